"""Starts and queries the mock engine. The comment at the top of `engine.c` describes its responses."""

import http.client
import json
import math
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hpc_router.bench.load.native.build import build_program
from hpc_router.errors import LaunchError

NAMES: Final = ("code", "math", "medicine", "law", "generalist")
"""Names of the models that the mock engine lists in /v1/models."""


@dataclass(frozen=True, slots=True)
class Lateness:
    """A histogram of how late the mock engine sent events. `late[i]` is the number of events that were late by less
    than 2**(i+1) microseconds, and belong to no earlier bin."""

    requests: int
    events: int
    late: tuple[int, ...]

    def since(self, before: "Lateness") -> "Lateness":
        """Returns the counts that were added after `before`, an earlier reading of the same histogram."""
        late = tuple(now - then for now, then in zip(self.late, before.late, strict=True))
        return Lateness(self.requests - before.requests, self.events - before.events, late)

    def within_ms(self, share: float) -> float:
        """Returns by how many milliseconds at most the share `share` of the events was late. The value is the upper
        limit of a histogram bin; infinite if it is in the last bin."""
        wanted, seen = share * sum(self.late), 0
        for power, count in enumerate(self.late):
            seen += count
            if seen >= wanted:
                return 2.0 ** (power + 1) / 1e3
        return math.inf


@dataclass(frozen=True, slots=True)
class MockEngine:
    """A running mock engine. It listens on loopback at `port`, or on the unix socket `socket` if `port` is None."""

    pid: int
    port: int | None
    socket: Path | None
    disconnect_log: Path

    def lateness(self) -> Lateness:
        """Returns the histogram of how late all events so far were sent."""
        value = json.loads(self._get("/lateness"))
        return Lateness(value["requests"], value["events"], tuple(value["late"]))

    def disconnects(self) -> dict[str, int]:
        """Returns when clients closed connections during a response: name of the request -> CLOCK_MONOTONIC in ns."""
        log = self.disconnect_log
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
        pairs = (line.rpartition(" ") for line in lines)
        return {name: int(at) for name, _, at in pairs if name}

    def _get(self, path: str) -> bytes:
        with socket.socket(socket.AF_INET if self.socket is None else socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(("127.0.0.1", self.port) if self.socket is None else str(self.socket))
            connection = http.client.HTTPConnection("localhost")
            connection.sock = sock
            connection.request("GET", path)
            return connection.getresponse().read()


@contextmanager
def mock_engine(folder: Path, *, rate: float, socket: Path | None = None) -> Iterator[MockEngine]:
    """Runs a mock engine until the block ends, at the unix socket `socket` or, if that is None, at a free port. `rate`:
    events per second of each stream."""
    disconnect_log = folder / "leaves"
    command = [str(build_program("engine")), "--rate", str(rate), "--leaves", str(disconnect_log)]
    if socket is not None:
        command += ["--unix", str(socket)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        banner = process.stdout.readline().split()
        if banner[:1] != ["listening"]:
            raise LaunchError(f"the mock engine did not start: {process.communicate(timeout=10)[1].strip()}")
        yield MockEngine(process.pid, int(banner[1]) or None, socket, disconnect_log)
    finally:
        process.kill()
        process.communicate()
