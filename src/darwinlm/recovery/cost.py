"""Predicted cost of recovery, which does not stream layers."""

from darwinlm.config.stage import Stage
from darwinlm.estimate.work import LIBRARIES, StageCost, Work


def predict_recovery(work: Work) -> StageCost:
    """Predict the refit, the teacher and the training of one step."""
    training, host = _training_bytes(work) if work.recipe.recovery.tokens else (0.0, 0.0)
    recovery, refit = work.recipe.recovery, 0.0
    if recovery.refit_tokens:
        parts = work.depth if work.offload else 1
        refit = work.resident + 4 * (work.fixed + work.candidate) / parts
        # The streams before, between and after the parts of a layer.
        streams = 4 * 4 * min(recovery.refit_tokens, work.recipe.data.train_tokens) * work.rows
        if not work.offload:
            refit += streams
        elif work.machine.accelerator:
            host = max(host, streams + 4 * work.candidate)
    cached = _teacher_bytes(work) if recovery.teacher_top_k else 0.0
    return StageCost(
        stage=Stage("recovery", work.number),
        seconds=_seconds(work),
        memory=LIBRARIES + max(cached, refit, training),
        host_memory=host,
    )


def _seconds(work: Work) -> float:
    data, recovery, rates, devices = work.recipe.data, work.recipe.recovery, work.rates, work.machine.devices
    read, layers, left = data.train_tokens + data.validation_tokens, work.layers, work.left
    teacher = layers * rates.layer_fast + rates.head_training / 4 if recovery.distillation > 0 else 0.0
    before = 0.0
    if recovery.teacher_top_k:
        before, teacher = read * teacher / devices, 0.0
    trained = left * layers * rates.layer_training * (4 / 3 if recovery.activations == "recompute" else 1)
    token = trained + rates.head_training + teacher
    evaluated: float = (recovery.evaluations + 1) * data.validation_tokens
    evaluated *= left * layers * rates.layer_fast + teacher + rates.head_float32
    refit: float = recovery.refit_tokens * (work.exact + left * rates.layer_float32) * layers
    if recovery.refit_tokens:
        # Evaluation of the refit: the dense model once, the pruned model before and after.
        refit += data.validation_tokens * (
            layers * (work.exact + 2 * left * rates.layer_float32) + 4 * rates.head_float32
        )
    products = sum(d**2 + work.rows * d for d in work.columns)
    refit += recovery.refit_tokens * 2 * left / work.before * products * rates.product
    tokens = recovery.tokens // work.recipe.steps
    return tokens * token / devices + (before + evaluated if tokens else 0) + refit


def _teacher_bytes(work: Work) -> float:
    recovery = work.recipe.recovery
    if recovery.distillation == 0:
        return 0.0
    return 2 * work.dense - (work.in_sites if recovery.teacher_dtype == "int8" else 0)


def _training_bytes(work: Work) -> tuple[float, float]:
    """Return the bytes of training on each device, and of CPU memory for offloaded shards."""
    data, recovery, devices = work.recipe.data, work.recipe.recovery, work.machine.devices
    layers = work.depth
    sharded = devices if recovery.sharding != "none" else 1
    blocks = recovery.micro_batch_size or max(1, recovery.batch_size // devices)
    kept = blocks * (
        work.left * work.block_bytes
        if recovery.activations == "keep"
        else work.block_bytes / layers + 2 * work.rows * layers * data.sequence_length
    )
    teacher = 0 if recovery.teacher_top_k else _teacher_bytes(work)
    # Weights, gradients and two moments; with LoRA frozen weights, if not in the compute dtype with copies in it.
    frozen = 2 if sharded == 1 and work.item == 2 and work.machine.accelerator else 6
    trained = (frozen if recovery.lora_rank else 16) * (work.fixed + work.candidate)
    logits = 1024 * work.vocabulary * 4 * (4 if recovery.temperature == 1 else 5)
    total, host = (trained + teacher) / sharded + kept + logits, 0.0
    if sharded > 1:
        # Gathered: embeddings and head with their gradients, those of the teacher, and two layers at a time.
        total += 8 * work.fixed + (2 * work.fixed if teacher else 0) + 4 * work.in_sites / layers
    if sharded > 1 and recovery.sharding == "fsdp_offload":
        host = trained / sharded
        total -= host
    return total, host
