"""The recovery stage: next-token training of the found model with the Hugging Face Trainer."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from darwinlm.adapters.modeling_darwinlm import DarwinLMForCausalLM
from darwinlm.errors import UserError
from darwinlm.progress import task
from darwinlm.recipe import RecoveryRecipe


class _Blocks(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, blocks_BT: Tensor) -> None:
        self._blocks_BT = blocks_BT.long()

    def __len__(self) -> int:
        return len(self._blocks_BT)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._blocks_BT[index], "labels": self._blocks_BT[index]}


class _Advance(TrainerCallback):
    def __init__(self, progress: Any) -> None:
        self._progress = progress

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._progress.advance(note=f"loss {logs['loss']:.3f}")


def steps_for(recipe: RecoveryRecipe, sequence_length: int) -> int:
    """Optimiser steps that `recipe.tokens` come to, rounded up."""
    return -(-recipe.tokens // (recipe.batch_size * sequence_length))


def recover(
    model: DarwinLMForCausalLM, blocks_BT: Tensor, recipe: RecoveryRecipe, *, seed: int, folder: Path
) -> list[float]:
    """Train `model` in place on next-token loss for `recipe.tokens` tokens: AdamW, warm-up, cosine to zero, float32.

    Args:
        model: trainable, float32; where it lies is where it is trained.
        blocks_BT: token ids, blocks * tokens; shuffled by `seed`, read again when they run out.
        recipe: how long and how fast.
        seed: of the order.
        folder: the Trainer's output folder. Nothing is saved there: an interrupted recovery starts again.

    Returns:
        The loss of every step, in nats.

    Raises:
        UserError: if the loss stops being finite.
    """
    steps = steps_for(recipe, blocks_BT.shape[1])
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=min(recipe.batch_size, len(blocks_BT)),
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(steps * recipe.warmup_ratio),
        weight_decay=recipe.weight_decay,
        max_grad_norm=1.0,
        optim="adamw_torch",
        seed=seed,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=False,
        dataloader_drop_last=len(blocks_BT) >= recipe.batch_size,
    )
    with task("recovery (steps)", steps) as progress:
        trainer = Trainer(model=model, args=arguments, train_dataset=_Blocks(blocks_BT), callbacks=[_Advance(progress)])
        trainer.pop_callback(_printer())
        trainer.train()
    model.eval()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    if not all(torch.isfinite(torch.tensor(losses))):
        raise UserError(
            f"recovery diverged at learning rate {recipe.learning_rate}; lower recovery.learning_rate (in a new run)"
        )
    return losses


def _printer() -> type[TrainerCallback]:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback
