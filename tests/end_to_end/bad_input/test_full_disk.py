"""Tests of a run on a disk that fills up."""

import os
import re

import pytest
from disks import FullDisk, drafts
from refusals import SMALL

from darwinlm import cli

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("room", [0, 1, 2, 5, 15, 20])
def test_full_disk_error_then_resume(room, checkpoint, text, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = ["prune", str(checkpoint("llama")), "--target", "0.8", "--out", str(out), "--data", str(text)]
    for setting in SMALL:
        command += ["--set", setting]
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", FullDisk(room).fsync)
        assert cli.exit_code(command) == 2
    told = capsys.readouterr().err.splitlines()
    faults = [line for line in told if line.startswith("error: ")]
    assert faults == told[-1:]
    assert re.fullmatch(
        f"error: the disk is full while writing {out}/.+; free some space and run the same command again", faults[0]
    )
    assert not drafts(tmp_path)
    assert cli.exit_code(command) == 0
    assert (out / "recipe.yaml").exists()
    assert (out / "model" / "model.safetensors").exists()
    assert not drafts(tmp_path)
