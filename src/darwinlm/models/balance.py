"""Load-balancing loss of experts, as each family defines it (Switch Transformer, arXiv 2101.03961, eq. 4-6).

Transformers' models add it to the next-token loss, computed from the logits of all routers at once, so that all layers
must have the same number of experts. Here layers with the same number of experts are grouped, and each group is
weighted by its number of layers: with a single group, this is transformers' loss.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from darwinlm.models.families import causal_lm, family_of
from darwinlm.models.modeling_darwinlm import PrunedConfig, PrunedModel


def asked_balance(config: Any) -> float:
    """Return the coefficient of this loss in a transformers config; 0 if the config does not enable it."""
    asked = getattr(config, "output_router_logits", False)
    return float(getattr(config, "router_aux_loss_coef", None) or 0.0) if asked else 0.0


@contextmanager
def watched_routers(model: PrunedModel, *, wanted: bool = True) -> Iterator[list[Tensor]]:
    """Collect the router logits, (tokens, experts) per layer, that `model` computes in this context; empty unless
    `wanted`."""
    family, seen = family_of(model.config), list[Tensor]()

    def hook(_: nn.Module, __: object, output: tuple[Tensor, ...]) -> None:
        seen.append(output[0])

    hooks = []
    for layer in model.model.layers if wanted else ():
        known = dict(layer.named_modules())
        if family.experts and f"{family.mlp}.{family.experts}" in known:
            hooks.append(known[f"{family.mlp}.{family.router}"].register_forward_hook(hook))
    try:
        yield seen
    finally:
        for one in hooks:
            one.remove()


def balance_loss(config: PrunedConfig, logits: Sequence[Tensor]) -> Tensor:
    """Compute the loss from the logits of `watched_routers` (at least one); at least 1, before its coefficient."""
    family = causal_lm(config).made_of
    loss_of: Any = vars(sys.modules[family.__module__])["load_balancing_loss_func"]
    groups: dict[int, list[Tensor]] = {}
    for one_NE in logits:
        groups.setdefault(one_NE.shape[-1], []).append(one_NE)
    losses = [len(some) * loss_of(tuple(some), experts, config.num_experts_per_tok) for experts, some in groups.items()]
    return torch.stack(losses).sum() / len(logits)
