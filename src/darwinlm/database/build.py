"""The database stage: walk the dense model's blocks; prune, write and forget each site as its statistics come."""

from pathlib import Path

from torch import Tensor

from darwinlm.adapters.loading import DenseModel
from darwinlm.calibration.grams import walk_blocks
from darwinlm.database.levels import level_sizes
from darwinlm.database.solver import prune_site, removal_error
from darwinlm.database.store import Database
from darwinlm.progress import task
from darwinlm.recipe import DatabaseRecipe


def build_database(dense: DenseModel, tokens_BT: Tensor, recipe: DatabaseRecipe, folder: Path) -> Database:
    """Prune every site of `dense` to every level, or what an interrupted build left undone, into `folder`."""
    database = Database(folder)
    weights = dense.weights
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    missing = [site for site in dense.sites if site not in database]
    with task("database (sites)", len(dense.sites)) as progress:
        progress.advance(len(dense.sites) - len(missing))
        if missing:
            first_layer = min(site.layer for site in missing)
            walk = walk_blocks(dense, tokens_BT, batch_size=recipe.batch_size, first_layer=first_layer)
            for site, statistics in walk:
                if site in database:
                    continue
                weight_OI = weights[f"{site.output}.weight"]
                snapshots = prune_site(
                    weight_OI,
                    statistics.gram_II,
                    columns_per_unit=site.columns_per_unit,
                    sizes=level_sizes(site, recipe.levels)[1:-1],
                    damping=recipe.damping,
                )
                database.write_site(
                    site,
                    snapshots,
                    shapes=shapes,
                    head_dim=dense.config.head_dim,
                    removal_error=removal_error(weight_OI, statistics.gram_II),
                    residual_power=statistics.residual_power,
                    dtype=dense.dtype,
                )
                progress.advance(note=site.name)
                if site is missing[-1]:
                    break
    in_sites = ("model.layers.",)
    database.finish(sum(tensor.numel() for name, tensor in weights.items() if not name.startswith(in_sites)))
    return database
