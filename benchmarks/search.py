"""Compare the search with other methods at equal wall-clock time.

    python benchmarks/search.py compare --data FOLDER --evaluation FILE --seeds 0 1 2
    python benchmarks/search.py selection --data FOLDER --evaluation FILE --seeds 0 1 2
    python benchmarks/search.py ranking --data FOLDER --evaluation FILE --seeds 0 1 2
    python benchmarks/search.py rates --data FOLDER --evaluation FILE --seeds 0
    python benchmarks/search.py ends --data FOLDER --evaluation FILE --seeds 0 1 2 --seconds 600
    python benchmarks/search.py optimizers --data FOLDER --evaluation FILE --seeds 0
    python benchmarks/search.py trial

All but the last accept `--model FOLDER` (benchmarks/second_model.py makes one) and `--set KEY=VALUE` (settings of
`quick`).

`compare`: for each seed, one database, and plans of the same budget from uniform sizes, from weight magnitudes, from
the database's output errors (knapsack), from our search, and, with the same time as ours, from the paper's search
(uniform start, exchanges within a kind of site, every candidate trained before it is scored) and from the same search
without training. All are evaluated on held-out text, before and after the same recovery. `trial`: seconds per
candidate, ours against a deep copy of the dense model with zeros in it, trained and scored in bfloat16. `selection`:
does training candidates before scoring them select better ones? Evolution from uniform sizes with and without training,
in one selection step and in three, and with distillation in trials, all with the same number of tokens (trained or
scored) per generation. `ranking`: how well do scores without a trial, and after one with next-token loss or
distillation, rank plans compared with a longer recovery? `rates`: KL of the plan found by a descent, before and after a
trial, at the rate `auto` and others. `ends`: after a descent, the same time spent on more rounds, on generations with
trials or on generations without, all with the same recovery; and on generations from before learning rates were
relative, with the recovery of that time. `optimizers`: do trials with signSGD in bfloat16 rank candidates as trials
with AdamW and float32 weights do, and does an evolution end at the same plan? `--keep FOLDER` keeps the databases in
`FOLDER/seed-N/database` and reuses them; `rates`, `ends` and `optimizers` keep their descents there too.
"""

import argparse
import copy
import json
import math
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from darwinlm.config.loading import load_recipe, parse_override
from darwinlm.config.recipe import Recipe, RecoveryRecipe, SearchRecipe
from darwinlm.data.corpus import Corpus, read_corpus
from darwinlm.data.tokens import Tokens
from darwinlm.database.build import build_database
from darwinlm.database.store import Database
from darwinlm.metrics.kl import DenseReference, Fidelity
from darwinlm.models.cutting import build_model
from darwinlm.models.loading import DenseModel, fast_dtype, load_dense
from darwinlm.models.smollm2 import resolve
from darwinlm.plan import Budget, Plan, Space, parameter_budget
from darwinlm.recovery.training import recover
from darwinlm.runtime.files import read_json
from darwinlm.search.allocation import cheapest_plan, error_plan, sparing_plans, uniform_plan
from darwinlm.search.evolution import Evolution
from darwinlm.search.forecast import spearman
from darwinlm.search.history import trials_of
from darwinlm.search.stage import descend, search_plan
from darwinlm.search.trials import TrialScorer

PAPER = SearchRecipe(
    descent_rounds=0, generations=1000, offspring=8, survivors=(4, 2, 1),
    trial_tokens=(512, 1024, 2048), score_tokens=(512, 1024, 2048), learning_rate=1e-5, trial_loss="next-token",
)  # fmt: skip
"""Settings of the published code, with tokens scaled to this model."""
UNTRAINED = PAPER.model_copy(update={"trial_tokens": (0, 0, 0)})


OLD = "before relative rates"

WAYS = ("more descent", "trials", "no trials", OLD)
"""Methods that `ends` compares at equal time."""

SELECTIONS: dict[str, dict[str, Any]] = {
    "trained, three steps": {
        "trial_tokens": (512, 1024, 2048), "score_tokens": (512, 1024, 2048), "trial_loss": "next-token"
    },
    "distilled, three steps": {
        "trial_tokens": (512, 1024, 2048), "score_tokens": (512, 1024, 2048), "trial_loss": "distillation"
    },
    "trained, one step": {"trial_tokens": (1536,), "score_tokens": (1536,), "trial_loss": "next-token"},
    "not trained, three steps": {"trial_tokens": (0, 0, 0), "score_tokens": (1024, 2048, 4096)},
    "not trained, one step": {"trial_tokens": (0,), "score_tokens": (3072,)},
}  # fmt: skip
"""Settings of `search`. A single step has one survivor; the first of three keeps half of the offspring."""


