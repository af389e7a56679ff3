"""Checkpoints of a recovery: safetensors and JSON, whole or not at all, and the same whatever the number of ranks.

Two are kept, each with the checksums of its files: where the newer one is damaged, the older one is taken.

A sharded tensor is gathered before it is written and cut up again when it is read, so that a recovery that began on
eight devices can go on on one.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from darwinlm import dist
from darwinlm.errors import UserError
from darwinlm.files import find_fault, new_folder, read_json, read_tensors, write_checksums
from darwinlm.progress import log

_PREFIX = "checkpoint-"
_BEST = "best"
WEIGHTS = "weights.safetensors"


def checkpoints(folder: Path) -> list[Path]:
    """All that are whole, the oldest first."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=step_of)


def newest_intact(folder: Path) -> Path | None:
    """The last checkpoint whose files are as they were written; later ones are named and removed. All ranks call it.

    Raises:
        UserError: if a file cannot be read.
    """
    if dist.rank() == 0:
        found = checkpoints(folder)
        while found and (fault := find_fault(found[-1])) is not None:
            shutil.rmtree(found.pop())
            log.warning("%s: %s", fault, f"going on from {found[-1].name}" if found else "the training begins anew")
    dist.barrier()
    return next(reversed(checkpoints(folder)), None)


def step_of(checkpoint: Path) -> int:
    """How many optimiser steps were done."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def remove_checkpoints(folder: Path) -> None:
    """To be called when what they were for is safe elsewhere."""
    for checkpoint in [*checkpoints(folder), folder / _BEST]:
        shutil.rmtree(checkpoint, ignore_errors=True)


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: dict[str, Any],
    trainer_state: dict[str, Any],
    text: dict[str, Any] | None,
) -> None:
    """Write what training needs to go on after `step`, and keep the one before; all ranks call it, rank 0 writes.

    Args:
        folder: of the recovery.
        step: optimiser steps done.
        model: its trained parameters are written, by name.
        optimizer: of these.
        scheduler: its state, as JSON.
        trainer_state: the Trainer's, as JSON.
        text: where a stream of text goes on, as JSON.
    """
    weights = dict(gathered(trained(model)))
    saved = optimizer.state_dict()
    moments = dict(
        gathered({f"{i}.{name}": value for i, each in saved["state"].items() for name, value in each.items()})
    )
    if dist.rank() > 0:
        return
    # Before, so that there is never room needed for a third.
    for older in checkpoints(folder)[:-1]:
        shutil.rmtree(older)
    with new_folder(folder / f"{_PREFIX}{step}") as draft:
        save_file(weights, draft / WEIGHTS)
        save_file(moments, draft / "optimizer.safetensors")
        (draft / "optimizer.json").write_text(json.dumps({"groups": saved["param_groups"], "scheduler": scheduler}))
        (draft / "trainer_state.json").write_text(json.dumps(trainer_state))
        if text is not None:
            (draft / "text.json").write_text(json.dumps(text))
        write_checksums(draft)


def load_weights(folder: Path, model: nn.Module) -> None:
    """Put what `save_checkpoint` or `save_best` wrote into the trained parameters of `model`."""
    weights = read_weights(folder)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(_placed_as(weights[name], parameter))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """What `save_checkpoint`, `save_best` or `save_weights` wrote, on the CPU."""
    return read_tensors(folder / WEIGHTS)


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put what `save_checkpoint` wrote into `optimizer`; returns the scheduler's state."""
    saved = read_json(checkpoint / "optimizer.json")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in read_tensors(checkpoint / "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        like = parameters[int(index)]
        states.setdefault(int(index), {})[name] = _placed_as(value, like) if value.shape == like.shape else value
    optimizer.load_state_dict({"state": states, "param_groups": saved["groups"]})
    scheduler: dict[str, Any] = saved["scheduler"]
    return scheduler


def save_best(folder: Path, model: nn.Module) -> None:
    """Keep the trained parameters of `model` as the best so far; all ranks call it, rank 0 writes."""
    weights = dict(gathered(trained(model)))
    if dist.rank() == 0:
        save_weights(folder / _BEST, weights)


def save_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    """Write `weights` into a folder of their own, with their checksum."""
    with new_folder(folder) as draft:
        save_file(weights, draft / WEIGHTS)
        write_checksums(draft)


def load_best(folder: Path, model: nn.Module) -> None:
    """Go back to what `save_best` kept last.

    Raises:
        UserError: if it is damaged.
    """
    fault = find_fault(folder / _BEST)
    if fault is not None:
        raise UserError(f"{fault}; delete {folder} and run the same command again: the training begins anew")
    load_weights(folder / _BEST, model)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `model` that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded, on its device; a collective."""
    # The clone waits for the collective: what full_tensor gives can still be a promise, without storage of its own.
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """On rank 0 all `tensors` in CPU memory; elsewhere none, but every rank takes part."""
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if dist.rank() == 0:
            yield name, full.cpu().contiguous()


def _placed_as(tensor: Tensor, like: Tensor) -> Tensor:
    if isinstance(like, DTensor):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor
