"""The search stage: cut each proposed plan out of the model, train it briefly, score it, and save the state."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from darwinlm.config.recipe import SearchRecipe
from darwinlm.data.corpus import Corpus
from darwinlm.database.store import Database
from darwinlm.errors import UserError
from darwinlm.metrics.kl import DenseReference
from darwinlm.models.loading import DenseModel, fast_dtype
from darwinlm.plan import Budget, Plan, Space
from darwinlm.run.job import Job
from darwinlm.runtime import dist
from darwinlm.runtime.files import read_json, write_bytes, write_json
from darwinlm.runtime.progress import log, task
from darwinlm.search.allocation import error_plan, even_plans, sparing_plans, uniform_plan
from darwinlm.search.descent import LONG_STEPS, Sensitivity, downhill
from darwinlm.search.evolution import Evolution, Score
from darwinlm.search.forecast import spearman
from darwinlm.search.history import trials_of
from darwinlm.search.sensitivity import measure_sensitivity
from darwinlm.search.trials import TrialScorer


def starting_plans(space: Space, budget: Budget, *, uniform: bool = False) -> list[Plan]:
    """Return the plans that a search starts with: the uniform and the least-error plan, or all plans of uniform layers.

    Raises:
        UserError: if no plan fits the budget.
    """
    if uniform:
        plans = even_plans(space, budget)
    else:
        plans = [plan for plan in (uniform_plan(space, budget), error_plan(space, budget)) if plan is not None]
    if not plans:
        asked = " and ".join(f"{one.minimum:,} to {one.maximum:,} {one.unit}" for one in budget.limits)
        raise UserError(
            f"no plan has {asked} with this database's levels; change target slightly or raise database.levels"
        )
    return plans


def descend(
    dense: DenseModel,
    database: Database,
    corpus: Corpus,
    budget: Budget,
    recipe: SearchRecipe,
    starts: Sequence[Plan],
    seed: int,
    file: Path,
) -> tuple[Plan, Sensitivity]:
    """Descend from the best of `starts` while it helps, for at most `recipe.descent_rounds` rounds.

    Each round measures sensitivities on its own part of the train split, and compares the proposed plans on the
    validation split. Stops after two consecutive rounds without improvement. Resumes from the rounds in `file`.

    Returns:
        The best plan, and the last measured sensitivities.
    """
    space = database.space(dense.sites)
    text_BT = corpus.splits["train"].input_ids_BT
    window = min(len(corpus.splits["train"].first(recipe.sensitivity_tokens)), len(text_BT))
    comparison = _PlanComparison(dense, database, corpus.splits["validation"].input_ids_BT)
    rounds: list[dict[str, Any]] = read_json(file, _restart_hint(file.parent))["rounds"] if file.exists() else []
    start = starts[0]
    if len(starts) > 1 and not rounds:
        start = starts[comparison.best(starts)[0]]

    with task("descent (blocks)", window * recipe.descent_rounds) as progress:
        progress.advance(window * len(rounds))
        while len(rounds) < recipe.descent_rounds and (len(rounds) < 2 or any(one["improved"] for one in rounds[-2:])):
            base = Plan(levels=tuple(rounds[-1]["levels"])) if rounds else start
            sensitivity = measure_sensitivity(
                dense,
                lambda index, level: database.cut(dense.sites[index], level, dense.layers_device),
                space,
                base,
                text_BT.roll(-window * len(rounds), dims=0)[:window],
                seed=seed + len(rounds),
                after_block=progress.advance,
            )
            plans = [base, *downhill(space, budget, base, sensitivity)]
            best, scores = comparison.best(plans)
            rounds.append(
                {
                    "scores": scores,
                    "best": best,
                    "improved": best > 0,
                    "base": base.levels,
                    "levels": plans[best].levels,
                    "first": sensitivity.first,
                    "second": sensitivity.second,
                }
            )
            if dist.rank() == 0:
                write_json(file, {"rounds": rounds}, sealed=True)
            log.info("descent: KL %s without training%s", _shown(scores[best]), "" if best else ", no improvement")
    last = rounds[-1]
    return Plan(levels=tuple(last["levels"])), Sensitivity(last["first"], last["second"])


class _PlanComparison:
    """Comparison of plans without training, with paired early stopping: clearly worse plans are dropped."""

    def __init__(self, dense: DenseModel, database: Database, blocks_BT: Tensor) -> None:
        self._dense, self._database = dense, database
        quarter = -(-len(blocks_BT) // 4)
        parts = [blocks_BT[:quarter], blocks_BT[quarter : 2 * quarter], blocks_BT[2 * quarter :]]
        self._references = [DenseReference(dense.reference.model, part_BT) for part_BT in parts if len(part_BT)]

    def best(self, plans: Sequence[Plan]) -> tuple[int, list[float | None]]:
        """Return the index of the plan with the lowest KL(dense || plan), and the KL of each plan, as in `ranked`."""
        order, scores = self.ranked(plans)
        return order[0], scores

    def ranked(self, plans: Sequence[Plan]) -> tuple[list[int], list[float | None]]:
        """Return the indices of the plans, best first and early stopped last, and the KL of each plan.

        The KL of an early-stopped plan is the winner's KL plus their difference on the common blocks, because scores on
        different text are not comparable. A KL that is not finite is None.
        """
        running = list(range(len(plans)))
        kls: list[list[float]] = [[] for _ in plans]
        for reference in self._references:
            for number, found in zip(
                running, _score_all([plans[n] for n in running], partial(self._kls, reference)), strict=True
            ):
                kls[number] += found
            leader = min(running, key=lambda number: sum(kls[number]))
            running = [number for number in running if not _beaten(kls[number], kls[leader])]
        order = sorted(range(len(plans)), key=lambda number: (-len(kls[number]), sum(kls[number])))
        winner = kls[order[0]]
        scores = [
            statistics.fmean(winner) + statistics.fmean(found) - statistics.fmean(winner[: len(found)]) for found in kls
        ]
        return order, [kl if math.isfinite(kl) else None for kl in scores]

    def _kls(self, reference: DenseReference, plan: Plan) -> list[float]:
        dense = self._dense
        model = dense.cut(self._database.cuts(dense.sites, plan.levels, dense.layers_device))
        model.to(fast_dtype(dense.device))
        found = reference.compare(model, head=dense.head).kl_by_block
        return [kl if math.isfinite(kl) else math.inf for kl in found]


def _beaten(kls: Sequence[float], leader: Sequence[float]) -> bool:
    """Whether the mean difference on common blocks is more than three times its standard error, or infinite."""
    if not math.isfinite(sum(kls)):
        return math.isfinite(sum(leader))
    differences = [one - other for one, other in zip(kls, leader, strict=True)]
    if len(differences) < 3:
        return False
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return bool(mean > 3 * error)


_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


def _score_all(items: Sequence[_Item], score: Callable[[_Item], _Found]) -> list[_Found]:
    """Compute `score` of all `items`, strided over ranks and then all-gathered."""
    mine = {number: score(items[number]) for number in range(dist.rank(), len(items), dist.world_size())}
    everything: dict[int, _Found] = {}
    for part in dist.gather(mine):
        everything |= part
    return [everything[number] for number in range(len(items))]


def _shown(kl: float | None) -> str:
    return "not finite" if kl is None else f"{kl:.4f}"


def search_size(job: Job, larger: Path | None = None) -> Plan:
    """Find the plan of a size, the search stage, or read it if the stage is done.

    `larger` is the folder of the search for the next larger size of the family.
    """
    recipe, folder, stage, source = job.recipe, job.size.folder / "search", job.size.stage("search"), job.source
    if not job.run.done(stage):
        with job.run.stage(stage, folder / "best_plan.json", folder / "history.jsonl"):
            search_plan(
                source.dense, source.database, job.corpus, job.budget, recipe.search, recipe.seed, folder,
                larger if recipe.search.descent_rounds > 0 else None, uniform=job.uniform,
            )  # fmt: skip
            dist.barrier()
    return Plan.from_dict(read_json(folder / "best_plan.json"), source.space)


def search_plan(
    dense: DenseModel,
    database: Database,
    corpus: Corpus,
    budget: Budget,
    recipe: SearchRecipe,
    seed: int,
    folder: Path,
    larger: Path | None = None,
    *,
    uniform: bool = False,
) -> Plan:
    """Search until the recipe's generations are done, resuming from the state in `folder`.

    `larger` is the folder of a finished search for another budget, whose last sensitivities propose plans for this one.
    If `uniform`, all layers get the same sizes: the few plans of uniform layers are compared, without descent,
    evolution and forecast.

    Writes `descent.json` after every round of the descent, `trials.json` before the first trial, `state.json` after
    every step of the evolution, `history.jsonl` (one line per generation) and, at the end, `best_plan.json`.
    """
    space = database.space(dense.sites)
    descends = recipe.descent_rounds > 0 and not uniform
    generations, forecasts = (0, False) if uniform else (recipe.generations, recipe.forecast_candidates > 0)
    if uniform:
        # Uniform layers change together, so no plan uses the whole budget to the parameter.
        budget = Budget(limits=tuple(replace(limit, minimum=0) for limit in budget.limits))
    state_file = folder / "state.json"
    if state_file.exists():
        try:
            state = read_json(state_file, _restart_hint(folder))
            search = Evolution.resume(space, budget, recipe, state, generations)
        except (LookupError, TypeError, ValueError):
            raise UserError(
                f"{state_file} was written by another version of darwinlm; {_restart_hint(folder)}"
            ) from None
        log.info("search: resuming at generation %d", search.generation)
    else:
        starts = starting_plans(space, budget, uniform=uniform)
        if uniform and len(starts) > recipe.offspring:
            order, scores = _PlanComparison(dense, database, corpus.splits["validation"].input_ids_BT).ranked(starts)
            best = _shown(scores[order[0]])
            log.info("search: %d plans of uniform layers, best KL %s without training", len(starts), best)
            starts = [starts[number] for number in order[: recipe.offspring]]
        costs = None
        if descends:
            file = folder / "descent.json"
            begin = [*sparing_plans(space, budget), *_from_other_budget(space, budget, larger)]
            # If no plan within the budget keeps sites dense, only the least-error plan remains.
            begin = list(dict.fromkeys([starts[-1], *begin]))
            plan, sensitivity = descend(dense, database, corpus, budget, recipe, begin, seed, file)
            starts.insert(0, plan)
            costs = sensitivity.costs()
        search = Evolution(space, budget, recipe, starts, seed, costs, generations)
    scorer: TrialScorer | None = None
    with task("search (generations)", generations + 1) as progress:
        progress.advance(search.generation, note=_best(search))
        while (request := search.ask()) is not None:
            scorer = scorer or _scorer(dense, database, corpus, recipe, search.parent, folder / "trials.json")
            search.tell(_score_all(request.plans, partial(scorer.score, step=request.step, parent=search.parent)))
            if dist.rank() == 0:
                write_json(state_file, search.state(), sealed=True)
            if search.generation > request.generation:
                progress.advance(note=_best(search))
    log.info("search: %s", search.stop())
    if scorer is not None:
        _report_trials(search, recipe)
    if forecasts and not (folder / "forecast.json").exists():
        scorer = scorer or _scorer(dense, database, corpus, recipe, search.parent, folder / "trials.json")
        _forecast(search, scorer, corpus, recipe, folder / "forecast.json")
    if dist.rank() > 0:
        return search.parent
    lines = [json.dumps(entry, allow_nan=False) + "\n" for entry in search.history]
    write_bytes(folder / "history.jsonl", "".join(lines).encode())
    write_json(folder / "best_plan.json", search.parent.to_dict(space))
    return search.parent


def _scorer(
    dense: DenseModel, database: Database, corpus: Corpus, recipe: SearchRecipe, plan: Plan, file: Path
) -> TrialScorer:
    """Create a scorer with the learning rates in `file`, or tune them on `plan` and write the file."""
    scorer = TrialScorer(dense, database, corpus, recipe)
    if file.exists():
        scorer.take_rates(read_json(file, _restart_hint(file.parent))["rates"])
    elif recipe.learning_rate == "auto":
        found = scorer.find_rates(plan)
        for one in found:
            tokens, rate, kls = one["tokens"], one["rate"], dict(one["tried"])
            if rate == 0:
                log.info("search: no learning rate helps in trials of %d tokens: candidates are not trained", tokens)
            else:
                log.info(
                    "search: trials of %d tokens: relative rate %.2g, KL %s to %s on text not trained on",
                    *(tokens, rate, _shown(kls[0.0]), _shown(kls[rate])),
                )
        if dist.rank() == 0:
            write_json(file, {"rates": found}, sealed=True)
    return scorer


def _report_trials(search: Evolution, recipe: SearchRecipe) -> None:
    """Log for each step how many candidates its trial improved, and what to change if it was fewer than half."""
    for number, step in enumerate(trials_of(search.history), 1):
        tokens, tried, helped = recipe.trial_tokens[number - 1], step["tried"], step["helped"]
        if tried == 0:
            continue
        log.info("search: step %d: trials of %d tokens improved %d of %d candidates", number, tokens, helped, tried)
        if helped < tried / 2:
            log.warning(
                "search: trials of step %d improved only %d of %d candidates; %s (in a new run)",
                *(number, helped, tried),
                "raise search.trial_tokens, or set it to 0 for this step to skip training"
                if recipe.learning_rate == "auto"
                else "set search.learning_rate=auto, or lower it",
            )


def _forecast(search: Evolution, scorer: TrialScorer, corpus: Corpus, recipe: SearchRecipe, file: Path) -> None:
    """Log how well each step's score predicts the ranking of nearby plans after a much longer training."""
    plans = search.relatives(recipe.forecast_candidates)
    long = corpus.splits["train"].input_ids_BT.numel()
    with task("forecast (plans)", (len(recipe.survivors) + 1) * len(plans)) as progress:

        def scores(score: Callable[[Plan], Score]) -> list[Score]:
            found = _score_all(plans, score)
            progress.advance(len(plans))
            return found

        last = scores(partial(scorer.score_after, trial_tokens=long, score_tokens=max(recipe.score_tokens)))
        steps = [
            scores(partial(scorer.score, step=step, parent=search.parent)) for step in range(len(recipe.survivors))
        ]
    found = []
    for step, early in enumerate(steps):
        alike = spearman([one.rank for one in early], [one.rank for one in last])
        kls = [one.kl for one in early]
        found.append({"step": step, "scores": kls, "rho": alike.rho, "low": alike.low, "high": alike.high})
        log.info(
            "forecast: step %d (%d trial, %d score tokens) ranks %d plans like %d training tokens with a "
            "Spearman correlation of %.2f (%.2f to %.2f)",
            *(step + 1, recipe.trial_tokens[step], recipe.score_tokens[step], len(plans), long),
            *(alike.rho, alike.low, alike.high),
        )
    if dist.rank() == 0:
        write_json(file, {"training_tokens": long, "scores": [one.kl for one in last], "steps": found})


def _from_other_budget(space: Space, budget: Budget, folder: Path | None) -> list[Plan]:
    if folder is None:
        return []
    last = read_json(folder / "descent.json", _restart_hint(folder))["rounds"][-1]
    sensitivity = Sensitivity(last["first"], last["second"])
    return downhill(space, budget, Plan(levels=tuple(last["base"])), sensitivity, LONG_STEPS)


def _restart_hint(folder: Path) -> str:
    return f"delete {folder} and run the same command again to restart the search"


def _best(search: Evolution) -> str:
    return f"KL {_shown(search.history[-1]['score'])}" if search.history else ""
