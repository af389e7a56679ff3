"""Lock of a run directory: one process at a time works on a run, and stale locks do not block it.

The kernel holds the lock (`flock` on `RUN/lock`) and frees it however its owner ends, including SIGKILL. Network file
systems may have no such locks, or locks that are local to one machine; there the file itself decides, by the owner that
it names and by its modification time, which the owner renews as a heartbeat. (Why not the library filelock:
docs/lab-log.md, 2026-11-29.)
"""

import errno
import os
import platform
import sys
import threading
import time
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from darwinlm.errors import UserError
from darwinlm.run.directory import LOCK
from darwinlm.runtime.files import naming_disk_faults
from darwinlm.runtime.progress import log

if sys.platform != "win32":
    import fcntl

_BEAT_SECONDS = 30.0
_SILENT_SECONDS = 600.0
"""Seconds without a heartbeat after which an owner on another machine is considered dead."""
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Owner(BaseModel):
    """Process that holds or held a lock."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    pid: int
    host: str
    boot: str
    """Boot id of its kernel: new at every boot, the same in all containers on a machine. Empty if unknown."""
    started: float
    """Seconds between the boot of the machine and the start of the process; tells apart processes with a reused pid."""
    since: float
    """Time when it took the lock, in seconds since 1970."""


class RunLock:
    """Exclusive right to write into a run directory, from `take` to the end of the block (or of the process)."""

    def __init__(self, run: Path) -> None:
        self._run, self._file = run, run / LOCK
        self._descriptor: int | None = None
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="lock", daemon=True)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *error: object) -> None:
        if self._descriptor is None:
            return
        self._over.set()
        self._heart.join()
        if _is(self._descriptor, self._file):
            self._file.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None

    def take(self) -> None:
        """Take the lock, creating the run directory if needed; does nothing if the lock is already held.

        Raises:
            UserError: if another process holds it; the message gives its pid, machine, age, and what to do. Also
                on Windows.
        """
        if self._descriptor is not None:
            return
        if sys.platform == "win32":
            raise UserError(f"{self._run}: DarwinLM cannot write runs on Windows; use Linux, macOS or WSL")
        with naming_disk_faults(self._file):
            self._run.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._open()
        self._heart.start()

    def _open(self) -> int:
        while True:
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                state = _flock(descriptor)
                self._check(_read(descriptor), state, silent=time.time() - os.fstat(descriptor).st_mtime)
                # Releasing a lock deletes its file, so a file that was opened before that is not a valid lock.
                if _is(descriptor, self._file):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, _myself().model_dump_json().encode(), 0)
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _check(self, owner: Owner | None, state: Literal["ours", "theirs", "unknown"], silent: float) -> None:
        """Reject a lock whose owner is alive; `silent` is the number of seconds since its last heartbeat."""
        if owner is None:
            if state == "theirs":
                raise UserError(f"--out {self._run} is in use by another process; wait for it or stop it")
            return
        here = _myself()
        near = owner.boot == here.boot if owner.boot and here.boot else owner.host == here.host
        if near:
            alive = state == "unknown" and _lives(owner)
        else:
            restarted = owner.host == here.host and state == "ours"
            alive = not restarted and silent < _SILENT_SECONDS
        if state != "theirs" and not alive:
            log.info("removing the stale lock of process %d on %s on %s", owner.pid, owner.host, self._run)
            return
        sign, remedy = "", f"wait for it or stop it (kill {owner.pid})"
        if not near:
            sign = f", last heartbeat {_duration(silent)} ago"
            remedy = f"wait for it or stop it there; if that machine is gone, delete {self._file}"
        raise UserError(
            f"--out {self._run} is in use by process {owner.pid} on {owner.host}, for "
            f"{_duration(time.time() - owner.since)}{sign}; {remedy}"
        )

    def _beat(self) -> None:
        while not self._over.wait(_BEAT_SECONDS):
            assert self._descriptor is not None
            os.utime(self._descriptor)


def _flock(descriptor: int) -> Literal["ours", "theirs", "unknown"]:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "theirs"
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return "unknown"
        raise
    return "ours"


def _read(descriptor: int) -> Owner | None:
    """Read the owner from the file; None if it is incomplete or not valid."""
    try:
        return Owner.model_validate_json(os.pread(descriptor, 4096, 0))
    except ValidationError:
        return None


def _is(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _myself() -> Owner:
    pid = os.getpid()
    return Owner(pid=pid, host=platform.node(), boot=_boot(), started=_started(pid), since=round(time.time()))


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _lives(owner: Owner) -> bool:
    try:
        # Both times come from the machine's clock in whole seconds and shift when it is adjusted.
        return abs(_started(owner.pid) - owner.started) < 2
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False


def _started(pid: int) -> float:
    seconds: float = psutil.Process(pid).create_time() - psutil.boot_time()
    return round(seconds, 1)


def _duration(seconds: float) -> str:
    minutes, hours, days = (int(max(0.0, seconds) / unit) for unit in (60, 3600, 86_400))
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{int(max(0.0, seconds))} s"
