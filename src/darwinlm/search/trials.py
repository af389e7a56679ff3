"""Trials: cut a plan out of the model, train it briefly and score it; and the tuning of their learning rate.

The largest useful AdamW step differs between models by more than a factor of ten. Therefore the learning rate `auto` is
tuned on the first plan of the evolution, on a part of the train split that no trial trains on: in factors of two,
relative to the size of each weight, until a lower and a higher rate are both worse. If no rate is better than no
training, candidates are not trained.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from darwinlm.config.recipe import SearchRecipe
from darwinlm.data.corpus import Corpus
from darwinlm.database.store import Database
from darwinlm.metrics.kl import DenseReference, Fidelity
from darwinlm.models.cutting import Cut
from darwinlm.models.device_memory import TRIAL_BYTES, Portion, free_memory
from darwinlm.models.loading import DenseModel, fast_dtype
from darwinlm.optim.learning_rate import LearningRate
from darwinlm.plan import Plan
from darwinlm.runtime import dist
from darwinlm.search.evolution import Score, difference
from darwinlm.search.neighbourhood import Neighbourhood
from darwinlm.search.trial_training import train_briefly

FIRST_RATE = 2.0**-11
"""First relative learning rate of the tuning."""
_MOST_RATES = 8


class TrialScorer:
    """Scorer of plans: cut, train on the step's trial tokens, KL(dense || candidate) on the step's score tokens."""

    def __init__(self, dense: DenseModel, database: Database, corpus: Corpus, recipe: SearchRecipe) -> None:
        self._dense, self._database, self._corpus, self._recipe = dense, database, corpus, recipe
        scored = corpus.splits["validation"].first(max(recipe.score_tokens))
        self._reference = DenseReference(dense.reference.model, scored.input_ids_BT)
        self._space = database.space(dense.sites)
        self._near: tuple[Plan, Neighbourhood] | None = None
        self._portion = Portion(recipe.batch_size, "search")
        self._target_rows_BTD: Tensor | None = None
        self._rates: dict[int, float] = {}
        self._optimizer = recipe.optimizer

    def score(self, plan: Plan, step: int, parent: Plan) -> Score:
        """Score the plan before and after the trial of `step`, reusing what it shares with `parent`."""
        trial_tokens, score_tokens = self._recipe.trial_tokens[step], self._recipe.score_tokens[step]
        if self._near is None or self._near[0] != parent:
            dtype = fast_dtype(self._dense.device)
            self._near = parent, Neighbourhood(self._dense, self._reference, self._cut, parent, dtype)
        untrained = _score(self._near[1].compare(plan.levels, score_tokens))
        if self._rate(trial_tokens) is None or untrained.kl is None:
            return untrained
        return replace(self.score_after(plan, trial_tokens, score_tokens), untrained=untrained.kl)

    def score_after(self, plan: Plan, trial_tokens: int, score_tokens: int) -> Score:
        """Score the plan on `score_tokens` tokens after a trial of `trial_tokens` tokens."""
        return self._score_after(plan, trial_tokens, self._rate(trial_tokens), self._reference, score_tokens)

    def find_rates(self, plan: Plan) -> list[dict[str, Any]]:
        """Tune the rate of each step's trial if it is `auto`; rank 0's result is sent to all ranks.

        Returns:
            For each number of trial tokens: `tokens`, `rate` (relative; 0 if no rate is better than no training), and
            `tried`: rates and the KL after them, in nats, on a part of the train split that is not trained on.
        """
        recipe, text_BT = self._recipe, self._corpus.splits["train"].input_ids_BT
        wanted = sorted({count for count in recipe.trial_tokens if count > 0})
        found: list[dict[str, Any]] = []
        if recipe.learning_rate == "auto" and wanted and dist.rank() == 0:
            others = len(text_BT) - len(self._corpus.splits["train"].first(wanted[-1]))
            count = min(len(self._corpus.splits["validation"].first(max(recipe.score_tokens))), others)
            reference = DenseReference(self._dense.reference.model, text_BT[len(text_BT) - count :])
            untrained, start = self._score_after(plan, 0, None, reference), FIRST_RATE
            for tokens in wanted:

                def score(rate: float, tokens: int = tokens) -> Score:
                    return self._score_after(plan, tokens, LearningRate(rate, relative=True), reference)

                rate, tried = best_rate(score, untrained, start)
                kls = [(each, one.kl) for each, one in sorted(tried.items())]
                found.append({"tokens": tokens, "rate": rate, "tried": kls})
                start = rate or start
        (found, *_) = dist.gather(found)
        self.take_rates(found)
        return found

    def take_rates(self, found: Sequence[Mapping[str, Any]]) -> None:
        """Use the rates found earlier by `find_rates`."""
        self._rates = {one["tokens"]: one["rate"] for one in found}

    def _rate(self, tokens: int) -> LearningRate | None:
        """Return the learning rate of a trial of `tokens` tokens; None to skip training."""
        if tokens == 0:
            return None
        if self._recipe.learning_rate != "auto":
            return LearningRate(self._recipe.learning_rate)
        rate = self._rates.get(tokens)
        if rate is None:
            # More tokens than in any step, as for a forecast.
            longest_first = (self._rates[count] for count in sorted(self._rates, reverse=True))
            rate = next((one for one in longest_first if one > 0), FIRST_RATE)
        return LearningRate(rate, relative=True) if rate > 0 else None

    def _score_after(
        self,
        plan: Plan,
        trial_tokens: int,
        rate: LearningRate | None,
        reference: DenseReference,
        tokens: int | None = None,
    ) -> Score:
        recipe, dense = self._recipe, self._dense
        blocks_BT = self._corpus.splits["train"].first(trial_tokens).input_ids_BT
        target_rows_BTD = (
            self._target_rows(blocks_BT) if recipe.trial_loss == "distillation" and rate is not None else None
        )
        trained = self._space.parameters(plan.levels) - self._space.fixed_parameters
        needed = TRIAL_BYTES[self._optimizer] * trained
        if needed > free_memory(dense.device):
            self._database.free()
        cuts = self._database.cuts(dense.sites, plan.levels, dense.layers_device)
        if needed > free_memory(dense.device):
            self._database.free()
            self._near = None  # It refers to layers of the dense model.
            dense.offload_layers()
        dtype = fast_dtype(dense.device)
        own = torch.float32 if self._optimizer == "adamw" and rate is not None else dtype
        model = dense.cut(cuts, trainable=True, shared_ends=True, dtype=own)
        del cuts  # the columns are copied
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
            return Score(None)
        return _score(reference.compare(model, tokens, head=dense.head))

    def _target_rows(self, blocks_BT: Tensor) -> Tensor:
        """Return the dense model's mean head rows for these first blocks of the train split, in CPU memory."""
        if self._target_rows_BTD is None or len(self._target_rows_BTD) < len(blocks_BT):
            self._target_rows_BTD = DenseReference(self._dense.reference.model, blocks_BT).mean_head_rows().cpu()
        return self._target_rows_BTD[: len(blocks_BT)]

    def _cut(self, index: int, level: int) -> Cut:
        return self._database.cut(self._dense.sites[index], level, self._dense.layers_device)


def best_rate(score: Callable[[float], Score], untrained: Score, start: float) -> tuple[float, dict[float, Score]]:
    """Return the rate of lowest KL among `start` times powers of two, and all scores tried; 0 means no training.

    Stops when both neighbors of the best rate are worse, or after `_MOST_RATES`. Returns 0 if the gain over no training
    is below the standard error of the difference.
    """
    tried = {0.0: untrained}
    rate = start
    for _ in range(_MOST_RATES):
        tried[rate] = score(rate)
        best = min(tried, key=lambda one: tried[one].rank)
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
        return Score(None)
    return Score(fidelity.kl, by_block=fidelity.kl_by_block)
