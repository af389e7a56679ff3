"""DarwinLM: structured pruning of language models by second-order information and evolutionary search.

Everything public is a name of this package; its modules may move between versions.
"""

import importlib
from typing import TYPE_CHECKING, Any

from darwinlm._version import __version__
from darwinlm.config.loading import load_recipe
from darwinlm.config.recipe import Recipe
from darwinlm.errors import UserError
from darwinlm.plan import Plan

if TYPE_CHECKING:
    from darwinlm.commands.doctor import examine
    from darwinlm.commands.evaluate import evaluate
    from darwinlm.commands.inspect import inspect
    from darwinlm.commands.plan import plan_run
    from darwinlm.commands.recover import recover_again
    from darwinlm.commands.speed import measure_speeds
    from darwinlm.data.corpus import load_corpus
    from darwinlm.database.store import Database
    from darwinlm.export.hf import export_hf
    from darwinlm.export.targets import export_model
    from darwinlm.metrics.kl import DenseReference
    from darwinlm.models.cutting import build_model
    from darwinlm.models.loading import load_dense
    from darwinlm.models.pruned import load
    from darwinlm.pipeline import prune
    from darwinlm.run.finished import Run

__all__ = [
    "Database",
    "DenseReference",
    "Plan",
    "Recipe",
    "Run",
    "UserError",
    "__version__",
    "build_model",
    "evaluate",
    "examine",
    "export_hf",
    "export_model",
    "inspect",
    "load",
    "load_corpus",
    "load_dense",
    "load_recipe",
    "measure_speeds",
    "plan_run",
    "prune",
    "recover_again",
]

_MODULES = {
    "commands.doctor": ("examine",),
    "commands.evaluate": ("evaluate",),
    "commands.inspect": ("inspect",),
    "commands.recover": ("recover_again",),
    "commands.speed": ("measure_speeds",),
    "data.corpus": ("load_corpus",),
    "database.store": ("Database",),
    "commands.plan": ("plan_run",),
    "export.hf": ("export_hf",),
    "export.targets": ("export_model",),
    "metrics.kl": ("DenseReference",),
    "models.cutting": ("build_model",),
    "models.loading": ("load_dense",),
    "models.pruned": ("load",),
    "pipeline": ("prune",),
    "run.finished": ("Run",),
}
_LAZY = {name: f"darwinlm.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import names that need torch on first access, so that `darwinlm --help` starts quickly."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'darwinlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
