"""Learn masks together with the weights as in LLM-Shearing (arXiv 2310.06694), reimplemented for our units.

Every unit (a KV head with its query heads, an MLP channel) has a hard-concrete gate (Louizos et al., 2018, arXiv
1712.01312) on its input to the output projection. Gates and weights are trained together with the recovery loss of all
methods plus `l1 (s - t) + l2 (s - t)^2`: `s` is the expected share of all prunable parameters that is removed, `t`
rises to the target share, and l1 and l2 are Lagrange multipliers, which are maximized. Then the units with the highest
gates are kept, as many as the size allows, their gates are merged into the output projection, and the model is cut.

As in LLM-Shearing: the distribution and its constants, the multipliers, weights trained together with the masks, high
learning rates of masks. Different: masks choose the sizes of each layer (the paper gives a shape, for the speed of
kernels), the hidden size and whole layers have no masks, training uses distillation, there are tens of steps instead of
3,200, and multipliers are trained by plain gradient ascent.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from curve_training import DenseStates, Settings, kl_loss
from even_widths import columns_of
from forms import tensors_of
from torch import Tensor, nn

from darwinlm.models.cutting import Cut, build_model, count_parameters
from darwinlm.models.loading import DenseModel
from darwinlm.models.modeling_darwinlm import PrunedModel
from darwinlm.models.sites import Site
from darwinlm.optim.learning_rate import parameter_groups

LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3
"""Bounds that the concrete distribution is stretched to, and its temperature."""
_BOUND = math.log(100)


@dataclass(frozen=True)
class MaskSettings:
    """Settings of mask training."""

    batch_size: int = 1
    """Blocks per step; many small steps work better here than few large ones."""
    start: float = 2.0
    """Initial log-odds of all gates."""
    mask_rate: float = 0.3
    """Learning rate of the log-odds; Adam moves them by about this much per step."""
    multipliers: tuple[float, float] = (0.0, 200.0)
    """Initial multipliers."""
    multiplier_rate: float = 20.0
    """Learning rate of their gradient ascent. Adam's steps do not shrink near the target and would overshoot, with too
    few steps to correct it."""
    warm_up: float = 0.7
    """Share of all steps in which the target share rises from 0."""

    def facts(self) -> dict[str, Any]:
        """Return the settings for the row."""
        return asdict(self)


class Gates(nn.Module):
    """Hard-concrete gates, one for every unit of all sites."""

    def __init__(self, sites: Sequence[Site], shapes: Mapping[str, Sequence[int]], start: float) -> None:
        super().__init__()
        self.sites = sites
        self.log_odds = nn.Parameter(torch.full((sum(site.num_units for site in sites),), start))
        costs = []
        self.whole = 0
        """Parameters removed only with the last unit of a site, summed over all sites."""
        for site in sites:
            one, two = (count_parameters(site, shapes, range(count)) for count in (1, 2))
            costs.append(torch.full((site.num_units,), float(two - one)))
            self.whole += 2 * one - two
        self.costs = torch.cat(costs)

    def sample(self, generator: torch.Generator) -> Tensor:
        """Sample a gate for each unit, from 0 to 1 inclusive."""
        noise = torch.rand(self.log_odds.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
        odds = noise.log() - (1 - noise).log() + self.log_odds
        return ((odds / TEMPERATURE).sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)

    def open(self) -> Tensor:
        """Return the probability of each gate to be above 0."""
        return (self.log_odds - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid()

    def settled(self) -> Tensor:
        """Return the gates without sampling, as used after training."""
        return (self.log_odds.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)

    def expected_share(self) -> Tensor:
        """Return the expected share of the units' parameters that is removed."""
        return 1 - (self.open() * self.costs).sum() / self.costs.sum()

    def by_site(self, values: Tensor) -> dict[str, Tensor]:
        """Split values of all units by site."""
        parts = values.split([site.num_units for site in self.sites])
        return {site.name: part for site, part in zip(self.sites, parts, strict=True)}

    def choose(self, room: float) -> Tensor:
        """Return a mask of the kept units: the highest gates whose parameters fit into `room`, with `whole`."""
        left, kept = room - self.whole, torch.zeros(len(self.costs), dtype=torch.bool)
        for unit in self.log_odds.detach().argsort(descending=True, stable=True).tolist():
            cost = float(self.costs[unit])
            if cost <= left:
                kept[unit] = True
                left -= cost
        return kept


