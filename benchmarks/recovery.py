"""Compare recovery objectives and trained parameters from one plan at equal wall-clock time.

    darwinlm prune smollm2 --target 0.6 --data FOLDER --out RUN --set data.train_tokens=1M --set recovery.tokens=0
    python benchmarks/recovery.py RUN --evaluation FILE --seconds 900

All methods start from the plan found by RUN. Each is first timed on a few steps, alternating with the others. It then
trains for the number of tokens that takes `--seconds` by this timing, so that noise during training does not change it.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from darwinlm.config.recipe import RecoveryRecipe
from darwinlm.data.corpus import load_corpus, read_corpus
from darwinlm.database.store import Database
from darwinlm.metrics.kl import DenseReference
from darwinlm.models.cutting import build_model
from darwinlm.models.loading import choose_device, fast_dtype, load_dense
from darwinlm.models.modeling_darwinlm import PrunedModel
from darwinlm.models.smollm2 import resolve
from darwinlm.plan import Plan
from darwinlm.recovery.refit import refit
from darwinlm.recovery.training import recover
from darwinlm.run.directory import RunDirectory
from darwinlm.runtime.files import read_json

METHODS = {
    "next-token": {"distillation": 0.0},
    "half and half": {"distillation": 0.5},
    "distillation": {"distillation": 1.0},
    "half and half, no refit": {"distillation": 0.5, "refit_tokens": 0},
    "LoRA, half and half": {"distillation": 0.5, "lora_rank": 64, "learning_rate": 1e-3},
}
"""Settings of `recovery`, in addition to those on the command line."""
_FEW, _MORE = 2, 5
"""Optimizer steps; the time per step is the difference in seconds over the difference in steps."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory with a finished search")
    parser.add_argument("--evaluation", required=True, help="held-out text file, read by no method")
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of the evaluation text")
    parser.add_argument("--seconds", type=float, default=900, help="training time of each method")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="recovery settings of all methods")
    arguments = parser.parse_args()

    recipe = RunDirectory.recipe_of(arguments.run)
    dense = load_dense(resolve(recipe.model), recipe.database.granularity, choose_device(recipe.device))
    database, corpus = Database(arguments.run / "database"), load_corpus(arguments.run / "corpus.safetensors")
    space = database.space(dense.sites)
    plan = Plan.from_dict(read_json(arguments.run / "search" / "best_plan.json"), space)
    cuts = database.cuts(dense.sites, plan.levels, dense.device)
    few = {"calibration_tokens": 1, "train_tokens": 1, "validation_tokens": 1, "test_tokens": arguments.tokens}
    text = read_corpus(recipe.data.model_copy(update={"source": arguments.evaluation, **few}), dense.tokenizer, 0)
    judges = {
        "evaluation text": DenseReference(dense.model, text.splits["test"].input_ids_BT),
        "test split": DenseReference(dense.model, corpus.splits["test"].input_ids_BT),
    }
    teacher = dense.load(dense.device, fast_dtype(dense.device))
    length = recipe.data.sequence_length
    common = {key: json.loads(value) for key, value in (setting.split("=") for setting in arguments.set)}
    settings = {
        "run": arguments.run.name, "target": recipe.target, "seconds": arguments.seconds, "tokens": arguments.tokens,
        "threads": torch.get_num_threads(), "machine": platform.machine(), "torch": torch.__version__, **common,
    }  # fmt: skip
    print(json.dumps(settings), flush=True)

    def started(method: RecoveryRecipe) -> PrunedModel:
        model = build_model(dense.config, dense.sites, dense.weights, cuts, trainable=True)
        if method.refit_tokens:
            refit(model, dense.model, corpus.splits["train"].first(method.refit_tokens).input_ids_BT)
        return model

    def train(method: RecoveryRecipe, steps: int, model: PrunedModel, evaluations: int):  # type: ignore[no-untyped-def]
        method = method.model_copy(update={"tokens": steps * method.batch_size * length, "evaluations": evaluations})
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            text, validation = corpus.splits["train"], corpus.splits["validation"]
            model, done = recover(
                model, teacher, text, validation, method, seed=0, folder=Path(folder), device=dense.device
            )
            return model, done, time.perf_counter() - start

    methods = {name: RecoveryRecipe(**{**common, **METHODS[name]}) for name in arguments.methods}
    spent: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(2):
        for name, method in methods.items():
            plain = method.model_copy(update={"refit_tokens": 0})
            seconds = [train(plain, steps, started(plain), 0)[2] for steps in (_FEW, _MORE)]
            spent[name].append((seconds[1] - seconds[0]) / (_MORE - _FEW))
    before = started(next(iter(methods.values())).model_copy(update={"refit_tokens": 0}))
    for judge, reference in judges.items():
        found = reference.compare(before)
        print(f"found, {judge}: KL {found.kl:.4f}, perplexity {found.perplexity:.2f}", flush=True)
    for name, method in methods.items():
        each = statistics.median(spent[name])
        steps = max(1, round(arguments.seconds / each))
        model, done, seconds = train(method, steps, started(method), 8)
        tokens = steps * method.batch_size * length
        print(f"{name}: {each:.2f} s per step, {steps} steps, {tokens:,} tokens, {seconds:.0f} s", flush=True)
        for judge, reference in judges.items():
            found = reference.compare(model)
            print(f"  {judge}: KL {found.kl:.4f}, perplexity {found.perplexity:.2f}", flush=True)
        print(f"  curve: {json.dumps(done.evaluations)}", flush=True)


if __name__ == "__main__":
    main()
