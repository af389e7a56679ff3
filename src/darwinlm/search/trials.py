"""Trials: cut a plan out of the model, train it a little, score it; and how fast to train, found before the first.

How far a step of AdamW may go differs between models by more than a factor of ten, so the learning rate `auto` is
searched for, on the plan that the evolution begins with and on trial text that no trial trains on: in factors of two,
relative to the size of each weight, until a lower and a higher rate are both worse. Where none is better than no
training, nothing is trained.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from darwinlm import dist
from darwinlm.adapters.cutting import Cut
from darwinlm.adapters.loading import DenseModel, fast_dtype
from darwinlm.adapters.memory import TRIAL_BYTES, Portion, free_memory
from darwinlm.data import Corpus
from darwinlm.database.store import Database
from darwinlm.learning_rate import LearningRate
from darwinlm.plan import Plan
from darwinlm.recipe import SearchRecipe
from darwinlm.scoring import DenseReference, Fidelity
from darwinlm.search.evolution import Score, difference
from darwinlm.search.neighbourhood import Neighbourhood
from darwinlm.training import train_briefly

DIVERGED = 1e9
"""The score of a candidate whose trial diverged: it is dropped, the search goes on."""
FIRST_RATE = 2.0**-11
"""Where the search for a relative learning rate begins."""
_MOST_RATES = 8


class TrialScorer:
    """Scores plans: cut, train on the step's trial tokens, KL(dense || candidate) on the step's score tokens."""

    def __init__(self, dense: DenseModel, database: Database, corpus: Corpus, recipe: SearchRecipe) -> None:
        self._dense, self._database, self._corpus, self._recipe = dense, database, corpus, recipe
        self._reference = DenseReference(dense.reference.model, corpus.tokens("score", max(recipe.score_tokens)))
        self._space = database.space(dense.sites)
        self._near: tuple[Plan, Neighbourhood] | None = None
        self._portion = Portion(recipe.batch_size, "search")
        self._taught_BTD: Tensor | None = None
        self._rates: dict[int, float] = {}
        self._optimizer = recipe.optimizer

    def score(self, plan: Plan, step: int, parent: Plan) -> Score:
        """The plan before and after the trial of `step`; what it has in common with `parent` is not computed again."""
        trial_tokens, score_tokens = self._recipe.trial_tokens[step], self._recipe.score_tokens[step]
        if self._near is None or self._near[0] != parent:
            dtype = fast_dtype(self._dense.device)
            self._near = parent, Neighbourhood(self._dense, self._reference, self._cut, parent, dtype)
        untrained = _score(self._near[1].compare(plan.levels, score_tokens))
        if self._rate(trial_tokens) is None:
            return untrained
        return replace(self.score_after(plan, trial_tokens, score_tokens), untrained=untrained.kl)

    def score_after(self, plan: Plan, trial_tokens: int, score_tokens: int) -> Score:
        """The plan after a trial of `trial_tokens`, on `score_tokens`."""
        return self._score_after(plan, trial_tokens, self._rate(trial_tokens), self._reference, score_tokens)

    def find_rates(self, plan: Plan) -> list[dict[str, Any]]:
        """Search for the rate of each step's trial where it is `auto`; all ranks get to know what rank 0 has found.

        Returns:
            For each number of trial tokens: `tokens`, `rate` (relative; 0 if no rate is better than no training), and
            what was `tried`: rates and the KL after them, in nats, on trial text that is not trained on.
        """
        recipe, text_BT = self._recipe, self._corpus.blocks["trial"]
        wanted = sorted({count for count in recipe.trial_tokens if count > 0})
        found: list[dict[str, Any]] = []
        if recipe.learning_rate == "auto" and wanted and dist.rank() == 0:
            others = len(text_BT) - len(self._corpus.tokens("trial", wanted[-1]))
            judged = min(len(self._corpus.tokens("score", max(recipe.score_tokens))), others)
            judge = DenseReference(self._dense.reference.model, text_BT[len(text_BT) - judged :])
            untrained, start = self._score_after(plan, 0, None, judge), FIRST_RATE
            for tokens in wanted:

                def score(rate: float, tokens: int = tokens) -> Score:
                    return self._score_after(plan, tokens, LearningRate(rate, relative=True), judge)

                rate, tried = best_rate(score, untrained, start)
                kls = [(each, one.kl) for each, one in sorted(tried.items())]
                found.append({"tokens": tokens, "rate": rate, "tried": kls})
                start = rate or start
        (found, *_) = dist.gather(found)
        self.take_rates(found)
        return found

    def take_rates(self, found: Sequence[Mapping[str, Any]]) -> None:
        """Go on with what `find_rates` has found before."""
        self._rates = {one["tokens"]: one["rate"] for one in found}

    def _rate(self, tokens: int) -> LearningRate | None:
        """Of a trial of `tokens`; None if nothing is to be trained."""
        if tokens == 0:
            return None
        if self._recipe.learning_rate != "auto":
            return LearningRate(self._recipe.learning_rate)
        rate = self._rates.get(tokens)
        if rate is None:
            # More than any step trains on, as for a forecast.
            longest_first = (self._rates[count] for count in sorted(self._rates, reverse=True))
            rate = next((one for one in longest_first if one > 0), FIRST_RATE)
        return LearningRate(rate, relative=True) if rate > 0 else None

    def _score_after(
        self, plan: Plan, trial_tokens: int, rate: LearningRate | None, judge: DenseReference, tokens: int | None = None
    ) -> Score:
        recipe, dense = self._recipe, self._dense
        blocks_BT = self._corpus.tokens("trial", trial_tokens)
        target_rows_BTD = self._aims(blocks_BT) if recipe.trial_loss == "distillation" and rate is not None else None
        trained = self._space.parameters(plan.levels) - self._space.fixed_parameters
        needed = TRIAL_BYTES[self._optimizer] * trained
        if needed > free_memory(dense.device):
            self._database.free()
        cuts = self._database.cuts(dense.sites, plan.levels, dense.layers_device)
        if needed > free_memory(dense.device):
            self._database.free()
            self._near = None  # it holds layers of the dense model
            dense.park()
        dtype = fast_dtype(dense.device)
        own = torch.float32 if self._optimizer == "adamw" and rate is not None else dtype
        model = dense.cut(cuts, trainable=True, shared_ends=True, dtype=own)
        if rate is None:
            model.to(dtype)
        elif not train_briefly(
            model,
            blocks_BT,
            optimizer=self._optimizer,
            rate=rate,
            batch_size=recipe.batch_size,
            target_rows_BTD=target_rows_BTD,
            portion=self._portion,
            balance=dense.reference.balance,
        ):
            return Score(DIVERGED)
        return _score(judge.compare(model, tokens, head=dense.head))

    def _aims(self, blocks_BT: Tensor) -> Tensor:
        """What the dense model teaches on these blocks, the first of the trial split; in the CPU's memory."""
        if self._taught_BTD is None or len(self._taught_BTD) < len(blocks_BT):
            self._taught_BTD = DenseReference(self._dense.reference.model, blocks_BT).mean_head_rows().cpu()
        return self._taught_BTD[: len(blocks_BT)]

    def _cut(self, index: int, level: int) -> Cut:
        return self._database.cut(self._dense.sites[index], level, self._dense.layers_device)


def best_rate(score: Callable[[float], Score], untrained: Score, start: float) -> tuple[float, dict[float, Score]]:
    """The rate of least KL among powers of two times `start`, with what was tried; 0, no training, is among it.

    Ends when the rates next to the best are both worse, or after `_MOST_RATES`. A rate that is better than no training
    by less than the standard error of the difference counts as none.
    """
    tried = {0.0: untrained}
    rate = start
    for _ in range(_MOST_RATES):
        tried[rate] = score(rate)
        best = min(tried, key=lambda one: tried[one].kl)
        low, high = min(one for one in tried if one > 0), max(tried)
        if best == high:
            rate = 2 * high
        elif best in (0.0, low):
            rate = low / 2
        else:
            break
    gain, error = difference(untrained, tried[best])
    return best if gain > error else 0.0, tried


def _score(fidelity: Fidelity) -> Score:
    if not math.isfinite(fidelity.kl):
        return Score(DIVERGED)
    return Score(fidelity.kl, by_block=fidelity.kl_by_block)
