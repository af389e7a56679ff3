"""Evaluation of several models on the same tokens and the same machine: quality, size and speed."""

import copy
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from darwinlm.config.recipe import WorkloadRecipe
from darwinlm.errors import UserError
from darwinlm.metrics.kl import DenseReference
from darwinlm.metrics.latency import time_request
from darwinlm.models.families import has_attention
from darwinlm.models.loading import served_dtype
from darwinlm.models.modeling_darwinlm import PrunedModel
from darwinlm.models.streaming import is_streamed
from darwinlm.runtime.memory import naming_memory_faults
from darwinlm.runtime.progress import log, task

SAMPLE_PROMPT = "The best way to learn something new is"
_SAMPLE_TOKENS = 40
REPEATS = 3
"""Timed passes of each model; the median is reported."""


def measure(
    models: Mapping[str, PrunedModel],
    test_BT: Tensor,
    workload: WorkloadRecipe,
    dtype: torch.dtype,
) -> list[dict[str, Any]]:
    """Return one row per model: parameters, perplexity and KL from the dense model, KV-cache bytes, speed
    (None if layers are streamed, or the request does not fit in memory).

    Args:
        models: models by name, in the dtype to evaluate them in, including `dense`; all are evaluated on its device,
            wherever they are.
        test_BT: token ids of the test split, (blocks, tokens).
        workload: request whose speed is measured.
        dtype: stored dtype of the models; used for cache bytes, and to choose the dtype of the speed measurement.
    """
    device = models["dense"].device
    reference = DenseReference(models["dense"], test_BT)
    rows: list[dict[str, Any]] = []
    with task("evaluation (models)", len(models)) as progress:
        for name, model in models.items():
            with on_device(model, device):
                fidelity = reference.compare(model)
            # The dense model's KL is 0 by definition; rounding would show as 1e-12.
            kl = 0.0 if name == "dense" else fidelity.kl
            rows.append(
                {
                    "name": name,
                    "parameters": parameters_of(model),
                    "perplexity": fidelity.perplexity,
                    "kl": kl,
                    "kv_cache_bytes_per_token": kv_cache_bytes(model, dtype),
                }
            )
            progress.advance(note=name)
    del reference
    found: dict[str, dict[str, float]] = {}
    # The speed of layer streaming says nothing about the model.
    if not any(map(is_streamed, models.values())):
        try:
            with naming_memory_faults("speed"):
                found = speeds(as_served(models, dtype), workload)
        except UserError as fault:
            # Budgets are only calculated for this request, so it may be too large to run; that should not end the run.
            reason = str(fault).partition("; ")[0]
            log.warning("%s: the request in workload is not timed; darwinlm evaluate --speed times others", reason)
    for row in rows:
        row |= {"prefill_tokens_per_second": None, "decode_tokens_per_second": None} | found.get(row["name"], {})
    return rows


@contextmanager
def on_device(model: PrunedModel, device: torch.device) -> Iterator[None]:
    """Move `model` to `device` during the block, and then back."""
    home = model.device
    moved_to(model, device)
    try:
        yield
    finally:
        moved_to(model, home)


def moved_to(model: PrunedModel, device: torch.device) -> PrunedModel:
    """Move `model` to `device`; a model with streamed layers is not moved."""
    return model if is_streamed(model) else model.to(device)


def as_served(models: Mapping[str, PrunedModel], dtype: torch.dtype) -> dict[str, PrunedModel]:
    """Convert models stored in `dtype` to the best dtype to run them in, on the device of the first model."""
    dtype = served_dtype(dtype, next(iter(models.values())).device)
    return {name: model if model.dtype == dtype else copy.deepcopy(model).to(dtype) for name, model in models.items()}


def parameters_of(model: PrunedModel) -> int:
    """Return the number of parameters of `model`, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def kv_cache_bytes(model: PrunedModel, dtype: torch.dtype) -> int:
    """Return the KV-cache bytes per token in `dtype`."""
    config = model.config
    heads = sum(
        config.layer(layer).num_key_value_heads
        for layer in range(config.num_hidden_layers)
        if has_attention(config, layer)
    )
    return int(2 * heads * config.head_dim * dtype.itemsize)


def speeds(models: Mapping[str, PrunedModel], workload: WorkloadRecipe) -> dict[str, dict[str, float]]:
    """Measure median prefill and decode tokens/s."""
    request = workload.timed
    return {
        name: {
            "prefill_tokens_per_second": request.batch_size * request.prompt_tokens / prompt,
            "decode_tokens_per_second": request.batch_size * request.new_tokens / new,
        }
        for name, (prompt, new) in request_seconds(models, request).items()
    }


def request_seconds(models: Mapping[str, PrunedModel], workload: WorkloadRecipe) -> dict[str, tuple[float, float]]:
    """Measure median seconds for a request's prompt and for its new tokens; models alternate, after an untimed pass.

    All models are timed on the device of the first.
    """
    device = next(iter(models.values())).device
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with task("evaluation (speed)", REPEATS + 1) as progress:
        for repeat in range(REPEATS + 1):
            for name, model in models.items():
                with on_device(model, device):
                    timed = time_request(
                        model,
                        batch_size=workload.batch_size,
                        prompt_tokens=workload.prompt_tokens,
                        new_tokens=workload.new_tokens,
                    )
                if repeat > 0:
                    times[name].append(timed)
            progress.advance()
    return {
        name: (statistics.median(t[0] for t in timed), statistics.median(t[1] for t in timed))
        for name, timed in times.items()
    }


def write_sample(model: PrunedModel, tokenizer: Any) -> str:
    """Generate a continuation of `SAMPLE_PROMPT` by greedy decoding."""
    prompt = tokenizer(SAMPLE_PROMPT, return_tensors="pt").to(model.device)
    generate: Any = model.generate
    ids = generate(
        **prompt,
        max_new_tokens=_SAMPLE_TOKENS,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    text: str = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return text
