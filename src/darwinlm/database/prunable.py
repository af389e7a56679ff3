"""The source of pruned models in a step: a model and its database."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from darwinlm.database.store import Database
from darwinlm.models.cutting import copy_trained
from darwinlm.models.loading import DenseModel
from darwinlm.models.modeling_darwinlm import PrunedModel
from darwinlm.models.streaming import stream_layers
from darwinlm.plan import Plan, Space
from darwinlm.runtime.files import read_tensors


@dataclass(frozen=True)
class Prunable:
    """Model and database from which plans are cut."""

    dense: DenseModel
    """The original model or, in later steps, the result of the step before."""
    database: Database

    @property
    def space(self) -> Space:
        """Search space of the database."""
        return self.database.space(self.dense.sites)

    def cut(self, plan: Plan) -> PrunedModel:
        """Build the pruned model of `plan`, without training."""
        dense = self.dense
        return dense.cut(self.database.cuts(dense.sites, plan.levels, dense.layers_device))

    def trained(self, plan: Plan, file: Path) -> PrunedModel:
        """Build the pruned model of `plan` with the trained weights in `file`. Raises UserError."""
        model = copy_trained(self.cut(plan), read_tensors(file), self.dense.layers_device)
        return stream_layers(model, self.dense.device) if self.dense.offload else model


def stored_weights(model: PrunedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights as stored in files: in `dtype`, tied ones once."""
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state
