"""Training of the pruned model with the Hugging Face Trainer, resumed where it stopped."""

import copy
import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import TrainerState, TrainingArguments

from darwinlm.config.recipe import RecoveryRecipe
from darwinlm.data.corpus import TextStream
from darwinlm.data.tokens import Tokens
from darwinlm.errors import UserError
from darwinlm.models.cutting import assemble
from darwinlm.models.device_memory import Portion
from darwinlm.models.loading import fast_dtype
from darwinlm.models.modeling_darwinlm import PrunedConfig, PrunedModel
from darwinlm.optim.learning_rate import LearningRate, root_mean_squares
from darwinlm.recovery.checkpoints import (
    gathered,
    load_best,
    load_weights,
    newest_intact,
    step_of,
)
from darwinlm.recovery.objective import Objective
from darwinlm.recovery.samples import make_samples
from darwinlm.recovery.sharding import is_sharded, shard
from darwinlm.recovery.teacher import CachedTeacher
from darwinlm.recovery.trainer import Follow, RecoveryTrainer, best_of, evaluations_of, losses_of
from darwinlm.runtime import dist
from darwinlm.runtime.progress import log, task

_SCHEDULES = {"cosine": "cosine", "wsd": "warmup_stable_decay", "linear": "linear", "constant": "constant_with_warmup"}
RELATIVE_RATE = 4e-4
"""Learning rate `auto` for optimizer steps of 1,024 tokens, in units of each weight tensor's root mean square."""
_FASTEST = 4e-3
"""Maximum learning rate of `auto`, for any number of tokens per step."""
_LORA_RATE = 8
"""Factor of the learning rate for low-rank updates."""
_DECAY = 0.2
"""Fraction of the steps in which the schedule `wsd` decays."""


@dataclass(frozen=True)
class Training:
    """Record of a recovery."""

    losses: list[float]
    """Loss of every optimizer step, in nats."""
    evaluations: list[dict[str, float]]
    """Evaluations on the validation text: `step`, `loss`, `next_token` and `kl` (nats; `kl` only with distillation)."""
    taken: int
    """Step whose weights are the result: `best_of` all evaluations, or the last step if there are none."""


def check_recovery(recipe: RecoveryRecipe) -> None:
    """Check before the search that recovery can run here. Raises UserError if a setting is not supported."""
    if recipe.tokens == 0:
        return
    _micro_batches(recipe)
    _available(recipe.loggers)
    if recipe.lora_rank > 0 and importlib.util.find_spec("peft") is None:
        raise UserError("recovery.lora_rank needs PEFT; pip install 'darwinlm[lora]'")


