"""Stores the results of a sweep: a folder with one file per finished point, named by a hash of the point's config.

An interrupted sweep keeps its finished points and continues with the missing ones. The hash covers the deployment, the
load and the repeat. It does not cover time and versions, which are provenance. There are no file locks, because shared
file systems do not support them reliably; instead, a process that measures a deployment renews a claim file.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from hpc_router.bench.background import repeated
from hpc_router.bench.config import BenchConfig
from hpc_router.bench.record import lines
from hpc_router.bench.workload import Point
from hpc_router.config.schema import Deployment
from hpc_router.errors import LaunchError
from hpc_router.state.atomic_files import read_json, replace_json, replace_text
from hpc_router.state.job_records import start_ticks
from hpc_router.state.run_directory import RunDir, private_umask

BEAT_S: Final = 5.0
CLAIM_TIMEOUT_S: Final = 60.0
"""Time in seconds without a heartbeat after which a claim from another host is void."""
_NOT_IN_KEY: Final = (
    "users",
    "rates",
    "trace",
    "repeats",
    "output",
    "raw",
    "load_place",
    "load_options",
    "trust",
    "drain_s",
    "retry",
    "search_share",
    "search_step",
    "search_points",
)
"""Keys of `bench` that do not change the measurement of one point."""


@dataclass(frozen=True, slots=True)
class Store:
    """The folder with the results of one sweep."""

    folder: Path

    def key(self, deployment: Deployment, config: BenchConfig, point: Point) -> str:
        """Returns the hash that names the file of a measurement point. The same point has the same hash in every
        sweep."""
        bench = {name: value for name, value in asdict(config).items() if name not in _NOT_IN_KEY}
        return _digest({"deployment": deployment_key(deployment), "bench": bench, "point": asdict(point)})

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.jsonl"

    def has(self, key: str, *, valid: bool = False) -> bool:
        """Returns whether the point is finished. With `valid`, its figures must be valid as well."""
        if not valid:
            return self.path(key).exists()
        return bool((self.read(key) or {}).get("valid"))

    def read(self, key: str) -> dict[str, Any] | None:
        """Returns the record of a finished point; None if the point is not finished."""
        return read_json(self.path(key))

    def add(self, key: str, record: Mapping[str, Any], raw: list[dict[str, Any]] | None) -> None:
        """Stores a finished point. Writes `raw`, its requests, first, because the record marks the point as
        finished."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if raw is not None:
            replace_text(self.folder / f"{key}.requests.jsonl", lines(raw))
        replace_text(self.path(key), lines([record]))

    def run_of(self, deployment: Deployment) -> RunDir:
        """Returns the run directory of a deployment of the sweep. It is always the same, so that a process can find and
        stop what a killed process has left running."""
        return RunDir(self.runs / deployment_key(deployment))

    @property
    def runs(self) -> Path:
        return self.folder / ".runs"

    @contextmanager
    def claim(self, deployment: Deployment) -> Iterator[None]:
        """Keeps the deployment's claim file during the block, so that no other process measures the same deployment
        meanwhile. Raises LaunchError if another process has the claim file."""
        with private_umask():
            self.runs.mkdir(parents=True, exist_ok=True)
        path = self.runs / f"{deployment_key(deployment)}.claim"
        holder = _holder(path)
        if holder is not None:
            raise LaunchError(f"{holder} measures this deployment (claim: {path})")
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "ticks": start_ticks(os.getpid())}
        replace_json(path, mine)
        try:
            with repeated(partial(_touch, path), every_s=BEAT_S):
                if read_json(path) != mine:
                    raise LaunchError(f"another call started to measure this deployment at the same time ({path})")
                yield
        finally:
            with contextlib.suppress(OSError):
                if read_json(path) == mine:
                    path.unlink()

    def clear(self, deployment: Deployment) -> None:
        """Removes the deployment's run directory."""
        shutil.rmtree(self.run_of(deployment).path, ignore_errors=True)


def deployment_key(deployment: Deployment) -> str:
    return _digest({**asdict(deployment), "name": "", "runs": ""})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _touch(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(path)


def _holder(path: Path) -> str | None:
    """Returns which other process keeps the claim file, as text for an error message; None if no live process does."""
    try:
        age_s = time.time() - path.stat().st_mtime
    except OSError:
        return None
    claim = read_json(path) or {}
    name = f"process {claim.get('pid')} on {claim.get('host')}"
    if claim.get("host") == socket.gethostname():
        alive = start_ticks(int(claim.get("pid") or 0)) == claim.get("ticks")
        return name if alive and claim.get("pid") != os.getpid() else None
    return name if age_s < CLAIM_TIMEOUT_S else None
