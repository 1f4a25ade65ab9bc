"""The log files of a run: whose they are, their last lines, and following them as they grow.

An agent's file starts when the agent does; before that, and where it could not start, the job's own output in its
folder is all there is: the batch script's and submitit's.
"""

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from hpc_router.cluster.launcher import ROUTER
from hpc_router.errors import ConfigError, RegistryError, suggest
from hpc_router.jobdir import JobDir
from hpc_router.registry import split_replica
from hpc_router.rundir import RunDir

POLL_S: Final = 0.3
CONTROL_LOG: Final = "reconcile.log"


def log_files(run: RunDir, name: str | None) -> dict[str, list[Path]]:
    """Files by replica: of a replica, an expert's newest jobs, the router, everything. Raises ConfigError."""
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
    control = run.logs / CONTROL_LOG
    if name in (None, ROUTER) and control.exists():
        files["reconcile"] = [control]
    return files


def files_of(job: JobDir) -> list[Path]:
    """The job's own output only where it said something."""
    ranks = sorted(job.run.logs.glob(f"{job.replica}.rank*.log"))  # of an engine on several nodes
    return [path for path in (*early_files(job), job.agent_log, job.engine_log, *ranks) if path.exists()]


def early_files(job: JobDir) -> list[Path]:
    """What the batch script and submitit had to complain about."""
    found = [*sorted(job.path.glob("*_batch.log")), *sorted(job.path.glob("*_log.err"))]
    return [path for path in found if path.stat().st_size]


def tail(path: Path, lines: int) -> list[str]:
    with path.open(encoding="utf-8", errors="replace") as stream:
        return [line.rstrip("\n") for line in deque(stream, maxlen=lines)]


def follow(run: RunDir, name: str | None, *, seen: Mapping[Path, int]) -> Iterator[tuple[str, str]]:
    """(replica, line) as lines come, of files that appear later too. `seen`: bytes already shown. Never ends."""
    offsets = dict(seen)
    rest: dict[Path, str] = {}
    while True:
        for replica, files in log_files(run, name).items():
            for path in files:
                for line in _grown(path, offsets, rest):
                    yield replica, line
        time.sleep(POLL_S)


def sizes(files: Mapping[str, Sequence[Path]]) -> dict[Path, int]:
    return {path: path.stat().st_size for paths in files.values() for path in paths}


def _grown(path: Path, offsets: dict[Path, int], rest: dict[Path, str]) -> Iterator[str]:
    try:
        with path.open("rb") as stream:
            stream.seek(offsets.get(path, 0))
            new = stream.read()
            offsets[path] = stream.tell()
    except FileNotFoundError:
        return
    *lines, rest[path] = (rest.get(path, "") + new.decode("utf-8", "replace")).split("\n")
    yield from lines


def _parts(name: str) -> tuple[str, str, int] | None:
    try:
        return split_replica(name)
    except RegistryError:
        return None


def last_lines(run: RunDir, replica: str, *, lines: int) -> list[str]:
    """The end of the file that says most about a failure: the engine's, else the agent's, else submitit's."""
    job = JobDir(run, replica)
    for path in (job.engine_log, job.agent_log, *reversed(early_files(job))):
        if path.exists() and os.path.getsize(path):  # noqa: PTH202
            return tail(path, lines)
    return []