class PaperEvolution(Evolution):
    """Evolution with exchanges within a kind of site: one site a level up, another a level down."""

    def _exchange(self, levels: list[int]) -> bool:
        sites = self._space.sites
        for _ in range(100):
            giver, taker = self._rng.sample(range(len(sites)), 2)
            if sites[giver].kind != sites[taker].kind:
                continue
            if levels[giver] == len(sites[giver].units) - 1 or levels[taker] == 0:
                continue
            levels[giver] += 1
            levels[taker] -= 1
            if self._budget.holds(levels):
                return True
            levels[giver] -= 1
            levels[taker] += 1
        return False


def evolve(search: Evolution, scorer: TrialScorer, seconds: float) -> Plan:
    """Return the best plan after `seconds`; a generation counts only if it is finished in time.

    If the learning rate is `auto`, it is found first, on the starting plan, within the same time.
    """
    end = time.perf_counter() + seconds
    for one in scorer.find_rates(search.parent):
        print(f"trials of {one['tokens']} tokens: rate {one['rate']:.2g} of {one['tried']}", flush=True)
    while time.perf_counter() < end and (request := search.ask()) is not None:
        search.tell([scorer.score(plan, request.step, search.parent) for plan in request.plans])
    return search.parent


def magnitude_plan(dense: DenseModel, database: Database, space: Space, budget: Budget) -> Plan | None:
    """Return the plan that removes the smallest share of the squared output weights."""
    lost: dict[str, list[float]] = {}
    for site, levels in zip(dense.sites, space.sites, strict=True):
        weight = dense.weights[f"{site.output}.weight"]
        power = weight.square().sum(0).view(-1, site.columns_per_unit).sum(1)
        kept = [torch.arange(len(power))]
        kept += [torch.tensor(database.cut(site, k, dense.device).kept) for k in range(1, len(levels.units) - 1)]
        lost[site.name] = [1 - (power[units].sum() / power.sum()).item() for units in kept] + [1.0]
    return cheapest_plan(space, budget, lambda site, level: lost[site.name][level])


class Judge:
    """The dense model on two texts that no method reads: the evaluation file, and the test split."""

    def __init__(self, dense: DenseModel, evaluation_BT: Tensor, test_BT: Tensor) -> None:
        self._references = [DenseReference(dense.model, blocks_BT) for blocks_BT in (evaluation_BT, test_BT)]

    def compare(self, model: torch.nn.Module) -> list[Fidelity]:
        """Return KL and perplexity on both."""
        return [reference.compare(model) for reference in self._references]


