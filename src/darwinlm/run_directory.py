"""The run directory: its manifest, and the sizes and steps that a recipe asks for."""

import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darwinlm import dist
from darwinlm.errors import UserError
from darwinlm.files import (
    damaged,
    fault_of,
    file_checksum,
    naming_disk_faults,
    read_json,
    write_bytes,
    write_json,
)
from darwinlm.memory import naming_memory_faults, peak_memory_bytes
from darwinlm.progress import log
from darwinlm.recipe import Recipe
from darwinlm.settings import differences, make_recipe
from darwinlm.target import parse_target, split_targets

FORMAT = 1
LOCK = "lock"
"""The file in a run directory that says which process works on it."""
VERSION = "darwinlm"
"""The fact that says which version of this package began the run; another version may continue it."""


@dataclass(frozen=True)
class Size:
    """One of the sizes that a run is to give."""

    name: str
    target: Mapping[str, float | int]
    folder: Path
    prefix: str
    """Of the names of its stages."""


@dataclass(frozen=True)
class Step:
    """One of the times that a run prunes and recovers."""

    number: int
    folder: Path
    """Its database is in there; so are search, recovery and model of a step before the last."""
    prefix: str
    """Of the names of its stages."""
    sizes: list[Size]


STEP = "step "
"""What the names of stages of all steps but the last begin with."""


def run_steps(recipe: Recipe, run: Path) -> list[Step]:
    """The steps of a gradual run, of which the last leaves the result; of any other run, one."""
    steps = []
    for number in range(1, recipe.steps):
        name, folder = f"{STEP}{number}", run / f"step-{number}"
        size = Size(name, parse_target(recipe.target), folder, f"{name}: ")
        steps.append(Step(number, folder, size.prefix, [size]))
    return [*steps, Step(recipe.steps, run, "", run_sizes(recipe, run))]


def run_sizes(recipe: Recipe, run: Path) -> list[Size]:
    """The sizes of a family, the largest first, each in a folder of its own; or the one that is asked for."""
    targets = split_targets(recipe.target)
    if len(targets) == 1:
        return [Size(str(targets[0]), parse_target(targets[0]), run, "")]
    names = [str(target) for target in targets]
    sizes = [Size(name, parse_target(name), run / "sizes" / name, f"{name}: ") for name in names]
    return sorted(sizes, key=lambda size: -size.target["params"])


