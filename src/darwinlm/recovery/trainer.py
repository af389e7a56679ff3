"""The Hugging Face Trainer with our checkpoints, order of the text and evaluation."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback

from darwinlm.config.recipe import RecoveryRecipe
from darwinlm.data.tokens import Tokens
from darwinlm.errors import UserError
from darwinlm.models.device_memory import Portion
from darwinlm.optim.learning_rate import LearningRate, parameter_groups
from darwinlm.recovery.checkpoints import load_optimizer, load_weights, save_best, save_checkpoint, trained
from darwinlm.recovery.forecast import FRACTIONS, forecast
from darwinlm.recovery.objective import Objective
from darwinlm.recovery.samples import Stream, sample
from darwinlm.recovery.teacher import Predictions
from darwinlm.runtime import dist
from darwinlm.runtime.progress import log

_LEAST = 20
"""Minimum number of steps for a forecast."""


def losses_of(state: TrainerState) -> list[float]:
    """Return the loss of every optimizer step."""
    return [float(entry["loss"]) for entry in state.log_history if "loss" in entry]


def evaluations_of(state: TrainerState) -> list[dict[str, float]]:
    """Return the evaluations on the validation text: `step`, `loss`, `next_token` and, with distillation, `kl`."""
    return [
        {"step": entry["step"]}
        | {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
        for entry in state.log_history
        if "eval_loss" in entry
    ]


def best_of(evaluations: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the first evaluation of lowest loss, among those that are no worse than the initial one in any part of the
    loss: lower next-token loss must not come with a higher KL from the dense model, or vice versa."""
    parts = [name for name in ("next_token", "kl") if name in evaluations[0]]
    no_worse = [one for one in evaluations if all(one[part] <= evaluations[0][part] for part in parts)]
    return min(no_worse, key=lambda one: one["loss"], default=evaluations[0])


