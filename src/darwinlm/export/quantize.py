"""K-quants of a GGUF file, made by llama.cpp itself: by its program `llama-quantize`, or by llama-cpp-python's library.

The library runs in a process of its own (`python -m darwinlm.export.quantize SOURCE FILE KIND`): llama.cpp ends the
process over what it cannot do.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from darwinlm.errors import UserError
from darwinlm.export.llama_cpp import threads

K_QUANTS = {"q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}
"""llama.cpp's number (`llama_ftype`) of each mixture; rows that are no multiple of 256 it stores in other types."""
PROGRAM = "llama-quantize"
_LIBRARY = "llama-cpp-python"


def quantizer() -> tuple[str, list[str]]:
    """What makes K-quants here: its name, and the command without its arguments. Raises UserError if nothing does."""
    program = shutil.which(PROGRAM)
    if program is not None:
        return PROGRAM, [program]
    try:
        version = importlib.metadata.version(_LIBRARY)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"K-quants are made by llama.cpp, and neither its program {PROGRAM} is on the PATH nor is {_LIBRARY} "
            f"installed; install llama.cpp, or run: pip install {_LIBRARY}"
        ) from None
    return f"{_LIBRARY} {version}", [sys.executable, "-m", __name__]


def quantize(source: Path, file: Path, kind: str) -> None:
    """Write `source`, a GGUF file of f32, f16 or bf16, to `file` as `kind`, one of `K_QUANTS`. Raises UserError."""
    name, command = quantizer()
    done = subprocess.run(
        [*command, str(source), str(file), kind.upper(), str(threads())],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},
    )
    if done.returncode or not file.exists():
        told = (done.stderr + done.stdout).decode(errors="replace").strip().splitlines()
        faults = [line for line in told if "failed" in line or "error" in line] or told[-1:]
        reason = " ".join(faults[0].split()) if faults else f"exit code {done.returncode}"
        raise UserError(f"{name} did not make {kind}: {reason}")


def _by_library(arguments: Sequence[str]) -> int:
    """What `llama-quantize` does, with its arguments."""
    import ctypes

    import llama_cpp

    source, file, kind, count = arguments
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = K_QUANTS[kind.lower()], int(count)
    return int(llama_cpp.llama_model_quantize(source.encode(), file.encode(), ctypes.byref(parameters)))


if __name__ == "__main__":
    sys.exit(_by_library(sys.argv[1:]))
