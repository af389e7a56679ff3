"""The recovery stage: training of the found model with the Hugging Face Trainer, resumed where it stopped."""

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

from darwinlm import dist
from darwinlm.adapters.cutting import assemble
from darwinlm.adapters.loading import fast_dtype
from darwinlm.adapters.memory import Portion
from darwinlm.adapters.modeling_darwinlm import PrunedConfig, PrunedModel
from darwinlm.data import TextStream
from darwinlm.errors import UserError
from darwinlm.learning_rate import LearningRate, root_mean_squares
from darwinlm.progress import log, task
from darwinlm.recipe import RecoveryRecipe
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
from darwinlm.recovery.teacher import Taught
from darwinlm.recovery.trainer import Follow, RecoveryTrainer, best_of, evaluations_of, losses_of

_SCHEDULES = {"cosine": "cosine", "wsd": "warmup_stable_decay", "linear": "linear", "constant": "constant_with_warmup"}
RELATIVE_RATE = 4e-4
"""The learning rate `auto` of optimiser steps of 1,024 tokens, in units of each weight tensor's root mean square."""
_FASTEST = 4e-3
"""The highest that `auto` takes, however many tokens a step has."""
_LORA_RATE = 8
"""By how much larger it is for low-rank updates."""
_DECAY = 0.2
"""The share of the steps in which schedule `wsd` comes down."""


@dataclass(frozen=True)
class Training:
    """What happened in a recovery."""

    losses: list[float]
    """Of every optimiser step, in nats."""
    evaluations: list[dict[str, float]]
    """`step`, and on the validation text `loss`, `next_token` and `kl` (nats; `kl` only with distillation)."""
    taken: int
    """The step whose weights are the result: `best_of` all evaluations; the last one without any."""


def check_recovery(recipe: RecoveryRecipe) -> None:
    """Raises UserError if a setting cannot be met here: said before the search rather than after it."""
    if recipe.tokens == 0:
        return
    _micro_batches(recipe)
    _available(recipe.loggers)
    if recipe.lora_rank > 0 and importlib.util.find_spec("peft") is None:
        raise UserError("recovery.lora_rank needs PEFT; pip install 'darwinlm[lora]'")


