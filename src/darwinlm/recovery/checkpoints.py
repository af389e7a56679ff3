"""Checkpoints of a recovery: safetensors and JSON, written atomically, independent of the number of ranks.

Two are kept, each with the checksums of its files: if the newer one is damaged, the older one is used.

A sharded tensor is gathered before it is written and sharded again when it is read, so that a recovery started on eight
devices can resume on one.
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

from darwinlm.errors import UserError
from darwinlm.runtime import dist
from darwinlm.runtime.files import find_fault, new_folder, read_json, read_tensors, write_checksums
from darwinlm.runtime.progress import log

_PREFIX = "checkpoint-"
_BEST = "best"
WEIGHTS = "weights.safetensors"


def checkpoints(folder: Path) -> list[Path]:
    """Return all complete checkpoints, oldest first."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=step_of)


def newest_intact(folder: Path) -> Path | None:
    """Return the last undamaged checkpoint; later ones are logged and removed. All ranks must call it.

    Raises:
        UserError: if a file cannot be read.
    """
    if dist.rank() == 0:
        found = checkpoints(folder)
        while found and (fault := find_fault(found[-1])) is not None:
            shutil.rmtree(found.pop())
            log.warning("%s: %s", fault, f"resuming from {found[-1].name}" if found else "restarting the training")
    dist.barrier()
    return next(reversed(checkpoints(folder)), None)


def step_of(checkpoint: Path) -> int:
    """Return the number of finished optimizer steps."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints, once the result is saved elsewhere."""
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
    """Write what is needed to resume after `step`, keeping the previous checkpoint. All ranks call it, rank 0 writes.

    Args:
        folder: folder of the recovery.
        step: finished optimizer steps.
        model: its trained parameters are written, by name.
        optimizer: optimizer of these parameters.
        scheduler: state of the scheduler, JSON-compatible.
        trainer_state: state of the Trainer, JSON-compatible.
        text: position in the text stream, JSON-compatible.
    """
    weights = dict(gathered(trained(model)))
    saved = optimizer.state_dict()
    moments = dict(
        gathered({f"{i}.{name}": value for i, each in saved["state"].items() for name, value in each.items()})
    )
    if dist.rank() > 0:
        return
    # Removed first, so that disk space for a third is never needed.
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
    """Load weights from `save_checkpoint` or `save_best` into the trained parameters of `model`."""
    weights = read_weights(folder)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(_placed_as(weights[name], parameter))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read weights from `save_checkpoint`, `save_best` or `save_weights`, on the CPU."""
    return read_tensors(folder / WEIGHTS)


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load the state from `save_checkpoint` into `optimizer`; returns the scheduler's state."""
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
    """Save the trained parameters of `model` as the best so far. All ranks call it, rank 0 writes."""
    weights = dict(gathered(trained(model)))
    if dist.rank() == 0:
        save_weights(folder / _BEST, weights)


def save_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    """Write `weights` into a separate folder, with their checksum."""
    with new_folder(folder) as draft:
        save_file(weights, draft / WEIGHTS)
        write_checksums(draft)


def load_best(folder: Path, model: nn.Module) -> None:
    """Restore the weights last saved by `save_best`.

    Raises:
        UserError: if they are damaged.
    """
    fault = find_fault(folder / _BEST)
    if fault is not None:
        raise UserError(f"{fault}; delete {folder} and run the same command again to restart the training")
    load_weights(folder / _BEST, model)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters of `model`, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor of a possibly sharded one, on its device; a collective operation."""
    # The clone waits for the collective: the result of full_tensor may not have its own storage yet.
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield all `tensors` in CPU memory on rank 0, and none on other ranks; all ranks must take part."""
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if dist.rank() == 0:
            yield name, full.cpu().contiguous()


def _placed_as(tensor: Tensor, like: Tensor) -> Tensor:
    if isinstance(like, DTensor):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor
