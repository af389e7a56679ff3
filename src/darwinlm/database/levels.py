"""Which sizes a site gets in the database."""

from darwinlm.adapters.families import Site

_MULTIPLES = (256, 128, 64, 32, 16, 8, 4, 2, 1)


def level_sizes(site: Site, levels: int) -> tuple[int, ...]:
    """Units kept at each level, from all of them down to none, in steps as even as the site allows.

    MLP sizes are multiples of 256 where that leaves at least four multiples a level, else of the largest smaller power
    of two that does: tensor cores and the K-quants of llama.cpp want it. A site with fewer units than levels gets one
    level a unit.
    """
    units = site.num_units
    multiple = 1
    if site.kind == "mlp":
        multiple = next(m for m in _MULTIPLES if units >= 4 * levels * m or m == 1)
    sizes = {units, 0}
    for level in range(1, levels):
        sizes.add(min(units, max(multiple, round(units * (1 - level / levels) / multiple) * multiple)))
    return tuple(sorted(sizes, reverse=True))
