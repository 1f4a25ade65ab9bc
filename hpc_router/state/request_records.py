"""The records of requests: files of JSON lines in `records/` of the run directory.

Each worker of a router writes files of its own, `records/<router>.worker<N>-<date>.jsonl` (UTC), so no lock is needed.
After a full file, the next one is `...-<date>.2.jsonl`, and so on. A line has the key `kind`: `request` (how one
request ended) or `feedback` (the score that a client gave to an earlier request). The prompts that
`router.sample_prompts` selects are in files with the same names in `samples/`. When the files of both folders exceed
`router.records_gb`, the oldest ones are removed. A write blocks while the file system hangs, so it must be made in a
file thread.
"""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import orjson

from hpc_router.state.run_directory import RunDir

PART_BYTES: Final = 64 * 2**20
"""Maximum size of one file, in bytes."""
MIN_PART_BYTES: Final = 2**16
_PARTS: Final = 16
"""The maximum size of one file is also at most this part of `router.records_gb`, so that the removal of whole files
keeps most records."""
_NAME: Final = re.compile(r"(?P<writer>.+)-(?P<day>\d{4}-\d\d-\d\d)(?:\.(?P<part>\d+))?\.jsonl")
REQUEST_ID: Final = re.compile(r"[\w.:-]{1,128}", re.ASCII)
"""The ids that requests can have."""


def part_bytes(limit_bytes: int) -> int:
    """Returns the maximum size of one file, in bytes, if all files together may have `limit_bytes`."""
    return max(MIN_PART_BYTES, min(PART_BYTES, limit_bytes // _PARTS))


class LineFile:
    """The files of one writer in one folder, with mode 0600. `write` appends whole lines to the last one."""

    def __init__(self, folder: Path, writer: str) -> None:
        self._folder, self._writer = folder, writer
        self._descriptor: int | None = None
        self._day, self._part, self._size = "", 1, 0

    def write(self, lines: bytes, *, at: float, max_bytes: int) -> None:
        """Appends `lines`; after an error, none of them. `at`: the present Unix time, whose date is in the file's name.
        `max_bytes`: maximum size of a file, beyond which a new one is begun. Raises OSError."""
        day = time.strftime("%Y-%m-%d", time.gmtime(at))
        if self._descriptor is not None and (
            day != self._day
            or self._size + len(lines) > max_bytes
            or not os.fstat(self._descriptor).st_nlink  # it was removed
        ):
            self.close()
        if self._descriptor is None:
            self._open(day, max_bytes)
        assert self._descriptor is not None
        try:
            rest = memoryview(lines)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)  # without a part of a line
            self.close()
            raise
        self._size += len(lines)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self, day: str, max_bytes: int) -> None:
        """Opens the first file of the day that is less than half full; creates it if necessary."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        part = self._part if day == self._day else 1
        while True:
            name = f"{self._writer}-{day}.jsonl" if part == 1 else f"{self._writer}-{day}.{part}.jsonl"
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            descriptor = os.open(self._folder / name, flags, 0o600)
            size = os.fstat(descriptor).st_size
            if size < max_bytes // 2:
                break
            os.close(descriptor)
            part += 1
        os.fchmod(descriptor, 0o600)
        self._descriptor, self._day, self._part, self._size = descriptor, day, part, size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":  # the node was lost during a write
            self._size += os.write(descriptor, b"\n")


def record_files(run: RunDir, *, since: float = 0.0) -> list[Path]:
    """Returns the files that may have records written after `since` (Unix seconds), the newest file first."""
    found = [(status.st_mtime, path) for path, status in _files(run.records) if status.st_mtime >= since]
    return [path for _, path in sorted(found, reverse=True)]


def read_records(run: RunDir, *, since: float) -> Iterator[dict[str, Any]]:
    """Yields the records of both kinds whose time is `since` (Unix seconds) or later, in no particular order. Skips
    lines that are not JSON objects, and files that are removed meanwhile."""
    for path in record_files(run, since=since):
        for line in _lines(path):
            record = _parsed(line)
            if record is not None and isinstance(at := record.get("at"), int | float) and at >= since:
                yield record


def find_records(run: RunDir, request_id: str) -> list[dict[str, Any]]:
    """Returns all records of the request with this id and of the feedback to it, the oldest first. They may belong to
    several requests, because a client may use an id again."""
    mark = b'"id":' + orjson.dumps(request_id)
    lines = (line for path in record_files(run) for line in _lines(path) if mark in line)
    found = [record for line in lines if (record := _parsed(line)) is not None and record.get("id") == request_id]
    return sorted(found, key=lambda record: record.get("at") or 0.0)


def remove_oldest(run: RunDir, limit_bytes: int) -> int:
    """Removes the oldest files of records and samples until the rest together has at most `limit_bytes`. Returns the
    number of removed files. Raises OSError if a file cannot be removed."""
    files = [(s.st_mtime, s.st_size, path) for folder in (run.records, run.samples) for path, s in _files(folder)]
    total, removed = sum(size for _, size, _ in files), 0
    for _, size, path in sorted(files):
        if total <= limit_bytes:
            break
        path.unlink(missing_ok=True)
        total, removed = total - size, removed + 1
    return removed


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        if _NAME.fullmatch(entry.name):
            with contextlib.suppress(FileNotFoundError):
                yield Path(entry.path), entry.stat()


def _lines(path: Path) -> Iterator[bytes]:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        yield from file


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return record if type(record) is dict else None
