"""The database stage: walk the dense model's layers, and prune and write each site when its statistics are complete."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from darwinlm.config.recipe import DatabaseRecipe
from darwinlm.database.expert_channels import prune_expert_channels
from darwinlm.database.experts import prune_experts
from darwinlm.database.grams import ExpertStatistics, SiteStatistics, walk_blocks
from darwinlm.database.levels import level_sizes
from darwinlm.database.solver import Snapshot, prune_site, removal_error
from darwinlm.database.store import Database
from darwinlm.errors import UserError
from darwinlm.models.cutting import count_parameters
from darwinlm.models.experts import Experts
from darwinlm.models.families import dense_again
from darwinlm.models.loading import DenseModel, expected_shapes
from darwinlm.models.sites import Site
from darwinlm.runtime import dist
from darwinlm.runtime.progress import Phases, task

_WRITERS, _WAITING = 2, 3
"""Number of writer threads, and maximum number of sites queued or being written."""
_SMALL = 2**26
"""Maximum bytes of a site that is written synchronously: Python threads would slow the main thread down by more."""
_LEAST_GAIN = 1e-3
"""Minimum gain of a norm's row, relative to the largest."""


def build_database(
    dense: DenseModel,
    tokens_BT: Tensor,
    recipe: DatabaseRecipe,
    folder: Path,
    phases: Phases | None = None,
    tensor_parallel: int = 1,
) -> Database:
    """Prune every site of `dense` to every level into `folder`, resuming an interrupted build.

    With several ranks, each calibrates on its share of the text and solves its share of the sites: rank r handles the
    layers r, r + ranks, r + 2 * ranks, ...; a site's owner writes its file, rank 0 the index.

    Args:
        dense: dense model; its weights are read one layer at a time.
        tokens_BT: calibration split, (blocks, tokens).
        recipe: levels, damping, batch size, offload.
        folder: folder of the database.
        phases: clock for `read`, `forward`, `Gram`, `solve` and `write`.
        tensor_parallel: divides the units kept at every level.

    Raises:
        UserError: if the damping is too small for a site's Gram matrix.
    """
    phases = phases or Phases()
    database = Database(folder)
    missing = [site for site in dense.sites if site not in database]
    last_of_layer = set({site.layer: site.name for site in dense.sites}.values())
    writer = _Writer(database, phases)
    with task("database (sites)", len(dense.sites)) as progress, writer:
        progress.advance(len(dense.sites) - len(missing))
        if missing:
            walk = walk_blocks(
                dense,
                tokens_BT,
                batch_size=recipe.batch_size,
                scratch=folder,
                owner=_owner,
                first_layer=min(site.layer for site in missing),
                offload=recipe.offload,
                phases=phases,
            )
            waiting: list[tuple[Site, SiteStatistics | ExpertStatistics | None]] = []
            for site, statistics in walk:
                if site in database:
                    continue
                waiting.append((site, statistics))
                # Solve when every rank has a layer to solve, so that none waits for another.
                round_is_full = (site.layer + 1) % dist.world_size() == 0
                if (site.name in last_of_layer and round_is_full) or site is missing[-1]:
                    _solve(dense, waiting, recipe, tensor_parallel, writer, phases)
                    _enter(database, writer.written(all_of_them=site is missing[-1]))
                    progress.advance(len(waiting), note=site.name)
                    waiting = []
                if site is missing[-1]:
                    break
    if dist.rank() == 0:
        database.finish(dense.fixed_parameters, _before(dense), dense.reference.parameters)
    dist.barrier()
    return Database(folder)


def _before(dense: DenseModel) -> list[dict[str, Any]]:
    """Return the sites of the original model; empty unless the model was already pruned."""
    shapes = expected_shapes(dense_again(dense.config)) if dense.sites_before else {}
    return [
        {
            "name": site.name,
            "layer": site.layer,
            "kind": site.kind,
            "units": site.num_units,
            "parameters": count_parameters(site, shapes, range(site.num_units)),
        }
        for site in dense.sites_before
    ]


def _owner(site: Site) -> int:
    return site.layer % dist.world_size()


def _solve(
    dense: DenseModel,
    waiting: list[tuple[Site, SiteStatistics | ExpertStatistics | None]],
    recipe: DatabaseRecipe,
    tensor_parallel: int,
    writer: "_Writer",
    phases: Phases,
) -> None:
    """Prune this rank's sites of `waiting`, and queue them for writing."""
    for site, statistics in waiting:
        if statistics is None:
            continue
        sizes = level_sizes(site, recipe.levels, tensor_parallel)[1:-1]
        with phases("solve"):
            if isinstance(statistics, ExpertStatistics):
                weights = dense.checkpoint.read(site.tensors, dense.device, torch.float32)
                experts = Experts.of(dense.config, site, weights)
                prune = prune_experts if site.of_experts else prune_expert_channels
                with _naming_singular(site, recipe):
                    snapshots, removal = prune(experts, statistics, sizes=sizes, damping=recipe.damping, name=site.name)
            else:
                snapshots, removal = _solve_site(dense, site, statistics, recipe, sizes)
        writer.put(
            site,
            snapshots,
            shapes=dense.shapes,
            head_dim=dense.config.head_dim,
            removal_error=removal,
            shares={} if isinstance(statistics, ExpertStatistics) else statistics.shares,
            dtype=dense.dtype,
        )


def _enter(database: Database, entries: Mapping[str, Any]) -> None:
    """Add the sites written by any rank to the index, which rank 0 writes."""
    for ranks_entries in dist.gather(entries):
        if ranks_entries:
            database.enter(ranks_entries, write=dist.rank() == 0)


class _Writer:
    """Writes sites in the background while the next ones are computed, with a short queue to limit memory."""

    def __init__(self, database: Database, phases: Phases) -> None:
        self._database, self._phases = database, phases
        self._pool = ThreadPoolExecutor(_WRITERS)
        self._pending: dict[str, Future[tuple[dict[str, Any], float]]] = {}
        self._written: dict[str, Any] = {}

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def put(self, site: Site, snapshots: Sequence[Snapshot], **facts: Any) -> None:
        """Queue a site for `Database.write_site`, waiting while the queue is full. Raises errors of earlier writes."""
        # Copied here: in another thread it would delay the next work of the device.
        snapshots = [replace(one, weight_OK=one.weight_OK.to("cpu", facts["dtype"])) for one in snapshots]
        if sum(one.weight_OK.nbytes for one in snapshots) < _SMALL:
            self._written[site.name], seconds = self._write(site, snapshots, facts)
            self._phases.add("write", seconds)
            return
        while len(self._pending) >= _WAITING:
            wait(self._pending.values(), return_when=FIRST_COMPLETED)
            self._collect()
        self._pending[site.name] = self._pool.submit(self._write, site, snapshots, facts)

    def written(self, *, all_of_them: bool) -> dict[str, Any]:
        """Return the new index entries of written sites, optionally after waiting for all."""
        if all_of_them:
            wait(self._pending.values())
        self._collect()
        done, self._written = self._written, {}
        return done

    def _collect(self) -> None:
        for name, future in list(self._pending.items()):
            if future.done():
                entry, seconds = self._pending.pop(name).result()
                self._written[name] = entry
                self._phases.add("write", seconds)

    def _write(
        self, site: Site, snapshots: Sequence[Snapshot], facts: Mapping[str, Any]
    ) -> tuple[dict[str, Any], float]:
        start = time.perf_counter()
        entry = self._database.write_site(site, snapshots, **facts)
        return entry, time.perf_counter() - start


@contextmanager
def _naming_singular(site: Site, recipe: DatabaseRecipe) -> Iterator[None]:
    try:
        yield
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise UserError(
            f"{site.name}: its Gram matrix is numerically singular at database.damping={recipe.damping}; raise "
            "it (default 0.01) or provide more calibration text, in a new run"
        ) from None


def _solve_site(
    dense: DenseModel, site: Site, statistics: SiteStatistics, recipe: DatabaseRecipe, sizes: Sequence[int]
) -> tuple[list[Snapshot], float]:
    """Return the site at `sizes`, and the error of removing it. Raises UserError."""
    weight_OI = dense.checkpoint.read([site.output_tensor], dense.device, torch.float32)[site.output_tensor]
    gain_O1 = None
    if statistics.gain_O is not None:
        # Clamped, because rows are divided by the gain again after pruning.
        gain_O1 = statistics.gain_O.abs().clamp_min(_LEAST_GAIN * statistics.gain_O.abs().max())[:, None]
        weight_OI = weight_OI * gain_O1
    with _naming_singular(site, recipe):
        solved = prune_site(
            weight_OI,
            statistics.gram_II,
            columns_per_unit=site.columns_per_unit,
            sizes=sizes,
            damping=recipe.damping,
        )
    snapshots = [
        one if gain_O1 is None else replace(one, weight_OK=one.weight_OK / gain_O1.to(one.weight_OK.device))
        for one in solved
    ]
    return snapshots, removal_error(weight_OI, statistics.gram_II)
