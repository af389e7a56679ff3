"""The recovery stage: training of the found model with the Hugging Face Trainer, resumed where it stopped."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from darwinlm.adapters.loading import fast_dtype
from darwinlm.adapters.modeling_darwinlm import DarwinLMForCausalLM
from darwinlm.errors import UserError
from darwinlm.files import new_folder, read_json, read_tensors
from darwinlm.progress import log, task
from darwinlm.recipe import RecoveryRecipe
from darwinlm.recovery.objective import Objective

_PREFIX = "checkpoint-"


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


class _ResumableTrainer(Trainer):
    """Checkpoints that appear whole or not at all, in safetensors and JSON: the Trainer's own are pickles in part."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        assert self.optimizer is not None and self.lr_scheduler is not None and self.model is not None
        folder = Path(str(self.args.output_dir))
        optimizer = self.optimizer.state_dict()
        tensors: dict[str, Tensor] = {}
        for index, state in optimizer["state"].items():
            tensors |= {f"{index}.{name}": value.detach().cpu().contiguous() for name, value in state.items()}
        weights = {name: value.detach().cpu().contiguous() for name, value in self.model.named_parameters()}
        state = {"groups": optimizer["param_groups"], "scheduler": self.lr_scheduler.state_dict()}
        with new_folder(folder / f"{_PREFIX}{self.state.global_step}") as draft:
            save_file(weights, draft / "weights.safetensors")
            save_file(tensors, draft / "optimizer.safetensors")
            (draft / "optimizer.json").write_text(json.dumps(state))
            self.state.save_to_json(str(draft / "trainer_state.json"))
        for older in _checkpoints(folder)[:-1]:
            shutil.rmtree(older)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        assert self.model is not None
        weights = read_tensors(Path(resume_from_checkpoint) / "weights.safetensors")
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        saved = read_json(Path(checkpoint) / "optimizer.json")
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in read_tensors(Path(checkpoint) / "optimizer.safetensors").items():
            index, _, name = key.partition(".")
            states.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": states, "param_groups": saved["groups"]})
        self.lr_scheduler.load_state_dict(saved["scheduler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: the order of the text comes from the seed, and the model draws no random numbers."""


def _checkpoints(folder: Path) -> list[Path]:
    """By step."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def remove_checkpoints(folder: Path) -> None:
    """To be called when what they were for is safe elsewhere."""
    for checkpoint in _checkpoints(folder):
        shutil.rmtree(checkpoint)


def steps_for(recipe: RecoveryRecipe, sequence_length: int) -> int:
    """Optimiser steps that `recipe.tokens` come to, rounded up."""
    return -(-recipe.tokens // (recipe.batch_size * sequence_length))


def recover(
    model: DarwinLMForCausalLM,
    dense: DarwinLMForCausalLM,
    blocks_BT: Tensor,
    recipe: RecoveryRecipe,
    *,
    seed: int,
    folder: Path,
) -> list[float]:
    """Train `model` in place for `recipe.tokens` tokens: AdamW, warm-up, cosine to zero; float32 weights.

    Args:
        model: trainable, float32; where it lies is where it is trained.
        dense: the model it was cut from, the teacher in distillation.
        blocks_BT: token ids, blocks * tokens; shuffled by `seed`, read again when they run out.
        recipe: how long, how fast and on what.
        seed: of the order.
        folder: of checkpoints; if there is one, training goes on from it, to the same losses. The last one stays until
            `remove_checkpoints`.

    Returns:
        The loss of every step, in nats.

    Raises:
        UserError: if the loss stops being finite.
    """
    steps = steps_for(recipe, blocks_BT.shape[1])
    if steps == 0:
        model.eval()
        return []
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
        bf16=fast_dtype(model.device) == torch.bfloat16,
        seed=seed,
        save_strategy="steps",
        save_steps=recipe.checkpoint_steps,
        report_to=[],
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=False,
        dataloader_drop_last=len(blocks_BT) >= recipe.batch_size,
        remove_unused_columns=False,
    )
    last = next(reversed(_checkpoints(folder)), None)
    with task("recovery (steps)", steps) as progress:
        trainer = _ResumableTrainer(
            model=Objective(model.train(), dense, recipe.distillation),
            args=arguments,
            train_dataset=_Blocks(blocks_BT),
            callbacks=[_Advance(progress)],
        )
        trainer.pop_callback(PrinterCallback)
        if last is not None:
            done = int(last.name.removeprefix(_PREFIX))
            progress.advance(done)
            log.info("recovery: going on at step %d", done)
        trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
    model.eval()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    if not all(torch.isfinite(torch.tensor(losses))):
        raise UserError(
            f"recovery diverged at learning rate {recipe.learning_rate}; lower recovery.learning_rate (in a new run)"
        )
    return losses
