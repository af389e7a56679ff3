"""Sizes of a site at each level of the database."""

import math
from collections.abc import Sequence

from darwinlm.errors import UserError
from darwinlm.models.sites import Site

_MULTIPLES = (256, 128, 64, 32, 16, 8, 4, 2, 1)


def level_sizes(site: Site, levels: int, tensor_parallel: int = 1) -> tuple[int, ...]:
    """Return the units kept at each level, from all of them down to none, in steps as even as possible.

    MLP sizes are multiples of 256 if that leaves at least four multiples per level, otherwise of the largest smaller
    power of two that does, as required by tensor cores and the K-quants of llama.cpp. A site with fewer units than
    levels gets one level per unit. All sizes are multiples of `tensor_parallel`, which must divide the number of units.
    For whole experts, which are split over devices by width, the last size before zero is the number of experts per
    token.
    """
    units = site.num_units
    multiple = 1
    if site.kind == "mlp":
        multiple = next(m for m in _MULTIPLES if units >= 4 * levels * m or m == 1)
    multiple = multiple if site.of_experts else math.lcm(multiple, tensor_parallel)
    if site.experts and units >= 8 * levels:
        multiple = math.lcm(multiple, 8)  # PyTorch's grouped bfloat16 products need rows of 16 bytes.
    least = site.routed if site.of_experts else multiple
    sizes = {units, 0} | ({least} if site.of_experts else set())
    for level in range(1, levels):
        sizes.add(min(units, max(least, round(units * (1 - level / levels) / multiple) * multiple)))
    return tuple(sorted(sizes, reverse=True))


def check_tensor_parallel(sites: Sequence[Site], tensor_parallel: int) -> None:
    """Reject a tensor-parallel size that does not divide the units of a dense site. Raises UserError."""
    for site in sites:
        if site.num_units % tensor_parallel and not site.of_experts:
            units = "KV heads" if site.kind == "attention" else "MLP channels"
            common = math.gcd(*(other.num_units for other in sites))
            possible = [str(number) for number in range(1, common + 1) if common % number == 0]
            raise UserError(
                f"export.tensor_parallel={tensor_parallel} does not divide the {site.num_units} {units} of the "
                f"model's layers; choose {'one of ' if len(possible) > 1 else ''}{', '.join(possible)}"
            )
