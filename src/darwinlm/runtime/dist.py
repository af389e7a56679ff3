"""Ranks: the only module that knows about distributed processes (`torchrun -m darwinlm …`).

Without torchrun every function handles the single-process case: rank 0 of 1, reductions that return their input.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as process_group
from torch import Tensor

from darwinlm.errors import UserError

_Value = TypeVar("_Value")
# One rank may generate text or search for days while the others wait.
_PATIENCE = timedelta(days=30)
_ASKING = timedelta(seconds=5)
_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|(wait|operation) timeout|connectfullmesh|gloo/transport/"
    r"|remote (worker|process)|network error|communicator was aborted",
    re.I,
)
"""Error messages of a lost rank. Classes do not tell: NCCL raises the same one for wrong usage and full memory."""


def start() -> None:
    """Join the process group of torchrun; does nothing without one, or when called again."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not process_group.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        process_group.init_process_group(backend, timeout=_PATIENCE)


def rank() -> int:
    """Return the rank of this process."""
    return process_group.get_rank() if process_group.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return process_group.get_world_size() if process_group.is_initialized() else 1


def local_device(device: torch.device) -> torch.device:
    """Return this rank's accelerator, by its local rank."""
    if device == torch.device("cuda") and process_group.is_initialized():
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def sum_to(tensor: Tensor, owner: int) -> None:
    """Sum `tensor` over all ranks into rank `owner`, in place; on other ranks its content is undefined afterwards."""
    if world_size() > 1:
        process_group.reduce(tensor, owner)


def gather(value: _Value) -> list[_Value]:
    """Return the values of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    process_group.all_gather_object(values, value)
    return values


def should_report(message: str) -> bool:
    """Return True on the first rank that reports `message`, or if ranks cannot communicate; needs no process group."""
    environment = os.environ
    if int(environment.get("WORLD_SIZE", "1")) == 1 or environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    key = f"darwinlm/{environment.get('TORCHELASTIC_RESTART_COUNT')}/{message}"
    try:
        # Torchrun's own store outlives the ranks.
        address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        store = process_group.TCPStore(address, port, is_master=False, timeout=_ASKING)  # type: ignore[attr-defined]
        return bool(store.add(key, 1) == 1)
    except (KeyError, RuntimeError):
        return True


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        process_group.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """Run the block on rank 0 first, then on the other ranks."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Turn backend errors caused by the loss of another rank into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not (isinstance(error, process_group.DistNetworkError) or _LOST.search(str(error))):
            raise
        # The same on all ranks, which report it once.
        raise UserError(
            "another rank has stopped or cannot be reached; see its own message. Progress is saved: start the same "
            "command again to resume"
        ) from error


@naming_lost_ranks()
def stop() -> None:
    """Wait for all ranks and leave the process group."""
    if process_group.is_initialized():
        barrier()
        process_group.destroy_process_group()
