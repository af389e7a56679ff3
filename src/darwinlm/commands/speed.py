"""`darwinlm evaluate --speed`: speed of a run's models, or of one model, in transformers, llama.cpp and vLLM.

All models of a table are timed in alternation in one process, so that other load on the machine slows all of them.
"""

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers

from darwinlm.config.exports import installed
from darwinlm.config.recipe import WorkloadRecipe
from darwinlm.engines import llama_cpp
from darwinlm.engines import vllm as vllm_engine
from darwinlm.errors import EngineError, UserError
from darwinlm.evaluation.measure import REPEATS, as_served, request_seconds
from darwinlm.export.gguf import choose_architecture, context_length, write_gguf
from darwinlm.export.gguf_tokenizer import read_vocabulary
from darwinlm.export.hf_native import native_config, write_native
from darwinlm.export.vllm import write_vllm
from darwinlm.models.modeling_darwinlm import PrunedConfig, PrunedModel
from darwinlm.run.directory import is_run
from darwinlm.run.models import models_of_run, one_model
from darwinlm.runtime.files import write_json
from darwinlm.runtime.progress import task

_NEW_TOKENS = 32
_FILE_TYPE = "f16"


def measure_speeds(
    source: str, batches: Sequence[int], lengths: Sequence[int], vllm_python: str | None = None
) -> dict[str, Any]:
    """Measure prefill and decode tokens/s, by batch size and prompt length.

    Args:
        source: finished run, model folder, or Hub model id.
        batches: batch sizes; llama.cpp is only timed at 1.
        lengths: prompt lengths in tokens.
        vllm_python: interpreter of an environment with vLLM, if this one has none.

    Returns:
        One entry per engine, with `rows` or the reason why it was `skipped`; for a run it is also written to
        `report/speed.json`.

    Raises:
        UserError: if `source` contains no model, a prompt exceeds its maximum length, or `vllm_python` has no vLLM.
    """
    vllm = vllm_engine.engine_version(vllm_python)
    run = Path(source) if is_run(Path(source)) else None
    loaders = models_of_run(run) if run is not None else {"model": partial(one_model, source)}
    models, tokenizers = {}, {}
    for name, loader in loaders.items():
        models[name], tokenizers[name] = loader()
    longest = max(lengths) + _NEW_TOKENS
    known = min(model.config.max_position_embeddings for model in models.values())
    if longest > known:
        raise UserError(
            f"--lengths {max(lengths)} and {_NEW_TOKENS} new tokens exceed the model's maximum of {known} positions"
        )
    results = {
        "engines": [
            _in_transformers(models, batches, lengths),
            _in_llama_cpp(models, tokenizers, lengths),
            _in_vllm(models, batches, lengths, vllm, vllm_python),
        ]
    }
    if run is not None:
        write_json(run / "report" / "speed.json", results)
    return results


def _in_transformers(
    models: Mapping[str, PrunedModel], batches: Sequence[int], lengths: Sequence[int]
) -> dict[str, Any]:
    rows = []
    served = as_served(models, next(iter(models.values())).dtype)
    for batch in batches:
        for length in lengths:
            request = WorkloadRecipe(batch_size=batch, prompt_tokens=length, new_tokens=_NEW_TOKENS)
            rows.append(_row(batch, length, request_seconds(served, request)))
    model = next(iter(served.values()))
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else _threads()
    dtype = str(model.dtype).removeprefix("torch.")
    return {"engine": f"transformers {transformers.__version__}", "device": device, "dtype": dtype, "rows": rows}


def _in_llama_cpp(
    models: Mapping[str, PrunedModel], tokenizers: Mapping[str, Any], lengths: Sequence[int]
) -> dict[str, Any]:
    """Measure on the CPU, with the engine in which exports are verified."""
    engine = installed(llama_cpp.PACKAGE)
    if engine is None:
        return {"engine": "llama.cpp", "skipped": f"run pip install {llama_cpp.PACKAGE}"}
    facts = {"engine": engine, "device": f"{llama_cpp.threads()} CPU threads", "dtype": _FILE_TYPE}
    try:
        with tempfile.TemporaryDirectory(prefix="darwinlm-speed-") as scratch:
            files: dict[str, Path] = {}
            for name, model in models.items():
                config = cast(PrunedConfig, model.config)
                if max(lengths) + _NEW_TOKENS > context_length(config):
                    raise UserError(
                        f"a llama.cpp file supports {context_length(config):,} positions, the sliding window"
                    )
                vocabulary = read_vocabulary(tokenizers[name], config.vocab_size, Path(tokenizers[name].name_or_path))
                files[name] = Path(scratch) / f"{len(files)}.gguf"
                write_gguf(model, vocabulary, files[name], _FILE_TYPE, name, choose_architecture(config))
            with task(f"evaluation ({engine})", 1) as progress:
                times = llama_cpp.time_requests(files, [(length, _NEW_TOKENS) for length in lengths], REPEATS)
                progress.advance()
    except (UserError, EngineError) as reason:
        return facts | {"skipped": str(reason)}
    return facts | {"rows": [_row(1, length, one) for length, one in zip(lengths, times, strict=True)]}


def _in_vllm(
    models: Mapping[str, PrunedModel],
    batches: Sequence[int],
    lengths: Sequence[int],
    engine: str | None,
    python: str | None,
) -> dict[str, Any]:
    """Run uniform models by vLLM's own code, as users do, and others by its Transformers backend."""
    if engine is None:
        return {
            "engine": "vLLM",
            "skipped": "not installed here; --vllm PYTHON selects another environment",
        }
    requests = [(batch, length, _NEW_TOKENS) for batch in batches for length in lengths]
    vocabulary = min(model.config.vocab_size for model in models.values())
    with tempfile.TemporaryDirectory(prefix="darwinlm-speed-") as scratch:
        nothing = Path(scratch) / "nothing"
        nothing.mkdir()
        folders: dict[str, Path] = {}
        for name, model in models.items():
            # Leave the device's memory to vLLM.
            model.to("cpu")
            folders[name] = Path(scratch) / str(len(folders))
            try:
                write_native(model, native_config(cast(PrunedConfig, model.config)), nothing, folders[name])
            except UserError:
                write_vllm(model, nothing, folders[name], 1)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            with task(f"evaluation ({engine})", 1) as progress:
                device, times = vllm_engine.time_requests(folders, requests, REPEATS, vocabulary, python)
                progress.advance()
        except EngineError as reason:
            return {"engine": engine, "skipped": str(reason)}
    rows = [_row(batch, length, one) for (batch, length, _), one in zip(requests, times, strict=True)]
    dtype = str(next(iter(models.values())).dtype).removeprefix("torch.")
    return {"engine": engine, "device": device, "dtype": dtype, "rows": rows}


def _row(batch: int, length: int, seconds: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    return {
        "batch_size": batch,
        "prompt_tokens": length,
        "new_tokens": _NEW_TOKENS,
        "models": {
            name: {
                "prefill_tokens_per_second": batch * length / prompt,
                "decode_tokens_per_second": batch * _NEW_TOKENS / new,
            }
            for name, (prompt, new) in seconds.items()
        },
    }


def _threads() -> str:
    return f"{torch.get_num_threads()} CPU threads"
