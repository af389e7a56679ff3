"""The database on disk: `index.json` and one safetensors file per site, with the remaining columns only."""

from collections import OrderedDict
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from darwinlm.database.solver import Snapshot
from darwinlm.errors import UserError
from darwinlm.models.cutting import Cut, count_parameters, kv_elements, mean_factor
from darwinlm.models.device_memory import free_memory
from darwinlm.models.sites import Site
from darwinlm.plan import SiteBefore, SiteLevels, Space
from darwinlm.runtime.files import OTHER_CHECKSUM, checksum, file_checksum, read_json, write_bytes, write_json

FORMAT = 2
_RESIDENT = 4
"""Divisor of an accelerator's free memory for cached cuts."""

_Count = Annotated[int, Field(ge=0)]


class _Entry(BaseModel):
    """Entry of a site in `index.json`; lists have one element per level."""

    model_config = ConfigDict(strict=True, extra="forbid")
    layer: _Count
    kind: Literal["attention", "mlp"]
    blake2b: str
    units: list[_Count] = Field(min_length=2)
    parameters: list[_Count]
    kv_elements: list[_Count]
    errors: list[float]
    experts: bool = False


class _Before(BaseModel):
    """Fields of `SiteBefore`."""

    model_config = ConfigDict(strict=True, extra="forbid")
    name: str
    layer: _Count
    kind: Literal["attention", "mlp"]
    units: _Count
    parameters: _Count


class _Index(BaseModel):
    """Schema of `index.json`."""

    model_config = ConfigDict(strict=True, extra="forbid")
    format: int
    sites: dict[Annotated[str, Field(pattern=r"^layers\.\d+\.(attention|mlp)$")], _Entry]
    fixed_parameters: _Count | None = None
    before: list[_Before] = []
    reference_parameters: _Count | None = None