def judge_blocks(dense: DenseModel, file: str, tokens: int, length: int) -> Tensor:
    ids = dense.tokenizer(Path(file).read_text(encoding="utf-8"))["input_ids"][: tokens // length * length]
    return torch.tensor(ids).view(-1, length)


@contextmanager
def prepared(
    arguments: argparse.Namespace, seed: int
) -> Iterator[tuple[Recipe, DenseModel, Corpus, Judge, Database, Budget, Path]]:
    """Prepare what all comparisons of a seed share; the database is deleted afterwards unless `--keep` is given."""
    given = dict(parse_override(text) for text in arguments.set)
    settings = {"model": arguments.model, "target": arguments.target, "data.source": arguments.data, "seed": seed}
    recipe = load_recipe("quick", settings | given)
    dense = load_dense(resolve(arguments.model), "kv_group", torch.device("cpu"))
    blocks = judge_blocks(dense, arguments.evaluation, arguments.tokens, recipe.data.sequence_length)
    corpus = read_corpus(recipe.data, dense.tokenizer, seed)
    judge = Judge(dense, blocks, corpus.splits["test"].first(arguments.tokens).input_ids_BT)
    with tempfile.TemporaryDirectory() as passing:
        folder = arguments.keep / f"seed-{seed}" / "database" if arguments.keep else Path(passing)
        if (folder / "index.json").exists():
            database = Database(folder)
        else:
            database = build_database(dense, corpus.splits["calibration"].input_ids_BT, recipe.database, folder)
        budget = parameter_budget(float(arguments.target), database.space(dense.sites))
        yield recipe, dense, corpus, judge, database, budget, Path(passing) / "search"


def compare(arguments: argparse.Namespace) -> None:
    rows: dict[str, list[tuple[float, ...]]] = {}
    for seed in arguments.seeds:
        with prepared(arguments, seed) as (recipe, dense, corpus, judge, database, budget, folder):
            space = database.space(dense.sites)
            start = time.perf_counter()
            ours = search_plan(dense, database, corpus, budget, recipe.search, seed, folder)
            seconds = time.perf_counter() - start
            uniform = uniform_plan(space, budget)
            assert uniform is not None
            plans = {"uniform": uniform, "ours": ours}
            plans["knapsack"] = error_plan(space, budget) or uniform
            plans["magnitude"] = magnitude_plan(dense, database, space, budget) or uniform
            for name, settings in (("paper's search", PAPER), ("evolution, no trials", UNTRAINED)):
                if name in arguments.without:
                    continue
                search = PaperEvolution(space, budget, settings, [uniform], seed)
                plans[name] = evolve(search, TrialScorer(dense, database, corpus, settings), seconds)
                print(f"seed {seed}: {name}: {search.generation} generations", flush=True)
            for name, plan in plans.items():
                found = _row(
                    dense, database, corpus, plan, judge, RecoveryRecipe(tokens=arguments.recovery_tokens), seed
                )
                rows.setdefault(name, []).append(found)
                shown = ", ".join(f"{value:.4f}" for value in found)
                print(f"seed {seed}: {name}: {space.parameters(plan.levels):,} parameters; {shown}", flush=True)
        print(f"seed {seed}: {seconds:.0f} s per search", flush=True)
    summarise(rows, arguments.recovery_tokens)


def compare_selections(arguments: argparse.Namespace) -> None:
    rows: dict[str, list[tuple[float, ...]]] = {}
    for seed in arguments.seeds:
        with prepared(arguments, seed) as (_, dense, corpus, judge, database, budget, _):
            space = database.space(dense.sites)
            uniform = uniform_plan(space, budget)
            assert uniform is not None
            for name in arguments.methods:
                steps, offspring = SELECTIONS[name], arguments.offspring
                settings = SearchRecipe(
                    descent_rounds=0,
                    generations=arguments.generations,
                    offspring=offspring,
                    survivors=(offspring // 2, max(1, offspring // 4), 1)[3 - len(steps["trial_tokens"]) :],
                    learning_rate=arguments.learning_rate,
                    **steps,
                )
                start = time.perf_counter()
                search = Evolution(space, budget, settings, [uniform], seed)
                plan = evolve(search, TrialScorer(dense, database, corpus, settings), math.inf)
                seconds = time.perf_counter() - start
                found = _row(
                    dense, database, corpus, plan, judge, RecoveryRecipe(tokens=arguments.recovery_tokens), seed
                )
                rows.setdefault(name, []).append(found)
                shown = ", ".join(f"{value:.4f}" for value in found)
                helped = ", ".join(f"{one['helped']} of {one['tried']}" for one in trials_of(search.history))
                print(f"seed {seed}: {name}: {seconds:.0f} s; trials helped {helped}; {shown}", flush=True)
    summarise(rows, arguments.recovery_tokens)


def compare_rankings(arguments: argparse.Namespace) -> None:
    """Rank plans near the result of a short descent by each cheap score and by a longer recovery."""
    cheap = {
        f"{f'{loss} {trained}' if trained > 0 else 'not trained'}, score {scored}": SearchRecipe(
            survivors=(1,), trial_tokens=(trained,), score_tokens=(scored,), trial_loss=loss,
            learning_rate=arguments.learning_rate,
        )
        for loss, trained, scored in (
            ("next-token", 0, 512), ("next-token", 512, 512), ("distillation", 512, 512),
            ("next-token", 0, 2048), ("next-token", 2048, 2048), ("distillation", 2048, 2048),
        )
    }  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in cheap}
    for seed in arguments.seeds:
        with prepared(arguments, seed) as (recipe, dense, corpus, judge, database, budget, folder):
            space = database.space(dense.sites)
            short = recipe.search.model_copy(update={"descent_rounds": 1, "generations": 0, "forecast_candidates": 0})
            best = search_plan(dense, database, corpus, budget, short, seed, folder)
            plans = Evolution(space, budget, PAPER, [best], seed).relatives(arguments.plans)
            scorers = {name: TrialScorer(dense, database, corpus, settings) for name, settings in cheap.items()}
            for scorer in scorers.values():
                scorer.find_rates(best)
            scores: dict[str, list[float]] = {name: [] for name in cheap}
            last = []
            for plan in plans:
                for name, scorer in scorers.items():
                    scores[name].append(scorer.score(plan, 0, best).rank)
                last.append(
                    _row(dense, database, corpus, plan, judge, RecoveryRecipe(tokens=arguments.recovery_tokens), seed)[
                        2
                    ]
                )
                print(f"seed {seed}: {len(last)}: {last[-1]:.4f}", flush=True)
            for name in cheap:
                alike = spearman(scores[name], last)
                found[name].append(alike.rho)
                print(f"seed {seed}: {name}: {alike.rho:.2f} ({alike.low:.2f} to {alike.high:.2f})", flush=True)
    for name, rhos in found.items():
        spread = statistics.stdev(rhos) if len(rhos) > 1 else 0
        print(f"{name}: Spearman {statistics.mean(rhos):.2f} ± {spread:.2f} over {len(rhos)} seeds")


def compare_ends(arguments: argparse.Namespace) -> None:
    """Compare ways to continue after a descent in equal time; all plans but that of `OLD` get the same recovery."""
    rows: dict[str, list[tuple[float, ...]]] = {}
    ways: dict[str, dict[str, Any]] = {
        "trials": {},
        "no trials": {"trial_tokens": (0, 0), "score_tokens": (2048, 4096), "offspring": 12},
        OLD: {"learning_rate": 1e-4, "trial_loss": "next-token"},
    }
    assert tuple(ways) == WAYS[1:]
    for seed in arguments.seeds:
        with prepared(arguments, seed) as (recipe, dense, corpus, judge, database, budget, folder):
            space = database.space(dense.sites)
            if arguments.keep:
                folder = arguments.keep / f"seed-{seed}" / f"search-{arguments.target}"
            plan, sensitivity = descend(
                dense, database, corpus, budget, recipe.search, sparing_plans(space, budget), seed,
                folder / "descent.json",
            )  # fmt: skip
            plans = {"descent": plan}
            with tempfile.TemporaryDirectory() as passing:
                file = Path(passing) / "descent.json"
                shutil.copy(folder / "descent.json", file)
                start, rounds = time.perf_counter(), len(read_json(file)["rounds"])
                while "more descent" in arguments.ways and time.perf_counter() - start < arguments.seconds:
                    rounds += 1
                    longer = recipe.search.model_copy(update={"descent_rounds": rounds})
                    plans["more descent"], _ = descend(
                        dense, database, corpus, budget, longer, [plan], seed, file
                    )  # fmt: skip
                    if len(read_json(file)["rounds"]) < rounds:
                        break
                print(f"seed {seed}: more descent: {rounds} rounds, {time.perf_counter() - start:.0f} s", flush=True)
            for name, changes in ((name, ways[name]) for name in ways if name in arguments.ways):
                settings = SearchRecipe(**{"generations": 10**6, **changes})
                search = Evolution(space, budget, settings, [plan], seed, sensitivity.costs())
                scorer = TrialScorer(dense, database, corpus, settings)
                start = time.perf_counter()
                plans[name] = evolve(search, scorer, arguments.seconds)
                for one in search.history[1:]:
                    gain = one["gain"]
                    print(f"seed {seed}: {name}: gain {gain['mean']:.4f} ± {gain['error']:.4f}", flush=True)
                seconds, helped = time.perf_counter() - start, trials_of(search.history)
                print(f"seed {seed}: {name}: {search.generation} generations, {seconds:.0f} s, {helped}", flush=True)
            if arguments.keep:
                levels = {name: found.levels for name, found in plans.items()}
                (folder / "plans.json").write_text(json.dumps(levels), encoding="utf-8")
            known: dict[tuple[Plan, bool], tuple[float, ...]] = {}
            for name, found in plans.items():
                recovery = RecoveryRecipe(tokens=arguments.recovery_tokens)
                if name == OLD:
                    recovery = recovery.model_copy(update={"learning_rate": 2e-4, "distillation": 0.5})
                key = found, name == OLD
                if key not in known:
                    known[key] = _row(dense, database, corpus, found, judge, recovery, seed)
                rows.setdefault(name, []).append(known[key])
                print(f"seed {seed}: {name}: {', '.join(f'{value:.4f}' for value in known[key])}", flush=True)
    summarise(rows, arguments.recovery_tokens)


def compare_optimizers(arguments: argparse.Namespace) -> None:
    """Compare the optimizers of trials on plans near the result of a descent, and in a short evolution."""
    for seed in arguments.seeds:
        with prepared(arguments, seed) as (recipe, dense, corpus, judge, database, budget, folder):
            space = database.space(dense.sites)
            if arguments.keep:
                folder = arguments.keep / f"seed-{seed}" / f"search-{arguments.target}"
            best, sensitivity = descend(
                dense, database, corpus, budget, recipe.search, sparing_plans(space, budget), seed,
                folder / "descent.json",
            )  # fmt: skip
            plans = Evolution(space, budget, PAPER, [best], seed).relatives(arguments.plans)
            scores: dict[str, list[float]] = {"not trained": []}
            found: dict[str, Plan] = {}
            for optimizer in ("adamw", "sign"):
                settings = recipe.search.model_copy(
                    update={"trial_optimizer": optimizer, "generations": arguments.generations}
                )
                scorer = TrialScorer(dense, database, corpus, settings)
                scorer.find_rates(best)
                last = len(settings.trial_tokens) - 1
                trained = [scorer.score(plan, last, best) for plan in plans]
                scores[optimizer] = [score.rank for score in trained]
                scores["not trained"] = [one.rank if one.untrained is None else one.untrained for one in trained]
                search = Evolution(space, budget, settings, [best], seed, sensitivity.costs())
                found[optimizer] = evolve(search, scorer, math.inf)
            for name, other in (("adamw", "sign"), ("not trained", "adamw"), ("not trained", "sign")):
                alike = spearman(scores[name], scores[other])
                print(f"seed {seed}: {name}, {other}: Spearman {alike.rho:.2f} ({alike.low:.2f} to {alike.high:.2f})")
            for optimizer, plan in found.items():
                kl = _row(dense, database, corpus, plan, judge, RecoveryRecipe(tokens=0), seed)[0]
                moved = sum(one != other for one, other in zip(plan.levels, best.levels, strict=True))
                print(f"seed {seed}: {optimizer}: KL {kl:.4f}, {moved} sites differ from the descent's", flush=True)
            apart = sum(one != other for one, other in zip(*(plan.levels for plan in found.values()), strict=True))
            print(f"seed {seed}: the two plans differ in {apart} of {len(space.sites)} sites", flush=True)


def compare_rates(arguments: argparse.Namespace) -> None:
    """Compare learning rates of a trial on the plan found by a descent; all train on the same text."""
    for seed in arguments.seeds:
        with prepared(arguments, seed) as (recipe, dense, corpus, judge, database, budget, folder):
            space = database.space(dense.sites)
            if arguments.keep:
                folder = arguments.keep / f"seed-{seed}" / f"search-{arguments.target}"
            short = recipe.search.model_copy(update={"generations": 0, "trial_tokens": (0,), "survivors": (1,)})
            short = short.model_copy(update={"score_tokens": recipe.search.score_tokens[-1:]})
            best = search_plan(dense, database, corpus, budget, short, seed, folder)
            uniform = uniform_plan(space, budget) or best
            for name, plan in (("uniform", uniform), ("found", best)):
                kl = _row(dense, database, corpus, plan, judge, RecoveryRecipe(tokens=0), seed)[0]
                print(f"seed {seed}: {name}: KL {kl:.4f} on the evaluation text", flush=True)
            settings = recipe.search.model_copy(update={"trial_loss": arguments.trial_loss})
            for rate in arguments.rates:
                scorer = TrialScorer(
                    dense, database, corpus,
                    SearchRecipe(**settings.model_dump() | {"learning_rate": rate}),
                )  # fmt: skip
                for one in scorer.find_rates(best):
                    print(f"seed {seed}: {one['tokens']} tokens: rate {one['rate']:.2g}; {one['tried']}", flush=True)
                for step, tokens in enumerate(settings.trial_tokens):
                    score = scorer.score(best, step, best)
                    before = score.rank if score.untrained is None else score.untrained
                    print(
                        f"seed {seed}: {arguments.trial_loss}, rate {rate}, {tokens} tokens: "
                        f"KL {before:.4f} to {score.rank:.4f} on {settings.score_tokens[step]} score tokens",
                        flush=True,
                    )


def summarise(rows: dict[str, list[tuple[float, ...]]], recovery_tokens: int) -> None:
    """Print mean and standard deviation over the seeds."""
    recovered = ", after recovery: KL, perplexity; on the test split: KL, after recovery"
    print("method: KL, perplexity" + (recovered if recovery_tokens else ", KL on the test split"))
    for name, found in rows.items():
        columns = list(zip(*found, strict=True))
        shown = [
            f"{statistics.mean(column):.3f} ± {statistics.stdev(column) if len(column) > 1 else 0:.3f}"
            for column in columns
        ]
        print(f"{name}: {', '.join(shown)}")


def _row(
    dense: DenseModel,
    database: Database,
    corpus: Corpus,
    plan: Plan,
    judge: Judge,
    recipe: RecoveryRecipe,
    seed: int,
) -> tuple[float, ...]:
    """Return KL and perplexity of a plan on the evaluation text, before and (if `recipe` has tokens) after recovery;
    then KL on the test split."""
    cuts = database.cuts(dense.sites, plan.levels, dense.device)
    before, test_before = judge.compare(build_model(dense.config, dense.sites, dense.weights, cuts))
    if not recipe.tokens:
        return before.kl, before.perplexity, test_before.kl
    model = build_model(dense.config, dense.sites, dense.weights, cuts, trainable=True)
    with tempfile.TemporaryDirectory() as folder:
        text, validation = corpus.splits["train"], corpus.splits["validation"]
        teacher, place = dense.load(dense.device, fast_dtype(dense.device)), Path(folder)
        model, _ = recover(model, teacher, text, validation, recipe, seed=seed, folder=place, device=dense.device)
    after, test_after = judge.compare(model)
    return before.kl, before.perplexity, after.kl, after.perplexity, test_before.kl, test_after.kl


def time_trials(arguments: argparse.Namespace) -> None:
    """Time both methods alternately on the same plan and tokens."""
    recipe = load_recipe("quick", {"model": "smollm2", "target": arguments.target})
    dense = load_dense(resolve("smollm2"), "kv_group", torch.device(arguments.device))
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, dense.config.vocab_size, (4, 512), generator=generator)
    splits = {"calibration": blocks, "train": blocks[:1], "validation": blocks[1:2]}
    corpus = Corpus({split: Tokens.unmasked(ids) for split, ids in splits.items()})
    settings = recipe.search.model_copy(
        update={"trial_tokens": (512,), "score_tokens": (512,), "survivors": (1,), "learning_rate": 1e-4}
    )
    with tempfile.TemporaryDirectory() as folder:
        database = build_database(dense, blocks, recipe.database, Path(folder))
        space = database.space(dense.sites)
        plan = error_plan(space, parameter_budget(float(arguments.target), space))
        assert plan is not None
        scorer = TrialScorer(dense, database, corpus, settings)
        half = copy.deepcopy(dense.model).to(torch.bfloat16)
        with torch.no_grad():
            expected = [half(blocks[1:2].to(dense.device)).logits]
        seconds: dict[str, list[float]] = {"ours": [], "deep copy": []}
        for repeat in range(arguments.repeats + 1):
            start = time.perf_counter()
            scorer.score(plan, 0, plan)
            _wait(dense.device)
            between = time.perf_counter()
            deep_copy_trial(half, dense, database, plan, blocks[:1], blocks[1:2], expected, PAPER.learning_rate)
            _wait(dense.device)
            if repeat > 0:
                seconds["ours"].append(between - start)
                seconds["deep copy"].append(time.perf_counter() - between)
    ours, other = (statistics.median(seconds[name]) for name in ("ours", "deep copy"))
    print(f"a candidate (trial 512, score 512 tokens): ours {ours:.2f} s, deep copy {other:.2f} s: {other / ours:.2f}x")
    if dense.device.type == "cuda":
        print(f"peak device memory {torch.cuda.max_memory_allocated(dense.device) / 2**30:.2f} GiB")


