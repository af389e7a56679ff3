"""`darwinlm export`: export a pruned model to the format of an engine, and verify it before it replaces earlier
exports."""

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from darwinlm.adapters.config import load_config
from darwinlm.adapters.loading import DenseModel
from darwinlm.adapters.modeling_darwinlm import PrunedConfig, PrunedModel
from darwinlm.errors import EngineError, UserError
from darwinlm.export import llama_cpp, mlx, onnx
from darwinlm.export.gguf import FILE_TYPES, choose_architecture, context_length, gguf_package, write_gguf
from darwinlm.export.gguf_tokenizer import load_tokenizer, read_vocabulary
from darwinlm.export.hf import MODULE, find_model, load, renew_code
from darwinlm.export.native import native_config, write_native
from darwinlm.export.proof import LATIN, TEXT, Proof, ProofError, check, compare, logits_of, proof_tokens
from darwinlm.export.quantize import K_QUANTS, quantize, quantizer
from darwinlm.export.shapes import check_equal_groups, check_no_experts, check_no_linear_attention
from darwinlm.export.vllm import check_tensor_parallel, write_vllm
from darwinlm.files import new_file, new_folder, write_json
from darwinlm.lock import RunLock
from darwinlm.run_directory import RunDirectory, run_of

_STORED_AS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
DTYPES = (*FILE_TYPES, *K_QUANTS)
"""Types of weight matrices in a GGUF file."""
_MOST_DIFFERENCE = {"f32": 1e-3, "f16": 0.05, "bf16": 0.2, "q8_0": 0.5, **dict.fromkeys(K_QUANTS, 0.5)}
"""Maximum difference relative to the largest logit. Only float32 has no rounding, to which strongly pruned models are
sensitive; a wrong file differs by half and more."""
_MAGIC = b"GGUF"
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


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Options of single engines."""

    dtype: str | None
    tensor_parallel: int


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

    Raises:
        UserError: if there is no pruned model, the engine cannot run it, or the logits of the export differ.
    """
    if target not in (*TARGETS, "hf"):
        raise UserError(f"--to {target}: unknown target; choose one of {', '.join(TARGETS)}, hf")
    if dtype is not None and target != "gguf":
        raise UserError(f"--dtype only applies to --to gguf; {target} keeps the model's dtype")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: unknown type; choose one of {', '.join(DTYPES)}")
    if tensor_parallel > 1 and target != "vllm":
        raise UserError("--tensor-parallel only applies to --to vllm")
    if target == "hf":
        return _renew(source, out)
    return TARGETS[target](find_model(source), out, _Options(dtype=dtype, tensor_parallel=tensor_parallel))


def check_targets(targets: Sequence[str], dense: DenseModel) -> None:
    """Reject engines that cannot run the pruned `dense`, before any work. Raises UserError."""
    if "onnx" in targets:
        onnx.check_writer()
        check_no_linear_attention(dense.config, "export to ONNX")
    for target in {"vllm", "onnx"} & set(targets):
        check_no_experts(dense.config, target)
    if "mlx" in targets:
        mlx.check_mlx(dense.config)
    if "gguf" in targets:
        gguf_package()
        choose_architecture(dense.config)
        read_vocabulary(dense.tokenizer, dense.config.vocab_size, Path(dense.source))


def sites_kept_for(targets: Sequence[str]) -> set[str]:
    """Return the sites that no plan may remove completely, so that the engines need no stubs."""
    return {"layers.0.attention"} if "gguf" in targets else set()


def _export_gguf(folder: Path, out: Path | None, options: _Options) -> Exported:
    dtype, config = options.dtype, load_config(str(folder))
    architecture = choose_architecture(config)
    if dtype in K_QUANTS:
        quantizer()
    tokenizer = load_tokenizer(folder)
    vocabulary = read_vocabulary(tokenizer, config.vocab_size, folder)
    model = load(folder)
    dtype = dtype or _STORED_AS[model.dtype]
    file = out or folder.with_name(f"{folder.name}-{dtype}.gguf")
    _check_file(file)
    with new_file(file) as draft:
        if dtype in K_QUANTS:
            whole = file.with_name(f"{file.name}.whole.draft")
            try:
                # In the stored dtype of the weights, so that nothing is rounded twice.
                write_gguf(model, vocabulary, whole, _STORED_AS[model.dtype], file.stem, architecture)
                quantize(whole, draft, dtype)
            finally:
                whole.unlink(missing_ok=True)
        else:
            write_gguf(model, vocabulary, draft, dtype, file.stem, architecture)
        proof, notes = _prove_gguf(model, tokenizer, draft, dtype)
    if context_length(config) < config.max_position_embeddings:
        notes.append(
            "llama.cpp has no sliding windows in this architecture: the file supports "
            f"{context_length(config):,} positions (the window) instead of {config.max_position_embeddings:,}"
        )
    write_json(
        file.with_name(f"{file.name}.json"),
        {"target": "gguf", "architecture": architecture.name, "dtype": dtype, "proof": proof and asdict(proof)},
    )
    return Exported(path=file, proof=proof, notes=tuple(notes))


