"""Depth pruning: remove whole layers with the lowest block influence (ShortGPT, arXiv 2403.03853)."""

from collections.abc import Iterator

from calibrated import Calibrated

from darwinlm.models.cutting import Cut, build_model, count_parameters
from darwinlm.models.modeling_darwinlm import PrunedModel


def by_influence(calibrated: Calibrated, parameters: int) -> Iterator[tuple[str, PrunedModel]]:
    """Remove the number of layers that brings the size nearest to `parameters`, above or below."""
    dense = calibrated.dense
    layer = sum(count_parameters(site, dense.shapes, range(site.num_units)) for site in dense.sites[:2])
    count = round((dense.parameters - parameters) / layer)
    order = sorted(range(dense.config.num_hidden_layers), key=lambda number: calibrated.influence[number])
    gone = sorted(order[:count])
    cuts = {site.name: Cut((), None) for site in dense.sites if site.layer in gone}
    name = f"without layers {', '.join(map(str, gone))}"
    yield name, build_model(dense.config, dense.sites, dense.weights, cuts)