def deep_copy_trial(
    half: torch.nn.Module, dense: DenseModel, database: Database, plan: Plan, trial_BT: Tensor, score_BT: Tensor,
    expected: list[Tensor], learning_rate: float,
) -> float:  # fmt: skip
    """Score a candidate as the published code does: copy the dense model, set pruned columns to zero, all in bfloat16.

    It trains on one block at a time. `expected` holds the dense model's logits for each block of `score_BT`.
    """
    model = copy.deepcopy(half).train().requires_grad_(True)
    with torch.no_grad():
        for site, level in zip(dense.sites, plan.levels, strict=True):
            if level == 0:
                continue
            weight = model.get_submodule(site.output).weight
            weight.zero_()
            cut = database.cut(site, level, dense.device)
            if cut.output_weight is not None:
                columns = torch.tensor(cut.kept)[:, None] * site.columns_per_unit + torch.arange(site.columns_per_unit)
                weight[:, columns.flatten()] = cut.output_weight.to(weight.dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    for block_T in trial_BT.to(dense.device):
        optimizer.zero_grad()
        model(input_ids=block_T[None], labels=block_T[None], use_cache=False).loss.backward()
        optimizer.step()
    model.eval()
    kl = 0.0
    with torch.no_grad():
        for block_T, logits in zip(score_BT.to(dense.device), expected, strict=True):
            p, q = logits.log_softmax(-1), model(block_T[None], use_cache=False).logits.log_softmax(-1)
            kl += (p.exp() * (p - q)).sum(-1).mean().item() / len(score_BT)
    return kl


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    comparison = commands.add_parser("compare", help="compare methods at the same budget")
    comparison.add_argument("--without", nargs="*", default=[], help="methods to leave out, by name")
    selection = commands.add_parser("selection", help="compare evolution with and without training")
    selection.add_argument("--generations", type=int, default=6)
    selection.add_argument("--offspring", type=int, default=8)
    selection.add_argument("--methods", nargs="+", choices=SELECTIONS, default=list(SELECTIONS))
    ranking = commands.add_parser("ranking", help="compare cheap scores with a longer recovery")
    ranking.add_argument("--plans", type=int, default=8)
    optimizers = commands.add_parser("optimizers", help="compare trials with signSGD and AdamW")
    optimizers.add_argument("--plans", type=int, default=12)
    optimizers.add_argument("--generations", type=int, default=2)
    rates = commands.add_parser("rates", help="compare learning rates of trials on one plan")
    rates.add_argument("--rates", nargs="+", default=["auto", "1e-5", "1e-4"])
    rates.add_argument("--trial-loss", choices=("next-token", "distillation"), default="distillation")
    ends = commands.add_parser("ends", help="compare ways to continue after a descent")
    ends.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    ends.add_argument("--seconds", type=float, default=600, help="time limit of each")
    for command in (selection, ranking):
        command.add_argument("--learning-rate", default="auto", help="learning rate of trials")
    for command in (comparison, selection, ranking, optimizers, rates, ends):
        command.add_argument("--model", default="smollm2")
        command.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="recipe settings: data.…")
        command.add_argument("--data", required=True, help="text for calibration, trials and scores")
        command.add_argument("--evaluation", required=True, help="held-out text file, read by no method")
        command.add_argument("--tokens", type=int, default=16_384, help="tokens of the evaluation text")
        command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        command.add_argument("--recovery-tokens", type=int, default=0)
        command.add_argument("--keep", type=Path, help="folder to keep and reuse databases in")
    trial = commands.add_parser("trial", help="measure the seconds per candidate")
    trial.add_argument("--repeats", type=int, default=5)
    trial.add_argument("--device", default="cpu")
    for command in (comparison, selection, ranking, optimizers, rates, ends, trial):
        command.add_argument("--target", default="0.6", help="fraction of parameters")
    arguments = parser.parse_args()
    print(
        json.dumps(
            {
                "threads": torch.get_num_threads(),
                "machine": platform.machine(),
                "torch": torch.__version__,
                **{key: value for key, value in vars(arguments).items() if key not in ("data", "evaluation", "keep")},
            }
        ),
        flush=True,
    )
    {
        "compare": compare,
        "selection": compare_selections,
        "ranking": compare_rankings,
        "optimizers": compare_optimizers,
        "rates": compare_rates,
        "ends": compare_ends,
        "trial": time_trials,
    }[arguments.command](arguments)


if __name__ == "__main__":
    main()
