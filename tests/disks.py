"""A disk without room."""

import builtins
import errno


class FullDisk:
    """Has room for so many files, then for none."""

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
