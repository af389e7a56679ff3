"""Evolutionary search as an ask/tell object: it proposes plans and selects among them, without tensors.

In a generation (paper, section 3), the parent's offspring are scored in steps, each with more training and scoring
tokens than the one before, and only the best survive; the parent joins the last step, so that the best plan is never
lost.
"""

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from darwinlm.config.recipe import SearchRecipe
from darwinlm.plan import Budget, Plan, Space
from darwinlm.search.history import kl_of

_TRIES = 200
_MOST_FLIPS = 3
"""Maximum number of exchanges per mutation, as in the paper's code."""
_TOURNAMENT = 16
"""Tournament size: each offspring is the best of this many mutations by the expected costs, if these are known."""


@dataclass(frozen=True, slots=True)
class Request:
    """Plans to score at a step; all plans of a request are trained and scored on the same tokens."""

    generation: int
    step: int
    plans: tuple[Plan, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """Score of a plan at a step."""

    kl: float | None
    """KL after the trial, if the step has one; lower is better. None if the candidate diverged: it is dropped, and the
    search continues."""
    untrained: float | None = None
    """KL before the trial, on the same text; None if nothing is trained."""
    by_block: tuple[float, ...] = ()
    """KL of each block of the text; `kl` is their mean."""

    @property
    def rank(self) -> float:
        """Value to compare scores by: `kl`, infinity if the candidate diverged."""
        return math.inf if self.kl is None else self.kl


class Evolution:
    """Search for the plan of lowest score within a budget.

        search = Evolution(space, budget, recipe, starts, seed)
        while (request := search.ask()) is not None:
            search.tell([Score(score(plan, request.step)) for plan in request.plans])

    Between the two calls, `state()` is plain data from which `Evolution.resume` continues exactly. Generation 0 scores
    only the starting plans, with the last step's tokens. A plan is scored at most once at each step.
    """

    def __init__(
        self,
        space: Space,
        budget: Budget,
        recipe: SearchRecipe,
        starts: Sequence[Plan],
        seed: int,
        costs: Sequence[Sequence[float]] | None = None,
        generations: int | None = None,
    ) -> None:
        """Start a search.

        Args:
            space: levels of every site.
            budget: budget that every plan meets.
            recipe: settings of offspring and selection.
            starts: plans within `budget`, compared in generation 0.
            seed: random seed.
            costs: expected cost by site and level, used to select mutations.
            generations: number of generations after generation 0; by default that of `recipe`.
        """
        assert starts, "the search needs a starting plan"
        assert all(budget.holds(plan.levels) for plan in starts)
        self._space, self._budget, self._recipe = space, budget, recipe
        self._generations = recipe.generations if generations is None else generations
        self._rng = random.Random(seed)
        self._last_step = len(recipe.survivors) - 1
        self._scores: list[dict[Plan, Score]] = [{} for _ in recipe.survivors]
        self._proposed: set[Plan] = set(starts)
        self._costs = costs
        self._flips = _MOST_FLIPS
        """Present maximum: decreases after a generation without improvement, otherwise increases."""
        self._stuck = False
        self.generation = 0
        self.parent = starts[0]
        self.history: list[dict[str, Any]] = []
        """One entry per finished generation: its best score, all scores of the last step, statistics of its trials, and
        the parent after it."""
        self._trials = _no_trials(recipe)
        self._step = self._last_step
        self._pool: tuple[Plan, ...] = tuple(dict.fromkeys(starts))

    def stop(self) -> str | None:
        """Return the reason why the search is over, or None."""
        if self.generation > self._generations:
            return f"all {self._generations} generations done"
        if self._stuck:
            return "all neighbors of the best plan have been tried"
        return None

    def ask(self) -> Request | None:
        """Return the plans to score next, or None when the search is over. Calling it twice gives the same result."""
        if self.stop() is not None:
            return None
        known = self._scores[self._step]
        return Request(self.generation, self._step, tuple(plan for plan in self._pool if plan not in known))

    def tell(self, scores: Sequence[Score]) -> None:
        """Report the scores of the plans of the last `ask`, in their order."""
        request = self.ask()
        assert request is not None and len(scores) == len(request.plans)
        known = self._scores[self._step]
        known.update(zip(request.plans, scores, strict=True))
        trained = [score.rank < score.untrained for score in scores if score.untrained is not None]
        self._trials[self._step]["tried"] += len(trained)
        self._trials[self._step]["helped"] += sum(trained)
        ranked = sorted(self._pool, key=lambda plan: known[plan].rank)
        if self._step < self._last_step:
            self._pool = tuple(ranked[: self._recipe.survivors[self._step]])
            self._step += 1
            if self._step == self._last_step:
                self._pool = tuple(dict.fromkeys([*self._pool, self.parent]))
            return
        before, self.parent = self.parent, ranked[0]
        improved = self.parent != before
        if self.generation > 0:
            self._flips = min(_MOST_FLIPS, self._flips + 1) if improved else max(1, self._flips - 1)
        mean, error = difference(known[before], known[self.parent])
        self.history.append(
            {
                "generation": self.generation,
                "score": known[self.parent].kl,
                "scores": [known[plan].kl for plan in ranked],
                "improved": improved,
                "gain": {"mean": mean if math.isfinite(mean) else None, "error": error},
                "trials": self._trials,
                "levels": list(self.parent.levels),
            }
        )
        self.generation += 1
        self._begin_generation()

    def _begin_generation(self) -> None:
        offspring: list[Plan] = []
        if self.generation <= self._generations:
            offspring = self._offspring()
            self._stuck = not offspring
        self._step = 0
        self._trials = _no_trials(self._recipe)
        self._pool = tuple(offspring)
        if self._last_step == 0:
            self._pool = (*self._pool, self.parent)

    def _offspring(self) -> list[Plan]:
        found: list[Plan] = []
        for _ in range(_TRIES):
            if len(found) == self._recipe.offspring:
                break
            drawn = [self._mutate(self.parent) for _ in range(_TOURNAMENT if self._costs else 1)]
            new = [plan for plan in drawn if plan is not None and plan not in self._proposed]
            if new:
                best = min(new, key=self._expected)
                self._proposed.add(best)
                found.append(best)
        return found

    def relatives(self, count: int) -> list[Plan]:
        """Return `count` different plans from near the parent to far from it, drawn without `costs`; the state of the
        search does not change."""
        before, found = self._rng.getstate(), dict[Plan, None]()
        for number in range(_TRIES * count):
            if len(found) == count:
                break
            levels = list(self.parent.levels)
            if all(self._exchange(levels) for _ in range(1 + number % (2 * _MOST_FLIPS))):
                found[Plan(levels=tuple(levels))] = None
        self._rng.setstate(before)
        return list(found)

    def _expected(self, plan: Plan) -> float:
        if self._costs is None:
            return 0.0
        return sum(self._costs[index][level] for index, level in enumerate(plan.levels))

    def _mutate(self, parent: Plan) -> Plan | None:
        """Exchange capacity between sites min(U, U) times; every exchange keeps the budget."""
        flips = min(self._rng.randint(1, self._flips), self._rng.randint(1, self._flips))
        levels = list(parent.levels)
        for _ in range(flips):
            if not self._exchange(levels):
                return None
        return Plan(levels=tuple(levels))

    def _exchange(self, levels: list[int]) -> bool:
        """Prune one site by one or two more levels, and give the freed capacity to another site of any kind, within the
        budget."""
        sites, limits = self._space.sites, self._budget.limits
        giver = self._rng.randrange(len(sites))
        last = len(sites[giver].units) - 1
        if levels[giver] == last:
            return False
        taken = min(last, levels[giver] + self._rng.choice((1, 1, 2)))
        freed = [limit.cost(levels) - limit.costs[giver][levels[giver]] + limit.costs[giver][taken] for limit in limits]
        takers = [
            (index, level)
            for index in range(len(sites))
            if index != giver
            for level in range(levels[index])
            if self._budget.holds_costs(
                [
                    total - limit.costs[index][levels[index]] + limit.costs[index][level]
                    for total, limit in zip(freed, limits, strict=True)
                ]
            )
        ]
        if not takers:
            return False
        levels[giver] = taken
        taker, level = self._rng.choice(takers)
        levels[taker] = level
        return True

    def state(self) -> dict[str, Any]:
        """Return everything needed to resume, as JSON-compatible data."""
        version, internal, gauss = self._rng.getstate()
        return {
            "generation": self.generation,
            "generations": self._generations,
            "step": self._step,
            "parent": list(self.parent.levels),
            "pool": [list(plan.levels) for plan in self._pool],
            "proposed": sorted(list(plan.levels) for plan in self._proposed),
            "scores": [
                [[list(plan.levels), score.kl, score.untrained, list(score.by_block)] for plan, score in known.items()]
                for known in self._scores
            ],
            "trials": self._trials,
            "stuck": self._stuck,
            "flips": self._flips,
            "costs": self._costs,
            "history": self.history,
            "rng": [version, list(internal), gauss],
        }

    @classmethod
    def resume(
        cls,
        space: Space,
        budget: Budget,
        recipe: SearchRecipe,
        state: Mapping[str, Any],
        generations: int | None = None,
    ) -> "Evolution":
        """Resume from `state()`."""
        parent = Plan(levels=tuple(state["parent"]))
        search = cls(space, budget, recipe, [parent], seed=0, costs=state["costs"], generations=generations)
        search._flips = state["flips"]
        version, internal, gauss = state["rng"]
        search._rng.setstate((version, tuple(internal), gauss))
        search.generation, search._step, search._stuck = state["generation"], state["step"], state["stuck"]
        search._pool = tuple(Plan(levels=tuple(levels)) for levels in state["pool"])
        search._proposed = {Plan(levels=tuple(levels)) for levels in state["proposed"]}
        search._scores = [
            {
                Plan(levels=tuple(levels)): Score(kl_of(kl), kl_of(untrained), tuple(kls))
                for levels, kl, untrained, kls in known
            }
            for known in state["scores"]
        ]
        search._trials = [dict(one) for one in state["trials"]]
        search.history = [_without_marks(entry) for entry in state["history"]]
        return search


def _no_trials(recipe: SearchRecipe) -> list[dict[str, int]]:
    """Create empty trial statistics per step: candidates trained (`tried`) and improved by training (`helped`)."""
    return [{"tried": 0, "helped": 0} for _ in recipe.survivors]


def _without_marks(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry of the history with None for candidates that diverged; see `kl_of`."""
    found = {**entry, "score": kl_of(entry["score"]), "scores": [kl_of(kl) for kl in entry["scores"]]}
    if "gain" in entry:
        found["gain"] = {**entry["gain"], "mean": kl_of(entry["gain"]["mean"])}
    return found


def difference(before: Score, after: Score) -> tuple[float, float]:
    """Return how much lower the KL of `after` is, in nats, and the standard error of the difference over blocks.

    Both scores are on the same text. If one of the plans has diverged, the difference is infinite, or NaN if both have,
    and its error is 0.
    """
    differences = [old - new for old, new in zip(before.by_block, after.by_block, strict=False)]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return before.rank - after.rank, error