class RunDirectory:
    """Everything a run writes, under one folder; `manifest.json` says which stages are done."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @staticmethod
    def check(path: Path, recipe: Recipe) -> None:
        """Refuse, before any work, a folder that holds something else or another recipe's run. Writes nothing."""
        with naming_disk_faults(path):
            if path.exists() and not path.is_dir():
                raise UserError(f"--out {path} is a file; name a new folder or an earlier run")
            above = next((folder for folder in path.absolute().parents if folder.exists()), path)
            if not above.is_dir():
                raise UserError(f"--out {path} cannot be made: {above} is a file")
            if not path.exists() or all(_leftover(entry) for entry in path.iterdir()):
                return
            manifest = read_json(path / "manifest.json") if (path / "manifest.json").exists() else {}
        if "format" not in manifest:
            raise UserError(f"--out {path} holds something that is not a DarwinLM run; name a new or an empty folder")
        if manifest["format"] != FORMAT:
            raise UserError(
                f"--out {path} is a run of format {manifest['format']!r}, this version reads format {FORMAT}; "
                "name a new folder"
            )
        if not all(isinstance(manifest.get(key), dict) for key in ("recipe", "facts", "stages")):
            raise damaged(path / "manifest.json", "it lacks recipe, facts or stages")
        try:
            changed = differences(make_recipe(manifest["recipe"]), recipe)
        except UserError as error:
            raise UserError(
                f"--out {path} is a run whose recipe this version cannot read ({error}); name a new folder"
            ) from None
        if changed:
            raise UserError(
                f"--out {path} is a run of another recipe ({'; '.join(changed)}); name a new folder or go back to it, "
                f"as with --recipe {path / 'recipe.yaml'}"
            )

    @classmethod
    def open(cls, path: Path, recipe: Recipe, facts: Mapping[str, Any]) -> "RunDirectory":
        """Continue the run in `path`, or start one. `facts` are what must not change, except for `VERSION`."""
        cls.check(path, recipe)
        if (path / "manifest.json").exists():
            manifest = read_json(path / "manifest.json")
            for key, value in facts.items():
                before = manifest["facts"].get(key)
                if before == value:
                    continue
                if key != VERSION:
                    raise UserError(
                        f"--out {path}: {key} was {before!r} when this run began and is {value!r} now; name a new "
                        "folder, or bring it back"
                    )
                # The files of the stages have formats of their own, and are refused where they are too old.
                log.info("%s was begun by darwinlm %s and is continued by %s", path, before, value)
        else:
            manifest = {"format": FORMAT, "recipe": recipe.model_dump(mode="json"), "facts": dict(facts), "stages": {}}
            write_json(path / "manifest.json", manifest, sealed=True)
        # After the manifest, which alone makes a folder a run: one that stops in between can be gone on with.
        text = recipe.to_yaml().encode()
        if not (path / "recipe.yaml").exists() or (path / "recipe.yaml").read_bytes() != text:
            write_bytes(path / "recipe.yaml", text)
        return cls(path, manifest)

    @classmethod
    def recipe_of(cls, path: Path) -> Recipe:
        """The recipe of the run in `path`. Raises UserError if there is no run, or none that this version reads."""
        manifest = read_json(path / "manifest.json") if (path / "manifest.json").exists() else {}
        if not isinstance(manifest.get("recipe"), dict):
            raise UserError(f"{path} is not a DarwinLM run (there is no manifest.json with a recipe in it)")
        recipe = make_recipe(manifest["recipe"])
        cls.check(path, recipe)
        return recipe

    @staticmethod
    def change_recipe(path: Path, recipe: Recipe, stages: Collection[str]) -> None:
        """Give the run in `path` another recipe, with all `stages` (of each size, in the last step) to be done anew."""
        manifest = read_json(path / "manifest.json")
        for part in ("stages", "files"):
            entries = manifest.get(part, {})
            manifest[part] = {
                name: entry
                for name, entry in entries.items()
                if name.startswith(STEP) or name.split(": ")[-1] not in stages
            }
        manifest["recipe"] = recipe.model_dump(mode="json")
        # Written again by `open`; a run that stops in between has none rather than a wrong one.
        (path / "recipe.yaml").unlink(missing_ok=True)
        write_json(path / "manifest.json", manifest, sealed=True)

    @staticmethod
    def accept(path: Path, folder: Path) -> None:
        """Take the files in `folder`, which a stage of the run in `path` left, for what it left: they were changed on
        purpose."""
        manifest = read_json(path / "manifest.json")
        prefix = f"{folder.resolve().relative_to(path.resolve())}{os.sep}"
        for files in manifest.get("files", {}).values():
            for name in files:
                if name.startswith(prefix):
                    files[name] = file_checksum(path / name)
        write_json(path / "manifest.json", manifest, sealed=True)

    def done(self, stage: str) -> bool:
        """Whether `stage` has ended well."""
        return bool(self.manifest["stages"].get(stage, {}).get("done"))

    def facts(self, stage: str) -> dict[str, Any]:
        """What is known of `stage`; nothing if it has not begun."""
        known: dict[str, Any] = self.manifest["stages"].get(stage, {})
        return known

    def outputs(self, stage: str) -> dict[str, str]:
        """The files that `stage` left when it last ended well, from the run's folder on, with their checksums."""
        found: dict[str, str] = self.manifest.get("files", {}).get(stage, {})
        return found

    def verify(self, stage: str) -> None:
        """Read what a finished `stage` left; if a file is damaged or missing, say so and note it is to be run again."""
        if not self.done(stage):
            return
        for name, expected in self.outputs(stage).items():
            fault = fault_of(self.path, name, expected)
            if fault is not None:
                log.warning("%s %s: it is made again (%s)", self.path / name, fault, stage)
                self.undo(stage)

    def undo(self, stage: str) -> None:
        """Note that `stage` is to be run again."""
        if self.done(stage):
            self.manifest["stages"][stage]["done"] = False
            if dist.rank() == 0:
                self._write()

    def _write(self) -> None:
        write_json(self.path / "manifest.json", self.manifest, sealed=True)

    @contextmanager
    def stage(self, name: str, *outputs: Path) -> Iterator[dict[str, Any]]:
        """Run a stage; its seconds (over all attempts), peak memory and what the block puts into the dict it gets go to
        the manifest, and so do the checksums of `outputs`, the files or folders of files that it leaves.

        If a stage that is run again leaves other files than before, those that follow from it are to be run again too.
        """
        before = self.manifest["stages"].get(name, {}).get("seconds", 0.0)
        start = time.monotonic()
        done = False
        facts: dict[str, Any] = {}
        try:
            with naming_memory_faults(name):
                yield facts
            if dist.rank() == 0 and outputs:
                self._note(name, outputs)
            done = True
        finally:
            self.manifest["stages"][name] = {
                "done": done,
                "seconds": round(before + time.monotonic() - start, 3),
                "peak_memory_bytes": peak_memory_bytes(),
                **facts,
            }
            if dist.rank() == 0:
                self._write()

    def _note(self, stage: str, outputs: Sequence[Path]) -> None:
        files = [file for path in outputs for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
        sums = {str(file.relative_to(self.path)): file_checksum(file) for file in files if file.is_file()}
        if self.outputs(stage) not in ({}, sums):
            stages = list(self.manifest["stages"])
            for later in stages[stages.index(stage) + 1 :]:
                if _follows(later, stage):
                    self.manifest["stages"][later]["done"] = False
        self.manifest.setdefault("files", {})[stage] = sums


def _follows(later: str, stage: str) -> bool:
    """Whether what the stage `later` leaves follows from what `stage` does, which comes before it."""
    group, _, kind = stage.rpartition(": ")
    # Of one size of a family, the others know the search alone.
    return not group or group.startswith(STEP) or kind == "search" or later.startswith(f"{group}: ")


def run_of(folder: Path) -> Path | None:
    """The run that `folder` lies in, or None."""
    above = list(folder.resolve().parents)[:3]  # RUN/sizes/0.6/model
    return next((path for path in above if (path / "manifest.json").exists()), None)


def _leftover(entry: Path) -> bool:
    """Whether a process that was killed before its run began may have left this in the run directory."""
    return entry.suffix == ".draft" or entry.name == LOCK