class Database:
    """Every site at every level; level 0 (dense) and the last (removed) need no tensors.

    Files are read lazily, one level at a time, and verified when first read. A site counts as present once `index.json`
    lists it.
    """

    def __init__(self, folder: Path, kept: Container[str] = ()) -> None:
        """Open the database in `folder`; sites named in `kept` have no last level in the search space."""
        self.folder = folder
        self._kept = kept
        self._index: dict[str, Any] = {"format": FORMAT, "sites": {}}
        self._verified: set[str] = set()
        self._resident: OrderedDict[tuple[str, int], Cut] = OrderedDict()
        """Cuts cached on an accelerator, in their stored dtype, least recently used first."""
        if (folder / "index.json").exists():
            remedy = f"delete {folder} and run the same command again"
            self._index = read_json(folder / "index.json", remedy)
            if self._index.get("format") != FORMAT:
                raise UserError(
                    f"{folder} is a database of format {self._index.get('format')!r}, but this version reads "
                    f"format {FORMAT}; rebuild it in a new run"
                )
            try:
                sites = _Index.model_validate(self._index).sites.values()
            except ValidationError as error:
                where = ".".join(str(part) for part in error.errors()[0]["loc"])
                raise UserError(f"{folder / 'index.json'} is damaged (at {where[:80]!r}); {remedy}") from None
            if any(
                {len(site.parameters), len(site.kv_elements), len(site.errors)} != {len(site.units)} for site in sites
            ):
                raise UserError(f"{folder / 'index.json'} is damaged (its lists have different lengths); {remedy}")

    def __contains__(self, site: Site) -> bool:
        return site.name in self._index["sites"]

    def write_site(
        self,
        site: Site,
        snapshots: Sequence[Snapshot],
        *,
        shapes: Mapping[str, Sequence[int]],
        head_dim: int,
        removal_error: float,
        shares: Mapping[str, Tensor],
        dtype: torch.dtype,
    ) -> dict[str, Any]:
        """Write a site's file and return its entry for the index; `enter` makes it present.

        Args:
            site: the site.
            snapshots: levels 1 to the last but one.
            shapes: shapes of the dense tensors, to count parameters.
            head_dim: to count KV-cache elements.
            removal_error: error of the last level.
            shares: shares of norms over all heads (`SiteStatistics.shares`).
            dtype: dtype of the stored columns.
        """
        tensors = {f"shares.{name}": shares_G.float().contiguous() for name, shares_G in shares.items()}
        for level, snapshot in enumerate(snapshots, 1):
            kept_K = torch.tensor(snapshot.kept) if snapshot.channels_EK is None else snapshot.channels_EK
            tensors[f"{level}.kept"] = kept_K.to("cpu", torch.int32).contiguous()
            tensors[f"{level}.output"] = snapshot.weight_OK.to("cpu", dtype).contiguous()
        content = save(tensors)
        write_bytes(self._file(site.name), content)
        kept = [range(site.num_units), *(snapshot.kept for snapshot in snapshots), ()]
        return {
            "layer": site.layer,
            "kind": site.kind,
            "blake2b": checksum(content),
            "units": [len(units) for units in kept],
            "parameters": [count_parameters(site, shapes, units) for units in kept],
            "kv_elements": [kv_elements(site, units, head_dim) for units in kept],
            "errors": [0.0, *(snapshot.error for snapshot in snapshots), removal_error],
            **({"experts": True} if site.of_experts else {}),
        }

    def enter(self, entries: Mapping[str, Any], *, write: bool) -> None:
        """Add entries of sites, by name, to the index; `write` also writes it to disk (by one process)."""
        sites = self._index["sites"] | entries
        self._index["sites"] = dict(sorted(sites.items(), key=lambda item: (item[1]["layer"], item[1]["kind"])))
        if write:
            self._write()

    def finish(
        self, fixed_parameters: int, before: Sequence[Mapping[str, Any]] = (), reference_parameters: int | None = None
    ) -> None:
        """Add what all plans have in common, which completes the database.

        Args:
            fixed_parameters: number of parameters that no plan removes.
            before: fields of `SiteBefore`, if the model was already pruned.
            reference_parameters: parameters of the model that sizes are fractions of, if it is not the one at level 0.
        """
        self._index["fixed_parameters"] = fixed_parameters
        if before:
            self._index |= {"before": list(before), "reference_parameters": reference_parameters}
        self._write()

    def forget_damaged(self) -> list[Path]:
        """Verify every file, and drop missing or damaged ones from the index, so that the next build recreates them.

        Returns:
            The dropped files.
        """
        damaged = {name: self._file(name) for name in self._index["sites"] if not self._intact(name)}
        for name in damaged:
            del self._index["sites"][name]
        if damaged:
            self._write()
        self._verified = set(self._index["sites"])
        return list(damaged.values())

    def _intact(self, name: str) -> bool:
        try:
            return bool(file_checksum(self._file(name)) == self._index["sites"][name]["blake2b"])
        except OSError:
            return False

    def _write(self) -> None:
        write_json(self.folder / "index.json", self._index, sealed=True)

    def space(self, sites: Sequence[Site]) -> Space:
        """Return the search space of a finished database.

        Args:
            sites: all sites of the model that the database was built for.

        Returns:
            The levels of every site and their costs, in the order of `sites`.
        """
        return _space(self._index, [site.name for site in sites], self._kept)

    def cut(self, site: Site, level: int, device: torch.device) -> Cut:
        """Read a site at a level, on `device` and in the dtype it is stored in. Level 0 is dense and needs no cut.

        On an accelerator cuts are cached while there is room, because candidates use the same ones repeatedly.

        Args:
            site: the site to cut.
            level: its level, from 1.
            device: where the columns are put.

        Returns:
            The units that are kept, and the refitted columns of the output projection.

        Raises:
            UserError: if the site's file is missing or damaged.
        """
        if level == len(self._index["sites"][site.name]["units"]) - 1:
            return Cut((), None)
        found = self._resident.get((site.name, level)) if device.type == "cuda" else None
        if found is None:
            found = self._read(site, level, device)
            if device.type == "cuda":
                self._keep((site.name, level), found, free_memory(device) // _RESIDENT)
        else:
            self._resident.move_to_end((site.name, level))
        return found

    def free(self) -> None:
        """Drop the cuts cached on the device, to free its memory."""
        self._resident.clear()

    def _keep(self, key: tuple[str, int], cut: Cut, room: int) -> None:
        """Cache a cut, evicting others beyond `room` bytes in total."""
        self._resident[key] = cut
        sizes = {
            name: one.output_weight.nbytes for name, one in self._resident.items() if one.output_weight is not None
        }
        total = sum(sizes.values())
        while self._resident and total > room:
            oldest, _ = self._resident.popitem(last=False)
            total -= sizes[oldest]

    def _read(self, site: Site, level: int, device: torch.device) -> Cut:
        file = self._file(site.name)
        try:
            if site.name not in self._verified:
                if file_checksum(file) != self._index["sites"][site.name]["blake2b"]:
                    raise OSError(OTHER_CHECKSUM)
                self._verified.add(site.name)
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                stored = tensors.get_tensor(f"{level}.kept")
                if site.experts:
                    width = range(stored.shape[1])
                    return Cut(tuple(width), tensors.get_tensor(f"{level}.output"), channels=stored)
                kept = stored.tolist()
                factors = {
                    rows.tensor: mean_factor(rows, kept, tensors.get_tensor(f"shares.{rows.tensor}").tolist())
                    for rows in site.inputs
                    if rows.norm
                }
                return Cut(tuple(kept), tensors.get_tensor(f"{level}.output"), factors=factors)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{file} cannot be read ({error}); run the same command again to rebuild this site"
            ) from None

    def cuts(self, sites: Sequence[Site], plan: Sequence[int], device: torch.device) -> dict[str, Cut]:
        """Read the cuts of all sites that a plan prunes.

        Args:
            sites: all sites of the model.
            plan: level of every site, in the same order.
            device: where the columns are put.

        Returns:
            Cuts by site name; sites at level 0 have none.

        Raises:
            UserError: if a site's file is missing or damaged.
        """
        return {site.name: self.cut(site, level, device) for site, level in zip(sites, plan, strict=True) if level > 0}

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def read_space(folder: Path) -> Space | None:
    """Read the search space of the database in `folder`, without a model: attention before MLP, layer by layer.

    Returns:
        The space, or None if the database is not finished yet.

    Raises:
        UserError: if its index is damaged.
    """
    if not (folder / "index.json").exists():
        return None
    index = Database(folder)._index
    if "fixed_parameters" not in index:
        return None
    entries = index["sites"]
    return _space(index, sorted(entries, key=lambda name: (entries[name]["layer"], entries[name]["kind"])))


def _space(index: Mapping[str, Any], names: Sequence[str], whole: Container[str] = ()) -> Space:
    """Return the space of the sites `names`; those in `whole` cannot be removed completely."""
    entries = index["sites"]
    return Space(
        sites=tuple(
            SiteLevels(
                name=name,
                layer=entries[name]["layer"],
                kind=entries[name]["kind"],
                **{
                    key: tuple(entries[name][key][: -1 if name in whole else None])
                    for key in ("units", "parameters", "kv_elements", "errors")
                },
                experts=entries[name].get("experts", False),
            )
            for name in names
        ),
        fixed_parameters=index["fixed_parameters"],
        reference_parameters=index.get("reference_parameters"),
        before=tuple(SiteBefore(**site) for site in index.get("before", ())),
    )
