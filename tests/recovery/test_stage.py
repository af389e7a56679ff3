"""Tests of the recovery stage: where the model is placed."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from darwinlm.config.loading import load_recipe
from darwinlm.errors import UserError
from darwinlm.recovery import stage
from darwinlm.recovery.sharding import is_sharded
from darwinlm.runtime import dist


def test_sharding_ignored_with_one_process(monkeypatch):
    """Model and teacher are on the device, whatever the setting."""
    recipe = load_recipe("quick", {"model": "m", "target": 0.5, "recovery.sharding": "fsdp", "recovery.tokens": 64})
    places = []

    def start(here, corpus, plan, refit_tokens, place, folder):
        places.append(place)
        raise UserError("placed")

    monkeypatch.setattr(stage, "_starting_model", start)
    job = SimpleNamespace(
        recipe=recipe, corpus=None, source=SimpleNamespace(dense=SimpleNamespace(device=torch.device("meta"))),
        run=SimpleNamespace(path=Path("run")), step=SimpleNamespace(number=1, last=True),
    )  # fmt: skip
    for processes in (1, 2):
        monkeypatch.setattr(dist, "world_size", lambda processes=processes: processes)
        assert is_sharded(recipe.recovery) == (processes > 1)
        with pytest.raises(UserError, match="placed"):
            stage._recover(job, None, Path("recovery"))
    assert [place.type for place in places] == ["meta", "cpu"]
