"""Names of the exports, for recipes and the command line, which must not import torch."""

import importlib.metadata
from typing import Literal, get_args

Target = Literal["gguf", "vllm", "hf-native", "mlx", "onnx"]
"""Formats and engines that a pruned model can be exported to; the module of the same name in `export/` defines each."""
ONE_SIZE: tuple[Target, ...] = ("hf-native",)
"""Exports that need the same sizes in all layers."""
_NOTES: dict[Target, str] = {"gguf": "llama.cpp and tools built on it", "hf-native": "uniform layers"}


def listed() -> str:
    """Return all exports in words, for the help of the command."""
    names = [f"{name} ({_NOTES[name]})" if name in _NOTES else name for name in get_args(Target)]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def installed(package: str) -> str | None:
    """Return the name and version of a package, or None if it is not installed."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return None
