"""The run directory: its manifest, and the sizes and steps of a recipe."""

import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darwinlm.config.loading import differences, make_recipe
from darwinlm.config.recipe import Recipe
from darwinlm.config.stage import Stage
from darwinlm.config.target import SizeTarget
from darwinlm.errors import UserError
from darwinlm.runtime import dist
from darwinlm.runtime.files import (
    damaged,
    fault_of,
    file_checksum,
    naming_disk_faults,
    read_json,
    write_bytes,
    write_json,
)
from darwinlm.runtime.memory import naming_memory_faults, peak_memory_bytes
from darwinlm.runtime.progress import log

FORMAT = 1
_MANIFEST = "manifest.json"
LOCK = "lock"
"""Lock file in the run directory, which names the process working on it."""
VERSION = "darwinlm"
"""Fact that records which version of this package started the run; another version may continue it."""


@dataclass(frozen=True)
class Size:
    """One of the sizes that a run produces."""

    target: SizeTarget
    folder: Path
    step: int | None = None
    """Number of its step, in all steps except the last."""
    in_family: bool = False

    @property
    def name(self) -> str:
        """Name of the size, or of its step."""
        return self.target.name if self.step is None else f"step {self.step}"

    def stage(self, kind: str) -> Stage:
        """Return its stage of this kind."""
        return Stage(kind, self.step, self.target.name if self.in_family else None)


@dataclass(frozen=True)
class Step:
    """One round of pruning and recovery."""

    number: int
    folder: Path
    """Folder of its database, and of search, recovery and model in all steps except the last."""
    sizes: list[Size]
    last: bool

    def stage(self, kind: str) -> Stage:
        """Return its stage of this kind, for kinds that all its sizes share."""
        return Stage(kind, None if self.last else self.number)


def run_steps(recipe: Recipe, run: Path) -> list[Step]:
    """Return the steps of a gradual run, the last of which gives the result; any other run has one step."""
    steps = []
    for number in range(1, recipe.steps):
        folder = run / f"step-{number}"
        steps.append(Step(number, folder, [Size(recipe.sizes[0], folder, number)], last=False))
    return [*steps, Step(recipe.steps, run, run_sizes(recipe, run), last=True)]


def run_sizes(recipe: Recipe, run: Path) -> list[Size]:
    """Return the sizes of a family, largest first, each in its own folder; or the single requested size."""
    if len(recipe.sizes) == 1:
        return [Size(recipe.sizes[0], run)]
    sizes = [Size(target, run / "sizes" / target.name, in_family=True) for target in recipe.sizes]
    return sorted(sizes, key=lambda size: -size.target.limits["params"])


