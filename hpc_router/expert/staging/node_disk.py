"""`<cluster.stage_to>/hpc-router-models-<uid>/`: the models and compile caches of one user on a node's disk.

    model-KEY/NAME...        a complete copy; each process that uses it holds a shared lock on `model-KEY`
    model-KEY/staged.json    the source, the size and the SHA-256 of each file
    part-KEY/                a copy in progress; the writer holds an exclusive lock, also during the rename to model-KEY
    cache-KEY/               a compile cache; each process that uses it holds a shared lock
    gone-*/                  a folder that is being removed

A folder is removed only when no other process has a lock on it. A process that was killed has no locks. The methods do
not wait for locks.
"""

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hpc_router.errors import StagingError
from hpc_router.expert.staging.folder_lock import FolderLock
from hpc_router.expert.staging.model_files import ModelFiles
from hpc_router.state.atomic_files import read_json, replace_json
from hpc_router.state.private_folder import make_private

MAX_UNUSED_S: Final = 7 * 24 * 3600.0
"""Copies and caches that no agent has used for this time, in seconds, are removed."""
GB: Final = 10**9
MANIFEST: Final = "staged.json"
_MODEL, _PART, _CACHE, _GONE = "model-", "part-", "cache-", "gone-"


@dataclass(frozen=True, slots=True)
class StagedModel:
    """A folder on the node's disk that this process has locked: a complete copy, a copy in progress, or a cache.
    `path`: the path of the model inside the folder."""

    folder: Path
    path: Path
    lock: FolderLock


