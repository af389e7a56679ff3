"""Available memory, and out-of-memory errors as one clear line."""

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from darwinlm.config.stage import Stage
from darwinlm.errors import UserError

if sys.platform != "win32":
    import resource

_CONTROL_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_FILES = {
    2: ("memory.max", "memory.current", "file", "shmem"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem"),
}
"""By cgroup version: files with the limit and the usage, and the keys of `memory.stat` for caches."""
_REMEDIES = {
    "corpus": "lower data.sequence_length",
    "database": "lower database.batch_size, set database.offload=disk",
    "search": "set search.offload=cpu, lower search.batch_size or data.sequence_length",
    "recovery": "lower recovery.micro_batch_size, set recovery.activations=recompute",
    "evaluation": "lower data.sequence_length",
}
_GPU_TEXTS = re.compile(
    r"(CUDA|HIP|XPU) (error|failure)\b.*out of memory|failed to CUDA calloc|CUBLAS_STATUS_ALLOC_FAILED|MPS backend out",
    re.I,
)
"""Errors of drivers and libraries, such as NCCL's, which allocate memory outside PyTorch's allocator."""
_TEXTS = re.compile(r"DefaultCPUAllocator|can't allocate memory|cannot allocate memory|bad_alloc|os error 12\b", re.I)


def available_memory() -> int:
    """Return the bytes that this process can still allocate: the minimum over the machine, its cgroups and its own
    limit."""
    available: int = psutil.virtual_memory().available
    if sys.platform != "win32":
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            available = min(available, limit - psutil.Process().memory_info().vms)
    left = [_left_in(group, version) for group, version in _control_groups()]
    return max(0, min([available, *(size for size in left if size is not None)]))


def _control_groups() -> Iterator[tuple[Path, int]]:
    """Yield the cgroups of this process, such as a batch job's, and their parents, with the cgroup version."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:  # Not on Linux.
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" or "memory" in controllers.split(","):
            root = _CONTROL_GROUPS if number == "0" else _CONTROL_GROUPS / "memory"
            folder = root / path.strip("/")
            for group in (folder, *folder.parents):
                if group.is_relative_to(root):
                    yield group, 2 if number == "0" else 1


def _left_in(group: Path, version: int) -> int | None:
    """Return the free bytes of a cgroup's limit; None if it has none."""
    limit, taken, cached, shared = _FILES[version]
    try:
        most = (group / limit).read_text().strip()
        used = int((group / taken).read_text())
        parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # The page cache is released as soon as memory is needed.
        free_again = int(parts[cached]) - int(parts[shared])
    except (OSError, ValueError, KeyError):
        return None
    return int(most) - used + free_again if most.isdigit() else None


def check_room(size: int, device: torch.device, what: str) -> None:
    """Raise an error for what cannot fit, instead of being killed by the kernel without a message.

    Args:
        size: minimum number of bytes needed on `device`.
        device: device to check.
        what: subject of the error message, which needs the memory.

    Raises:
        UserError: if less is free.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if size > free:
        where = f"on {device}" if device.type == "cuda" else "of memory"
        raise UserError(
            f"{what} takes {size / 2**30:,.1f} GiB, but only {free / 2**30:,.1f} GiB {where} are free; free "
            "some, or use a larger machine"
        )


@contextmanager
def naming_memory_faults(stage: Stage | str) -> Iterator[None]:
    """Turn out-of-memory errors of a device or of the machine in `stage` into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or _GPU_TEXTS.search(str(error)):
            place = "GPU out of memory"
        elif isinstance(error, MemoryError) or _lacks_memory(error):
            place = "out of memory"
        else:
            raise
        remedy = _REMEDIES.get(stage.kind) if isinstance(stage, Stage) else None
        raise UserError(
            f"{stage}: {place} ({_reason(error)}); run the same command on a larger machine"
            + (f", or {remedy} in a new folder" if remedy else "")
        ) from error


def _lacks_memory(error: Exception) -> bool:
    # PyTorch, NumPy and safetensors each raise their own exceptions.
    return getattr(error, "errno", None) == errno.ENOMEM or bool(_TEXTS.search(str(error)))


def _reason(error: Exception) -> str:
    asked = re.search(r"tried to allocate [\d.,]+ ?\w+|allocate [\d.,]+ ?[KMGT]iB", str(error), re.I)
    return asked[0] if asked else type(error).__name__


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process so far, in bytes."""
    # On Linux ru_maxrss starts with the peak of the parent process.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
