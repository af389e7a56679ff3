"""Tests of determinism: the same bytes in another process, and the PyTorch settings of `deterministic`."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import TARGET, files_of

from darwinlm.errors import UserError
from darwinlm.runtime.determinism import same_bits


@pytest.mark.slow
def test_run_same_in_process_with_more_threads(run, checkpoint, tmp_path):
    finished, settings = run
    command = ["prune", str(checkpoint("qwen3")), "--target", str(TARGET), "--out", str(tmp_path / "run"), "--quiet"]
    for key, value in {**settings, "deterministic": True}.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    # Such small tensors are not split over threads; see docs/troubleshooting.md for larger ones.
    done = subprocess.run(
        [sys.executable, "-m", "darwinlm", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "PYTHONHASHSEED": "1"},
    )
    assert done.returncode == 0, done.stderr
    found, expected = files_of(tmp_path / "run"), files_of(finished.path)
    assert found == expected
    assert {"database/index.json", "search/best_plan.json", "model/model.safetensors"} <= set(found)


def settings_of_torch():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.cudnn_sdp_enabled(),
    )


def test_same_bits_restores_torch_settings(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = settings_of_torch()
    assert before[0] is False
    with same_bits(False):
        assert settings_of_torch() == before
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with same_bits(True):
        assert settings_of_torch() == (True, "highest", False, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert settings_of_torch() == before


def fail_without_a_deterministic_algorithm():
    with same_bits(True):
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def test_same_bits_nondeterministic_operation_error():
    before = settings_of_torch()
    with pytest.raises(UserError, match=r"^deterministic=true: put_ has no deterministic implementation on this"):
        fail_without_a_deterministic_algorithm()
    with pytest.raises(RuntimeError, match="shapes"), same_bits(True):
        raise RuntimeError("shapes do not match")
    assert settings_of_torch() == before
