"""What a step cuts plans out of: a model and its database."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from darwinlm.adapters.cutting import copy_trained
from darwinlm.adapters.loading import DenseModel
from darwinlm.adapters.modeling_darwinlm import PrunedModel
from darwinlm.adapters.streaming import stream_layers
from darwinlm.database.store import Database
from darwinlm.files import read_tensors
from darwinlm.plan import Plan, Space
from darwinlm.recipe import Recipe


@dataclass(frozen=True)
class Material:
    """What a step cuts plans out of."""

    dense: DenseModel
    """The model that the run began with or, in later steps, what the step before has left."""
    database: Database

    @property
    def space(self) -> Space:
        """The search space."""
        return self.database.space(self.dense.sites)

    def cut(self, plan: Plan) -> PrunedModel:
        """`plan`, not trained."""
        dense = self.dense
        return dense.cut(self.database.cuts(dense.sites, plan.levels, dense.layers_device))

    def result(self, recipe: Recipe, plan: Plan, folder: Path) -> PrunedModel:
        """What a step leaves: `plan`, recovered (in `folder/recovery`) if that is wanted."""
        cut = self.cut(plan)
        if not recipe.recovery.wanted:
            return cut
        trained = read_tensors(folder / "recovery" / "weights.safetensors")
        model = copy_trained(cut, trained, self.dense.layers_device)
        return stream_layers(model, self.dense.device) if self.dense.offload else model


def stored_weights(model: PrunedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights as files hold them: in `dtype`, tied ones once."""
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state
