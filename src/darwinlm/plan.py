"""Plans (a level for every site) and the search space, as plain data."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

from darwinlm.errors import UserError

SiteKind = Literal["attention", "mlp"]
FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteLevels:
    """Levels of one site. Every tuple has one entry per level: level 0 is dense, the last level has no units, unless
    the site must be kept."""

    name: str
    """Name of the site, such as `layers.3.mlp`."""
    layer: int
    kind: SiteKind
    units: tuple[int, ...]
    """Units kept at each level."""
    parameters: tuple[int, ...]
    """Parameters of the site at each level, including its norm."""
    kv_elements: tuple[int, ...]
    """KV-cache elements per token at each level."""
    errors: tuple[float, ...]
    """Squared output error per calibration token, relative to the residual stream's median squared norm after the site.
    """
    experts: bool = False
    """Whether the units of this MLP are experts instead of channels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteBefore:
    """Site of the original model, before any pruning; it may no longer exist."""

    name: str
    layer: int
    kind: SiteKind
    units: int
    parameters: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """All sites with their levels, and the parameters that no plan removes (embeddings, head, final norm)."""

    sites: tuple[SiteLevels, ...]
    fixed_parameters: int
    reference_parameters: int | None = None
    """Parameters of the model that sizes are fractions of, if it is not the model at level 0."""
    before: tuple[SiteBefore, ...] = ()
    """Sites of the original model; empty unless this model was already pruned."""

    def parameters(self, plan: Sequence[int]) -> int:
        """Return the parameters of the whole model under `plan`; tied embeddings count once."""
        return self.fixed_parameters + sum(site.parameters[level] for site, level in zip(self.sites, plan, strict=True))

    def kv_elements(self, plan: Sequence[int]) -> int:
        """Return the KV-cache elements per token under `plan`."""
        return sum(site.kv_elements[level] for site, level in zip(self.sites, plan, strict=True))

    @property
    def dense_parameters(self) -> int:
        """Parameters of the model that sizes are fractions of."""
        return self.reference_parameters or self.parameters([0] * len(self.sites))

    @property
    def first_sites(self) -> tuple[SiteBefore, ...]:
        """All sites as they were before any pruning."""
        return self.before or tuple(
            SiteBefore(
                name=site.name, layer=site.layer, kind=site.kind, units=site.units[0], parameters=site.parameters[0]
            )
            for site in self.sites
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A level for every site of a `Space`, in its order."""

    levels: tuple[int, ...]

    def to_dict(self, space: Space) -> dict[str, Any]:
        """Return the JSON form.

        Args:
            space: search space of the plan.

        Returns:
            Levels and units by site name, and totals.
        """
        return {
            "format": FORMAT,
            "levels": {site.name: level for site, level in zip(space.sites, self.levels, strict=True)},
            "units": {site.name: site.units[level] for site, level in zip(space.sites, self.levels, strict=True)},
            "parameters": space.parameters(self.levels),
            "dense_parameters": space.dense_parameters,
            "kv_elements_per_token": space.kv_elements(self.levels),
        }

    @classmethod
    def from_dict(cls, payload: Mapping[str, Any], space: Space) -> "Plan":
        """Read the JSON form.

        Args:
            payload: the result of `to_dict`.
            space: search space that the plan belongs to.

        Returns:
            The plan.

        Raises:
            UserError: if it does not match `space`.
        """
        levels = payload.get("levels")
        if payload.get("format") != FORMAT or not isinstance(levels, Mapping):
            raise UserError(f"plan: expected format {FORMAT} with `levels`, found format {payload.get('format')!r}")
        if set(levels) != {site.name for site in space.sites}:
            odd = sorted(set(levels) ^ {site.name for site in space.sites})[0]
            raise UserError(f"plan: its sites do not match this model; {odd!r} is in only one of them")
        for site in space.sites:
            level = levels[site.name]
            if not isinstance(level, int) or isinstance(level, bool) or not 0 <= level < len(site.units):
                raise UserError(f"plan: {site.name} has level {level!r}; must be 0 to {len(site.units) - 1}")
        return cls(levels=tuple(levels[site.name] for site in space.sites))


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """Upper limit of one resource."""

    name: str
    """Resource: `params`, `active_params`, `flops`, `kv_cache`, `memory` or `latency`."""
    unit: str
    """Unit of the counts: `parameters`, `active parameters`, `FLOPs`, `bytes a token`, `bytes`, `ns`."""
    fixed: int
    """Cost that every plan has."""
    costs: tuple[tuple[int, ...], ...]
    """Cost of each site at each level, in the order of the space."""
    maximum: int
    """Maximum cost of a plan."""
    minimum: int = 0
    """Minimum cost, below which a plan leaves capacity unused; 0 if there are several limits."""
    reference: int | None = None
    """Cost of the model that sizes are fractions of, if it is not the model at level 0."""

    def cost(self, levels: Sequence[int]) -> int:
        """Return the cost of the plan with these levels."""
        return self.fixed + sum(site[level] for site, level in zip(self.costs, levels, strict=True))

    @property
    def dense(self) -> int:
        """Cost of the model that sizes are fractions of."""
        return self.uncut if self.reference is None else self.reference

    @property
    def uncut(self) -> int:
        """Cost of the model at level 0."""
        return self.cost([0] * len(self.costs))

    @property
    def smallest(self) -> int:
        """Cost of the smallest plan."""
        return self.fixed + sum(min(site) for site in self.costs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """One or several limits that every plan must meet."""

    limits: tuple[Limit, ...]

    def holds(self, levels: Sequence[int]) -> bool:
        """Whether the plan with these levels meets every limit."""
        return self.holds_costs([limit.cost(levels) for limit in self.limits])

    def holds_costs(self, costs: Sequence[int]) -> bool:
        """Whether a plan with these costs, in the order of the limits, meets them."""
        return all(limit.minimum <= cost <= limit.maximum for limit, cost in zip(self.limits, costs, strict=True))


def make_budget(target: Mapping[str, float | int], limits: Mapping[str, Limit], way: float = 1.0) -> Budget:
    """Make the budget for `target`: by resource, a fraction of the dense model's cost (float) or a count (int).

    Args:
        target: requested sizes by resource.
        limits: costs of plans by resource; their maximum is filled in here.
        way: progress from the dense model (0) to the target (1). The removable cost shrinks geometrically, so each step
            of a gradual run removes the same share of its model's layers.

    Raises:
        UserError: if no plan is that small, or the target exceeds the dense model.
    """
    chosen = []
    for name, size in target.items():
        limit = limits[name]
        check_target(name, size, limit.dense, limit.smallest)
        maximum = _count(size, limit.dense)
        if way < 1:
            removable, left = limit.dense - limit.fixed, max(1, maximum - limit.fixed)
            maximum = limit.fixed + round(removable ** (1 - way) * left**way)
        chosen.append(replace(limit, maximum=maximum))
    if len(chosen) == 1:
        only = chosen[0]
        steps = [abs(a - b) for site in only.costs for a, b in itertools.pairwise(site) if a != b]
        chosen = [replace(only, minimum=max(0, only.maximum - min(steps, default=0) // 2))]
    return Budget(limits=tuple(chosen))


def parameter_budget(target: float | int, space: Space) -> Budget:
    """Make the budget for a fraction (float) or a number (int) of parameters. Raises UserError."""
    return make_budget({"params": target}, {"params": parameter_limit(space)})


def parameter_limit(space: Space) -> Limit:
    """Return a limit on parameters, with its maximum not yet set."""
    costs = tuple(site.parameters for site in space.sites)
    return Limit(name="params", unit="parameters", fixed=space.fixed_parameters, costs=costs, maximum=0)


def check_target(name: str, size: float | int, dense: int, smallest: int) -> None:
    """Reject a target that no plan can meet, given the costs of the `dense` and `smallest` models. Raises UserError."""
    maximum = _count(size, dense)
    asked = f"target {size}" if name == "params" else f"target {name}={size}"
    units = {"params": "parameters", "active_params": "active parameters", "flops": "FLOPs", "memory": "bytes"}
    unit = (units | {"latency": "ns", "kv_cache": "bytes a token"})[name]
    if maximum > dense:
        raise UserError(f"{asked} is {maximum:,} {unit}, but the dense model has only {dense:,}; lower it")
    if maximum < smallest:
        left = "embeddings, head and final norm have" if name == "params" else "a model without any site needs"
        raise UserError(
            f"{asked} is {maximum:,} of {dense:,} {unit}, but {left} {smallest:,}; the smallest possible target "
            f"is {-(-smallest * 10_000 // dense) / 10_000}"
        )


def _count(size: float | int, dense: int) -> int:
    """Return the count that `size` allows, exactly: 0.29 of 100 is 29, though 100 * 0.29 is 28.999..."""
    return int(dense * Fraction(str(size))) if isinstance(size, float) else size
