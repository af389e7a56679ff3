"""Save and restore pruned models of any method as tensors and a few facts.

Two methods need parameters that this project's modeling file does not have: biases on output projections (FLAP), and
matrices on the residual stream (SliceGPT). Both are trained and counted like all others.
"""

import copy
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from darwinlm.models.cutting import empty_model, fill, sizes_by_layer
from darwinlm.models.families import HEAD
from darwinlm.models.loading import DenseModel
from darwinlm.models.modeling_darwinlm import PrunedModel

SHORTCUTS = ("shortcut_attention", "shortcut_mlp")
"""Matrices of a layer that multiply the residual stream before a part's output is added to it."""


def facts_of(model: PrunedModel) -> dict[str, Any]:
    """Return what defines `model` besides its tensors, as plain data."""
    config = model.config
    return {
        "hidden_size": config.hidden_size,
        "tied": bool(config.tie_word_embeddings),
        "layers": {str(layer): sizes for layer, sizes in sizes_by_layer(config).items()},
    }


def tensors_of(model: PrunedModel) -> dict[str, Tensor]:
    """Return all weights of `model`, shared with it, without a tied head."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop(HEAD, None)
    return tensors


def revive(
    dense: DenseModel, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], *, trainable: bool = False
) -> PrunedModel:
    """Rebuild a model pruned from `dense` from its facts and tensors, which are not copied."""
    config = copy.deepcopy(dense.config)
    # Without it in the config, it would be the quotient of two sizes.
    config.head_dim = dense.config.head_dim
    config.hidden_size, config.tie_word_embeddings = facts["hidden_size"], facts["tied"]
    config.per_layer_config = {int(layer): dict(sizes) for layer, sizes in facts["layers"].items()} or None
    model = empty_model(config)
    known = model.state_dict().keys()
    for name in tensors.keys() - known:
        parent, _, last = name.rpartition(".")
        add_parameter(model.get_submodule(parent), last, torch.empty_like(tensors[name], device="meta"))
    return fill(model, tensors, trainable=trainable)


def add_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Add a parameter that `module` does not have by itself: a bias, or one of a layer's `SHORTCUTS`."""
    setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    if name in SHORTCUTS:
        module.forward = MethodType(_forward_with_shortcuts, module)


def _forward_with_shortcuts(layer: Any, hidden_states: Tensor, **settings: Any) -> Tensor:
    """Compute a pre-norm decoder layer as transformers does, with the matrices on the residual stream."""
    attended = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **settings)[0]
    hidden_states = hidden_states @ layer.shortcut_attention + attended
    mapped = layer.mlp(layer.post_attention_layernorm(hidden_states))
    passed: Tensor = hidden_states @ layer.shortcut_mlp + mapped
    return passed
