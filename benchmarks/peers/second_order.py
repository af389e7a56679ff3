"""Uniform width pruning with the database's solver: units are removed by second-order scores, the others refitted."""

from collections.abc import Iterator

from calibrated import Calibrated
from even_widths import Shape, even_shapes, named

from darwinlm.config.recipe import DatabaseRecipe
from darwinlm.database.solver import prune_site
from darwinlm.models.cutting import Cut, build_model
from darwinlm.models.modeling_darwinlm import PrunedModel


def refitted_cuts(calibrated: Calibrated, shapes: list[Shape]) -> dict[Shape, dict[str, Cut]]:
    """Return the cuts of every site by shape; a site is solved once for all shapes."""
    cuts: dict[Shape, dict[str, Cut]] = {shape: {} for shape in shapes}
    for site in calibrated.dense.sites:
        sizes = sorted({shape.units(site) for shape in shapes} - {site.num_units}, reverse=True)
        snapshots = prune_site(
            calibrated.dense.weights[f"{site.output}.weight"],
            calibrated.grams[site.name],
            columns_per_unit=site.columns_per_unit,
            sizes=sizes,
            damping=DatabaseRecipe().damping,
        )
        found = {size: Cut(snapshot.kept, snapshot.weight_OK) for size, snapshot in zip(sizes, snapshots, strict=True)}
        for shape in shapes:
            if shape.units(site) in found:
                cuts[shape][site.name] = found[shape.units(site)]
    return cuts


def by_second_order(calibrated: Calibrated, parameters: int) -> Iterator[tuple[str, PrunedModel]]:
    """Prune to each shape of `parameters`, keeping units by the error that their removal would cause."""
    dense = calibrated.dense
    for shape, cuts in refitted_cuts(calibrated, even_shapes(dense, parameters)).items():
        yield named(dense, shape), build_model(dense.config, dense.sites, dense.weights, cuts)