def steps_for(recipe: RecoveryRecipe, sequence_length: int) -> int:
    """Optimiser steps that `recipe.tokens` come to, rounded up."""
    return -(-recipe.tokens // (recipe.batch_size * sequence_length))


def recover(
    model: PrunedModel,
    teacher: PrunedModel | Taught | None,
    text: Tensor | TextStream,
    validation_BT: Tensor,
    recipe: RecoveryRecipe,
    *,
    seed: int,
    folder: Path,
    device: torch.device,
    passed: int = 0,
    balance: float = 0.0,
) -> tuple[PrunedModel, Training]:
    """Train `model` for `recipe.tokens` tokens with AdamW, all ranks together; its weights are float32.

    Args:
        model: trainable, float32; the same on all ranks; on `device`, or on the CPU if it is to be sharded, and moved
            layer by layer. It is used up.
        teacher: the model it was cut from, for distillation, of any dtype, sharded if `model` is; or its predictions
            for `text`, which is a tensor then, and for `validation_BT`.
        text: token ids, blocks * tokens, marked as in `Corpus`, shuffled by `seed` and read again when they run out; or
            a stream of blocks.
        validation_BT: other text, marked too, blocks * tokens (as many in a block), to choose the best weights by.
        recipe: how long, how fast and on what.
        seed: of the order.
        folder: of checkpoints; if there is one, training goes on from it, to the same losses; from the one before
            where it is damaged. They stay until `remove_checkpoints`.
        device: this rank's.
        passed: how many blocks of the order to pass over, if `text` is a tensor: an earlier training has had them.
        balance: what `recovery.router_loss=auto` stands for.

    Returns:
        The trained model, and what happened. A sharded one is whole on rank 0, on the CPU, and stays sharded elsewhere.

    Raises:
        UserError: if the loss stops being finite, or a setting cannot be met here.
    """
    steps = steps_for(recipe, validation_BT.shape[1])
    if steps == 0:
        return model.eval(), Training([], [], 0)
    check_recovery(recipe)
    micro, accumulation = _micro_batches(recipe)
    portion = Portion(micro, "recovery")
    if dist.world_size() == 1:
        # The Trainer hands over whole steps, which can be taken back.
        micro, accumulation = micro * accumulation, 1
    dtype = fast_dtype(device)
    sharded = is_sharded(recipe)
    last = newest_intact(folder)
    evaluate_at = {round(steps * i / recipe.evaluations) for i in range(1, recipe.evaluations + 1)}
    rate = _highest_rate(recipe, validation_BT.shape[1])
    arguments = _arguments(recipe, steps, micro, accumulation, seed=seed, folder=folder, device=device, sharded=sharded)
    arguments.learning_rate = rate.value
    arguments.ignore_data_skip = isinstance(text, TextStream)  # it is told where to go on; blocks are passed over
    arguments.eval_on_start = recipe.evaluations > 0 and last is None
    taught = teacher if isinstance(teacher, Taught) else None
    model_taught = None if isinstance(teacher, Taught) or recipe.distillation == 0 else teacher
    adapted = _with_lora(model, recipe.lora_rank) if recipe.lora_rank > 0 else None
    if recipe.activations == "recompute":
        model.activation_checkpointing_enable({"use_reentrant": False})
    weight = balance if recipe.router_loss == "auto" else recipe.router_loss
    objective = Objective(model.train(), model_taught, recipe.distillation, recipe.temperature, weight)
    if sharded:
        shard(objective, model_taught, device, dtype, offload=recipe.sharding == "fsdp_offload")
    with task("recovery (steps)", steps) as progress:
        trainer = RecoveryTrainer(
            model=objective,
            args=arguments,
            train_dataset=make_samples(text, steps, recipe, seed, last, passed, taught),
            callbacks=[Follow(progress, recipe, frozenset(evaluate_at))],
            validation_BT=validation_BT,
            taught=taught.validation if taught is not None else None,
            cut_documents=recipe.cut_documents,
            portion=portion,
            rate=rate,
            sizes=_sizes(adapted) if adapted is not None and rate.relative else {},
        )
        if last is not None:
            progress.advance(step_of(last))
            log.info("recovery: going on at step %d", step_of(last))
        if last is not None and step_of(last) >= steps:
            # The Trainer would take one step more.
            load_weights(last, objective)
            trainer.state = TrainerState.load_from_json(str(last / "trainer_state.json"))
        else:
            trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
    evaluations = evaluations_of(trainer.state)
    taken = int(best_of(evaluations)["step"]) if evaluations else steps
    if taken == 0:
        log.warning(
            "recovery: %d tokens made the model no better on the validation text; it keeps the weights that it had",
            recipe.tokens,
        )
    elif taken < steps:
        log.info("recovery: the weights after step %d did best on the validation text, and are taken", taken)
    if taken < steps:
        load_best(folder, objective)
    if recipe.activations == "recompute":
        model.activation_checkpointing_disable()
    if adapted is not None:
        adapted.merge_and_unload()
    if sharded:
        # FSDP has made the modules its own; a plain model of the same tensors is built, on one rank and tensor by
        # tensor: no device needs to hold all of it.
        tensors = dict(gathered(dict(model.named_parameters())))
        if tensors:
            model = assemble(copy.deepcopy(cast(PrunedConfig, model.config)), tensors, trainable=False)
    model.requires_grad_(False).eval()
    return model, Training(losses_of(trainer.state), evaluations, taken)


def _highest_rate(recipe: RecoveryRecipe, sequence_length: int) -> LearningRate:
    """The highest learning rate of the schedule.

    That of `auto` grows with the square root of the batch, whose gradients are that much less noisy (Malladi et al.,
    2022, arXiv 2205.10287).
    """
    if recipe.learning_rate != "auto":
        return LearningRate(recipe.learning_rate)
    tokens = recipe.batch_size * sequence_length
    return LearningRate(min(_FASTEST, RELATIVE_RATE * (tokens / 1024) ** 0.5), relative=True)


def _arguments(
    recipe: RecoveryRecipe,
    steps: int,
    micro: int,
    accumulation: int,
    *,
    seed: int,
    folder: Path,
    device: torch.device,
    sharded: bool,
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
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
        # Ours save the optimiser too; the Trainer does not know that of sharded models.
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
    """Blocks that a device computes at a time, and how often in an optimiser step."""
    ranks, batch = dist.world_size(), recipe.batch_size
    micro = recipe.micro_batch_size or max(1, batch // ranks)
    if batch % (ranks * micro) > 0:
        raise UserError(
            f"recovery.batch_size={batch} is not a multiple of {ranks} processes * recovery.micro_batch_size={micro}; "
            f"set it to {-(-batch // (ranks * micro)) * ranks * micro} (in a new run)"
        )
    return micro, batch // (ranks * micro)


def _available(loggers: Sequence[str]) -> list[str]:
    for name in loggers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"recovery.loggers: {name} is not installed; pip install {name}")
    return list(loggers)


def _with_lora(model: PrunedModel, rank: int) -> Any:
    """Freeze `model` and put trainable low-rank updates beside all projections of its layers, in place."""
    import peft

    with warnings.catch_warnings():
        # It asks transformers for what is called otherwise by now.
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def _sizes(adapted: Any) -> dict[Tensor, float]:
    """What a relative rate is relative to in low-rank updates, which begin as `s B A = 0`.

    A step of all of B by one unit changes the product by `_LORA_RATE` times what a step of the same relative rate
    changes the projection by, to first order, and A by the same share of itself.
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
