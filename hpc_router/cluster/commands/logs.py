"""The log files of a run: finds them, reads their last lines, and follows them.

An agent's log begins when the agent starts. Before that, or if it could not start, there is only the output of the
batch script and of submitit in the job's folder. A log is rotated by renaming it (`state.log_file`), so its lines
continue from the older file to the newer one.
"""

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hpc_router.cluster.launchers.interface import ROUTER
from hpc_router.errors import ConfigError, RegistryError, suggest
from hpc_router.state.atomic_files import refresh_folder
from hpc_router.state.job_records import JobDir
from hpc_router.state.log_file import rotated_path
from hpc_router.state.registry import split_replica
from hpc_router.state.run_directory import RunDir

POLL_S: Final = 0.3


def log_files(run: RunDir, name: str | None) -> dict[str, list[Path]]:
    """Returns the log files of each chosen replica. `name`: a replica, a slot, an expert (its newest jobs), or the
    router; None: the newest jobs of all. Raises ConfigError for another name."""
    jobs = sorted((d.name for d in run.jobs.iterdir() if _parts(d.name)), key=lambda n: _parts(n) or ("", "", 0))
    newest = {(_parts(job) or ("", "", 0))[:2]: job for job in jobs}
    if name is None:
        chosen = list(newest.values())
    elif name in jobs:
        chosen = [name]
    else:
        chosen = [job for (expert, slot), job in newest.items() if name in (expert, f"{expert}-{slot}")]
    if not chosen and name is not None:
        names = {expert for expert, _ in newest} | set(jobs)
        raise ConfigError(f"no job of this run is named '{name}'{suggest(name, names)}")
    files = {job: files_of(JobDir(run, job)) for job in chosen}
    for job in chosen:
        control = JobDir(run, job).reconcile_log
        if (_parts(job) or ("",))[0] == ROUTER and control.exists():
            files["reconcile"] = [control]
    return files


def files_of(job: JobDir) -> list[Path]:
    """Returns all log files of a job that exist. Leaves out empty output of the batch script and of submitit."""
    with suppress(OSError):
        refresh_folder(job.run.logs)
    ranks = sorted(job.run.logs.glob(f"{job.replica}.rank*.log"))  # of an engine on several nodes
    workers = sorted(job.run.logs.glob(f"{job.replica}.worker*.log"))  # of a router
    return [path for path in (*early_files(job), job.agent_log, job.engine_log, *ranks, *workers) if path.exists()]


def early_files(job: JobDir) -> list[Path]:
    """Returns the non-empty output files of the batch script and of submitit."""
    with suppress(OSError):  # the folder may be gone
        refresh_folder(job.path)  # without this, an NFS client may not see a log that exists
    found = [*sorted(job.path.glob("*_batch.log")), *sorted(job.path.glob("*_log.err"))]
    return [path for path in found if path.stat().st_size]


def tail(path: Path, lines: int) -> list[str]:
    """Returns the last `lines` lines of the log at `path`. If the log was rotated, they may begin in the older file."""
    last: deque[str] = deque(maxlen=lines)
    for part in (rotated_path(path), path):
        with suppress(FileNotFoundError), part.open(encoding="utf-8", errors="replace") as stream:
            last.extend(stream)
    return [line.rstrip("\n") for line in last]


@dataclass(slots=True)
class Position:
    """The position in bytes up to which a log file was read. `inode` identifies the file. `partial`: the text of a last
    line that was incomplete."""

    inode: int
    offset: int = 0
    partial: str = ""


def ends(files: Mapping[str, Sequence[Path]]) -> dict[Path, Position]:
    """Returns the position of the present end of each of these logs."""
    found = ((path, path.stat()) for paths in files.values() for path in paths)
    return {path: Position(status.st_ino, status.st_size) for path, status in found}


def follow(run: RunDir, name: str | None, *, since: Mapping[Path, Position]) -> Iterator[tuple[str, str]]:
    """Yields (replica, line) for each line that is written after the positions `since`, including files that are
    created later. Never ends. `name`: as for `log_files`."""
    positions = dict(since)
    while True:
        for replica, files in log_files(run, name).items():
            for path in files:
                for line in _grown(path, positions):
                    yield replica, line
        time.sleep(POLL_S)


def _grown(path: Path, positions: dict[Path, Position]) -> Iterator[str]:
    """Yields the lines of the log at `path` that were written after its entry in `positions`, and updates the entry. If
    the log was rotated since then, the end of the older file comes first."""
    try:
        with path.open("rb") as stream:
            inode = os.fstat(stream.fileno()).st_ino
            position = positions.setdefault(path, Position(inode))
            new = b""
            if inode != position.inode:
                new = _end_of(rotated_path(path), position)
                position.inode, position.offset = inode, 0
            stream.seek(position.offset)
            new += stream.read()
            position.offset = stream.tell()
    except FileNotFoundError:
        return
    *lines, position.partial = (position.partial + new.decode("utf-8", "replace")).split("\n")
    yield from lines


def _end_of(path: Path, position: Position) -> bytes:
    """Returns the unread bytes of the file at `path`; empty if it is not the file that `position` belongs to."""
    with suppress(FileNotFoundError), path.open("rb") as stream:
        if os.fstat(stream.fileno()).st_ino == position.inode:
            stream.seek(position.offset)
            return stream.read()
    return b""


def _parts(name: str) -> tuple[str, str, int] | None:
    try:
        return split_replica(name)
    except RegistryError:
        return None


def last_lines(run: RunDir, replica: str, *, lines: int) -> list[str]:
    """Returns the last lines of the engine's log; if there is none, of the agent's log; otherwise of the output of the
    batch script and submitit."""
    job = JobDir(run, replica)
    for path in (job.engine_log, job.agent_log, *reversed(early_files(job))):
        if path.exists() and os.path.getsize(path):  # noqa: PTH202
            return tail(path, lines)
    return []
