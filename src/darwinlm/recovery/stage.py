"""The recovery stage: training of the found model with the Hugging Face Trainer, resumed where it stopped."""

import dataclasses
import importlib.util
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from darwinlm import dist
from darwinlm.adapters.cutting import copy_trained
from darwinlm.adapters.loading import fast_dtype
from darwinlm.adapters.memory import Portion
from darwinlm.adapters.modeling_darwinlm import DarwinLMForCausalLM
from darwinlm.data import TextStream, positions, unmark
from darwinlm.errors import UserError
from darwinlm.files import read_json
from darwinlm.progress import log, task
from darwinlm.recipe import RecoveryRecipe
from darwinlm.recovery.checkpoints import (
    load_best,
    load_optimizer,
    load_weights,
    newest_intact,
    save_best,
    save_checkpoint,
    step_of,
    whole,
)
from darwinlm.recovery.forecast import FRACTIONS, forecast
from darwinlm.recovery.objective import Objective
from darwinlm.recovery.sharding import shard
from darwinlm.recovery.teacher import Predictions, Taught

_SCHEDULES = {"cosine": "cosine", "wsd": "warmup_stable_decay", "linear": "linear", "constant": "constant_with_warmup"}
_LEAST = 20
"""Steps that a forecast needs."""
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
    """The step whose weights are the result: the one with the lowest validation loss."""


