"""Storage of the calibration text's hidden states between two layers: on the device, in memory or on disk."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from darwinlm.config.recipe import Offload
from darwinlm.runtime import dist
from darwinlm.runtime.files import naming_disk_faults, open_new
from darwinlm.runtime.memory import available_memory
from darwinlm.runtime.progress import log

_SHARE = 0.4
"""Fraction of free memory for activations: weights, Gram matrices and the solver need the rest."""


@contextmanager
def open_activations(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, offload: Offload, scratch: Path
) -> Iterator[Tensor]:
    """Yield a tensor of `shape` for reading and writing while the block runs, stored as set by `offload`."""
    size = prod(shape) * dtype.itemsize
    place = choose_place(size, device) if offload == "auto" else offload
    log.debug("activations: %.2f GiB, on %s", size / 2**30, place)
    if place == "disk":
        file = scratch / f"activations.{dist.rank()}.draft"
        with naming_disk_faults(file):
            scratch.mkdir(parents=True, exist_ok=True)
            try:
                # Disk blocks are reserved now: writing to a memory-mapped file on a full disk would kill the process.
                with open_new(file) as handle:
                    _reserve(handle.fileno(), max(size, 1))
                yield torch.from_file(str(file), shared=True, size=prod(shape), dtype=dtype).view(*shape)
            finally:
                file.unlink(missing_ok=True)
        return
    pinned = place == "cpu" and device.type == "cuda"
    yield torch.empty(*shape, dtype=dtype, device=device if place == "device" else "cpu", pin_memory=pinned)


def choose_place(size: int, device: torch.device) -> Offload:
    """Return the fastest place with room for `size` bytes."""
    if device.type == "cuda" and size < _SHARE * torch.cuda.mem_get_info(device)[0]:
        return "device"
    if size < _SHARE * available_memory():
        return "cpu" if device.type == "cuda" else "device"
    return "disk"


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)
