"""Masks learnt with the weights, in the manner of LLM-Shearing (arXiv 2310.06694), reimplemented for our units.

Every unit (a KV head with its query heads, an MLP channel) has a hard-concrete gate (Louizos et al., 2018, arXiv
1712.01312) on what it hands to the output projection. Gates and weights are trained together on the loss that all
methods recover with, plus `l1 (s - t) + l2 (s - t)^2`: `s` is the share of all prunable parameters that is expected to
go, `t` rises to the share that has to, and l1 and l2 are Lagrange multipliers, which climb. Then the units of the
highest gates stay, as many as the size allows, their gates become part of the output projection, and the model is cut.

As in LLM-Shearing: the distribution and its constants, the multipliers, weights trained beside the masks, mask rates
that are high. Otherwise: which sizes each layer gets is left to the masks (a given shape is the paper's choice, for the
speed of kernels), the hidden size and whole layers have no masks of their own, training distils, there are tens of
steps in place of 3,200, and the multipliers climb by plain gradient ascent.
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
"""The ends that the concrete distribution is stretched to, and its temperature."""
_BOUND = math.log(100)


@dataclass(frozen=True)
class MaskSettings:
    """How masks are learnt."""

    batch_size: int = 1
    """Blocks in a step: many steps matter more here than what each says."""
    start: float = 2.0
    """Of all gates' log-odds."""
    mask_rate: float = 0.3
    """Of the log-odds, which Adam moves by about so much in a step."""
    multipliers: tuple[float, float] = (0.0, 200.0)
    """At the start."""
    multiplier_rate: float = 20.0
    """Of their gradient ascent. Adam's steps, as large where little is missing as where much is, would overshoot: there
    are too few of them to come back."""
    warm_up: float = 0.7
    """The share of all steps in which the share that has to go rises from none."""

    def facts(self) -> dict[str, Any]:
        """What a row says of it."""
        return asdict(self)


class Gates(nn.Module):
    """A hard-concrete gate for every unit of all sites."""

    def __init__(self, sites: Sequence[Site], shapes: Mapping[str, Sequence[int]], start: float) -> None:
        super().__init__()
        self.sites = sites
        self.log_odds = nn.Parameter(torch.full((sum(site.num_units for site in sites),), start))
        costs = []
        self.whole = 0
        """Parameters that go with the last unit of a site alone, of all sites together."""
        for site in sites:
            one, two = (count_parameters(site, shapes, range(count)) for count in (1, 2))
            costs.append(torch.full((site.num_units,), float(two - one)))
            self.whole += 2 * one - two
        self.costs = torch.cat(costs)

    def sample(self, generator: torch.Generator) -> Tensor:
        """A gate for each unit, 0 to 1, both ends included."""
        noise = torch.rand(self.log_odds.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
        odds = noise.log() - (1 - noise).log() + self.log_odds
        return ((odds / TEMPERATURE).sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)

    def open(self) -> Tensor:
        """The probability of each gate not to be 0."""
        return (self.log_odds - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid()

    def settled(self) -> Tensor:
        """What each gate is once nothing is drawn any more."""
        return (self.log_odds.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)

    def expected_share(self) -> Tensor:
        """The share of the units' parameters that is expected to go."""
        return 1 - (self.open() * self.costs).sum() / self.costs.sum()

    def by_site(self, values: Tensor) -> dict[str, Tensor]:
        """Values of all units, site by site."""
        parts = values.split([site.num_units for site in self.sites])
        return {site.name: part for site, part in zip(self.sites, parts, strict=True)}

    def choose(self, room: float) -> Tensor:
        """Which units stay: the highest gates whose parameters fit into `room`, which are whole sites' extras too."""
        left, kept = room - self.whole, torch.zeros(len(self.costs), dtype=torch.bool)
        for unit in self.log_odds.detach().argsort(descending=True, stable=True).tolist():
            cost = float(self.costs[unit])
            if cost <= left:
                kept[unit] = True
                left -= cost
        return kept


def gated(model: PrunedModel, gates: Gates) -> tuple[dict[str, Tensor], list[Any]]:
    """Have `model` multiply what comes into output projections by gates.

    Returns:
        Where the gates of each site are to be put before a pass, and the hooks, to be removed at the end.
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
    """A model of at most so many parameters, from masks and weights trained on the text's first `blocks` blocks."""
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
    # What is to go, of what units have: the rest is there as long as any unit of its site is.
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
    """A model of at most so many parameters: the units of the highest gates, which become part of the weights."""
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
