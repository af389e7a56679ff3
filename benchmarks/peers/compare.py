"""Compare pruning methods on the same model, size and text, before and after the same recovery.

    python benchmarks/peers/compare.py --data FOLDER --evaluation FILE --out ROWS.jsonl
    python benchmarks/peers/compare.py --table ROWS.jsonl

The model is SmolLM2-135M (`smollm2`, the `demo` extra); `pip install torch-pruning` for the method of that name. Each
peer proposes one or a few models of the target size, and the one with the lowest KL to the dense model on the
validation split is taken, without training. All are evaluated before and after the same training (no refit), on text
that no method reads: a file, and the test split of the calibration text.

Each finished row is written at once, and existing rows are skipped: run the same command again to resume. Our databases
and searches are stored in a folder next to the rows and resume too. Peers are deterministic and run only with the first
seed, which orders the text; ours runs with each seed, which orders the text too.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch_pruner
from calibrated import Calibrated
from even_widths import by_activations, by_weights
from second_order import by_second_order
from torch import Tensor
from whole_layers import by_influence

from darwinlm.config.loading import load_recipe
from darwinlm.config.recipe import Recipe, RecoveryRecipe
from darwinlm.data.corpus import Corpus, read_corpus
from darwinlm.database.build import build_database
from darwinlm.evaluation.measure import parameters_of
from darwinlm.metrics.kl import DenseReference
from darwinlm.models.cutting import assemble, build_model
from darwinlm.models.loading import DenseModel, fast_dtype, load_dense
from darwinlm.models.modeling_darwinlm import PrunedModel
from darwinlm.models.smollm2 import resolve
from darwinlm.plan import parameter_budget
from darwinlm.recovery.training import recover
from darwinlm.runtime.files import write_bytes
from darwinlm.search.stage import search_plan

Candidates = Iterator[tuple[str, PrunedModel]]
"""Descriptions and models that a method proposes."""
PEERS: dict[str, Callable[[Calibrated, int], Candidates]] = {
    "even widths, weights": by_weights,
    "even widths, activations x weights": by_activations,
    "even widths, second order": by_second_order,
    "whole layers, block influence": by_influence,
    "Torch-Pruning, Taylor": torch_pruner.by_taylor,
    "Torch-Pruning, its LLM example": torch_pruner.as_in_the_example,
}
DENSE, OURS = "dense", "ours (quick)"
_SHAPE_TOKENS = 1_024
"""Tokens of the validation split that a peer's shape is chosen on."""


