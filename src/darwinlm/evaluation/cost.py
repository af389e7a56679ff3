"""Predicted cost of the evaluation."""

from darwinlm.config.stage import Stage
from darwinlm.estimate.work import LIBRARIES, LINK, SCORED_TOGETHER, StageCost, Work

_SAMPLE_TOKENS = 40
"""Tokens that the dense and the last model each generate."""
_PASSES = 4
"""Passes of each model to measure its speed, the untimed one included."""


def predict_evaluation(work: Work) -> StageCost:
    """Predict KL and perplexity on held-out text, a few timed requests, and sample text."""
    recipe, rates, layers, left = work.recipe, work.rates, work.layers, work.left
    # The dense model, the uniform plan, the model pruned in this step, the plan found, and the recovered model.
    earlier, recovered = [work.before] if work.before < 1 else [], [left] if recipe.recovery.wanted else []
    models = [1.0, left, *earlier, left, *recovered]
    tokens = recipe.data.test_tokens
    seconds = tokens * (
        layers * work.exact + sum(share * layers * work.exact + 2 * rates.head_float32 for share in models)
    )
    if work.offload:
        # No request is timed; each pass copies all layers.
        passes = sum(models) * tokens / SCORED_TOGETHER + _SAMPLE_TOKENS * (1 + left)
        seconds += 2 * work.in_sites / LINK * passes
    else:
        timed = recipe.workload.timed
        prompts = timed.batch_size * timed.prompt_tokens
        request = layers * (prompts * rates.layer_fast + timed.new_tokens * rates.layer_alone)
        seconds += _PASSES * sum(share * request + timed.new_tokens * rates.head_alone for share in models)
    seconds += _SAMPLE_TOKENS * ((1 + left) * layers * rates.layer_alone + 2 * rates.head_alone)
    return StageCost(stage=Stage("evaluation"), seconds=seconds, memory=_memory(work))


def _memory(work: Work) -> float:
    base, others = LIBRARIES + work.resident, work.item * (work.fixed + work.candidate)
    if work.offload:
        return base
    if work.machine.accelerator:
        # Models are moved to the device one at a time if they do not all fit.
        return base + (3 * others if base + 4 * others < work.machine.memory else others)
    return base + 3 * others + 2 * work.dense
