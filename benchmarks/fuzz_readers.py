"""Fuzz all readers with coverage guidance: any input must be accepted, or refused in one line.

    pip install atheris
    PYTHONPATH=tests python benchmarks/fuzz_readers.py --seconds 120

Each reader gets bytes that libFuzzer mutates from valid files, guided by the coverage of this package and of PyYAML. A
reader fails if it raises anything but a one-line `UserError`. Files with a checksum are fuzzed before it is added.
Prints executions and seconds, and exits with 1 if a reader failed; the failing input is kept in a folder that is
printed.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

READERS = ("recipe", "setting", "plan", "manifest", "weights", "database", "checkpoint")
WORST = 8192
"""Maximum length in bytes; the tests cover longer inputs."""


def reader(name: str, folder: Path) -> tuple[Callable[[bytes], object], list[bytes]]:
    """Return the function to fuzz, and valid inputs to start from."""
    import torch
    from safetensors.torch import save
    from spaces import TINY_SPACE

    from darwinlm.config.loading import load_recipe, parse_override
    from darwinlm.database.store import Database, read_space
    from darwinlm.models.checkpoint import Checkpoint
    from darwinlm.plan import Plan
    from darwinlm.run.directory import RunDirectory
    from darwinlm.runtime.files import find_fault, read_json, write_json

    asked = {"model": "m", "target": 0.5}
    recipe = load_recipe("quick", asked)
    tensors = {f"layers.{i}.weight": torch.full((2, 3), 0.5) for i in range(2)}

    def sealed(content: bytes, file: Path) -> None:
        try:
            payload = json.loads(content)
            write_json(file, payload if isinstance(payload, dict) else {"payload": payload}, sealed=True)
        except (ValueError, RecursionError):  # not JSON: write it unchanged
            file.write_bytes(content)

    def read_recipe(content: bytes) -> None:
        (folder / "recipe.yaml").write_bytes(content)
        load_recipe(folder / "recipe.yaml", asked)

    def read_setting(content: bytes) -> None:
        key, value = parse_override(content.decode("utf-8", "replace"))
        load_recipe("quick", {**asked, key: value})

    def read_plan(content: bytes) -> None:
        (folder / "plan.json").write_bytes(content)
        Plan.from_dict(read_json(folder / "plan.json"), TINY_SPACE)

    def read_manifest(content: bytes) -> None:
        sealed(content, folder / "manifest.json")
        RunDirectory.recipe_of(folder)
        run = RunDirectory.open(folder, recipe, {})
        for stage in list(run.manifest["stages"]):
            run.verify(stage)

    def read_weights(content: bytes) -> None:
        (folder / "model.safetensors").write_bytes(content)
        found = Checkpoint(str(folder))
        found.check_names(found.shapes)
        found.fingerprint(found.shapes)

    def read_database(content: bytes) -> None:
        sealed(content, folder / "index.json")
        database = Database(folder)
        database.forget_damaged()
        read_space(folder)

    def read_checkpoint(content: bytes) -> None:
        sealed(content, folder / "checksums.json")
        find_fault(folder)

    plan = Plan(levels=(0, 1, 2, 0)).to_dict(TINY_SPACE)
    entry = {"layer": 0, "kind": "mlp", "blake2b": "0" * 32}
    entry |= {key: [2, 1, 0] for key in ("units", "parameters", "kv_elements", "errors")}
    manifest = {"format": 1, "recipe": recipe.model_dump(mode="json"), "facts": {}, "files": {"corpus": {"a": "0"}}}
    manifest["stages"] = {"corpus": {"done": True, "seconds": 1.0}}
    found: dict[str, tuple[Callable[[bytes], object], list[bytes]]] = {
        "recipe": (read_recipe, [recipe.to_yaml().encode(), b"search: {offspring: 8}\n"]),
        "setting": (read_setting, [b"search.offspring=8", b"target=0.8,0.6", b"search.survivors=[2, 1]"]),
        "plan": (read_plan, [json.dumps(plan).encode()]),
        "manifest": (read_manifest, [json.dumps(manifest).encode()]),
        "weights": (read_weights, [save(tensors)]),
        "database": (
            read_database,
            [json.dumps({"format": 2, "sites": {"layers.0.mlp": entry}, "fixed_parameters": 10}).encode()],
        ),
        "checkpoint": (read_checkpoint, [json.dumps({"weights.safetensors": "0" * 32}).encode()]),
    }
    return found[name]


def fuzz(name: str, seconds: int, kept: Path) -> None:
    """Fuzz one reader in this process; does not return."""
    import atheris

    with atheris.instrument_imports(include=["darwinlm", "yaml"]):
        import yaml  # noqa: F401

        from darwinlm.database import store  # noqa: F401
        from darwinlm.errors import UserError
        from darwinlm.models import checkpoint  # noqa: F401
    corpus, folder = kept / "corpus", kept / "files"
    corpus.mkdir(parents=True)
    folder.mkdir()
    read, seeds = reader(name, folder)
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)

    def once(content: bytes) -> None:
        try:
            read(content)
        except UserError as error:
            if "\n" in str(error) or len(str(error)) > 4_000:
                raise AssertionError(f"not one line: {error}") from error

    options = [f"-max_total_time={seconds}", f"-max_len={WORST}", f"-artifact_prefix={kept}/", str(corpus)]
    atheris.Setup([sys.argv[0], *options], once)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("readers", nargs="*", default=READERS, help=f"any of {', '.join(READERS)}; default: all")
    parser.add_argument("--seconds", type=int, default=120, help="time limit of each reader")
    parser.add_argument("--keep", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.keep:
        fuzz(arguments.readers[0], arguments.seconds, arguments.keep)
    failed = 0
    for name in arguments.readers:
        kept = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
        command = [sys.executable, __file__, name, "--seconds", str(arguments.seconds), "--keep", str(kept)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        runs = re.search(r"Done (\d+) runs? in (\d+) second", done.stderr)
        if runs and done.returncode == 0:
            print(f"{name:10} {int(runs[1]):9,} executions in {runs[2]} s: none failed", flush=True)
            continue
        failed += 1
        (kept / "log.txt").write_text(done.stderr)
        print(f"{name:10} failed, see {kept}:\n{done.stderr[-3000:]}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
