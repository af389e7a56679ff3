"""Search spaces without a model, and a budget with two limits."""

from darwinlm.plan import Limit, SiteLevels, Space, make_budget, parameter_limit


def space_of(sizes, fixed=100):
    """Create sites with the given parameters per level; errors grow with removal, differently in each site."""
    return Space(
        sites=tuple(
            SiteLevels(
                name=f"layers.{i}.mlp",
                layer=i,
                kind="mlp",
                units=tuple(range(len(levels) - 1, -1, -1)),
                parameters=tuple(levels),
                kv_elements=tuple(0 for _ in levels),
                errors=tuple((1 + i) * (levels[0] - size) ** 2 / levels[0] for size in levels),
            )
            for i, levels in enumerate(sizes)
        ),
        fixed_parameters=fixed,
    )


SPACE = space_of([[90, 60, 30, 0]] * 4 + [[80, 50, 40, 0]] * 2)
TINY_SPACE = Space(
    sites=tuple(
        SiteLevels(
            name=f"layers.{layer}.{kind}",
            layer=layer,
            kind=kind,
            units=(4, 2, 0),
            parameters=(40, 20, 0),
            kv_elements=(8, 4, 0),
            errors=(0.0, 0.1, 1.0),
        )
        for layer in range(2)
        for kind in ("attention", "mlp")
    ),
    fixed_parameters=100,
)
"""Search space of two layers, for all readers of plans."""


def two_limits(target):
    """Return a budget of parameters, and of a resource that the last sites use most of."""
    other = Limit(
        name="kv_cache",
        unit="bytes a token",
        fixed=3,
        costs=tuple(
            tuple((i * i + 1) * len(site.units) * (3 - k) for k in range(4)) for i, site in enumerate(SPACE.sites)
        ),
        maximum=0,
    )
    return make_budget(target, {"params": parameter_limit(SPACE), "kv_cache": other})
