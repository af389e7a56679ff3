"""Plans (a level for every site) and the space they live in, as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from darwinlm.errors import UserError

SiteKind = Literal["attention", "mlp"]
FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteLevels:
    """What one site can become. Every tuple has one entry a level: 0 is dense, the last has no units left."""

    name: str
    """`layers.3.mlp`"""
    layer: int
    kind: SiteKind
    units: tuple[int, ...]
    """Units kept."""
    parameters: tuple[int, ...]
    """Parameters left in the site, its norm included."""
    kv_elements: tuple[int, ...]
    """Numbers the KV cache stores for each token."""
    errors: tuple[float, ...]
    """Squared output error per calibration token, over the residual stream's median squared norm after the site."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """All sites with their levels, and the parameters that no plan removes (embeddings, head, last norm)."""

    sites: tuple[SiteLevels, ...]
    fixed_parameters: int

    def parameters(self, plan: Sequence[int]) -> int:
        """Parameters of the whole model under `plan`; tied embeddings count once."""
        return self.fixed_parameters + sum(site.parameters[level] for site, level in zip(self.sites, plan, strict=True))

    def kv_elements(self, plan: Sequence[int]) -> int:
        """Numbers that the KV cache stores for each token under `plan`."""
        return sum(site.kv_elements[level] for site, level in zip(self.sites, plan, strict=True))

    @property
    def dense_parameters(self) -> int:
        """Parameters of the dense model."""
        return self.parameters([0] * len(self.sites))

    @property
    def finest_step(self) -> int:
        """The smallest difference in parameters between neighbouring levels of any site."""
        return min(
            larger - smaller
            for site in self.sites
            for larger, smaller in zip(site.parameters, site.parameters[1:], strict=False)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A level for every site of a `Space`, in its order."""

    levels: tuple[int, ...]

    def to_dict(self, space: Space) -> dict[str, Any]:
        """The JSON form: levels by site name, and what they come to."""
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
        """Read the JSON form. Raises UserError if it does not fit `space`."""
        levels = payload.get("levels")
        if payload.get("format") != FORMAT or not isinstance(levels, Mapping):
            raise UserError(f"plan: expected format {FORMAT} with `levels`, found format {payload.get('format')!r}")
        if set(levels) != {site.name for site in space.sites}:
            odd = sorted(set(levels) ^ {site.name for site in space.sites})[0]
            raise UserError(f"plan: its sites are not this model's; {odd!r} is in one of them only")
        for site in space.sites:
            level = levels[site.name]
            if not isinstance(level, int) or isinstance(level, bool) or not 0 <= level < len(site.units):
                raise UserError(f"plan: {site.name} has level {level!r}; it must be 0 to {len(site.units) - 1}")
        return cls(levels=tuple(levels[site.name] for site in space.sites))


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """How many parameters a plan may have."""

    maximum: int
    """Never exceeded."""
    minimum: int
    """Half of the finest level step below `maximum`: a plan under it leaves capacity unused."""

    def holds(self, parameters: int) -> bool:
        """Whether a plan of so many parameters meets the budget."""
        return self.minimum <= parameters <= self.maximum


def parameter_budget(target: float | int, space: Space) -> Budget:
    """The budget for `target`, a fraction (float) or a count (int) of parameters.

    Raises:
        UserError: if no plan is that small, or the dense model already is.
    """
    check_target(target, space.dense_parameters, space.parameters([len(s.units) - 1 for s in space.sites]))
    maximum = _count(target, space.dense_parameters)
    return Budget(maximum=maximum, minimum=maximum - space.finest_step // 2)


def check_target(target: float | int, dense: int, smallest: int) -> None:
    """Refuse a target that no plan can meet. `dense` and `smallest` count parameters. Raises UserError."""
    maximum = _count(target, dense)
    if maximum > dense:
        raise UserError(
            f"target {target} is {maximum:,} parameters, but the dense model has only {dense:,}; ask for fewer"
        )
    if maximum < smallest:
        raise UserError(
            f"target {target} is {maximum:,} of {dense:,} parameters, but embeddings, head and last norm alone keep "
            f"{smallest:,}; the smallest target that can be met is {-(-smallest * 10_000 // dense) / 10_000}"
        )


def _count(target: float | int, dense: int) -> int:
    """The parameters that `target` allows; 0.29 of 100 is 29, though 100 * 0.29 is 28.999..."""
    return int(dense * Fraction(str(target))) if isinstance(target, float) else target
