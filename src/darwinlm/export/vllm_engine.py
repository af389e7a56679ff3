"""How fast folders are in vLLM, in a process of the Python that has it."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from darwinlm.errors import EngineError, UserError
from darwinlm.export import vllm_process

_CPU_CACHE_GIB = "1"
"""For each model's KV cache where there is no other device; vLLM would take four."""

_CAUSE = re.compile(r"\w*(?:Error|Exception): (?!.*root cause above).+")
"""The engine itself is a process of vLLM's, whose exception stands above; our process hears only that it failed."""

Request = tuple[int, int, int]
"""Requests at the same time, prompt tokens of each, new tokens of each."""


def engine_version(python: str | None = None) -> str | None:
    """Name and version of the vLLM of an interpreter, by default of this one; None if it has none.

    Raises:
        UserError: if `python` is given and has none.
    """
    command = [python or sys.executable, vllm_process.__file__, "--version"]
    try:
        done = subprocess.run(command, capture_output=True, check=False, text=True)
    except OSError as error:
        raise UserError(f"--vllm {python}: it cannot be run: {error.strerror or error}") from None
    if done.returncode and python is not None:
        raise UserError(f"--vllm {python}: this Python has no vLLM")
    return done.stdout.strip() if done.returncode == 0 else None


def time_requests(
    folders: Mapping[str, Path],
    requests: Sequence[Request],
    repeats: int,
    vocabulary: int,
    python: str | None = None,
) -> tuple[str, list[dict[str, tuple[float, float]]]]:
    """Median seconds for prompts and new tokens of each request; all models in turns, after one untimed pass.

    Args:
        folders: of models that vLLM loads, by name.
        requests: what is asked of each model.
        repeats: timed passes.
        vocabulary: prompts are drawn from so many tokens.
        python: the interpreter that has vLLM, by default this one.

    Returns:
        The device, in words, and by request and model the seconds for the prompts and for the new tokens.

    Raises:
        EngineError: with vLLM's own reason, if it cannot load or run a model.
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
    """The last exception that says why, among warnings and tracebacks."""
    causes = _CAUSE.findall(stderr) or stderr.strip().splitlines()
    return causes[-1].strip()[:300] if causes else ""