class Rows:
    """Rows of a JSON-lines file, which is always written as a whole, so that no row is incomplete."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.rows: list[dict[str, Any]] = []
        if file.exists():
            self.rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    def lacks(self, key: dict[str, Any]) -> bool:
        """Return whether no row has these entries."""
        return not any(key.items() <= row.items() for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        write_bytes(self._file, "".join(json.dumps(one) + "\n" for one in self.rows).encode())
        print(json.dumps(row), flush=True)


def best(candidates: Candidates, score: DenseReference) -> tuple[str, PrunedModel]:
    """Return the candidate with the lowest KL to the dense model."""
    kl, name, model = min(
        ((score.compare(model).kl, name, model) for name, model in candidates), key=lambda one: one[0]
    )
    print(f"  KL {kl:.3f} on the validation split: {name}", flush=True)
    return name, model


def ours(dense: DenseModel, corpus: Corpus, recipe: Recipe, target: float, folder: Path) -> tuple[str, PrunedModel]:
    """Return the model of the plan that the search finds; the database in `folder` is built once for all targets."""
    database = build_database(dense, corpus.splits["calibration"].input_ids_BT, recipe.database, folder / "database")
    space = database.space(dense.sites)
    budget = parameter_budget(target, space)
    plan = search_plan(dense, database, corpus, budget, recipe.search, recipe.seed, folder / f"search-{target}")
    cuts = database.cuts(dense.sites, plan.levels, dense.device)
    return f"levels {plan.levels}", build_model(dense.config, dense.sites, dense.weights, cuts)


def trainable(model: PrunedModel) -> PrunedModel:
    """Return a copy of `model` whose training does not change the dense weights."""
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return assemble(model.config, tensors, trainable=True)  # type: ignore[arg-type]


def recovered(model: PrunedModel, teacher: PrunedModel, corpus: Corpus, tokens: int, seed: int) -> PrunedModel:
    """Return `model` after the recovery of all methods."""
    recipe = RecoveryRecipe(tokens=tokens, evaluations=0, learning_rate=2e-4, distillation=0.5)
    text, validation = corpus.splits["train"], corpus.splits["validation"]
    with tempfile.TemporaryDirectory() as folder:
        model, _ = recover(
            trainable(model), teacher, text, validation, recipe, seed=seed, folder=Path(folder), device=model.device
        )
    return model


def judge_blocks(dense: DenseModel, file: str, tokens: int, length: int) -> Tensor:
    ids = dense.tokenizer(Path(file).read_text(encoding="utf-8"))["input_ids"][: tokens // length * length]
    return torch.tensor(ids).view(-1, length)


def compare(arguments: argparse.Namespace) -> None:
    rows = Rows(arguments.out)
    dense = load_dense(resolve("smollm2"), "kv_group", torch.device("cpu"))
    teacher = dense.load(dense.device, fast_dtype(dense.device))
    judge: DenseReference | None = None
    settings = {"tokens": arguments.tokens, "recovery_tokens": arguments.recovery_tokens}
    facts = {
        "machine": platform.machine(), "threads": torch.get_num_threads(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "torch-pruning")},
    }  # fmt: skip
    for seed in arguments.seeds:
        first = seed == arguments.seeds[0]
        recipe = load_recipe("quick", {"model": "smollm2", "target": 0.6, "data.source": arguments.data, "seed": seed})
        corpus = read_corpus(recipe.data, dense.tokenizer, seed)
        calibrated = Calibrated(dense, corpus.splits["calibration"].input_ids_BT)
        validation = DenseReference(dense.model, corpus.splits["validation"].first(_SHAPE_TOKENS).input_ids_BT)
        test = DenseReference(dense.model, corpus.splits["test"].first(arguments.tokens).input_ids_BT)
        if judge is None:
            blocks = judge_blocks(dense, arguments.evaluation, arguments.tokens, recipe.data.sequence_length)
            judge = DenseReference(dense.model, blocks)
            if rows.lacks({"method": DENSE, **settings}):
                found = judge.compare(dense.model)
                rows.add({"method": DENSE, **settings, "parameters": dense.parameters, "perplexity": found.perplexity})
        for target in arguments.targets:
            for method in arguments.methods if first else [OURS]:
                key = {"method": method, "target": target, "seed": seed, **settings}
                if not rows.lacks(key):
                    continue
                print(f"{method}, {target}, seed {seed}", flush=True)
                start = time.perf_counter()
                if method == OURS:
                    shape, model = ours(dense, corpus, recipe, target, arguments.out.with_suffix("") / f"seed-{seed}")
                else:
                    shape, model = best(PEERS[method](calibrated, int(dense.parameters * target)), validation)
                seconds = time.perf_counter() - start
                trained = recovered(model, teacher, corpus, arguments.recovery_tokens, seed)
                before, after = judge.compare(model), judge.compare(trained)
                rows.add(
                    key
                    | {"shape": shape, "parameters": parameters_of(model)}
                    | {"share": parameters_of(model) / dense.parameters}
                    | {"kl": before.kl, "perplexity": before.perplexity}
                    | {"recovered_kl": after.kl, "recovered_perplexity": after.perplexity}
                    | {"held_out_kl": test.compare(model).kl, "held_out_recovered_kl": test.compare(trained).kl}
                    | {"seconds": round(seconds), **facts}
                )


def table(rows: list[dict[str, Any]]) -> str:
    """Return Markdown tables of the methods by target and recovery, lowest KL after recovery first."""
    lines = [f"Dense: perplexity {row['perplexity']:.2f}." for row in rows if row["method"] == DENSE][:1]
    pruned = [row for row in rows if row["method"] != DENSE]
    for target, recovery in dict.fromkeys((row["target"], row["recovery_tokens"]) for row in pruned):
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in pruned:
            if (row["target"], row["recovery_tokens"]) == (target, recovery):
                groups.setdefault(row["method"], []).append(row)
        lines += ["", f"At {target} of all parameters, {recovery:,} tokens of recovery:", ""]
        lines.append(
            "| method | share of parameters | KL | perplexity | recovered: KL | perplexity "
            "| test split: KL | recovered: KL | seeds |"
        )
        lines.append("|---|---|---|---|---|---|---|---|---|")
        for name, group in sorted(groups.items(), key=lambda one: statistics.mean(r["recovered_kl"] for r in one[1])):
            columns = [
                _mean([row[key] for row in group if key in row], digits)
                for key, digits in (
                    ("share", 4), ("kl", 3), ("perplexity", 1), ("recovered_kl", 3), ("recovered_perplexity", 1),
                    ("held_out_kl", 3), ("held_out_recovered_kl", 3),
                )
            ]  # fmt: skip
            lines.append(f"| {name} | {' | '.join(columns)} | {len(group)} |")
    return "\n".join(lines)


def _mean(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):,.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", type=Path, help="print the table of this file of rows and exit")
    parser.add_argument("--data", help="text for calibration, trials, scores and recovery")
    parser.add_argument("--evaluation", help="held-out text file, read by no method")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.8, 0.6], help="fractions of all parameters")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=[*PEERS, OURS], default=[*PEERS, OURS])
    parser.add_argument("--recovery-tokens", type=int, default=8_192)
    parser.add_argument("--tokens", type=int, default=8_192, help="tokens of the evaluation text")
    parser.add_argument("--out", type=Path, help="JSON-lines file; existing rows are skipped")
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(Rows(arguments.table).rows))
        return
    if not (arguments.data and arguments.evaluation and arguments.out):
        parser.error("give --data, --evaluation and --out, or --table FILE")
    compare(arguments)


if __name__ == "__main__":
    main()
