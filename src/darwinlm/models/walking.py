"""Computation of a model outside its layers: the first layer's input, each layer's arguments, and what follows the
last."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from darwinlm.models.modeling_darwinlm import PrunedModel

CACHE = "cache" if "cache" in signature(create_causal_mask).parameters else "past_key_values"
"""Name of the KV cache argument in this version of transformers; it changed in 5.24."""
Given = Mapping[str, Any]
"""Keyword arguments of a layer: masks, positions, rotary embeddings, depending on its family."""


def enter(model: PrunedModel, ids_BT: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, list[Given]]:
    """Run the part of a model before and around its layers, which may be on the meta device.

    Args:
        model: only modules outside its layers and head are used.
        ids_BT: token ids, on the same device as these.
        dtype: compute dtype of the layers; by default the model's.

    Returns:
        The stream that the first layer reads, (B, T, D), and the keyword arguments of each layer.
    """
    first, given = list[Tensor](), list[Given]()

    def pass_on(hidden_states: Tensor, **arguments: Any) -> Tensor:
        first.append(hidden_states)
        given.append(arguments)
        return hidden_states

    embeddings_BTD = model.get_input_embeddings()(ids_BT)
    with _layers_replaced(model, pass_on):
        model.base_model(inputs_embeds=embeddings_BTD if dtype is None else embeddings_BTD.to(dtype), use_cache=False)
    return first[0], given


def leave(model: PrunedModel, states_BTD: Tensor) -> Tensor:
    """Compute the last hidden states from the output `states_BTD` of the last layer; the layers are not used."""
    states_BTD = states_BTD.to(model.dtype)
    with _layers_replaced(model, lambda *_, **__: states_BTD):
        last_BTD: Tensor = model.base_model(inputs_embeds=states_BTD, use_cache=False).last_hidden_state
    return last_BTD


@contextmanager
def _layers_replaced(model: PrunedModel, forward: Callable[..., Tensor]) -> Iterator[None]:
    layers = model.base_model.layers
    own = [vars(layer).get("forward") for layer in layers]  # Set by streamed layers.
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            del layer.forward
            if before is not None:
                layer.forward = before


def carried(given: list[Given], device: torch.device) -> list[Given]:
    """Move the layers' arguments to `device`; tensors shared by several layers are moved once."""
    known: dict[int, Tensor] = {}

    def carry(one: Any) -> Any:
        if isinstance(one, Tensor):
            if id(one) not in known:
                known[id(one)] = one.to(device)
            return known[id(one)]
        if isinstance(one, Mapping):
            return {name: carry(value) for name, value in one.items()}
        return tuple(carry(value) for value in one) if isinstance(one, list | tuple) else one

    return [carry(one) for one in given]
