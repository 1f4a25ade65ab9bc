"""Runs the native load generator. The comment at the top of `load.c` describes how it works."""

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

from hpc_router.bench.load.native.build import build_program
from hpc_router.bench.load.native.records import EVENT, Table, read_events, read_requests
from hpc_router.errors import LaunchError
from hpc_router.state.run_directory import private_umask

MAX_CONNECTIONS: Final = 4000
"""Maximum number of connections of one load generator."""
EXIT_TIMEOUT_S: Final = 30.0
"""Time in seconds after the end of a load after which the program counts as hung."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSpec:
    """The arguments of the load generator. An argument that is None is not passed to the program.

    With `seconds` or `count`, each of `connections` users waits for a response before its next request; with
    `arrivals_s`, requests begin at these times. `requests`: a file from `write_requests`. With `measure_s`, requests
    that begin after that time are measured and sent in `order`; all other requests are sent in the order of `others`.
    """

    requests: Path
    port: int | None = None  # on loopback, unless `host` is given
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
    chains: Table | None = None  # conversations, as rows of STEP; instead of order, others and think_s
    most_in_flight: int | None = None  # open loop: with more requests in flight, the load ends early
    ramp_s: float = 0.0
    leave_after_events: int | None = None
    leave_after_ms: float | None = None
    events: bool = False
    label: str | None = None  # up to three response headers to record, separated by commas
    timeout_s: float = 60.0
    drain_s: float = 30.0

    def argv(self, folder: Path) -> list[str]:
        """Returns the command-line arguments. A sequence is written to a file in `folder`, whose path is passed."""
        options: dict[str, object] = {
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
            "chains": _written(folder / "chains", self.chains),
            "most-in-flight": self.most_in_flight,
            "ramp": self.ramp_s,
            "leave-after-events": self.leave_after_events,
            "leave-after-ms": self.leave_after_ms,
            "events": folder / "events" if self.events else None,
            "label": self.label,
            "timeout": self.timeout_s,
            "drain": self.drain_s,
        }
        return [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]


@dataclass(frozen=True, slots=True)
class Recorded:
    """The requests and events that the load generator recorded. `events` is empty if `LoadSpec.events` is false."""

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
    """A load in progress. `begun_ns`: time at which it began (CLOCK_MONOTONIC)."""

    def __init__(self, process: subprocess.Popen[bytes], spec: LoadSpec, folder: Path) -> None:
        self.process, self._spec, self._folder = process, spec, folder
        assert process.stdout is not None
        banner = process.stdout.readline().split()
        if banner[:1] != [b"begun"]:
            self.wait(timeout_s=EXIT_TIMEOUT_S)
            raise LaunchError("the load generator did not start")
        self.begun_ns = int(banner[1])

    def stop(self) -> None:
        """Ends the load early. Requests in progress are recorded as stopped."""
        self.process.terminate()

    def wait(self, *, timeout_s: float | None) -> Recorded:
        """Waits for the end of the load. Raises LaunchError if the program fails or does not end in time."""
        try:
            summary, stderr = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise LaunchError(f"the load generator did not end within {timeout_s} s") from error
        if self.process.returncode != 0:
            raise LaunchError(f"the load generator failed: {stderr.decode().strip() or self.process.returncode}")
        events = read_events(self._folder / "events") if self._spec.events else np.empty(0, dtype=EVENT)
        return Recorded(read_requests(self._folder / "records"), events, json.loads(summary))


@contextmanager
def running(spec: LoadSpec, folder: Path) -> Iterator[Running]:
    """Starts the load and yields it. Kills the load generator if it still runs when the block ends. `folder`: a private
    folder that no other load uses."""
    if spec.connections > MAX_CONNECTIONS:
        raise LaunchError(
            f"{spec.connections} connections are too many for one load generator (at most {MAX_CONNECTIONS})"
        )
    with private_umask():
        folder.mkdir(parents=True, exist_ok=True)
    command = [str(build_program("load")), *spec.argv(folder)]
    # Unbuffered, because `communicate` would miss bytes that a buffer had read beyond the first line.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    try:
        yield Running(process, spec, folder)
    finally:
        process.kill()
        process.communicate()


def run(spec: LoadSpec, folder: Path, *, timeout_s: float | None) -> Recorded:
    with running(spec, folder) as load:
        return load.wait(timeout_s=timeout_s)


def write_requests(path: Path, requests: Sequence[bytes]) -> Path:
    """Writes HTTP requests, each preceded by its length in bytes. The file is private, because requests contain
    tokens."""
    with private_umask():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        for request in requests:
            stream.write(struct.pack("<I", len(request)) + request)
    return path


def _written(path: Path, table: Table | None) -> Path | None:
    if table is None:
        return None
    table.tofile(path)
    return path


def _listed(path: Path, values: Sequence[float] | None, kind: str) -> Path | None:
    if values is None:
        return None
    np.asarray(values, dtype=kind).tofile(path)
    return path