class RunDirectory:
    """All files of a run under one folder; `manifest.json` records which stages are done."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @staticmethod
    def check(path: Path, recipe: Recipe) -> None:
        """Reject a folder with other content or a run of another recipe, before any work. Writes nothing. Raises
        UserError."""
        with naming_disk_faults(path):
            if path.exists() and not path.is_dir():
                raise UserError(f"--out {path} is a file; give a new folder or an earlier run")
            above = next((folder for folder in path.absolute().parents if folder.exists()), path)
            if not above.is_dir():
                raise UserError(f"--out {path} cannot be created: {above} is a file")
            if not path.exists() or all(_leftover(entry) for entry in path.iterdir()):
                return
            found = _read(path)
        if found is None:
            raise UserError(
                f"--out {path} contains something that is not a DarwinLM run; give a new or an empty folder"
            )
        changed = differences(found[0], recipe)
        if changed:
            raise UserError(
                f"--out {path} is a run with another recipe ({'; '.join(changed)}); give a new folder, or "
                f"restore these settings, as with --recipe {path / 'recipe.yaml'}"
            )

    @classmethod
    def open(cls, path: Path, recipe: Recipe, facts: Mapping[str, Any]) -> "RunDirectory":
        """Continue the run in `path`, or start one. `facts` must not change during a run, except for `VERSION`.

        Raises:
            UserError: if they have changed, or `check` rejects the folder.
        """
        cls.check(path, recipe)
        if is_run(path):
            _, manifest = read_manifest(path)
            for key, value in facts.items():
                before = manifest["facts"].get(key)
                if before == value:
                    continue
                if key != VERSION:
                    raise UserError(
                        f"--out {path}: {key} was {before!r} when this run started and is now {value!r}; give a "
                        "new folder, or restore it"
                    )
                # The files of the stages have their own formats, and are rejected if they are too old.
                log.info("%s was started by darwinlm %s and is continued by %s", path, before, value)
        else:
            manifest = {"format": FORMAT, "recipe": recipe.model_dump(mode="json"), "facts": dict(facts), "stages": {}}
            write_json(path / _MANIFEST, manifest, sealed=True)
        # Written after the manifest, which makes a folder a run: a run interrupted in between can be resumed.
        text = recipe.to_yaml().encode()
        if not (path / "recipe.yaml").exists() or (path / "recipe.yaml").read_bytes() != text:
            write_bytes(path / "recipe.yaml", text)
        return cls(path, manifest)

    @classmethod
    def recipe_of(cls, path: Path) -> Recipe:
        """Return the recipe of the run in `path`. Raises UserError if there is no run that this version can read."""
        return read_manifest(path)[0]

    @staticmethod
    def change_recipe(path: Path, recipe: Recipe, stages: Collection[str]) -> None:
        """Replace the recipe of the run in `path`, and mark `stages` of every size in the last step as not done."""
        _, manifest = read_manifest(path)
        for part in ("stages", "files"):
            entries = manifest.get(part, {})
            manifest[part] = {
                name: entry
                for name, entry in entries.items()
                if Stage.parse(name).step is not None or Stage.parse(name).kind not in stages
            }
        manifest["recipe"] = recipe.model_dump(mode="json")
        # Written again by `open`; a run interrupted in between has no recipe.yaml rather than a wrong one.
        (path / "recipe.yaml").unlink(missing_ok=True)
        write_json(path / _MANIFEST, manifest, sealed=True)

    @staticmethod
    def accept(path: Path, folder: Path) -> None:
        """Accept intentional changes of the files in `folder`, outputs of a stage of the run in `path`: update their
        checksums."""
        _, manifest = read_manifest(path)
        prefix = f"{folder.resolve().relative_to(path.resolve())}{os.sep}"
        for files in manifest.get("files", {}).values():
            for name in files:
                if name.startswith(prefix):
                    files[name] = file_checksum(path / name)
        write_json(path / _MANIFEST, manifest, sealed=True)

    @property
    def stages(self) -> list[Stage]:
        """Stages that have started, in their order."""
        return [Stage.parse(name) for name in self.manifest["stages"]]

    def done(self, stage: Stage) -> bool:
        """Whether `stage` has finished successfully."""
        return bool(self.facts(stage).get("done"))

    def facts(self, stage: Stage) -> dict[str, Any]:
        """Return the manifest entry of `stage`; empty if it has not started."""
        known: dict[str, Any] = self.manifest["stages"].get(str(stage), {})
        return known

    def outputs(self, stage: Stage) -> dict[str, str]:
        """Return the output files of the last successful run of `stage`, relative to the run's folder, with their
        checksums."""
        found: dict[str, str] = self.manifest.get("files", {}).get(str(stage), {})
        return found

    def verify(self, stage: Stage) -> None:
        """Verify the outputs of a finished `stage`; if a file is damaged or missing, log it and mark the stage as not
        done."""
        if not self.done(stage):
            return
        for name, expected in self.outputs(stage).items():
            fault = fault_of(self.path, name, expected)
            if fault is not None:
                log.warning("%s %s: recreating it (%s)", self.path / name, fault, stage)
                self.undo(stage)

    def undo(self, stage: Stage) -> None:
        """Mark `stage` as not done."""
        if self.done(stage):
            self.manifest["stages"][str(stage)]["done"] = False
            if dist.rank() == 0:
                self._write()

    def _write(self) -> None:
        write_json(self.path / _MANIFEST, self.manifest, sealed=True)

    @contextmanager
    def stage(self, stage: Stage, *outputs: Path) -> Iterator[dict[str, Any]]:
        """Run a stage and record it in the manifest: seconds (over all attempts), peak memory, the entries of the
        yielded dict, and the checksums of `outputs`, its files or folders of files.

        If a stage is repeated with different outputs, the stages that depend on it are marked as not done.
        """
        before = self.facts(stage).get("seconds", 0.0)
        start = time.monotonic()
        done = False
        facts: dict[str, Any] = {}
        try:
            with naming_memory_faults(stage):
                yield facts
            if dist.rank() == 0 and outputs:
                self._note(stage, outputs)
            done = True
        finally:
            self.manifest["stages"][str(stage)] = {
                "done": done,
                "seconds": round(before + time.monotonic() - start, 3),
                "peak_memory_bytes": peak_memory_bytes(),
                **facts,
            }
            if dist.rank() == 0:
                self._write()

    def _note(self, stage: Stage, outputs: Sequence[Path]) -> None:
        files = [file for path in outputs for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
        sums = {str(file.relative_to(self.path)): file_checksum(file) for file in files if file.is_file()}
        if self.outputs(stage) not in ({}, sums):
            for later in self.stages[self.stages.index(stage) + 1 :]:
                if stage.affects(later):
                    self.manifest["stages"][str(later)]["done"] = False
        self.manifest.setdefault("files", {})[str(stage)] = sums


def run_of(folder: Path) -> Path | None:
    """Return the run directory that contains `folder`, or None."""
    above = list(folder.resolve().parents)[:3]  # RUN/sizes/0.6/model
    return next((path for path in above if is_run(path)), None)


def is_run(folder: Path) -> bool:
    """Whether `folder` has a manifest, possibly damaged."""
    return (folder / _MANIFEST).is_file()


def read_manifest(run: Path) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe and the manifest of the run in the folder `run`.

    Raises:
        UserError: if it is not a run, its manifest is damaged, or this version cannot read it.
    """
    found = _read(run)
    if found is None:
        raise UserError(f"{run} is not a DarwinLM run (it has no {_MANIFEST} of one); give the folder passed to --out")
    return found


def _read(run: Path) -> tuple[Recipe, dict[str, Any]] | None:
    """Return what `read_manifest` does, or None if `run` is not a run."""
    manifest = read_json(run / _MANIFEST) if is_run(run) else {}
    if "format" not in manifest:
        return None
    if manifest["format"] != FORMAT:
        raise UserError(
            f"{run} is a run of format {manifest['format']!r}, but this version reads format {FORMAT}; give a new "
            "folder, or use the version that wrote it"
        )
    if not all(isinstance(manifest.get(key), dict) for key in ("recipe", "facts", "stages")):
        raise damaged(run / _MANIFEST, "recipe, facts or stages are missing")
    try:
        return make_recipe(manifest["recipe"]), manifest
    except UserError as error:
        raise UserError(
            f"{run} is a run whose recipe this version cannot read ({error}); give a new folder, or use the version "
            "that wrote it"
        ) from None


def _leftover(entry: Path) -> bool:
    """Whether `entry` may be left over from a process killed before its run started."""
    return entry.suffix == ".draft" or entry.name == LOCK
