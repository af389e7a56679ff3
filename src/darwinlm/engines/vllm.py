"""Speed of folders in vLLM, measured in a process of the Python interpreter that has it."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from darwinlm.engines import vllm_process
from darwinlm.errors import EngineError, UserError

_CPU_CACHE_GIB = "1"
"""GiB for each model's KV cache on the CPU; vLLM's default is four."""

_CAUSE = re.compile(r"\w*(?:Error|Exception): (?!.*root cause above).+")
"""Error line of vLLM's engine process, printed above the less specific error of our process."""

Request = tuple[int, int, int]
"""Batch size, prompt tokens and new tokens of a request."""


def engine_version(python: str | None = None) -> str | None:
    """Return name and version of vLLM for an interpreter (default: this one); None if it is not installed.

    Raises:
        UserError: if `python` is given and has no vLLM.
    """
    command = [python or sys.executable, vllm_process.__file__, "--version"]
    try:
        done = subprocess.run(command, capture_output=True, check=False, text=True)
    except OSError as error:
        raise UserError(f"--vllm {python} cannot be run: {error.strerror or error}") from None
    if done.returncode and python is not None:
        raise UserError(f"--vllm {python}: vLLM is not installed for this Python")
    return done.stdout.strip() if done.returncode == 0 else None


def time_requests(
    folders: Mapping[str, Path],
    requests: Sequence[Request],
    repeats: int,
    vocabulary: int,
    python: str | None = None,
) -> tuple[str, list[dict[str, tuple[float, float]]]]:
    """Return median seconds for prompts and new tokens of each request; models alternate, after an untimed pass.

    Args:
        folders: folders of models that vLLM can load, by name.
        requests: requests to time.
        repeats: number of timed passes.
        vocabulary: number of token ids from which prompts are drawn.
        python: interpreter with vLLM; by default this one.

    Returns:
        The name of the device, and by request and model the seconds for the prompts and for the new tokens.

    Raises:
        EngineError: if vLLM cannot load or run a model, with its own reason.
    """
    with tempfile.TemporaryDirectory(prefix="darwinlm-vllm-") as scratch:
        answer = Path(scratch) / "answer.json"
        question = {
            "folders": {name: str(folder) for name, folder in folders.items()},
            "requests": list(requests),
            "repeats": repeats,
            "vocabulary": vocabulary,
            "answer": str(answer),
        }
        quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [python or sys.executable, vllm_process.__file__],
            input=json.dumps(question).encode(),
            capture_output=True,
            check=False,
            env={"VLLM_CPU_KVCACHE_SPACE": _CPU_CACHE_GIB} | os.environ | quiet,
        )
        if not answer.exists():
            raise EngineError(_reason(done.stderr.decode(errors="replace")) or f"exit code {done.returncode}")
        device, times = json.loads(answer.read_bytes())
    return device, [{name: (prompt, new) for name, (prompt, new) in one.items()} for one in times]


def _reason(stderr: str) -> str:
    """Return the last exception that contains a reason, among warnings and tracebacks."""
    causes = _CAUSE.findall(stderr) or stderr.strip().splitlines()
    return causes[-1].strip()[:300] if causes else ""
