"""The evolutionary search as an ask/tell core: it proposes plans and selects among them, and knows no tensors.

A generation (paper, section 3): the parent's offspring are scored in steps, each with more training and more scoring
tokens than the one before, and only the best go on; in the last step the parent joins them, so that the best plan is
never lost.
"""

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from darwinlm.plan import Budget, Plan, Space
from darwinlm.recipe import SearchRecipe

_TRIES = 200
_TOURNAMENT = 16
"""Where costs are known, an offspring is the one of so many mutations that they say is best."""


@dataclass(frozen=True, slots=True)
class Request:
    """Plans to be scored at a step; every plan of a request is trained and scored on the same tokens."""

    generation: int
    step: int
    plans: tuple[Plan, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """How good a plan is at a step."""

    kl: float
    """After its trial, if the step has one; lower is better."""
    untrained: float | None = None
    """Before its trial, on the same text; None where nothing is trained."""
    by_block: tuple[float, ...] = ()
    """Of each block of the text; `kl` is their mean."""


class Evolution:
    """Search for the plan of the lowest score within a budget.

        search = Evolution(space, budget, recipe, starts, seed)
        while (request := search.ask()) is not None:
            search.tell([Score(score(plan, request.step)) for plan in request.plans])

    `state()` between the two is plain data; `Evolution.resume` continues from it exactly. Generation 0 scores the
    starting plans alone, with the last step's tokens. A plan is scored at most once at each step.
    """

    def __init__(
        self,
        space: Space,
        budget: Budget,
        recipe: SearchRecipe,
        starts: Sequence[Plan],
        seed: int,
        costs: Sequence[Sequence[float]] | None = None,
    ) -> None:
        """Begin a search.

        Args:
            space: what sites can become.
            budget: that every plan meets.
            recipe: generations, offspring, selection.
            starts: plans within `budget`, compared in generation 0.
            seed: of all random choices.
            costs: by site and level, what is expected of it; offspring are drawn by these.
        """
        assert starts, "a search needs a plan to start from"
        assert all(budget.holds(plan.levels) for plan in starts)
        self._space, self._budget, self._recipe = space, budget, recipe
        self._rng = random.Random(seed)
        self._last_step = len(recipe.survivors) - 1
        self._scores: list[dict[Plan, Score]] = [{} for _ in recipe.survivors]
        self._proposed: set[Plan] = set(starts)
        self._costs = costs
        self._flips = recipe.max_flips
        """The most exchanges in a mutation: fewer after a generation without success, more after one with it."""
        self._stuck = False
        self.generation = 0
        self.parent = starts[0]
        self.history: list[dict[str, Any]] = []
        """One entry a finished generation: its best score, those it was compared with, what its trials were good for,
        and the parent after it."""
        self._trials = _no_trials(recipe)
        self._step = self._last_step
        self._pool: tuple[Plan, ...] = tuple(dict.fromkeys(starts))

    def stop(self) -> str | None:
        """Why the search is over, or None."""
        if self.generation > self._recipe.generations:
            return f"{self._recipe.generations} generations are done"
        if self._stuck:
            return "every neighbour of the best plan has been tried"
        return None

    def ask(self) -> Request | None:
        """What to score next; None when the search is over. Asking twice gives the same answer."""
        if self.stop() is not None:
            return None
        known = self._scores[self._step]
        return Request(self.generation, self._step, tuple(plan for plan in self._pool if plan not in known))

    def tell(self, scores: Sequence[Score]) -> None:
        """Report the scores of the plans last asked for, in their order."""
        request = self.ask()
        assert request is not None and len(scores) == len(request.plans)
        known = self._scores[self._step]
        known.update(zip(request.plans, scores, strict=True))
        trained = [score.kl < score.untrained for score in scores if score.untrained is not None]
        self._trials[self._step]["tried"] += len(trained)
        self._trials[self._step]["helped"] += sum(trained)
        ranked = sorted(self._pool, key=lambda plan: known[plan].kl)
        if self._step < self._last_step:
            self._pool = tuple(ranked[: self._recipe.survivors[self._step]])
            self._step += 1
            if self._step == self._last_step:
                self._pool = tuple(dict.fromkeys([*self._pool, self.parent]))
            return
        before, self.parent = self.parent, ranked[0]
        improved = self.parent != before
        if self.generation > 0:
            self._flips = min(self._recipe.max_flips, self._flips + 1) if improved else max(1, self._flips - 1)
        self.history.append(
            {
                "generation": self.generation,
                "score": known[self.parent].kl,
                "scores": [known[plan].kl for plan in ranked],
                "improved": improved,
                "gain": dict(zip(("mean", "error"), difference(known[before], known[self.parent]), strict=True)),
                "trials": self._trials,
                "levels": list(self.parent.levels),
            }
        )
        self.generation += 1
        self._begin_generation()

    def _begin_generation(self) -> None:
        offspring: list[Plan] = []
        if self.generation <= self._recipe.generations:
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
        """`count` different plans from near the parent to far from it, drawn without `costs`; the search goes on as if
        they had not been asked for.
        """
        before, found = self._rng.getstate(), dict[Plan, None]()
        for number in range(_TRIES * count):
            if len(found) == count:
                break
            levels = list(self.parent.levels)
            if all(self._exchange(levels) for _ in range(1 + number % (2 * self._recipe.max_flips))):
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
        """Prune one site a level or two further and give others of any kind what that frees, within the budget."""
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
        """Everything that is needed to go on, as JSON."""
        version, internal, gauss = self._rng.getstate()
        return {
            "generation": self.generation,
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
    def resume(cls, space: Space, budget: Budget, recipe: SearchRecipe, state: Mapping[str, Any]) -> "Evolution":
        """Continue from `state()`."""
        search = cls(space, budget, recipe, [Plan(levels=tuple(state["parent"]))], seed=0, costs=state["costs"])
        search._flips = state["flips"]
        version, internal, gauss = state["rng"]
        search._rng.setstate((version, tuple(internal), gauss))
        search.generation, search._step, search._stuck = state["generation"], state["step"], state["stuck"]
        search._pool = tuple(Plan(levels=tuple(levels)) for levels in state["pool"])
        search._proposed = {Plan(levels=tuple(levels)) for levels in state["proposed"]}
        search._scores = [
            {Plan(levels=tuple(levels)): Score(kl, untrained, tuple(kls)) for levels, kl, untrained, kls in known}
            for known in state["scores"]
        ]
        search._trials = [dict(one) for one in state["trials"]]
        search.history = list(state["history"])
        return search


def _no_trials(recipe: SearchRecipe) -> list[dict[str, int]]:
    """By step, how many candidates of a generation were trained, and how many of them were better after it."""
    return [{"tried": 0, "helped": 0} for _ in recipe.survivors]


def difference(before: Score, after: Score) -> tuple[float, float]:
    """By how much the KL of `after` is lower, in nats, and the standard error of that over blocks of the same text.

    A plan that has diverged has no blocks, and no error is known.
    """
    differences = [old - new for old, new in zip(before.by_block, after.by_block, strict=False)]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return before.kl - after.kl, error
