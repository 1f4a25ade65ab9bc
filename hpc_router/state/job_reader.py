"""Reads all records of a job at once, and reads them again only after the job's folder has changed.

A record is replaced by a rename, which changes the folder's modification time. Two changes may get the same time, since
its resolution is limited; so a folder is also read again until its time is older than SETTLED_S. Opening the folder
makes an NFS client ask the server for the present modification time.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hpc_router.state.atomic_files import load_json
from hpc_router.state.job_records import (
    FILES,
    Ended,
    Exit,
    JobInfo,
    JobProgress,
    Process,
    Stop,
    Submitter,
    parse_record,
)
from hpc_router.state.run_directory import RunDir
from hpc_router.state.stamped_file import Stamp, stamp_of

SETTLED_S: Final = 2.0
SAME_PASS_S: Final = 0.1
"""Seconds after a read during which an unchanged folder is not read again."""
_FIELDS: Final[Mapping[str, type]] = {
    "info": JobInfo,
    "submitter": Submitter,
    "process": Process,
    "progress": JobProgress,
    "exit": Exit,
    "ended": Ended,
    "stop": Stop,
}


@dataclass(frozen=True, slots=True)
class JobRecords:
    """The records of one job. `claimed_at`: Unix seconds at which its submission began, from the submitter's record.
    Without that record it is the modification time of the job's folder, which is later, because each new record changes
    it."""

    replica: str
    claimed_at: float
    info: JobInfo | None = None
    submitter: Submitter | None = None
    process: Process | None = None
    progress: JobProgress | None = None
    exit: Exit | None = None
    ended: Ended | None = None
    stop: Stop | None = None


@dataclass(slots=True)
class _Cached:
    """The records of a job, and the modification time of its folder when they were read."""

    records: JobRecords
    stamp: Stamp
    seen_at: float
    read_at: float
    settled: bool


class JobReader:
    """Reads the records of jobs, and caches them."""

    def __init__(self, run: RunDir, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = str(run.jobs)
        self._clock = clock
        self._cached: dict[str, _Cached] = {}

    def read(self, replica: str) -> JobRecords | None:
        """Returns the records of a job; None if it has no folder. Raises OSError if a record exists but cannot be read,
        because None would mean that the job was never submitted."""
        path = f"{self._folder}/{replica}"
        try:
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            self._cached.pop(replica, None)
            return None
        try:
            return self._current(folder, path, replica)
        finally:
            os.close(folder)

    def _current(self, folder: int, path: str, replica: str) -> JobRecords:
        stamp, known = stamp_of(os.fstat(folder)), self._cached.get(replica)
        now = self._clock()
        if known is None or known.stamp != stamp:
            seen_at = now
        elif known.settled or now - known.read_at < SAME_PASS_S:
            return known.records
        else:
            seen_at = known.seen_at
        found = _read(folder, Path(path))
        claimed_at = _submitted_at(path) if "submitter" in found else None
        records = JobRecords(replica, stamp[0] / 1e9 if claimed_at is None else claimed_at, **found)
        whole = None not in found.values()
        self._cached[replica] = _Cached(records, stamp, seen_at, now, settled=whole and now - seen_at >= SETTLED_S)
        return records

    def keep_only(self, replicas: Iterable[str]) -> None:
        """Drops the cached records of all jobs except those of `replicas`."""
        self._cached = {name: self._cached[name] for name in replicas if name in self._cached}


def _submitted_at(path: str) -> float | None:
    """Returns when the submission of the job at `path` began, in Unix seconds; None if that is not recorded."""
    try:
        return Path(path, FILES[Submitter]).stat().st_mtime
    except FileNotFoundError:
        return None


def _read(folder: int, path: Path) -> dict[str, Any]:
    """Returns the records in the job's folder by field of `JobRecords`; None for a record that is not valid. Lists the
    folder first, so that files that do not exist are not opened."""
    found: dict[str, Any] = {}
    names = frozenset(os.listdir(folder))
    for field, kind in _FIELDS.items():
        if FILES[kind] in names:
            with suppress(FileNotFoundError, ValueError):  # the record was removed just now, or is only partly copied
                found[field] = None
                found[field] = parse_record(kind, load_json(path / FILES[kind]))
    return found
