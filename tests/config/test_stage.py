"""Tests of stages and their names."""

import pytest

from darwinlm.config.stage import Stage


@pytest.mark.parametrize(
    ("stage", "later", "follows"),
    [
        ("corpus", "0.6: search", True),
        ("0.8: evaluation", "0.8: export", True),
        ("0.8: recovery", "0.6: recovery", False),
        ("0.8: search", "0.6: search", True),
        ("step 1: recovery", "step 2: database", True),
        ("step 1: export", "search", True),
        ("recovery", "evaluation", True),
    ],
)
def test_stage_affects_later_stages(stage, later, follows):
    stage, later = Stage.parse(stage), Stage.parse(later)
    assert stage.affects(later) == follows


@pytest.mark.parametrize("stage", [Stage("corpus"), Stage("search", step=2), Stage("gguf", size="params=0.5")])
def test_stage_parse_inverts_str(stage):
    assert Stage.parse(str(stage)) == stage
