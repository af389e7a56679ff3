"""Tests of recovery checkpoints that are damaged or cannot be read."""

import errno
import logging
import os
import re
import shutil

import pytest
import torch
from helpers import DAMAGES, flip_a_bit, halved
from recoveries import killed_at, train

from darwinlm.config.recipe import RecoveryRecipe
from darwinlm.errors import UserError
from darwinlm.recovery.checkpoints import load_best, newest_intact, save_best
from darwinlm.runtime import files

FILES = ("weights.safetensors", "optimizer.safetensors", "optimizer.json", "trainer_state.json", "checksums.json")
RESUMED = RecoveryRecipe(tokens=24 * 24, learning_rate=5e-3, batch_size=2, checkpoint_steps=3, evaluations=3)


@pytest.fixture(scope="module")
def interrupted(pruned, tmp_path_factory):
    """Result of a recovery, its model, and a folder of the same recovery, killed after two checkpoints."""
    dense, database = pruned("llama", "kv_group")
    whole, folder = halved(dense, database, trainable=True), tmp_path_factory.mktemp("interrupted")
    done = train(whole, dense, RESUMED, folder / "whole")
    with killed_at(8, pytest.MonkeyPatch()):
        train(halved(dense, database, trainable=True), dense, RESUMED, folder / "broken")
    assert {path.name for path in (folder / "broken").iterdir()} == {"best", "checkpoint-3", "checkpoint-6"}
    assert {file.name for file in (folder / "broken" / "checkpoint-6").iterdir()} == set(FILES)
    return done, whole, folder / "broken"


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FILES)
def test_damaged_checkpoint_falls_back_to_earlier(name, damage, interrupted, tmp_path, caplog):
    run = shutil.copytree(interrupted[2], tmp_path / "run")
    damage(run / "checkpoint-6" / name)
    assert newest_intact(run) == run / "checkpoint-3"
    assert not (run / "checkpoint-6").exists()
    (said,) = caplog.messages
    assert re.fullmatch(rf"{run}/checkpoint-6/{name} is (damaged.*|missing): resuming from checkpoint-3", said)


@pytest.mark.parametrize(
    ("damaged", "says"),
    [((6,), ["resuming from checkpoint-3"]), ((3, 6), ["resuming from .+", "restarting the training"])],
)
def test_recovery_resumes_past_damaged_checkpoints(damaged, says, interrupted, pruned, tmp_path, caplog):
    dense, database = pruned("llama", "kv_group")
    done, whole, broken = interrupted
    run = shutil.copytree(broken, tmp_path / "run")
    for step in damaged:
        flip_a_bit(run / f"checkpoint-{step}" / "weights.safetensors")
    resumed = halved(dense, database, trainable=True)
    assert train(resumed, dense, RESUMED, run) == done
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), resumed.parameters(), strict=True))
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert all(re.search(f"weights.safetensors is damaged: {end}", line) for line, end in zip(said, says, strict=True))
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-12"}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["weights.safetensors", "checksums.json"])
def test_damaged_best_weights_refused(name, damage, pruned, tmp_path):
    dense, database = pruned("llama", "kv_group")
    model = halved(dense, database, trainable=True)
    save_best(tmp_path, model)
    load_best(tmp_path, model)
    damage(tmp_path / "best" / name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    message = rf"^{tmp_path}/best/{name} is (damaged.*|missing); delete {tmp_path} and run the same command again to"
    with pytest.raises(UserError, match=message):
        load_best(tmp_path, model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_unreadable_checkpoint_kept(interrupted, tmp_path, monkeypatch):
    shutil.copytree(interrupted[2], tmp_path / "run")

    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, "file_checksum", fail)
    message = r"optimizer\.json cannot be read \(Input/output error\); make it readable, or delete .+/checkpoint-6$"
    with pytest.raises(UserError, match=message):
        newest_intact(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint-6").exists()
