"""The files of users in the run directory: what they have uploaded, and the results of their batches.

Each file is a folder `files/ID/` with `file.json`, which describes it, and `content`, its bytes. A folder is written by
one process and read by many. An upload that ends early leaves a folder whose `uploaded` is false; it counts toward the
user's quota until it is removed, so that uploads at the same time cannot exceed the quota together. All functions
block, so callers run them in a file thread.
"""

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

from hpc_router.errors import BodyTooLargeError, QuotaExceededError, StoredFileNotFoundError
from hpc_router.state.atomic_files import read_json, replace_json
from hpc_router.state.run_directory import RunDir, make_private_folder

FILE_ID: Final = re.compile(r"file-[0-9a-f]{31}")
ABANDONED_S: Final = 3600.0
"""Time in seconds without a write after which an incomplete upload is removed."""


def new_id(prefix: str) -> str:
    """Returns a new ID that begins with `prefix`. IDs sort by the time at which they were made."""
    return f"{prefix}{time.time_ns() // 10**6:011x}{secrets.token_hex(10)}"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """What `file.json` says of a file. `user`: whose file it is; None: the deployment's owner. `bytes`: its length; of
    an incomplete upload, the length that is reserved for it. `created_at`, `expires_at`: Unix seconds."""

    id: str
    user: str | None
    filename: str
    purpose: str
    bytes: int
    created_at: float
    expires_at: float
    uploaded: bool = True

    def to_json(self) -> dict[str, Any]:
        """Returns the file object of OpenAI's API."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": int(self.created_at),
            "expires_at": int(self.expires_at),
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


def names_in(folder: Path) -> list[str]:
    """Returns the names in a folder; none if there is no such folder."""
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []


class StoredFiles:
    """The files of all users of one run."""

    def __init__(self, run: RunDir) -> None:
        self._folder = run.files

    def begin(self, file: StoredFile) -> BinaryIO:
        """Creates the folder of a file whose upload begins, and returns its content, open for writing. Raises
        OSError."""
        make_private_folder(self._folder)
        folder = self._folder / file.id
        make_private_folder(folder)
        self._write(replace(file, uploaded=False))
        return open(folder / "content", "xb", buffering=0, opener=_open_private)

    def complete(self, file: StoredFile, *, quota_bytes: int) -> StoredFile:
        """Completes the upload of a file, so that it can be read. Raises QuotaExceededError, and removes the file, if
        the user's files together exceed `quota_bytes`."""
        content = self._folder / file.id / "content"
        complete = replace(file, bytes=content.stat().st_size, uploaded=True)
        self._write(replace(complete, uploaded=False))
        try:
            self.check_quota(file.user, 0, quota_bytes=quota_bytes)
        except QuotaExceededError:
            self.remove(file.id)
            raise
        self._write(complete)
        return complete

    def add(self, file: StoredFile, content: Path) -> None:
        """Adds a file whose content is that of the file `content`, as a hard link. Does nothing if it was added
        before."""
        make_private_folder(self._folder)
        folder = self._folder / file.id
        make_private_folder(folder)
        with contextlib.suppress(FileExistsError):
            (folder / "content").hardlink_to(content)
        if not (folder / "file.json").exists():
            self._write(replace(file, bytes=content.stat().st_size))

    def get(self, file_id: str, user: str | None) -> StoredFile:
        """Returns a file of the user. Raises StoredFileNotFoundError if there is none, also for another user's file."""
        file = self._read(file_id) if FILE_ID.fullmatch(file_id) else None
        if file is None or file.user != user or not file.uploaded or file.expires_at <= time.time():
            raise StoredFileNotFoundError(f"there is no file {file_id[:80]!r}")
        return file

    def of_user(self, user: str | None) -> Iterator[StoredFile]:
        """Yields the files of the user, the newest first."""
        now = time.time()
        for file in self._all():
            if file.user == user and file.uploaded and file.expires_at > now:
                yield file

    def content(self, file_id: str) -> Path:
        """Returns the path of the content of a file."""
        return self._folder / file_id / "content"

    def remove(self, file_id: str) -> None:
        """Removes a file. Readers that have it open can read it to its end."""
        removed = self._folder / f".removed-{file_id}"
        with contextlib.suppress(FileNotFoundError):
            (self._folder / file_id).rename(removed)
        shutil.rmtree(removed, ignore_errors=True)

    def check_quota(self, user: str | None, more_bytes: int, *, quota_bytes: int) -> None:
        """Raises QuotaExceededError if the user's files, and `more_bytes`, together exceed `quota_bytes`."""
        used = sum(file.bytes for file in self._all() if file.user == user)
        if used + more_bytes > quota_bytes:
            raise QuotaExceededError(
                f"your files would have {used + more_bytes} bytes, and router.batch.user_gb allows {quota_bytes}: "
                "delete files that you do not need"
            )

    def remove_expired(self, *, now: float) -> int:
        """Removes expired files and abandoned uploads; returns their number. `now`: Unix seconds."""
        removed = 0
        for name in self._names():
            file = self._read(name)
            if name.startswith(".removed-"):
                shutil.rmtree(self._folder / name, ignore_errors=True)
            elif (file is not None and file.uploaded and file.expires_at <= now) or (
                (file is None or not file.uploaded) and self._is_abandoned(name, now)
            ):
                self.remove(name)
                removed += 1
        return removed

    def _is_abandoned(self, name: str, now: float) -> bool:
        for path in (self._folder / name / "content", self._folder / name):
            with contextlib.suppress(OSError):
                return now - path.stat().st_mtime > ABANDONED_S
        return False

    def _all(self) -> Iterator[StoredFile]:
        for name in self._names():
            file = self._read(name)
            if file is not None:
                yield file

    def _names(self) -> list[str]:
        return sorted(names_in(self._folder), reverse=True)

    def _read(self, file_id: str) -> StoredFile | None:
        content = read_json(self._folder / file_id / "file.json")
        try:
            return None if content is None else StoredFile(**content)
        except TypeError:
            return None

    def _write(self, file: StoredFile) -> None:
        replace_json(self._folder / file.id / "file.json", asdict(file))


def write_part(content: BinaryIO, part: bytes, *, written: int, max_bytes: int) -> int:
    """Appends a part of an upload of which `written` bytes are stored. Returns the number of stored bytes then. Raises
    BodyTooLargeError beyond `max_bytes`, and OSError."""
    if written + len(part) > max_bytes:
        raise BodyTooLargeError(f"the file is larger than router.batch.max_file_mb, {max_bytes} bytes")
    rest = memoryview(part)
    while rest:
        rest = rest[content.write(rest) :]
    return written + len(part)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