def _prove_gguf(model: PrunedModel, tokenizer: Any, file: Path, dtype: str) -> tuple[Proof | None, list[str]]:
    """Return the verification and notes. Raises ProofError if the output of llama.cpp differs."""
    engine = llama_cpp.engine_version()
    if engine is None:
        return None, [f"not verified: run pip install {llama_cpp.PACKAGE} and export again"]
    tokens = proof_tokens(tokenizer, context_length(cast(PrunedConfig, model.config)))
    try:
        answer = llama_cpp.ask(file, tokens, [TEXT, LATIN])
    except EngineError as error:
        raise ProofError(f"{engine} cannot run the file; export discarded: {error}") from None
    notes = []
    for text, found in zip((LATIN, TEXT), reversed(answer.token_ids), strict=True):
        if found != tokenizer(text).input_ids:
            message = f"{engine} tokenizes some text differently: {_first_difference(tokenizer, text, found)}"
            if text == LATIN:
                raise ProofError(f"{message}; export discarded")
            notes.append(message)
    model.float()
    proof = compare(logits_of(model, tokens), answer.logits_TV, engine)
    return check(proof, _MOST_DIFFERENCE[dtype], "file"), notes


def _first_difference(tokenizer: Any, text: str, found: list[int]) -> str:
    expected = tokenizer(text).input_ids
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(expected, found, strict=False)))
    pieces = [tokenizer.convert_ids_to_tokens(ids[same : same + 4]) for ids in (found, expected)]
    return f"after {tokenizer.decode(expected[:same])[-20:]!r} {pieces[0]} instead of {pieces[1]}"


def _check_file(file: Path) -> None:
    """Reject overwriting anything but a GGUF file. Raises UserError."""
    if file.is_dir():
        raise UserError(f"--out {file} is a folder; give a file name")
    if file.exists():
        with file.open("rb") as handle:
            if handle.read(len(_MAGIC)) != _MAGIC:
                raise UserError(f"--out {file} already exists and is not a GGUF file; give a new file name")


def _export_vllm(folder: Path, out: Path | None, options: _Options) -> Exported:
    config, devices = load_config(str(folder)), options.tensor_parallel
    check_no_experts(config, "vLLM")
    check_equal_groups(config, "vLLM")
    check_tensor_parallel(config, devices)
    target = out or folder.with_name(f"{folder.name}-vllm")
    _check_folder(target)
    model = load(folder)
    with new_folder(target) as draft:
        write_vllm(model, folder, draft, devices)
        proof = _prove_folder(load(folder, dtype=torch.float32), load(draft, dtype=torch.float32), folder)
        write_json(draft / _FACTS, {"target": "vllm", "tensor_parallel": devices, "proof": asdict(proof)})
    return Exported(
        path=target, proof=proof, notes=("not run in vLLM itself: the folder was compared in transformers",)
    )


def _export_native(folder: Path, out: Path | None, _: _Options) -> Exported:
    native = native_config(load_config(str(folder)))
    target = out or folder.with_name(f"{folder.name}-native")
    _check_folder(target)
    model = load(folder)
    with new_folder(target) as draft:
        write_native(model, native, folder, draft)
        written = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32, trust_remote_code=False)
        proof = _prove_folder(load(folder, dtype=torch.float32), written, folder)
        write_json(draft / _FACTS, {"target": "hf-native", "model_type": native.model_type, "proof": asdict(proof)})
    return Exported(path=target, proof=proof)


