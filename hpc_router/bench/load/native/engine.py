"""The mock engine as a process. What it answers stands at the top of `engine.c`."""

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

from hpc_router.bench.load.native.build import built
from hpc_router.errors import LaunchError

NAMES: Final = ("code", "math", "medicine", "law", "generalist")
"""The models it says to have."""


@dataclass(frozen=True, slots=True)
class Lateness:
    """How many events went out how late: `late[i]` by less than 2**(i+1) microseconds."""

    requests: int
    events: int
    late: tuple[int, ...]

    def since(self, before: "Lateness") -> "Lateness":
        late = tuple(now - then for now, then in zip(self.late, before.late, strict=True))
        return Lateness(self.requests - before.requests, self.events - before.events, late)

    def within_ms(self, share: float) -> float:
        """This share of the events went out no later than that."""
        wanted, seen = share * sum(self.late), 0
        for power, count in enumerate(self.late):
            seen += count
            if seen >= wanted:
                return 2.0 ** (power + 1) / 1e3
        return math.inf


@dataclass(frozen=True, slots=True)
class MockEngine:
    """`port` on loopback, or None behind `socket`."""

    pid: int
    port: int | None
    socket: Path | None
    noted: Path

    def lateness(self) -> Lateness:
        value = json.loads(self._get("/lateness"))
        return Lateness(value["requests"], value["events"], tuple(value["late"]))

    def leaves(self) -> dict[str, int]:
        """When connections were closed in the midst of an answer, CLOCK_MONOTONIC in ns, by the name in the request."""
        lines = self.noted.read_text(encoding="utf-8", errors="replace").split("\n") if self.noted.exists() else []
        pairs = (line.rpartition(" ") for line in lines)
        return {name: int(at) for name, _, at in pairs if name}

    def _get(self, path: str) -> bytes:
        connection = _Connection(self)
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        finally:
            connection.close()


class _Connection(http.client.HTTPConnection):
    def __init__(self, engine: MockEngine) -> None:
        super().__init__("127.0.0.1", engine.port or 80, timeout=10)
        self._socket = engine.socket

    def connect(self) -> None:
        if self._socket is None:
            super().connect()
            return
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(10)
        self.sock.connect(str(self._socket))


@contextmanager
def mock_engine(folder: Path, *, rate: float, socket: Path | None = None) -> Iterator[MockEngine]:
    """Listening; it ends with the block. `rate`: events per second of each stream."""
    noted = folder / "leaves"
    command = [str(built("engine")), "--rate", str(rate), "--leaves", str(noted)]
    if socket is not None:
        command += ["--unix", str(socket)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        if words[:1] != ["listening"]:
            raise LaunchError(f"the mock engine does not start: {process.communicate(timeout=10)[1].strip()}")
        yield MockEngine(process.pid, int(words[1]) or None, socket, noted)
    finally:
        process.kill()
        process.communicate()
