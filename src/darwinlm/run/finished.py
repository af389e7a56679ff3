"""A finished run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darwinlm.models.modeling_darwinlm import PrunedModel
from darwinlm.models.pruned import load


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    """Run directory."""
    metrics: Mapping[str, Any]
    """Content of `report/metrics.json`."""

    @property
    def model_path(self) -> Path:
        """Folder of the pruned model."""
        return self.path / "model"

    def load(self) -> PrunedModel:
        """Load the pruned model.

        Returns:
            The result of `darwinlm.load` for `model_path`.

        Raises:
            UserError: if its files are damaged or missing.
        """
        return load(self.model_path)
