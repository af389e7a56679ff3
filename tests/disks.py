"""Simulated disk without free space."""

import builtins
import errno


class FullDisk:
    """Replacement for file functions that fails as a full disk after `room` files."""

    def __init__(self, room):
        self.room = room

    def fsync(self, descriptor):
        self.room -= 1
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    def open(self, path, mode="r", **options):
        if "x" in mode and self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return builtins.open(path, mode, **options)


def drafts(folder):
    return [path for path in folder.rglob("*") if ".draft" in path.name]