def gated(model: PrunedModel, gates: Gates) -> tuple[dict[str, Tensor], list[Any]]:
    """Multiply the inputs of output projections in `model` by gates.

    Returns:
        A dictionary for the gates of each site, to be filled before a pass, and the hooks, to be removed at the end.
    """
    current: dict[str, Tensor] = {}

    def multiply(site: Site) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            gate_I = current[site.name].repeat_interleave(site.columns_per_unit)
            return (inputs[0] * gate_I.to(inputs[0].dtype), *inputs[1:])

        return hook

    return current, [model.get_submodule(site.output).register_forward_pre_hook(multiply(site)) for site in gates.sites]


def learn(
    dense: DenseModel,
    states: DenseStates,
    parameters: int,
    blocks: int,
    training: Settings,
    settings: MaskSettings,
    seed: int,
    report: Callable[[str], None] = print,
) -> PrunedModel:
    """Train masks and weights on the first `blocks` blocks; return a model of at most `parameters` parameters."""
    model = build_model(dense.config, dense.sites, dense.weights, {}, trainable=True)
    gates = Gates(dense.sites, dense.shapes, settings.start)
    current, hooks = gated(model, gates)
    batch = Settings(batch_size=settings.batch_size, rate_factor=training.rate_factor)
    weights = torch.optim.AdamW(
        parameter_groups(list(model.parameters()), batch.rate(states.blocks_BT.shape[1])), weight_decay=0.0, fused=True
    )
    masks = torch.optim.Adam(gates.parameters(), lr=settings.mask_rate)
    multipliers = nn.Parameter(torch.tensor(settings.multipliers))
    climb = torch.optim.SGD([multipliers], lr=settings.multiplier_rate, maximize=True)
    generator = torch.Generator().manual_seed(seed)
    # Share of the units' parameters to remove; all other parameters are kept as long as their site has a unit.
    target = (dense.parameters - parameters) / float(gates.costs.sum())
    steps, count = blocks // settings.batch_size, len(states.blocks_BT)
    for step in range(steps):
        current.update(gates.by_site(gates.sample(generator)))
        first = step * settings.batch_size
        kl = kl_loss(model, states, [number % count for number in range(first, first + settings.batch_size)])
        wanted = target * min(1.0, (step + 1) / max(1.0, settings.warm_up * steps))
        gap = gates.expected_share() - wanted
        (kl + multipliers[0] * gap + multipliers[1] * gap.square()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (weights, masks, climb):
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            gates.log_odds.clamp_(-_BOUND, _BOUND)
        if (step + 1) % max(1, steps // 8) == 0:
            report(
                f"  masks, step {step + 1} of {steps}: KL {kl.item():.3f}, expected to go "
                f"{gates.expected_share().item():.3f} of {wanted:.3f}, multipliers {multipliers.tolist()}"
            )
    for hook in hooks:
        hook.remove()
    return cut(dense, tensors_of(model), gates, parameters)


@torch.no_grad()
def cut(dense: DenseModel, weights: Mapping[str, Tensor], gates: Gates, parameters: int) -> PrunedModel:
    """Cut the model to at most `parameters` parameters: the highest gates are kept and merged into the weights."""
    kept = gates.by_site(gates.choose(parameters - dense.fixed_parameters))
    settled = gates.by_site(gates.settled().detach())
    cuts = {}
    for site in dense.sites:
        units = kept[site.name].nonzero().flatten()
        if len(units) == 0:
            cuts[site.name] = Cut((), None)
            continue
        gate_K = settled[site.name][units].repeat_interleave(site.columns_per_unit)
        cuts[site.name] = Cut(tuple(units.tolist()), weights[site.output_tensor][:, columns_of(site, units)] * gate_K)
    return build_model(dense.config, dense.sites, dict(weights), cuts)
