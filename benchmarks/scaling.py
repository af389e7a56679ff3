"""Predict the costs of the paper's three cases and of a 70B model from their shapes, with `darwinlm plan`.

    python benchmarks/scaling.py --gpu h100 --gpus 8
    python benchmarks/scaling.py --trace --gpus 1 --gpu-memory 80

`--trace` runs the stages themselves on tensors without content, and counts their peak memory (`live_bytes.py`).
"""

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from live_stages import Trace, fake_ranks

from darwinlm.commands.plan import plan_run
from darwinlm.config.loading import load_recipe, parse_override
from darwinlm.config.recipe import Recipe
from darwinlm.config.target import parse_target
from darwinlm.estimate.rates import GPUS
from darwinlm.models.config import load_sizes

CASES = {
    "Llama-2-7B": ("llama2_7b_2.7b", "2.7B", {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
    }),
    "Llama-3.1-8B": ("llama3.1_8b_4.6b", "4.6B", {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    }),
    "Qwen2.5-14B": ("qwen2.5_14b_8.4b", "8.4B", {
        "model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48,
        "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 32768,
    }),
    "Llama-3.1-70B": ("llama3.1_8b_4.6b", "0.6", {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    }),
}  # fmt: skip
"""Recipe, target and config by name."""
OURS = {
    "search.descent_rounds": 4, "search.sensitivity_tokens": 65_536, "search.generations": 8, "search.offspring": 8,
    "search.survivors": [2, 1], "search.trial_tokens": [16_384, 65_536], "search.score_tokens": [8_192, 16_384],
    "search.learning_rate": "auto", "search.trial_loss": "distillation",
    "recovery.refit_tokens": 262_144, "recovery.distillation": 0.5, "database.granularity": "kv_group",
}  # fmt: skip
"""Settings that replace the paper's search: descent by sensitivities and a short evolution; refit and distillation."""

ONE_GPU = {"recovery.lora_rank": 64, "recovery.micro_batch_size": 1, "recovery.sharding": "none"}
"""Settings of the training on one GPU: low-rank updates."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--trace", action="store_true", help="count the memory of all stages instead of predicting it")
    parser.add_argument("--gpu-memory", type=float, default=80, help="device memory for --trace, in GB")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings for --trace")
    arguments = parser.parse_args()
    if arguments.trace:
        more = (ONE_GPU if arguments.gpus == 1 else {}) | dict(parse_override(text) for text in arguments.set)
        print("| case | stage | device (GB) | CPU memory (GB) |\n|---|---|---|---|")
        for name, search, recipe in cases(arguments.cases, more):
            for stage in traced(recipe, arguments.gpu_memory * 1e9, arguments.gpus).stages():
                # A fresh process for each stage: what libraries cache, such as masks, has no content.
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    given = recipe, arguments.gpu_memory * 1e9, arguments.gpus, stage
                    device, host = pool.submit(peak_of, *given).result()
                numbers = f"{device / 1e9:.1f} | {host / 1e9:.1f}"
                print(f"| {name} to {recipe.target}, {search} | {stage} | {numbers} |", flush=True)
        return
    print(f"{arguments.gpus} x {arguments.gpu}: hours and, in parentheses, GB on each device")
    print("| case | database | search | recovery, 10B tokens | disk (GB) |\n|---|---|---|---|---|")
    for name, search, recipe in cases(arguments.cases):
        _, costs = plan_run(recipe, arguments.gpus, arguments.gpu)
        cells = [f"{stage.seconds / 3600:.1f} ({stage.memory / 1e9:.0f})" for stage in costs.stages[:3]]
        print(f"| {name} to {recipe.target}, {search} | {' | '.join(cells)} | {costs.disk / 1e9:.0f} |")


def traced(recipe: Recipe, memory: float, ranks: int) -> Trace:
    """Return the trace of a run on devices of `memory` bytes."""
    return Trace(load_sizes(recipe.model), recipe, parse_target(recipe.target)["params"], memory, ranks)


def peak_of(recipe: Recipe, memory: float, ranks: int, stage: str) -> tuple[int, int]:
    """Return the bytes of a stage on the device and in CPU memory."""
    with fake_ranks(ranks if stage == "training" else 1):
        peak = traced(recipe, memory, ranks).peak(stage)
    return peak.device, peak.host


def cases(names: list[str], more: Mapping[str, Any] | None = None) -> Iterator[tuple[str, str, Recipe]]:
    """Yield name, search and recipe, with `more` settings; the model's folder exists until the next one."""
    for name in names:
        recipe, target, config = CASES[name]
        for search, settings in (("the paper's", {}), ("ours", OURS)):
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **config}))
                yield name, search, load_recipe(recipe, {"model": folder, "target": target, **settings, **(more or {})})


if __name__ == "__main__":
    main()
