"""Tests of checkpoints with missing files."""

import shutil

import pytest
import torch

from darwinlm.errors import UserError
from darwinlm.models.checkpoint import Checkpoint


def test_checkpoint_download_error(monkeypatch):
    def fail(*arguments, **named):
        raise ConnectionError("the Hub\nis away")

    monkeypatch.setattr("darwinlm.models.checkpoint.snapshot_download", fail)
    with pytest.raises(UserError, match=r"^model 'owner/it': its weights cannot be downloaded: the Hub is away$"):
        Checkpoint("owner/it")


def test_checkpoint_file_missing_while_reading(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    found = Checkpoint(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model.safetensors cannot be read \(No such file.*; download the whole"):
        found.read(["lm_head.weight"], torch.device("cpu"))
