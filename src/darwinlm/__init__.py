"""DarwinLM: structured pruning of language models by second-order information and evolutionary search."""

from typing import TYPE_CHECKING, Any

from darwinlm.errors import UserError
from darwinlm.recipe import Recipe
from darwinlm.settings import load_recipe

if TYPE_CHECKING:
    from darwinlm.export.hf import load
    from darwinlm.pipeline import Run, prune

__version__ = "0.2.0"
__all__ = ["Recipe", "Run", "UserError", "__version__", "load", "load_recipe", "prune"]

_LAZY = {"load": "darwinlm.export.hf", "prune": "darwinlm.pipeline", "Run": "darwinlm.pipeline"}


def __getattr__(name: str) -> Any:
    """Import names that need torch on first access, so that `darwinlm --help` starts quickly."""
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'darwinlm' has no attribute {name!r}")