class _Blocks(torch.utils.data.Dataset[dict[str, Tensor]]):
    """All samples of the training in their order: the blocks, shuffled anew each time they have run out.

    The order is the same for any number of ranks, and after resuming.
    """

    def __init__(
        self, blocks_BT: Tensor, samples: int, seed: int, passed: int, cut: bool, taught: Predictions | None = None
    ) -> None:
        self._blocks_BT, self._cut, self._taught = blocks_BT, cut, taught
        generator = torch.Generator().manual_seed(seed)
        passes = -(-(passed + samples) // len(blocks_BT))
        order = torch.cat([torch.randperm(len(blocks_BT), generator=generator) for _ in range(passes)])
        self._order = order[passed : passed + samples]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = int(self._order[index])
        return _sample(self._blocks_BT[block], self._cut) | (self._taught[block] if self._taught is not None else {})


class _Stream(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """Samples from a stream. Rank 0 reads and hands out, some batches before they are needed."""

    def __init__(
        self, stream: TextStream, batch_size: int, steps_done: int, state: Mapping[str, Any] | None, cut: bool
    ) -> None:
        self._stream, self._batch_size, self._cut = stream, batch_size, cut
        self._steps_done, self._state = steps_done, state
        self._states: dict[int, Mapping[str, Any]] = {}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        samples = self._steps_done * self._batch_size
        for block_T, state in self._stream.blocks(self._state):
            samples += 1
            if samples % self._batch_size == 0:
                self._states[samples // self._batch_size] = state
            yield _sample(block_T, self._cut)

    def state_after(self, step: int) -> dict[str, Any]:
        """Where the stream was after the batch of this optimiser step, as plain data; forgets the steps before."""
        self._states = {number: state for number, state in self._states.items() if number >= step}
        return {**self._states[step], "tokens": self._states[step]["tokens"].tolist()}


def _sample(marked_T: Tensor, cut: bool) -> dict[str, Tensor]:
    """What the objective reads; with `cut`, positions that begin anew with every document."""
    ids_T, labels_T = unmark(marked_T.long())
    if not cut:
        return {"input_ids": ids_T, "labels": labels_T}
    positions_T = positions(marked_T.long())
    # Nothing foretells how a document begins.
    return {"input_ids": ids_T, "labels": labels_T.masked_fill(positions_T == 0, -100), "position_ids": positions_T}


class _Follow(TrainerCallback):
    """Shows how far it is and where it leads, stops at a loss that is not finite, and says when to evaluate."""

    def __init__(self, progress: Any, recipe: RecoveryRecipe, evaluate_at: frozenset[int]) -> None:
        self._progress, self._recipe, self._evaluate_at = progress, recipe, evaluate_at

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._forecast_at = {round(state.max_steps * part) for part in FRACTIONS if state.max_steps * part >= _LEAST}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate = state.global_step in self._evaluate_at

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            if not math.isfinite(float(logs["loss"])):
                raise UserError(
                    f"recovery diverged at learning rate {self._recipe.learning_rate}, step {state.global_step}; "
                    "lower recovery.learning_rate (in a new run)"
                )
            self._progress.advance(note=f"loss {logs['loss']:.3f}")
            if state.global_step in self._forecast_at:
                losses = _losses(state)
                now, then = statistics.fmean(losses[-len(losses) // 10 :]), forecast(losses, state.max_steps)
                log.info(
                    "recovery: step %d, loss %.3f; if it goes on like this, %.3f at the end",
                    state.global_step,
                    now,
                    then,
                )


class _Trainer(Trainer):
    """The Trainer with our checkpoints (its own are pickles in part), our order of text and our evaluation."""

    validation_BT: Tensor | None = None
    taught: Predictions | None = None
    """Of `validation_BT`."""
    portion: Portion

    def _fitting(self, run: Callable[[int], Tensor]) -> Tensor:
        """`run` with as many blocks at a time as fit the memory."""
        # In the middle of a pass ranks wait for one another: none of them can take it back alone.
        return self.portion(run) if dist.world_size() == 1 else run(self.portion.size)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Add the gradients of a batch, in parts where it is large, to what the optimiser step has so far."""
        step = super().training_step

        def run(size: int) -> Tensor:
            if dist.world_size() == 1:
                model.zero_grad()  # of an attempt that ran out of memory: here a batch is all of a step
            parts = zip(*(tensor.split(size) for tensor in inputs.values()), strict=True)
            losses = [step(model, dict(zip(inputs, part, strict=True)), num_items_in_batch) for part in parts]
            return torch.stack(losses).sum()

        return self._fitting(run)

    cut_documents = False

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Losses on the validation text: all of it on every rank, so that all know which weights are the best."""
        assert self.validation_BT is not None
        self.model_wrapped.eval()
        blocks_BT = self.validation_BT.to(self.args.device)

        def run(size: int) -> Tensor:
            parts = [
                self.model_wrapped(
                    **_sample(blocks_BT[numbers], self.cut_documents), **self._predictions(numbers.tolist())
                )["sums"]
                for numbers in torch.arange(len(blocks_BT)).split(size)
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
        before = [entry["loss"] for entry in _evaluations(self.state)]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if metrics["eval_loss"] < min(before, default=math.inf):
            save_best(Path(str(self.args.output_dir)), objective)
        return metrics

    def _predictions(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The dense model's for these blocks of the validation text, if they take its place."""
        if self.taught is None:
            return {}
        blocks = [self.taught[number] for number in numbers]
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
            if isinstance(self.train_dataset, _Stream) and dist.rank() == 0
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
        """Nothing: there is none in bfloat16 or float32."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: the order of the text comes from the seed, and the model draws no random numbers."""


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
    model: DarwinLMForCausalLM,
    teacher: DarwinLMForCausalLM | Taught | None,
    text: Tensor | TextStream,
    validation_BT: Tensor,
    recipe: RecoveryRecipe,
    *,
    seed: int,
    folder: Path,
    device: torch.device,
    passed: int = 0,
) -> tuple[DarwinLMForCausalLM, Training]:
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

    Returns:
        The trained model, whole on every rank, and what happened.

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
    sharded = recipe.sharding == "fsdp" and dist.world_size() > 1
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=_SCHEDULES[recipe.schedule],
        lr_scheduler_kwargs={"num_decay_steps": round(_DECAY * steps)} if recipe.schedule == "wsd" else {},
        warmup_steps=round(steps * recipe.warmup_ratio),
        weight_decay=recipe.weight_decay,
        max_grad_norm=1.0,
        optim="adamw_torch_fused" if device.type == "cuda" else "adamw_torch",
        bf16=dtype == torch.bfloat16,
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
        # A stream is told where to go on; blocks are passed over.
        ignore_data_skip=isinstance(text, TextStream),
        ddp_find_unused_parameters=False,
    )
    last = newest_intact(folder)
    evaluate_at = {round(steps * i / recipe.evaluations) for i in range(1, recipe.evaluations + 1)}
    arguments.eval_on_start = recipe.evaluations > 0 and last is None
    taught = teacher if isinstance(teacher, Taught) else None
    model_taught = None if isinstance(teacher, Taught) or recipe.distillation == 0 else teacher
    adapted = _with_lora(model, recipe.lora_rank) if recipe.lora_rank > 0 else None
    if recipe.activations == "recompute":
        model.activation_checkpointing_enable({"use_reentrant": False})
    objective = Objective(model.train(), model_taught, recipe.distillation, recipe.temperature)
    if sharded:
        shard(objective, model_taught, device, dtype)
    with task("recovery (steps)", steps) as progress:
        trainer = _Trainer(
            model=objective,
            args=arguments,
            train_dataset=_samples(text, steps, recipe, seed, last, passed, taught),
            callbacks=[_Follow(progress, recipe, frozenset(evaluate_at))],
        )
        trainer.validation_BT, trainer.portion, trainer.cut_documents = validation_BT, portion, recipe.cut_documents
        trainer.taught = taught.validation if taught is not None else None
        trainer.pop_callback(PrinterCallback)
        if last is not None:
            progress.advance(step_of(last))
            log.info("recovery: going on at step %d", step_of(last))
        if last is not None and step_of(last) >= steps:
            # The Trainer would take one step more.
            load_weights(last, objective)
            trainer.state = TrainerState.load_from_json(str(last / "trainer_state.json"))
        else:
            trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
    evaluations = _evaluations(trainer.state)
    best = min(evaluations, key=lambda entry: entry["loss"], default=None)
    if best is not None and best["step"] < steps:
        log.info("recovery: the weights after step %d did best on the validation text, and are taken", best["step"])
        load_best(folder, objective)
    if recipe.activations == "recompute":
        model.activation_checkpointing_disable()
    if adapted is not None:
        adapted.merge_and_unload()
    if sharded:
        # FSDP has made the modules its own; a plain model of the same tensors is built.
        model = copy_trained(model, {name: whole(tensor.detach()) for name, tensor in model.named_parameters()})
    model.requires_grad_(False).eval()
    return model, Training(_losses(trainer.state), evaluations, int(best["step"]) if best is not None else steps)


def _samples(
    text: Tensor | TextStream,
    steps: int,
    recipe: RecoveryRecipe,
    seed: int,
    last: Path | None,
    passed: int,
    taught: Taught | None,
) -> _Blocks | _Stream:
    size, cut = recipe.batch_size, recipe.cut_documents
    if isinstance(text, Tensor):
        return _Blocks(text, steps * size, seed, passed, cut, taught.text if taught is not None else None)
    if last is None:
        return _Stream(text, size, 0, None, cut)
    return _Stream(text, size, step_of(last), read_json(last / "text.json"), cut)


def _losses(state: TrainerState) -> list[float]:
    return [float(entry["loss"]) for entry in state.log_history if "loss" in entry]


def _evaluations(state: TrainerState) -> list[dict[str, float]]:
    return [
        {"step": entry["step"]}
        | {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
        for entry in state.log_history
        if "eval_loss" in entry
    ]


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


def _with_lora(model: DarwinLMForCausalLM, rank: int) -> Any:
    """Freeze `model` and put trainable low-rank updates beside all projections of its layers, in place."""
    import peft

    with warnings.catch_warnings():
        # It asks transformers for what is called otherwise by now.
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
