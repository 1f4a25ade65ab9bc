"""One run of the load generator: what it sends, and what came back. How it works stands at the top of `load.c`."""

import json
import os
import struct
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from hpc_router.bench.load.native.build import built
from hpc_router.bench.load.native.records import EVENT, Table, read_events, read_requests
from hpc_router.errors import LaunchError
from hpc_router.state.run_directory import private_umask

MAX_CONNECTIONS: Final = 4000
GUARD_S: Final = 30.0
"""Beyond what it was given, before it counts as hung."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSpec:
    """Closed loop: `seconds` or `count`; open loop: `arrivals_s`. `requests` is a file of `write_requests`. With
    `measure_s` what begins from then on is measured, in `order`; all the rest comes in that of `others`."""

    requests: Path
    port: int | None = None  # on loopback, unless `host` says otherwise
    host: str | None = None
    socket: Path | None = None
    connections: int
    seconds: float | None = None
    count: int | None = None
    arrivals_s: Sequence[float] | None = None
    order: Sequence[int] | None = None
    others: Sequence[int] | None = None
    measure_s: float | None = None
    think_s: Sequence[float] | None = None
    ramp_s: float = 0.0
    leave_after_events: int | None = None
    leave_after_ms: float | None = None
    events: bool = False
    label: str | None = None  # a header, or up to three, with commas
    timeout_s: float = 60.0
    drain_s: float = 30.0

    def argv(self, folder: Path) -> list[str]:
        """Everything but the program; lists go to files in `folder`."""
        given: dict[str, object] = {
            "requests": self.requests,
            "records": folder / "records",
            "tcp": self.port,
            "host": self.host,
            "unix": self.socket,
            "connections": self.connections,
            "seconds": self.seconds,
            "count": self.count,
            "arrivals": _listed(folder / "arrivals", self.arrivals_s, "f8"),
            "order": _listed(folder / "order", self.order, "u4"),
            "others": _listed(folder / "others", self.others, "u4"),
            "measure": self.measure_s,
            "think": _listed(folder / "think", self.think_s, "f8"),
            "ramp": self.ramp_s,
            "leave-after-events": self.leave_after_events,
            "leave-after-ms": self.leave_after_ms,
            "events": folder / "events" if self.events else None,
            "label": self.label,
            "timeout": self.timeout_s,
            "drain": self.drain_s,
        }
        return [word for key, value in given.items() if value is not None for word in (f"--{key}", str(value))]


@dataclass(frozen=True, slots=True)
class Recorded:
    """`events` is empty where they were not asked for."""

    requests: Table
    events: Table
    summary: dict[str, Any]

    @property
    def cpu_s(self) -> float:
        return float(self.summary["cpu_s"])

    @property
    def elapsed_s(self) -> float:
        return float(self.summary["ended"] - self.summary["begun"]) / 1e9


class Running:
    """A load that is under way. `begun_ns`: CLOCK_MONOTONIC."""

    def __init__(self, process: subprocess.Popen[bytes], load: LoadSpec, folder: Path) -> None:
        self.process, self._load, self._folder = process, load, folder
        assert process.stdout is not None
        words = process.stdout.readline().split()
        if words[:1] != [b"begun"]:
            self.wait(patience_s=GUARD_S)
            raise LaunchError("the load generator did not start")
        self.begun_ns = int(words[1])

    def stop(self) -> None:
        """What is under way is recorded as stopped."""
        self.process.terminate()

    def wait(self, *, patience_s: float | None) -> Recorded:
        try:
            out, said = self.process.communicate(timeout=patience_s)
        except subprocess.TimeoutExpired as error:
            raise LaunchError(f"the load generator did not end within {patience_s} s") from error
        if self.process.returncode != 0:
            raise LaunchError(f"the load generator failed: {said.decode().strip() or self.process.returncode}")
        events = read_events(self._folder / "events") if self._load.events else np.empty(0, dtype=EVENT)
        return Recorded(read_requests(self._folder / "records"), events, json.loads(out))


@contextmanager
def running(load: LoadSpec, folder: Path) -> Iterator[Running]:
    """Start it; it does not outlive the block. `folder` is its own, and private."""
    if load.connections > MAX_CONNECTIONS:
        raise LaunchError(f"{load.connections} connections are more than this takes on (at most {MAX_CONNECTIONS})")
    with private_umask():
        folder.mkdir(parents=True, exist_ok=True)
    command = [str(built("load")), *load.argv(folder)]
    # Unbuffered: what a buffer had read beyond the first line would be lost to `communicate`.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    try:
        yield Running(process, load, folder)
    finally:
        process.kill()
        process.communicate()


def run(load: LoadSpec, folder: Path, *, patience_s: float) -> Recorded:
    with running(load, folder) as under_way:
        return under_way.wait(patience_s=patience_s)


def write_requests(path: Path, requests: Sequence[bytes]) -> Path:
    """Whole HTTP requests; private, as they carry tokens."""
    with private_umask():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        for request in requests:
            stream.write(struct.pack("<I", len(request)) + request)
    return path


def _listed(path: Path, values: Sequence[float] | None, kind: str) -> Path | None:
    if values is None:
        return None
    np.asarray(values, dtype=kind).tofile(path)
    return path
