"""Tests of files and folders that cannot be written: the old ones are kept."""

import errno
import resource

import pytest
import torch
from disks import FullDisk, drafts
from safetensors import SafetensorError
from safetensors.torch import save_file

from darwinlm.errors import UserError
from darwinlm.runtime import files
from darwinlm.runtime.files import naming_disk_faults, new_folder


def test_write_json_full_disk_keeps_old_file(tmp_path, monkeypatch):
    files.write_json(tmp_path / "a.json", {"a": 1})
    monkeypatch.setattr(files, "open", FullDisk(0).open, raising=False)
    with pytest.raises(UserError, match=r"the disk is full while writing .*a.json; free some space and run the same"):
        files.write_json(tmp_path / "a.json", {"a": 2})
    assert files.read_json(tmp_path / "a.json") == {"a": 1}
    assert not drafts(tmp_path)


def test_new_folder_full_disk_keeps_old_folder(tmp_path):
    for content in ("old", "new"):
        try:
            with new_folder(tmp_path / "model") as draft:
                (draft / "file").write_text(content)
                if content == "new":
                    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        except UserError as error:
            told = str(error)
    assert told.startswith(f"the disk is full while writing {tmp_path / 'model'}; free some space")
    assert (tmp_path / "model" / "file").read_text() == "old"
    assert not drafts(tmp_path)


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.EACCES, "Permission denied"), (errno.EROFS, "Read-only file system"), (errno.EIO, "Input/output error")],
)
def test_naming_disk_faults(number, reason, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} cannot be written: {reason}"), naming_disk_faults(tmp_path):
        raise OSError(number, "whatever")


def test_file_size_limit_keeps_old_file(tmp_path):
    files.write_bytes(tmp_path / "a", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=rf"^{tmp_path}/a cannot be written: File too large$"):
            files.write_bytes(tmp_path / "a", bytes(200_000))
        with (
            pytest.raises(UserError, match=rf"^{tmp_path}/model cannot be written: File too large$"),
            new_folder(tmp_path / "model") as draft,
        ):
            save_file({"a": torch.zeros(50_000)}, draft / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_naming_disk_faults_passes_other_errors(tmp_path):
    with pytest.raises(FileNotFoundError), naming_disk_faults(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "whatever")
