"""Tests of the choice of the best evaluation."""

import math

import pytest

from darwinlm.recovery.trainer import best_of


@pytest.mark.parametrize(
    ("kls", "next_tokens", "taken"),
    [
        ([1.0, 0.9, 0.8], [3.0, 2.9, 2.8], 2),
        ([1.0, 0.5, 1.1], [3.0, 2.9, 1.0], 1),  # higher KL, although the next-token loss is lower
        ([1.0, 0.9, 0.8], [3.0, 2.9, 3.1], 1),
        ([1.0, 1.1, 1.2], [3.0, 2.0, 1.0], 0),
        ([1.0, 1.0, 1.0], [3.0, 3.0, 3.0], 0),
        ([math.nan, 1.0], [math.nan, 3.0], 0),
    ],
)
def test_best_of_improves_every_loss(kls, next_tokens, taken):
    evaluations = [
        {"step": step, "loss": kl + next_token, "kl": kl, "next_token": next_token}
        for step, (kl, next_token) in enumerate(zip(kls, next_tokens, strict=True))
    ]
    assert best_of(evaluations)["step"] == taken
    alone = [{name: one[name] for name in ("step", "next_token")} | {"loss": one["next_token"]} for one in evaluations]
    assert best_of(alone)["step"] == (0 if math.isnan(kls[0]) else next_tokens.index(min(next_tokens)))
