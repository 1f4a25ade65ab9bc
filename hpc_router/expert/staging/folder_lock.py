"""Locks on folders of a node-local disk by `flock`. The kernel releases such a lock when its process ends for any
reason.

The folder itself is locked, so there are no lock files to remove, and a lock stays valid when the folder is renamed.
flock is not used on the shared file system, where it may fail or have no effect on other hosts.
"""

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(slots=True)
class FolderLock:
    """A lock on a folder that this process holds until `release`. Child processes do not inherit it."""

    _descriptor: int

    @classmethod
    def take(cls, folder: Path, *, shared: bool) -> Self | None:
        """Locks the folder without waiting. `shared`: whether others may hold shared locks at the same time. Returns
        None if the folder is missing or another process holds a lock that excludes this one. Raises OSError."""
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            if _lock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX) and _is_at(descriptor, folder):
                return cls(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def make_exclusive(self) -> bool:
        """Turns a shared lock into an exclusive one. Returns False if another process also has a shared lock; this
        process may then have lost its own."""
        return _lock(self._descriptor, fcntl.LOCK_EX)

    def touch(self) -> None:
        """Sets the folder's modification time, which records when it was last used."""
        os.utime(self._descriptor)

    def release(self) -> None:
        os.close(self._descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, folder: Path) -> bool:
    """Returns whether the open folder is still the one at the path `folder`. Another process may have renamed or
    removed it before it was locked."""
    try:
        there, here = folder.lstat(), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
