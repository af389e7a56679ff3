"""Experts of a layer, one at a time: routing, and the output of each expert.

Transformers' modules compute a batch of tokens by all experts. Pruning needs to know the output for a token if some
experts were removed.

Dimension letters: N tokens, E experts, D hidden size, I channels of an expert.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from darwinlm.models.families import LAYERS, family_of
from darwinlm.models.modeling_darwinlm import PrunedConfig, PrunedModel
from darwinlm.models.sites import Site

PRODUCTS = 2**27
"""Maximum number of elements for the products of all experts' outputs: sampled tokens * E * E."""
OUTPUTS = 2**26
"""Maximum number of elements for the outputs of all experts: tokens * E * D."""


def renormalizes(config: PrunedConfig) -> bool:
    """Whether the gates of a token sum to 1: a softmax over its routed experts only, instead of over all experts."""
    return bool(getattr(config, "norm_topk_prob", True))


def choose_experts(logits_NE: Tensor, routed: int, *, renormalized: bool) -> tuple[Tensor, Tensor]:
    """Return the gates of the `routed` experts of each token, float32, and their indices, both (N, routed)."""
    top_NK, chosen_NK = logits_NE.float().softmax(-1).topk(routed, dim=-1)
    return top_NK / top_NK.sum(-1, keepdim=True) if renormalized else top_NK, chosen_NK


