"""JSON files that are read often, but parsed again only after they were replaced.

A file's stamp consists of its modification time, inode and size. A file that was replaced atomically has another inode.
Only regular files of one user are read, by default of this one, because other users could put files into a shared
folder.
"""

import logging
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from hpc_router.errors import RegistryError
from hpc_router.state.atomic_files import MAX_FILE_BYTES, read_json

logger = logging.getLogger(__name__)
T = TypeVar("T")
Stamp = tuple[int, int, int]


def stamp_of(status: os.stat_result) -> Stamp:
    """Returns the stamp of a file with this status: modification time, inode and size."""
    return status.st_mtime_ns, status.st_ino, status.st_size


def stamp_at(path: Path) -> Stamp | None:
    """Returns the stamp of the file at `path`, following links; None if there is no file. Raises other OSErrors."""
    try:
        return stamp_of(path.stat())
    except FileNotFoundError:
        return None


@dataclass(slots=True)
class StampedFile(Generic[T]):
    """A JSON file and its parsed content. `parse` makes the content from the JSON object, and may raise RegistryError.
    `owner`: uid of the user who must own the file; None: this user.

    `value` is the content at the last `read`; None while there is no valid file.
    """

    path: Path
    parse: Callable[[dict[str, Any]], T]
    value: T | None = None
    owner: int | None = None
    _stamp: Stamp | None = None

    def read(self) -> T | None:
        """Returns the present content; None if there is no valid file. If the file exists but cannot be read now,
        returns the last known content. Raises OSError if the file's status cannot be read."""
        try:
            status = self.path.lstat()
        except FileNotFoundError:
            self._stamp = self.value = None
            return None
        if stamp_of(status) != self._stamp:
            self._load(status)
        return self.value

    def _load(self, status: os.stat_result) -> None:
        """Reads and parses the file. If it is not valid, logs a warning, once per version of the file."""
        value, self._stamp = None, stamp_of(status)
        if status.st_uid != (os.getuid() if self.owner is None else self.owner):
            logger.warning("%s belongs to uid %d: refused", self.path, status.st_uid)
        elif not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
            logger.warning("%s is not a small regular file: refused", self.path)
        elif (content := read_json(self.path)) is None:
            logger.warning("%s cannot be read now", self.path)
            value, self._stamp = self.value, None
        else:
            try:
                value = self.parse(content)
            except RegistryError as error:
                logger.warning("%s: %s", self.path, error)
        self.value = value
