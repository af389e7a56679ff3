"""Tests without `fcntl` and `resource`, as on Windows: models can be loaded, and runs are refused."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# Import other packages first, because they may rely on the platform.
WINDOWS = """
import sys
from pathlib import Path

import psutil, torch, transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

sys.modules |= {"fcntl": None, "resource": None}
sys.platform = "win32"

import darwinlm
from darwinlm.run.lock import RunLock
from darwinlm.runtime.memory import available_memory

assert available_memory() > 0
assert darwinlm.load(sys.argv[1]).num_parameters() > 0
try:
    RunLock(Path(sys.argv[2])).take()
except darwinlm.UserError as error:
    print(error)
"""


def test_windows_loads_models_and_refuses_runs(run, tmp_path):
    finished, _ = run
    command = [sys.executable, "-c", WINDOWS, str(finished.model_path), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'run'}: DarwinLM cannot write runs on Windows; use Linux, macOS or WSL\n"
    assert not (tmp_path / "run").exists()