def steps_for(tokens: int, recipe: RecoveryRecipe, sequence_length: int) -> int:
    """Return the optimizer steps needed for `tokens` tokens, rounded up."""
    return -(-tokens // (recipe.batch_size * sequence_length))


def recover(
    model: PrunedModel,
    teacher: PrunedModel | CachedTeacher | None,
    text: Tokens | TextStream,
    validation: Tokens,
    recipe: RecoveryRecipe,
    *,
    seed: int,
    folder: Path,
    device: torch.device,
    passed: int = 0,
    balance: float = 0.0,
    tokens: int | None = None,
) -> tuple[PrunedModel, Training]:
    """Train `model` with AdamW and float32 weights (with LoRA, float32 updates), on all ranks together.

    Args:
        model: trainable, float32, the same on all ranks; on `device`, or on the CPU if it will be sharded and moved
            layer by layer. It must not be used afterwards.
        teacher: model it was cut from, for distillation, in any dtype, sharded if `model` is; or its cached
            predictions for `text`, which is then no stream, and for `validation`.
        text: blocks, shuffled by `seed` and repeated as needed; or a stream of blocks.
        validation: other text, with the same block length, to select the best weights.
        recipe: settings of the recovery.
        seed: random seed of the order.
        folder: folder of checkpoints. Training resumes from the last one, with the same losses, or from the previous
            one if it is damaged. Checkpoints are kept until `remove_checkpoints`.
        device: device of this rank.
        passed: number of blocks of the order to skip, if `text` is no stream, because earlier training used them.
        balance: value of `recovery.router_loss=auto`.
        tokens: number of tokens to train on; by default `recipe.tokens`.

    Returns:
        The trained model, and the record of the training. A sharded model is gathered on rank 0, on the CPU, and stays
        sharded on the others.

    Raises:
        UserError: if the loss is not finite, or a setting is not supported here.
    """
    tokens = recipe.tokens if tokens is None else tokens
    sequence_length = validation.input_ids_BT.shape[1]
    steps = steps_for(tokens, recipe, sequence_length)
    if steps == 0:
        return model.eval(), Training([], [], 0)
    check_recovery(recipe)
    last, rate, sharded = newest_intact(folder), _highest_rate(recipe, sequence_length), is_sharded(recipe)
    arguments = _arguments(recipe, steps, rate, seed=seed, folder=folder, device=device, sharded=sharded)
    # A stream resumes from its state; blocks are skipped by the Trainer.
    arguments.ignore_data_skip = isinstance(text, TextStream)
    arguments.eval_on_start = recipe.evaluations > 0 and last is None
    cached = teacher if isinstance(teacher, CachedTeacher) else None
    teacher_model = None if isinstance(teacher, CachedTeacher) or recipe.distillation == 0 else teacher
    if recipe.lora_rank > 0 and not sharded and model.config.dtype == fast_dtype(device):
        # Frozen weights need no more precision than their checkpoint has. FSDP needs the dtype of the updates.
        model.to(model.config.dtype)
    adapted = _with_lora(model, recipe.lora_rank) if recipe.lora_rank > 0 else None
    if recipe.activations == "recompute":
        model.activation_checkpointing_enable({"use_reentrant": False})
    weight = balance if recipe.router_loss == "auto" else recipe.router_loss
    objective = Objective(model.train(), teacher_model, recipe.distillation, recipe.temperature, weight)
    if sharded:
        shard(objective, teacher_model, device, fast_dtype(device), offload=recipe.sharding == "fsdp_offload")
    with task("recovery (steps)", steps) as progress:
        trainer = RecoveryTrainer(
            model=objective,
            args=arguments,
            train_dataset=make_samples(text, steps, recipe, seed, last, passed, cached),
            callbacks=[Follow(progress, recipe, _evaluated_steps(recipe, steps))],
            validation=validation,
            cached=cached.validation if cached is not None else None,
            cut_documents=recipe.cut_documents,
            portion=Portion(_micro_batches(recipe)[0], "recovery"),
            rate=rate,
            sizes=_sizes(adapted) if adapted is not None and rate.relative else {},
        )
        if last is not None:
            progress.advance(step_of(last))
        _run(trainer, objective, steps, last)
    evaluations = evaluations_of(trainer.state)
    taken = int(best_of(evaluations)["step"]) if evaluations else steps
    if taken < steps:
        _report_taken(taken, tokens)
        load_best(folder, objective)
    if recipe.activations == "recompute":
        model.activation_checkpointing_disable()
    if adapted is not None:
        adapted.merge_and_unload()
    if sharded:
        model = _gathered_model(model)
    model.requires_grad_(False).eval()
    return model, Training(losses_of(trainer.state), evaluations, taken)


def _run(trainer: RecoveryTrainer, objective: Objective, steps: int, last: Path | None) -> None:
    """Train, from the checkpoint `last` if there is one."""
    if last is None:
        trainer.train()
        return
    log.info("recovery: resuming at step %d", step_of(last))
    if step_of(last) >= steps:
        # The Trainer would take one more step.
        load_weights(last, objective)
        trainer.state = TrainerState.load_from_json(str(last / "trainer_state.json"))
    else:
        trainer.train(resume_from_checkpoint=str(last))


def _evaluated_steps(recipe: RecoveryRecipe, steps: int) -> frozenset[int]:
    return frozenset(round(steps * i / recipe.evaluations) for i in range(1, recipe.evaluations + 1))


def _report_taken(taken: int, tokens: int) -> None:
    if taken == 0:
        log.warning(
            "recovery: %d training tokens did not improve the model on the validation text; keeping the "
            "weights from before training",
            tokens,
        )
    else:
        log.info("recovery: the weights after step %d were best on the validation text and are used", taken)


def _gathered_model(model: PrunedModel) -> PrunedModel:
    """Build a plain model from the full tensors of a sharded one, whose modules FSDP has replaced.

    It is built on one rank and tensor by tensor, so that no device needs to hold all of it.
    """
    tensors = dict(gathered(dict(model.named_parameters())))
    return assemble(copy.deepcopy(cast(PrunedConfig, model.config)), tensors, trainable=False) if tensors else model


def _highest_rate(recipe: RecoveryRecipe, sequence_length: int) -> LearningRate:
    """Return the peak learning rate of the schedule.

    `auto` grows with the square root of the batch size, which reduces the gradient noise accordingly (Malladi et al.,
    2022, arXiv 2205.10287).
    """
    if recipe.learning_rate != "auto":
        return LearningRate(recipe.learning_rate)
    tokens = recipe.batch_size * sequence_length
    return LearningRate(min(_FASTEST, RELATIVE_RATE * (tokens / 1024) ** 0.5), relative=True)


def _arguments(
    recipe: RecoveryRecipe,
    steps: int,
    rate: LearningRate,
    *,
    seed: int,
    folder: Path,
    device: torch.device,
    sharded: bool,
) -> TrainingArguments:
    micro, accumulation = _micro_batches(recipe)
    if dist.world_size() == 1:
        # The Trainer then passes whole optimizer steps, which can be retried with smaller parts.
        micro, accumulation = micro * accumulation, 1
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=rate.value,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        lr_scheduler_type=_SCHEDULES[recipe.schedule],
        lr_scheduler_kwargs={"num_decay_steps": round(_DECAY * steps)} if recipe.schedule == "wsd" else {},
        warmup_steps=round(steps * recipe.warmup_ratio),
        weight_decay=recipe.weight_decay,
        max_grad_norm=1.0,
        optim="adamw_torch_fused" if device.type == "cuda" else "adamw_torch",
        bf16=fast_dtype(device) == torch.bfloat16,
        seed=seed,
        save_strategy="steps",
        save_steps=recipe.checkpoint_steps,
        # Our checkpoints include the optimizer; the Trainer does not support that for sharded models.
        save_only_model=sharded,
        report_to=_available(recipe.loggers),
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )


def _micro_batches(recipe: RecoveryRecipe) -> tuple[int, int]:
    """Return the blocks per forward pass on a device, and the number of gradient accumulation steps."""
    ranks, batch = dist.world_size(), recipe.batch_size
    micro = recipe.micro_batch_size or max(1, batch // ranks)
    if batch % (ranks * micro) > 0:
        raise UserError(
            f"recovery.batch_size={batch} is not a multiple of {ranks} processes * "
            f"recovery.micro_batch_size={micro}; set it to {-(-batch // (ranks * micro)) * ranks * micro} (in a "
            "new run)"
        )
    return micro, batch // (ranks * micro)


def _available(loggers: Sequence[str]) -> list[str]:
    for name in loggers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"recovery.loggers: {name} is not installed; pip install {name}")
    return list(loggers)


def _with_lora(model: PrunedModel, rank: int) -> Any:
    """Freeze `model` and add trainable low-rank updates to all projections of its layers, in place."""
    import peft

    with warnings.catch_warnings():
        # PEFT uses a deprecated name of transformers.
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def _sizes(adapted: Any) -> dict[Tensor, float]:
    """Return the units of a relative learning rate for low-rank updates, which start as `s B A = 0`.

    A step of B by one unit changes the product by `_LORA_RATE` times the change of the projection in a step of the same
    relative rate, to first order; A changes by the same fraction of itself.
    """
    sizes: dict[Tensor, float] = {}
    for module in adapted.modules():
        if not hasattr(module, "lora_B"):
            continue
        for name, second in module.lora_B.items():
            first, base, scaling = module.lora_A[name].weight, module.base_layer.weight, module.scaling[name]
            size, whole = root_mean_squares([first, base])
            sizes[first] = _LORA_RATE * size
            sizes[second.weight] = _LORA_RATE * whole / (scaling * size * len(first) ** 0.5)
    return sizes
