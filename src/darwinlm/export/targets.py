"""`darwinlm export`: export a pruned model to the format of an engine, and verify it before it replaces earlier
exports."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import get_args

from darwinlm.config.exports import Target, installed
from darwinlm.errors import UserError
from darwinlm.export import renewal
from darwinlm.export.engine import Engine, Export
from darwinlm.export.proof import Proof, ProofError, check, compare, logits_of, proof_tokens
from darwinlm.models.loading import DenseModel
from darwinlm.models.pruned import find_model
from darwinlm.run.directory import RunDirectory, run_of
from darwinlm.run.lock import RunLock
from darwinlm.runtime.files import new_file, new_folder, write_json

TARGETS: tuple[str, ...] = get_args(Target)
ENGINES: dict[str, Engine] = {
    name: import_module(f"darwinlm.export.{name.replace('-', '_')}").ENGINE for name in TARGETS
} | {"hf": renewal.ENGINE}
"""Engine of each target, and `hf`, which writes a model's folder again."""
DTYPES = tuple(ENGINES["gguf"].dtypes)
"""Types of weight matrices in a GGUF file."""
_MOST_DIFFERENCE = 1e-3
"""Maximum difference relative to the largest logit, in float32; a wrong export differs by half and more."""
_FACTS = "export.json"
"""File in an exported folder with its target and verification."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Result of an export."""

    path: Path
    proof: Proof | None
    notes: tuple[str, ...] = ()
    """Notes for the user: what was not verified, what the engine does not support."""

    def lines(self) -> list[str]:
        """Return all of it as text lines."""
        proved = [f"verified: {self.proof}"] if self.proof else []
        return [*proved, *self.notes, f"exported: {self.path}"]


def export_model(
    source: Path, target: str, out: Path | None = None, dtype: str | None = None, tensor_parallel: int = 1
) -> Exported:
    """Export the pruned model in `source` for another engine.

    Args:
        source: run directory, or the folder of a pruned model.
        target: one of `TARGETS`; or `hf`, which writes the folder again with this version's modelling file.
        out: output path; by default next to the model's folder, and for `hf` the folder itself.
        dtype: type of a GGUF file's weight matrices (`DTYPES`); by default the model's dtype.
        tensor_parallel: tensor-parallel size in vLLM.

    Returns:
        Where the export is, and how its logits were verified.

    Raises:
        UserError: if there is no pruned model, the engine cannot run it, or the logits of the export differ.
    """
    if target not in ENGINES:
        raise UserError(f"--to {target}: unknown target; choose one of {', '.join(ENGINES)}")
    engine = ENGINES[target]
    if dtype is not None and not engine.dtypes:
        raise UserError(f"--dtype only applies to --to {_with('dtypes')}; {target} keeps the model's dtype")
    if dtype is not None and dtype not in engine.dtypes:
        raise UserError(f"--dtype {dtype}: unknown type; choose one of {', '.join(engine.dtypes)}")
    if tensor_parallel > 1 and not engine.tensor_parallel:
        raise UserError(f"--tensor-parallel only applies to --to {_with('tensor_parallel')}")
    folder = find_model(source)
    export = Export(source=folder, requested_dtype=dtype, devices=tensor_parallel)
    engine.check(export)
    engine.check_export(export)
    path = out or (folder.with_name(folder.name + engine.suffix.format(export=export)) if engine.suffix else folder)
    in_place = not engine.suffix and path.resolve() == folder.resolve()
    if not in_place:
        _check_path(path, engine)
    with ExitStack() as stack:
        run = run_of(folder) if in_place else None
        if run is not None:
            stack.enter_context(RunLock(run)).take()
        with new_file(path) if engine.magic else new_folder(path) as draft:
            facts = {"target": target, **engine.write(export, draft)}
            proof = _prove(engine, export, draft)
            facts["proof"] = proof and asdict(proof)
            if not engine.magic and not in_place:
                write_json(draft / _FACTS, facts)
        if engine.magic:
            write_json(path.with_name(f"{path.name}.json"), facts)
        if run is not None:
            RunDirectory.accept(run, path)
    return Exported(path=path, proof=proof, notes=tuple(export.notes))


def check_targets(targets: Sequence[str], dense: DenseModel) -> None:
    """Reject engines that cannot run the pruned `dense`, before any work. Raises UserError."""
    for target in targets:
        ENGINES[target].check(dense)


def sites_kept_for(targets: Sequence[str]) -> set[str]:
    """Return the sites that no plan may remove completely, so that the engines need no stubs."""
    return {site for target in targets for site in ENGINES[target].kept_sites}


def _with(option: str) -> str:
    return " or ".join(name for name, engine in ENGINES.items() if getattr(engine, option))


def _check_path(path: Path, engine: Engine) -> None:
    """Reject overwriting anything but an earlier export. Raises UserError."""
    if not engine.magic:
        if path.is_file() or (path.exists() and any(path.iterdir()) and not (path / _FACTS).exists()):
            raise UserError(f"--out {path} already exists and is not an earlier export; give a new folder")
    elif path.is_dir():
        raise UserError(f"--out {path} is a folder; give a file name")
    elif path.exists():
        with path.open("rb") as handle:
            if handle.read(len(engine.magic)) != engine.magic:
                kind = engine.name.upper()
                raise UserError(f"--out {path} already exists and is not a {kind} file; give a new file name")


def _prove(engine: Engine, export: Export, draft: Path) -> Proof | None:
    """Compare a draft in its engine with the pruned model in float32; None if the engine is not installed.

    Raises:
        ProofError: if the logits differ, or the engine cannot run the draft.
    """
    version, what = installed(engine.packages[0]), "file" if engine.magic else "folder"
    if version is None:
        export.notes.insert(0, f"not verified: run pip install {' '.join(engine.packages)} and export again")
        return None
    tokens = proof_tokens(export.tokenizer, engine.positions(export.config))
    try:
        found_TV = engine.logits(export, draft, tokens)
    except UserError:
        raise
    except Exception as error:  # Engines raise many kinds of errors.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ProofError(f"{version} cannot run the {what}; export discarded: {reason}") from None
    most = engine.dtypes[export.dtype] if engine.dtypes else _MOST_DIFFERENCE
    return check(compare(logits_of(export.load_exact(), tokens), found_TV, version), most, what)