def hide_experts(model: PrunedModel, site: Site, kept: Sequence[int]) -> None:
    """Restrict the router of `site` to the experts `kept`, by a hook; all experts stay in the model."""
    family, renormalized = family_of(model.config), renormalizes(model.config)
    gone = [expert for expert in range(site.num_units) if expert not in kept]

    def hook(_: nn.Module, __: object, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits_NE = output[0].index_fill(-1, torch.tensor(gone, device=output[0].device), -torch.inf)
        gates_NK, chosen_NK = choose_experts(logits_NE, site.routed, renormalized=renormalized)
        return logits_NE, gates_NK.to(output[1].dtype), chosen_NK

    block = model.get_submodule(f"{LAYERS}{site.layer}.{family.mlp}")
    block.get_submodule(family.router).register_forward_hook(hook)


def _gated(activation: nn.Module, gate_up_NJ: Tensor) -> Tensor:
    gate_NI, up_NI = gate_up_NJ.chunk(2, dim=-1)
    channels_NI: Tensor = activation(gate_NI) * up_NI
    return channels_NI


def _clamped(config: PrunedConfig) -> Callable[[Tensor], Tensor]:
    """Return the SwiGLU function of gpt-oss."""
    alpha, limit = config.swiglu_alpha, config.swiglu_limit

    def glu(gate_up_NJ: Tensor) -> Tensor:
        gate_NI, up_NI = gate_up_NJ[:, ::2].clamp(max=limit), gate_up_NJ[:, 1::2].clamp(-limit, limit)
        return (up_NI + 1) * gate_NI * torch.sigmoid(alpha * gate_NI)

    return glu


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Mixture in which each token is routed to the `routed` experts of largest logits, weighted by a softmax.

    `output = sum_e gate_e * down_e glu(gate_up_e x)`, where `glu` is usually `act(gate_proj_e x) * up_proj_e x`.
    """

    router_ED: Tensor
    gate_up_EJD: Tensor
    """Input projections, J = 2 * I: for each expert, usually the rows of its `gate_proj` before those of its `up_proj`.
    """
    down_EDI: Tensor
    glu: Callable[[Tensor], Tensor]
    """Maps the input projections (N, J) to the input of an expert's output projection (N, I)."""
    routed: int
    renormalized: bool
    transposed: bool
    """Whether the model stores its matrices transposed."""
    router_bias_E: Tensor | None = None
    gate_up_bias_EJ: Tensor | None = None
    down_bias_ED: Tensor | None = None

    @classmethod
    def of(cls, config: PrunedConfig, site: Site, weights: Mapping[str, Tensor]) -> "Experts":
        """Create the experts of `site`; the tensors in `weights`, named as in the model, are shared."""
        family, prefix = family_of(config), f"{LAYERS}{site.layer}."
        block = f"{prefix}{family.mlp}."
        gate_up, down = weights[f"{block}{family.experts}.gate_up_proj"], weights[site.output_tensor]
        return cls(
            router_ED=weights[f"{block}{family.router}.weight"],
            gate_up_EJD=gate_up.mT if family.experts_transposed else gate_up,
            down_EDI=down.mT if family.experts_transposed else down,
            glu=_clamped(config) if family.experts_transposed else functools.partial(_gated, ACT2FN[config.hidden_act]),
            routed=site.routed,
            renormalized=renormalizes(config),
            transposed=family.experts_transposed,
            router_bias_E=weights.get(f"{block}{family.router}.bias"),
            gate_up_bias_EJ=weights.get(f"{block}{family.experts}.gate_up_proj_bias"),
            down_bias_ED=weights.get(f"{block}{family.experts}.down_proj_bias"),
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> "Experts":
        """Return a copy on another device or in another dtype."""
        return self._each(lambda tensor: tensor.to(device, dtype))

    def some(self, kept: Sequence[int]) -> "Experts":
        """Return only the experts `kept`."""
        rows = torch.tensor(kept, device=self.router_ED.device)
        return self._each(lambda tensor: tensor[rows])

    def narrowed(self, channels_EK: Tensor) -> "Experts":
        """Return the same experts with only these channels."""
        width = self.down_EDI.shape[2]
        rows_EJ = (
            torch.stack([2 * channels_EK, 2 * channels_EK + 1], dim=2).flatten(1)
            if self.transposed
            else torch.cat([channels_EK, channels_EK + width], dim=1)
        )
        bias_EJ = self.gate_up_bias_EJ
        return replace(
            self,
            gate_up_EJD=self.gate_up_EJD.take_along_dim(rows_EJ[:, :, None], 1),
            gate_up_bias_EJ=None if bias_EJ is None else bias_EJ.take_along_dim(rows_EJ, 1),
            down_EDI=self.down_EDI.take_along_dim(channels_EK[:, None], 2),
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Experts":
        tensors: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    def as_stored(self, down_EDI: Tensor) -> Tensor:
        """Return output projections as the model stores them: (E, I, D) if transposed."""
        return down_EDI.mT if self.transposed else down_EDI

    @property
    def count(self) -> int:
        """Number of experts."""
        return len(self.router_ED)

    def logits(self, x_ND: Tensor) -> Tensor:
        """Return the router logits, (N, E), float32."""
        return nn.functional.linear(x_ND, self.router_ED, self.router_bias_E).float()

    def gates(self, logits_NE: Tensor) -> Tensor:
        """Return the gate of each expert, (N, E); 0 for experts that a token is not routed to.

        An expert with logits of -inf is treated as removed.
        """
        top_NK, chosen_NK = choose_experts(logits_NE, self.routed, renormalized=self.renormalized)
        return torch.zeros_like(logits_NE).scatter_(-1, chosen_NK, top_NK)

    def channels(self, expert: int, x_ND: Tensor) -> Tensor:
        """Return the input of an expert's output projection, (N, I)."""
        bias_J = None if self.gate_up_bias_EJ is None else self.gate_up_bias_EJ[expert]
        return self.glu(nn.functional.linear(x_ND, self.gate_up_EJD[expert], bias_J))

    def output(self, expert: int, x_ND: Tensor) -> Tensor:
        """Return an expert's output for tokens, (N, D), before multiplication by its gate."""
        bias_D = None if self.down_bias_ED is None else self.down_bias_ED[expert]
        return nn.functional.linear(self.channels(expert, x_ND), self.down_EDI[expert], bias_D)

    def sum_of(self, x_ND: Tensor, gates_NE: Tensor) -> Tensor:
        """Return the summed output of all experts, (N, D)."""
        total_ND = torch.zeros(len(x_ND), self.down_EDI.shape[1], dtype=x_ND.dtype, device=x_ND.device)
        for expert in range(self.count):
            rows = gates_NE[:, expert].nonzero()[:, 0]
            if len(rows):
                gated = self.output(expert, x_ND[rows]) * gates_NE[rows, expert, None].to(x_ND.dtype)
                total_ND.index_add_(0, rows, gated)
        return total_ND