class Follow(TrainerCallback):
    """Callback that shows progress and forecasts, stops if the loss is not finite, and triggers evaluations."""

    def __init__(self, progress: Any, recipe: RecoveryRecipe, evaluate_at: frozenset[int]) -> None:
        self._progress, self._recipe, self._evaluate_at = progress, recipe, evaluate_at

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the forecast steps, once the number of steps is known."""
        self._forecast_at = {round(state.max_steps * part) for part in FRACTIONS if state.max_steps * part >= _LEAST}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trigger an evaluation after the chosen optimizer steps."""
        control.should_evaluate = state.global_step in self._evaluate_at

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Log the loss of a step. Raises UserError if it is not finite."""
        if logs and "loss" in logs:
            if not math.isfinite(float(logs["loss"])):
                lower = "set" if self._recipe.learning_rate == "auto" else "lower"
                raise UserError(
                    f"recovery diverged at learning rate {self._recipe.learning_rate}, step "
                    f"{state.global_step}; {lower} recovery.learning_rate (in a new run)"
                )
            self._progress.advance(note=f"loss {logs['loss']:.3f}")
            if state.global_step in self._forecast_at:
                losses = losses_of(state)
                now, then = statistics.fmean(losses[-len(losses) // 10 :]), forecast(losses, state.max_steps)
                log.info(
                    "recovery: step %d, loss %.3f, forecast at the end %.3f",
                    state.global_step,
                    now,
                    then,
                )


class RecoveryTrainer(Trainer):
    """Trainer with our checkpoints (its own are partly pickles), order of the text and evaluation.

    Args:
        validation: text of `evaluate`.
        cached: cached predictions of the dense model for it, if they replace the dense model.
        cut_documents: as in the recovery settings.
        portion: number of blocks per forward pass, reduced when out of memory.
        rate: peak learning rate of AdamW.
        sizes: unit of a relative rate for tensors where it is not their own root mean square.
        **settings: arguments of the Trainer.
    """

    def __init__(
        self,
        *,
        validation: Tokens,
        cached: Predictions | None,
        cut_documents: bool,
        portion: Portion,
        rate: LearningRate,
        sizes: Mapping[Tensor, float],
        **settings: Any,
    ) -> None:
        self._rate, self._sizes = rate, sizes
        super().__init__(**settings)
        self._validation, self._cached = validation, cached
        self._cut, self._portion = cut_documents, portion
        self.pop_callback(PrinterCallback)

    def _fitting(self, run: Callable[[int], Tensor]) -> Tensor:
        """Call `run` with as many blocks at a time as fit in memory."""
        # With several ranks, the others wait in collectives, so one rank cannot retry alone.
        return self._portion(run) if dist.world_size() == 1 else run(self._portion.size)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create AdamW at a relative rate, or the Trainer's own optimizer."""
        if self.optimizer is None and self._rate.relative:
            assert self.model is not None
            decays = set(self.get_decay_parameter_names(self.model))
            groups = []
            for decay, named in ((0.0, False), (self.args.weight_decay, True)):
                parameters = [one for name, one in trained(self.model).items() if (name in decays) is named]
                groups += parameter_groups(parameters, self._rate, decay, self._sizes)
            self.optimizer = torch.optim.AdamW(groups, fused=self.args.device.type == "cuda")
        return super().create_optimizer(model)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Add the gradients of a batch to those of the optimizer step, in parts if it does not fit in memory."""
        step = super().training_step

        def run(size: int) -> Tensor:
            if dist.world_size() == 1:
                # Discard gradients of an attempt that ran out of memory; a batch is a whole step here.
                model.zero_grad()
            parts = zip(*(tensor.split(size) for tensor in inputs.values()), strict=True)
            losses = [step(model, dict(zip(inputs, part, strict=True)), num_items_in_batch) for part in parts]
            return torch.stack(losses).sum()

        return self._fitting(run)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Compute losses on the whole validation text on every rank, so that all ranks agree on the best weights."""
        self.model_wrapped.eval()
        text = self._validation.to(self.args.device)

        def run(size: int) -> Tensor:
            parts = [
                self.model_wrapped(**sample(text[numbers], self._cut), **self._predictions(numbers.tolist()))["sums"]
                for numbers in torch.arange(len(text)).split(size)
            ]
            return torch.stack(parts).double().cpu().sum(0)

        with torch.no_grad(), self.compute_loss_context_manager():
            sums = self._fitting(run)
        self.model_wrapped.train()
        next_token, kl = (sums[:2] / sums[2]).tolist()
        objective = cast(Objective, self.model)
        metrics = {"eval_loss": objective.mix(next_token, kl), "eval_next_token": next_token}
        if objective.distils:
            metrics["eval_kl"] = kl
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        evaluations = evaluations_of(self.state)
        if best_of(evaluations) is evaluations[-1]:
            save_best(Path(str(self.args.output_dir)), objective)
        return metrics

    def _predictions(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Return the cached predictions for these blocks of the validation text, if they replace the dense model."""
        if self._cached is None:
            return {}
        blocks = [self._cached[number] for number in numbers]
        return {name: torch.stack([block[name] for block in blocks]).to(self.args.device) for name in blocks[0]}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        assert self.optimizer is not None and self.lr_scheduler is not None and self.model is not None
        save_checkpoint(
            Path(str(self.args.output_dir)),
            self.state.global_step,
            self.model,
            self.optimizer,
            self.lr_scheduler.state_dict(),
            dataclasses.asdict(self.state),
            self.train_dataset.state_after(self.state.global_step)
            if isinstance(self.train_dataset, Stream) and dist.rank() == 0
            else None,
        )
        dist.barrier()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        assert self.model is not None
        load_weights(Path(resume_from_checkpoint), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self.optimizer is not None and self.lr_scheduler is not None
            self.lr_scheduler.load_state_dict(load_optimizer(Path(checkpoint), self.optimizer))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Do nothing: bfloat16 and float32 use no gradient scaler."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Do nothing: the seed determines the order of the text, and the model uses no random numbers."""
