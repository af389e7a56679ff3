"""Tests of the lock on a run directory: live owners are named, dead ones replaced, the file removed at exit."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from darwinlm.errors import UserError
from darwinlm.run import lock
from darwinlm.run.lock import RunLock

HOLDER = """
import sys
from pathlib import Path
from darwinlm.run.lock import RunLock
RunLock(Path(sys.argv[1])).take()
print("held", flush=True)
sys.stdin.read()
"""
NOT_MINE = 2**22 + 1
"""Process number above the maximum of Linux."""


def no_kernel_locks(descriptor, operation):
    raise OSError(lock.errno.ENOLCK, "No locks available")


def test_lock_refuses_second_owner(tmp_path):
    with RunLock(tmp_path / "run") as first:
        first.take()
        first.take()
        message = rf"--out {tmp_path}/run is in use by process {os.getpid()} on .+, for"
        with pytest.raises(UserError, match=message), RunLock(tmp_path / "run") as second:
            second.take()
        assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == os.getpid()
    assert not any((tmp_path / "run").iterdir())
    with RunLock(tmp_path / "run") as third:
        third.take()


def test_lock_of_living_and_killed_process(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        message = rf"in use by process {holder.pid} on .+, for \d+ s; wait for it or stop it \(kill {holder.pid}\)"
        with pytest.raises(UserError, match=message), RunLock(tmp_path) as mine:
            mine.take()
        holder.send_signal(signal.SIGKILL)
    assert (tmp_path / "lock").exists()
    with RunLock(tmp_path) as mine:
        mine.take()
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


AWAY = {"host": "elsewhere", "boot": "another", "pid": 77}
TIMELY, SILENT = 30, 3_600
CASES = {
    # Owner in the file, seconds since its last heartbeat, kernel locks available: expected message.
    "dead, the kernel says so": ({}, TIMELY, True, None),
    "living, no kernel locks": ({}, TIMELY, False, rf"in use by process {os.getpid()} on"),
    "living and silent, no kernel locks": ({}, SILENT, False, rf"in use by process {os.getpid()} on"),
    "gone, no kernel locks": ({"pid": NOT_MINE}, TIMELY, False, None),
    "its number reused, no kernel locks": ({"started": 0.5}, TIMELY, False, None),
    "before a restart of this machine": ({"boot": "another"}, TIMELY, True, None),
    "elsewhere, alive": (
        AWAY,
        TIMELY,
        True,
        r"in use by process 77 on elsewhere, for 2 h 5 min, last heartbeat 30 s ago; wait for it or stop it there; "
        r"if that machine is gone, delete .+/lock$",
    ),
    "elsewhere, its clock ahead": (AWAY, -300, True, "last heartbeat 0 s ago"),
    "elsewhere, alive, no kernel locks": (AWAY, TIMELY, False, "process 77 on elsewhere"),
    "elsewhere, silent": (AWAY, SILENT, True, None),
    "elsewhere, silent, no kernel locks": (AWAY, SILENT, False, None),
}


@pytest.mark.parametrize("case", CASES)
def test_lock_file_decides_without_kernel_lock(case, tmp_path, monkeypatch):
    changes, silent, kernel, message = CASES[case]
    if not kernel:
        monkeypatch.setattr(fcntl, "flock", no_kernel_locks)
    owner = lock._myself().model_copy(update={"since": time.time() - 7_530, **changes})
    (tmp_path / "lock").write_text(owner.model_dump_json())
    os.utime(tmp_path / "lock", (time.time() - silent,) * 2)
    with RunLock(tmp_path) as mine:
        if message is None:
            mine.take()
        else:
            with pytest.raises(UserError, match=message):
                mine.take()
    assert (tmp_path / "lock").exists() == (message is not None)


ENDLESS = '{"pid": 1, "host": "elsewhere", "boot": "", "started": 0, "since": NaN}'


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', "\x00" * 500, '{"pid": 1e999}', ENDLESS])
def test_lock_file_without_owner(content, tmp_path):
    (tmp_path / "lock").write_text(content)
    with open(tmp_path / "lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is in use by another process; wait"), RunLock(tmp_path) as mine:
            mine.take()
    with RunLock(tmp_path) as mine:
        mine.take()
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_lock_file_deleted_before_locking(tmp_path, monkeypatch):
    flock, times = fcntl.flock, []

    def given_back_meanwhile(descriptor, operation):
        if not times:
            (tmp_path / "lock").unlink()
        times.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", given_back_meanwhile)
    with RunLock(tmp_path) as mine:
        mine.take()
        assert len(times) == 2
        with pytest.raises(UserError, match="is in use"), RunLock(tmp_path) as other:
            other.take()


def test_lock_file_touched_by_owner(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.001)
    with RunLock(tmp_path) as mine:
        mine.take()
        os.utime(tmp_path / "lock", (0, 0))
        end = time.monotonic() + 30
        while (tmp_path / "lock").stat().st_mtime == 0:
            assert time.monotonic() < end


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (59, "59 s"), (61, "1 min"), (7_530, "2 h 5 min"), (90_000, "1 d 1 h")],
)
def test_lock_duration(seconds, text):
    assert re.fullmatch(text, lock._duration(seconds))
