"""Predicted cost of the search."""

import torch

from darwinlm.config.stage import Stage
from darwinlm.estimate.work import LIBRARIES, LINK, SCORED_TOGETHER, SLACK, StageCost, Work
from darwinlm.models.device_memory import SPARE, TRIAL_BYTES
from darwinlm.models.heads import chunk_tokens

_EVALUATED_PLANS = 4.75
"""Plan evaluations on the whole validation split per descent round: eight plans start, most are stopped early."""
_GRADIENT_PASSES = 1.7
"""Cost of measuring sensitivities, relative to a forward and backward pass of training: two backward passes without
weight gradients, and the columns of all levels in addition to the dense ones."""


def predict_search(work: Work) -> StageCost:
    """Predict the descent, the generations, and the memory of trials and sensitivities."""
    return StageCost(
        stage=Stage("search", work.number),
        seconds=_seconds(work),
        memory=_memory(work),
        host_memory=2 * work.candidate if work.offload else 0.0,
    )


def _seconds(work: Work) -> float:
    search, rates, tokens = work.search, work.rates, work.recipe.data.validation_tokens
    # Seconds per token through the layers of a candidate, forward and in training.
    small, trained = work.left * work.layers * rates.layer_fast, work.left * work.layers * rates.layer_training
    if work.offload:
        # Each layer is copied once per scoring pass; for training, twice and back.
        small += 2 * work.candidate / (LINK * SCORED_TOGETHER)
        trained += 6 * work.candidate / (LINK * work.trained_together)
    scored, trained = small + 2 * rates.head_float32, trained + rates.head_training
    comparing = _EVALUATED_PLANS * tokens * scored

    # A candidate is scored after its trial; the score before the trial skips the layers shared with its parent.
    tried = [
        trial * trained + score * (scored + (scored - small / 2 if trial > 0 else 0))
        for trial, score in zip(search.trial_tokens, search.score_tokens, strict=True)
    ]
    candidates = [search.offspring, *search.survivors[:-1]]
    generation = sum(count * seconds for count, seconds in zip(candidates, tried, strict=True))
    # Generation 0: the uniform, least-error and descent plans; or uniform-size plans, about one per level.
    starts = 3 if search.descent_rounds else 2
    if work.uniform:
        starts = min(search.offspring, work.recipe.database.levels)
    beginning = starts * tried[-1] + (comparing if work.uniform else 0.0)
    if search.learning_rate == "auto":
        # Usually three learning rates are tried for each number of tokens.
        for trial in {trial for trial in search.trial_tokens if trial > 0}:
            beginning += 3 * (trial * trained + max(search.score_tokens) * scored)

    descent = 0.0
    if search.descent_rounds:
        sensitivities = search.sensitivity_tokens * (
            work.before * work.layers * rates.layer_training * _GRADIENT_PASSES + 3 * rates.head_float32
        )
        # The starting plan is evaluated like a round.
        descent = search.descent_rounds * sensitivities + (search.descent_rounds + 1) * comparing
    reference = tokens * work.layers * work.exact
    return 2 * reference + (descent + beginning + search.generations * generation) / work.machine.devices


def _memory(work: Work) -> float:
    search, machine = work.search, work.machine
    place = torch.device("cuda" if machine.accelerator else "cpu")
    # The inputs of all layers of a parent are kept, for all score tokens.
    states = max(search.score_tokens) * work.rows * (work.depth + 1) * work.item
    base = LIBRARIES + 3 * 4 * work.vocabulary * chunk_tokens(work.vocabulary, place) + states
    trained_for = search.trial_tokens if search.generations else search.trial_tokens[-1:]
    return base + max(
        _trials(work, base) if any(trained_for) else 0.0,
        _sensitivities(work) if search.descent_rounds else 0.0,
        work.resident,
    )


def _trials(work: Work, base: float) -> float:
    """Return the bytes of a trial; it recomputes activations that do not fit."""
    if work.offload:
        return work.passing
    search = work.search
    layer = work.block_bytes / work.depth
    trials = work.whole + TRIAL_BYTES[search.optimizer] * work.candidate + search.batch_size * layer
    if work.machine.accelerator and base + trials > work.machine.memory:
        trials -= work.whole - work.item * work.fixed
    return trials


def _sensitivities(work: Work) -> float:
    """Return the bytes of sensitivities, which keep activations; all levels are on the device if there is room."""
    outputs, levels, kept = work.output_elements, work.level_bytes, work.block_bytes
    if work.offload:
        return work.passing + (levels + 2 * outputs) / work.depth
    if not work.machine.accelerator:
        return work.whole + levels + 2 * work.before * work.in_sites + work.whole / 2 + kept
    needed = work.whole + SPARE * (levels + 2 * outputs + kept)
    fits = SLACK * (LIBRARIES + needed) < work.machine.memory
    return work.whole + 2 * outputs + kept + (levels if fits else 0)
