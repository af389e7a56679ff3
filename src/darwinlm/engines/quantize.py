"""K-quants of GGUF files by llama.cpp: with its program `llama-quantize`, or the library of llama-cpp-python.

The library runs in a separate process (`python -m darwinlm.engines.quantize SOURCE FILE KIND`), because llama.cpp
aborts on errors.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from darwinlm.engines.llama_cpp import threads
from darwinlm.errors import UserError

K_QUANTS = {"q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}
"""llama.cpp's number (`llama_ftype`) of each mixture; rows that are not multiples of 256 are stored in other types."""
PROGRAM = "llama-quantize"
_LIBRARY = "llama-cpp-python"


def quantizer() -> tuple[str, list[str]]:
    """Return the name of the quantizer on this system, and its command without arguments. Raises UserError if there is
    none."""
    program = shutil.which(PROGRAM)
    if program is not None:
        return PROGRAM, [program]
    try:
        version = importlib.metadata.version(_LIBRARY)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"K-quants need llama.cpp, but its program {PROGRAM} is not on the PATH and {_LIBRARY} is not "
            f"installed; install llama.cpp, or run: pip install {_LIBRARY}"
        ) from None
    return f"{_LIBRARY} {version}", [sys.executable, "-m", __name__]


def quantize(source: Path, file: Path, kind: str) -> None:
    """Quantize `source`, a GGUF file of f32, f16 or bf16, to `file` as `kind`, one of `K_QUANTS`. Raises UserError."""
    name, command = quantizer()
    done = subprocess.run(
        [*command, str(source), str(file), kind.upper(), str(threads())],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},
    )
    if done.returncode or not file.exists():
        output = (done.stderr + done.stdout).decode(errors="replace").strip().splitlines()
        faults = [line for line in output if "failed" in line or "error" in line] or output[-1:]
        reason = " ".join(faults[0].split()) if faults else f"exit code {done.returncode}"
        raise UserError(f"{name} failed to write {kind}: {reason}")


def _by_library(arguments: Sequence[str]) -> int:
    """Do the same as `llama-quantize`, with its arguments."""
    import ctypes

    import llama_cpp

    source, file, kind, count = arguments
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = K_QUANTS[kind.lower()], int(count)
    return int(llama_cpp.llama_model_quantize(source.encode(), file.encode(), ctypes.byref(parameters)))


if __name__ == "__main__":
    sys.exit(_by_library(sys.argv[1:]))
