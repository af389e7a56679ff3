"""Pruned models of any method as tensors and a few facts, so that one can be put aside and taken up again.

Two methods leave what the modelling file of this project does not have: biases on output projections (FLAP), and
matrices on the residual stream (SliceGPT). Both are parameters here, trained and counted as all others.
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
"""Of a layer: what the stream is multiplied by before the part's output is added to it."""


def facts_of(model: PrunedModel) -> dict[str, Any]:
    """What besides its tensors a model is made of, as plain data."""
    config = model.config
    return {
        "hidden_size": config.hidden_size,
        "tied": bool(config.tie_word_embeddings),
        "layers": {str(layer): sizes for layer, sizes in sizes_by_layer(config).items()},
    }


def tensors_of(model: PrunedModel) -> dict[str, Tensor]:
    """All its weights, shared with it; a tied head is not among them."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop(HEAD, None)
    return tensors


def revive(
    dense: DenseModel, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], *, trainable: bool = False
) -> PrunedModel:
    """The model with these facts and tensors, which are not copied; it was pruned from `dense`."""
    config = copy.deepcopy(dense.config)
    # It is the quotient of two sizes where a config leaves it out.
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
    """Give `module` a parameter that it does not have by itself: a bias, or one of a layer's `SHORTCUTS`."""
    setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    if name in SHORTCUTS:
        module.forward = MethodType(_forward_with_shortcuts, module)


def _forward_with_shortcuts(layer: Any, hidden_states: Tensor, **settings: Any) -> Tensor:
    """A decoder layer with norms before its parts, as transformers has it, but for the matrices on the stream."""
    attended = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **settings)[0]
    hidden_states = hidden_states @ layer.shortcut_attention + attended
    mapped = layer.mlp(layer.post_attention_layernorm(hidden_states))
    passed: Tensor = hidden_states @ layer.shortcut_mlp + mapped
    return passed
