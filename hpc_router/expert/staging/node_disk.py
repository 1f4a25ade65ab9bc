"""`<cluster.stage_to>/hpc-router-models-<uid>/`: the models and compile caches of one user on a node's disk.

    model-KEY/NAME...        a copy that is complete; its users hold a shared lock on `model-KEY`
    model-KEY/staged.json    where it comes from, its size, the SHA-256 of its files
    part-KEY/                a copy in progress; its writer holds an exclusive lock, which it keeps when it renames it
    cache-KEY/               a compile cache; its users hold a shared lock
    gone-*/                  what is being removed

Nothing is removed while another process has it locked. What a killed process left behind has no lock. The methods do
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
"""Copies and caches that no agent has used for this long are removed."""
GB: Final = 10**9
MANIFEST: Final = "staged.json"
_MODEL, _PART, _CACHE, _GONE = "model-", "part-", "cache-", "gone-"


@dataclass(frozen=True, slots=True)
class StagedModel:
    """A folder of this disk that is locked by this process: a copy, or one in progress. `path`: of the model in it."""

    folder: Path
    path: Path
    lock: FolderLock


@dataclass(frozen=True, slots=True)
class NodeDisk:
    """`limit`: bytes that the copies of this user may take; None: as many as the disk has."""

    folder: Path
    limit: int | None = None

    @classmethod
    def open(cls, stage_to: Path, *, limit: int | None = None) -> "NodeDisk":
        """Make the folder if needed. Raises StagingError if this user cannot have it, and OSError."""
        if not stage_to.is_absolute():
            raise StagingError(f"{stage_to} is not an absolute path")
        stage_to.mkdir(mode=0o700, exist_ok=True)
        folder = stage_to / f"hpc-router-models-{os.getuid()}"
        if not make_private(folder):
            raise StagingError(f"{folder} belongs to another user, or is no folder")
        return cls(folder, limit)

    def has(self, model: Path) -> bool:
        """Whether the model is on the same file system, so that a copy has no use. Raises OSError."""
        return model.stat().st_dev == self.folder.stat().st_dev

    def find(self, files: ModelFiles) -> StagedModel | None:
        """The complete copy, locked for use; None if there is none. A damaged one is removed; raises StagingError if
        another process uses it."""
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
        """An empty folder for a new copy, locked, with room for it. None if another process is copying this model, or
        looks for room. Raises StagingError if there is no room, and OSError."""
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
            return StagedModel(folder, folder / files.source.name, lock)
        finally:
            whole.release()

    def finish(self, part: StagedModel, files: ModelFiles, hashes: dict[str, str]) -> None:
        """Publish a complete copy; `find` returns it from then on. The lock of `part` is released."""
        about = {"source": str(files.source), "bytes": files.size, "at": time.time(), "sha256": hashes}
        replace_json(part.folder / MANIFEST, about)
        part.folder.rename(self.folder / f"{_MODEL}{files.key}")
        part.lock.release()

    def discard(self, part: StagedModel) -> None:
        """Remove a copy that was not completed."""
        shutil.rmtree(part.folder, ignore_errors=True)
        part.lock.release()

    def cache(self, key: str) -> StagedModel | None:
        """The compile cache of this key, locked for use; None while it is being removed."""
        folder = self.folder / f"{_CACHE}{key}"
        folder.mkdir(mode=0o700, exist_ok=True)
        lock = FolderLock.take(folder, shared=True)
        if lock is None:
            return None
        lock.touch()
        return StagedModel(folder, folder, lock)

    def drop(self, used: StagedModel) -> None:
        """Give a copy or a cache back, and remove it if no other process uses it."""
        if used.lock.make_exclusive():
            self._move_away(used.folder)
        used.lock.release()

    def sweep(self, *, now: float) -> None:
        """Remove what killed processes left, and what was not used for MAX_UNUSED_S."""
        for folder in self._folders(_PART, _GONE):
            self._remove(folder)
        for folder in self._folders(_MODEL, _CACHE):
            if now - _last_used(folder) > MAX_UNUSED_S:
                self._remove(folder)

    def _make_room(self, size: int) -> None:
        """Remove unused copies, those unused longest first, until `size` bytes fit. Raises StagingError."""
        if self.limit is not None and size > self.limit:
            raise StagingError(f"it has {size / GB:.1f} GB, more than cluster.stage_gb={self.limit / GB:g}")
        for folder in [*sorted(self._folders(_MODEL), key=_last_used), None]:
            if (lack := self._lack(size)) is None:
                return
            if folder is not None:
                self._remove(folder)
        raise StagingError(f"no room for {size / GB:.1f} GB: {lack}")

    def _lack(self, size: int) -> str | None:
        """Why `size` more bytes do not fit; None if they do. Copies in progress count in full."""
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
        """False if another process uses the folder."""
        lock = FolderLock.take(folder, shared=False)
        if lock is None:
            return not folder.exists()
        self._move_away(folder)
        lock.release()
        return True

    def _move_away(self, folder: Path) -> None:
        """Remove a locked folder. Its name is free at once, also if this process is killed before the end."""
        gone = folder.rename(self.folder / f"{_GONE}{secrets.token_hex(8)}")
        shutil.rmtree(gone, ignore_errors=True)


def _last_used(folder: Path) -> float:
    """Unix seconds; 0 if the folder was removed meanwhile."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _manifest(folder: Path) -> dict[str, Any]:
    return read_json(folder / MANIFEST) or {}


def _size(folder: Path) -> int:
    """Bytes of the files that are in a folder now. Another process may be removing it."""
    found = 0
    for inside, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                found += Path(inside, name).lstat().st_size
    return found