def _export_mlx(folder: Path, out: Path | None, _: _Options) -> Exported:
    mlx.check_mlx(load_config(str(folder)))
    target = out or folder.with_name(f"{folder.name}-mlx")
    _check_folder(target)
    model = load(folder)
    with new_folder(target) as draft:
        mlx.write_mlx(model, folder, draft)
        proof = _prove_elsewhere(model, folder, draft, mlx.engine_version(), mlx.mlx_logits)
        write_json(draft / _FACTS, {"target": "mlx", "proof": proof and asdict(proof)})
    notes = () if proof else (f"not verified: run pip install {mlx.PACKAGE} 'mlx[cpu]' and export again",)
    return Exported(path=target, proof=proof, notes=notes)


def _export_onnx(folder: Path, out: Path | None, _: _Options) -> Exported:
    onnx.check_writer()
    config = load_config(str(folder))
    check_no_experts(config, "export to ONNX")
    check_no_linear_attention(config, "export to ONNX")
    target = out or folder.with_name(f"{folder.name}-onnx")
    _check_folder(target)
    model = load(folder, dtype=torch.float32)
    with new_folder(target) as draft:
        onnx.write_onnx(model, draft)
        load_tokenizer(folder).save_pretrained(draft)
        proof = _prove_elsewhere(model, folder, draft, onnx.engine_version(), onnx.onnx_logits)
        write_json(draft / _FACTS, {"target": "onnx", "proof": proof and asdict(proof)})
    notes = () if proof else (f"not verified: run pip install {onnx.ENGINE} and export again",)
    return Exported(path=target, proof=proof, notes=(*notes, "the file has no KV cache: it processes whole texts"))


def _renew(source: Path, out: Path | None) -> Exported:
    folder = find_model(source)
    target = out or folder
    if not (folder / f"{MODULE}.py").exists():
        raise UserError(
            f"{folder} contains no {MODULE}.py to update; give a run, or a folder written by --to hf or vllm"
        )
    run = run_of(folder) if target.resolve() == folder.resolve() else None
    if target.resolve() != folder.resolve():
        _check_folder(target)
    model = load(folder, dtype=torch.float32)
    with RunLock(run) if run is not None else nullcontext() as lock:
        if lock is not None:
            lock.take()
        with new_folder(target) as draft:
            renew_code(folder, draft)
            written = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32, trust_remote_code=True)
            proof = _prove_folder(model, written, folder)
            if target.resolve() != folder.resolve():
                write_json(draft / _FACTS, {"target": "hf", "proof": asdict(proof)})
        if run is not None:
            RunDirectory.accept(run, target)
    return Exported(path=target, proof=proof)


def _prove_folder(model: PrunedModel, written: Any, folder: Path) -> Proof:
    """Compare two models in transformers, float32. Raises UserError."""
    tokens = proof_tokens(load_tokenizer(folder), model.config.max_position_embeddings)
    engine = f"transformers {transformers.__version__}"
    proof = compare(logits_of(model, tokens), logits_of(written, tokens), engine)
    return check(proof, _MOST_DIFFERENCE["f32"], "folder")


def _prove_elsewhere(
    model: PrunedModel,
    folder: Path,
    draft: Path,
    engine: str | None,
    logits: Callable[[Path, Sequence[int]], np.ndarray],
) -> Proof | None:
    """Compare `model`, loaded from `folder`, with `draft` in a float32 engine; None if the engine is not installed.

    Raises:
        ProofError: if the logits differ, or the engine cannot run the folder.
    """
    if engine is None:
        return None
    tokens = proof_tokens(load_tokenizer(folder), model.config.max_position_embeddings)
    try:
        found_TV = logits(draft, tokens)
    except Exception as error:  # Engines raise many kinds of errors.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ProofError(f"{engine} cannot run the folder; export discarded: {reason}") from None
    return check(compare(logits_of(model.float(), tokens), found_TV, engine), _MOST_DIFFERENCE["f32"], "folder")


def _check_folder(folder: Path) -> None:
    """Reject overwriting anything but an earlier export. Raises UserError."""
    if folder.is_file() or (folder.exists() and any(folder.iterdir()) and not (folder / _FACTS).exists()):
        raise UserError(f"--out {folder} already exists and is not an earlier export; give a new folder")


TARGETS: dict[str, Callable[[Path, Path | None, _Options], Exported]] = {
    "gguf": _export_gguf,
    "vllm": _export_vllm,
    "hf-native": _export_native,
    "mlx": _export_mlx,
    "onnx": _export_onnx,
}
"""Export function of each target."""
