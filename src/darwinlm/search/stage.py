"""The search stage: cut each proposed plan out of the model, train it a little, score it, keep the state on disk."""

import json
import math
from pathlib import Path
from typing import Any

from darwinlm.adapters.cutting import build_model
from darwinlm.adapters.loading import DenseModel
from darwinlm.data import Corpus
from darwinlm.database.store import Database
from darwinlm.errors import UserError
from darwinlm.files import read_json, write_bytes, write_json
from darwinlm.plan import Budget, Plan, Space
from darwinlm.progress import log, task
from darwinlm.recipe import SearchRecipe
from darwinlm.scoring import DenseReference
from darwinlm.search.allocation import error_plan, uniform_plan
from darwinlm.search.descent import neighbours, steepest
from darwinlm.search.evolution import Evolution
from darwinlm.search.sensitivity import Neighbourhood
from darwinlm.training import train_briefly

DIVERGED = 1e9
"""The score of a candidate whose trial diverged: it is dropped, the search goes on."""


class TrialScorer:
    """Scores plans: cut, train on the step's trial tokens, KL(dense || candidate) on the step's score tokens."""

    def __init__(self, dense: DenseModel, database: Database, corpus: Corpus, recipe: SearchRecipe) -> None:
        self._dense, self._database, self._corpus, self._recipe = dense, database, corpus, recipe
        self._weights = dense.weights
        self._reference = DenseReference(dense.model, corpus.tokens("score", max(recipe.score_tokens)))

    def score(self, plan: Plan, step: int) -> float:
        """The plan's KL in nats after the trial of `step`; `DIVERGED` if that has no finite value."""
        recipe, dense = self._recipe, self._dense
        trial_tokens = recipe.trial_tokens[step]
        cuts = self._database.cuts(dense.sites, plan.levels, dense.device)
        model = build_model(dense.config, dense.sites, self._weights, cuts, trainable=trial_tokens > 0)
        if trial_tokens > 0:
            blocks_BT = self._corpus.tokens("trial", trial_tokens)
            train_briefly(model, blocks_BT, learning_rate=recipe.learning_rate, batch_size=recipe.batch_size)
        return _finite(self._reference.compare(model, recipe.score_tokens[step]).kl)


def starting_plans(space: Space, budget: Budget) -> list[Plan]:
    """The plans a search begins with: uniform sizes, and least total output error. Raises UserError if none fits."""
    plans = [plan for plan in (uniform_plan(space, budget), error_plan(space, budget)) if plan is not None]
    if not plans:
        raise UserError(
            f"no plan has between {budget.minimum:,} and {budget.maximum:,} parameters with this database's levels; "
            "change target a little or raise database.levels"
        )
    return plans


def descend(
    dense: DenseModel,
    database: Database,
    corpus: Corpus,
    budget: Budget,
    recipe: SearchRecipe,
    start: Plan,
    file: Path,
) -> Plan:
    """Go downhill from `start` by measured slopes, for as long as that helps, at most `recipe.descent_rounds` times.

    Each round measures slopes on a few score blocks of its own, and its step counts only if it helps on all the others:
    a step found and judged on the same text fits that text. Goes on from the rounds in `file`.
    """
    space = database.space(dense.sites)
    blocks_BT = corpus.blocks["score"]
    window = len(corpus.tokens("score", recipe.score_tokens[0]))
    rounds: list[dict[str, Any]] = read_json(file)["rounds"] if file.exists() else []
    plans = len(neighbours(space, start)) + 1

    def kl_of(reference: DenseReference, plan: Plan) -> float:
        cuts = database.cuts(dense.sites, plan.levels, dense.device)
        return _finite(reference.compare(build_model(dense.config, dense.sites, dense.weights, cuts)).kl)

    with task("descent (plans)", plans * recipe.descent_rounds) as progress:
        progress.advance(plans * len(rounds))
        while len(rounds) < recipe.descent_rounds and (not rounds or rounds[-1]["improved"]):
            base = Plan(levels=tuple(rounds[-1]["levels"])) if rounds else start
            rolled_BT = blocks_BT.roll(-window * len(rounds), dims=0)
            others_BT = rolled_BT[window:] if len(rolled_BT) > window else rolled_BT
            slopes_on = DenseReference(dense.model, rolled_BT[:window])
            near = Neighbourhood(dense, slopes_on, lambda i, k: database.cut(dense.sites[i], k, dense.device), base)
            scores = []
            for plan in [base, *neighbours(space, base)]:
                scores.append(_finite(near.kl(plan.levels)))
                progress.advance()
            found = steepest(space, budget, base, scores[0], scores[1:]) or base
            judged_on = DenseReference(dense.model, others_BT)
            before, after = kl_of(judged_on, base), kl_of(judged_on, found)
            best = found if after < before else base
            rounds.append({"before": before, "after": after, "improved": after < before, "levels": best.levels})
            write_json(file, {"rounds": rounds})
            log.info("descent: KL %.4f -> %.4f without training", before, after)
    return Plan(levels=tuple(rounds[-1]["levels"]))


def _finite(kl: float) -> float:
    return kl if math.isfinite(kl) else DIVERGED


def search_plan(
    dense: DenseModel,
    database: Database,
    corpus: Corpus,
    budget: Budget,
    recipe: SearchRecipe,
    seed: int,
    folder: Path,
) -> Plan:
    """Search until the recipe's generations are done, or go on from the state in `folder`.

    Writes `descent.json` after every round of the descent, `state.json` after every step of the evolution,
    `history.jsonl` (one line a generation) and, at the end, `best_plan.json`.
    """
    space = database.space(dense.sites)
    state_file = folder / "state.json"
    if state_file.exists():
        search = Evolution.resume(space, budget, recipe, read_json(state_file))
        log.info("search: going on at generation %d", search.generation)
    else:
        starts = starting_plans(space, budget)
        if recipe.descent_rounds > 0:
            starts.append(descend(dense, database, corpus, budget, recipe, starts[-1], folder / "descent.json"))
        search = Evolution(space, budget, recipe, starts, seed)
    scorer: TrialScorer | None = None
    with task("search (generations)", recipe.generations + 1) as progress:
        progress.advance(search.generation, note=_best(search))
        while (request := search.ask()) is not None:
            scorer = scorer or TrialScorer(dense, database, corpus, recipe)
            search.tell([scorer.score(plan, request.step) for plan in request.plans])
            write_json(state_file, search.state())
            if search.generation > request.generation:
                progress.advance(note=_best(search))
    log.info("search: %s", search.stop())
    lines = [json.dumps(entry, allow_nan=False) + "\n" for entry in search.history]
    write_bytes(folder / "history.jsonl", "".join(lines).encode())
    write_json(folder / "best_plan.json", search.parent.to_dict(space))
    return search.parent


def _best(search: Evolution) -> str:
    return f"KL {search.history[-1]['score']:.4f}" if search.history else ""
