"""The results of a sweep: a folder with one file per finished point, named by what was measured.

So whatever is killed, what is finished stays and is found again, and nothing is measured twice. The key says *what*
(deployment, load, repeat), not when or by which version: those are provenance. No locks; a claim with a heartbeat tells
a living call from what a killed one left.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from hpc_router.bench.config import BenchConfig
from hpc_router.bench.workload import Point
from hpc_router.config.schema import Deployment
from hpc_router.errors import LaunchError
from hpc_router.state.atomic_files import read_json, replace_json, replace_text
from hpc_router.state.job_records import start_ticks
from hpc_router.state.run_directory import RunDir, private_umask

BEAT_S: Final = 5.0
STILL_S: Final = 60.0
"""A claim of another host whose heart has not beaten for so long is nobody's."""
_HOW: Final = (
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
)
"""Keys of `bench` that do not change what one point measures."""


@dataclass(frozen=True, slots=True)
class Store:
    folder: Path

    def key(self, deployment: Deployment, config: BenchConfig, point: Point) -> str:
        """The same for the same question, however often the call is made."""
        how = {name: value for name, value in asdict(config).items() if name not in _HOW}
        what = {"deployment": config_key(deployment), "bench": how, "point": asdict(point)}
        return _digest(what)

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.jsonl"

    def has(self, key: str, *, valid: bool = False) -> bool:
        """Whether the point is finished; with `valid`, one that cannot be trusted is not."""
        if not valid:
            return self.path(key).exists()
        return bool((read_json(self.path(key)) or {}).get("valid"))

    def add(self, key: str, record: Mapping[str, Any], raw: list[dict[str, Any]] | None) -> None:
        """Raw requests first: a point without them is not finished where they were asked for."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if raw is not None:
            replace_text(self.folder / f"{key}.requests.jsonl", "".join(json.dumps(one) + "\n" for one in raw))
        replace_text(self.path(key), json.dumps(record, allow_nan=False) + "\n")

    def run_of(self, deployment: Deployment) -> RunDir:
        """Where that deployment is brought up: always the same place, so that what a killed call left is found."""
        return RunDir(self.runs / config_key(deployment))

    @property
    def runs(self) -> Path:
        return self.folder / ".runs"

    @contextmanager
    def claim(self, deployment: Deployment) -> Iterator[None]:
        """One call at a time measures a deployment. Raises LaunchError for a second one."""
        with private_umask():
            self.runs.mkdir(parents=True, exist_ok=True)
        path = self.runs / f"{config_key(deployment)}.claim"
        holder = _holder(path)
        if holder is not None:
            raise LaunchError(f"{holder} measures this deployment already ({path})")
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "ticks": start_ticks(os.getpid())}
        replace_json(path, mine)
        over = threading.Event()
        beat = threading.Thread(target=_beat, args=(path, over), daemon=True)
        beat.start()
        try:
            if read_json(path) != mine:
                raise LaunchError(f"another call began at the same moment to measure this deployment ({path})")
            yield
        finally:
            over.set()
            beat.join()
            with contextlib.suppress(OSError):
                if read_json(path) == mine:
                    path.unlink()

    def clear(self, deployment: Deployment) -> None:
        shutil.rmtree(self.run_of(deployment).path, ignore_errors=True)


def config_key(deployment: Deployment) -> str:
    return _digest({**asdict(deployment), "name": "", "runs": ""})


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _beat(path: Path, over: threading.Event) -> None:
    while not over.wait(BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(path)


def _holder(path: Path) -> str | None:
    """Who lives and holds the claim."""
    try:
        still_s = time.time() - path.stat().st_mtime
    except OSError:
        return None
    held = read_json(path) or {}
    told = f"process {held.get('pid')} on {held.get('host')}"
    if held.get("host") == socket.gethostname():
        alive = start_ticks(int(held.get("pid") or 0)) == held.get("ticks")
        return told if alive and held.get("pid") != os.getpid() else None
    return told if still_s < STILL_S else None