@dataclass(frozen=True, slots=True)
class NodeDisk:
    """This user's folder on the node's disk. `limit`: maximum total size of the copies in bytes; None: no limit but the
    disk's."""

    folder: Path
    limit: int | None = None

    @classmethod
    def open(cls, stage_to: Path, *, limit: int | None = None) -> "NodeDisk":
        """Returns the folder and creates it if needed. Raises StagingError if this user cannot have it, and OSError."""
        if not stage_to.is_absolute():
            raise StagingError(f"{stage_to} is not an absolute path")
        stage_to.mkdir(mode=0o700, exist_ok=True)
        folder = stage_to / f"hpc-router-models-{os.getuid()}"
        if not make_private(folder):
            raise StagingError(f"{folder} belongs to another user, or is no folder")
        return cls(folder, limit)

    def has(self, model: Path) -> bool:
        """Returns whether the model is on the same file system as this folder, so that a copy would not help. Raises
        OSError."""
        return model.stat().st_dev == self.folder.stat().st_dev

    def find(self, files: ModelFiles) -> StagedModel | None:
        """Returns the complete copy of the model, with a shared lock; None if there is none. Removes a copy in which
        files are missing; raises StagingError if another process uses that copy."""
        folder = self.folder / f"{_MODEL}{files.key}"
        lock = FolderLock.take(folder, shared=True)
        if lock is None:
            return None
        if files.are_at(folder / files.source.name):
            lock.touch()
            return StagedModel(folder, folder / files.source.name, lock)
        lock.release()
        if not self._remove(folder):
            raise StagingError(f"{folder} lacks files, and another process uses it")
        return None

    def begin(self, files: ModelFiles) -> StagedModel | None:
        """Makes room for a new copy, and creates and locks its folder. Returns None if another process is copying this
        model or making room. Raises StagingError if there is no room, and OSError."""
        whole = FolderLock.take(self.folder, shared=False)
        if whole is None:
            return None
        try:
            folder = self.folder / f"{_PART}{files.key}"
            if (self.folder / f"{_MODEL}{files.key}").exists():
                return None
            if folder.exists() and not self._remove(folder):
                return None
            self._make_room(files.size)
            folder.mkdir(mode=0o700)
            lock = FolderLock.take(folder, shared=False)
            if lock is None:
                return None
            replace_json(folder / MANIFEST, {"source": str(files.source), "bytes": files.size})
            part = StagedModel(folder, folder / files.source.name, lock)
            for inside in {(part.path / file.path).parent for file in files.files}:
                inside.mkdir(mode=0o700, parents=True, exist_ok=True)
            return part
        finally:
            whole.release()

    def finish(self, part: StagedModel, files: ModelFiles, hashes: dict[str, str]) -> None:
        """Renames a copy that is complete, so that `find` returns it, and releases the lock of `part`. `hashes`:
        SHA-256 by file."""
        about = {"source": str(files.source), "bytes": files.size, "at": time.time(), "sha256": hashes}
        replace_json(part.folder / MANIFEST, about)
        part.folder.rename(self.folder / f"{_MODEL}{files.key}")
        part.lock.release()

    def discard(self, part: StagedModel) -> None:
        """Removes a copy in progress. A thread that still copies to it gets FileNotFoundError at its next file."""
        try:
            self._move_away(part.folder)
        finally:
            part.lock.release()

    def cache(self, key: str) -> StagedModel | None:
        """Returns the compile cache with this key, with a shared lock; creates it if needed. Returns None while another
        process is removing it."""
        folder = self.folder / f"{_CACHE}{key}"
        folder.mkdir(mode=0o700, exist_ok=True)
        lock = FolderLock.take(folder, shared=True)
        if lock is None:
            return None
        lock.touch()
        return StagedModel(folder, folder, lock)

    def drop(self, used: StagedModel) -> None:
        """Releases a copy or a cache, and removes it if no other process uses it."""
        if used.lock.make_exclusive():
            self._move_away(used.folder)
        used.lock.release()

    def sweep(self, *, now: float) -> None:
        """Removes the unfinished folders of killed processes, and copies and caches that were not used for
        MAX_UNUSED_S. `now`: Unix seconds."""
        for folder in self._folders(_PART, _GONE):
            self._remove(folder)
        for folder in self._folders(_MODEL, _CACHE):
            if now - _last_used(folder) > MAX_UNUSED_S:
                self._remove(folder)

    def _make_room(self, size: int) -> None:
        """Removes unused copies, the least recently used first, until `size` bytes fit. Raises StagingError if they do
        not fit."""
        if self.limit is not None and size > self.limit:
            raise StagingError(f"it has {size / GB:.1f} GB, more than cluster.stage_gb={self.limit / GB:g}")
        for folder in [*sorted(self._folders(_MODEL), key=_last_used), None]:
            if (lack := self._lack(size)) is None:
                return
            if folder is not None:
                self._remove(folder)
        raise StagingError(f"no room for {size / GB:.1f} GB: {lack}")

    def _lack(self, size: int) -> str | None:
        """Returns why `size` more bytes do not fit; None if they do. A copy in progress counts with its full size."""
        parts = {folder: _manifest(folder).get("bytes", 0) for folder in self._folders(_PART)}
        copies = sum(_manifest(folder).get("bytes", 0) for folder in self._folders(_MODEL)) + sum(parts.values())
        if self.limit is not None and copies + size > self.limit:
            return f"cluster.stage_gb={self.limit / GB:g}, and other copies take {copies / GB:.1f} GB"
        status = os.statvfs(self.folder)
        free = status.f_bavail * status.f_frsize - sum(max(0, whole - _size(part)) for part, whole in parts.items())
        return None if size <= free else f"{self.folder} has {max(0, free) / GB:.1f} GB"

    def _folders(self, *kinds: str) -> Iterator[Path]:
        return (path for path in sorted(self.folder.iterdir()) if path.name.startswith(kinds) and path.is_dir())

    def _remove(self, folder: Path) -> bool:
        """Removes a folder. Returns False if another process uses it."""
        lock = FolderLock.take(folder, shared=False)
        if lock is None:
            return not folder.exists()
        self._move_away(folder)
        lock.release()
        return True

    def _move_away(self, folder: Path) -> None:
        """Renames a locked folder and then removes it. Its name is free from the renaming on, even if this process is
        killed before the removal."""
        gone = folder.rename(self.folder / f"{_GONE}{secrets.token_hex(8)}")
        shutil.rmtree(gone, ignore_errors=True)


def _last_used(folder: Path) -> float:
    """Returns when the folder was last used, in Unix seconds; 0 if another process has removed it."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _manifest(folder: Path) -> dict[str, Any]:
    return read_json(folder / MANIFEST) or {}


def _size(folder: Path) -> int:
    """Returns the total size in bytes of the files that are in a folder now. Another process may be removing them."""
    found = 0
    for inside, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                found += Path(inside, name).lstat().st_size
    return found
