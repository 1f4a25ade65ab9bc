"""The interface of a relay under test. `this_router` and `other_relays` contain the implementations."""

import shutil
import socket
import time
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hpc_router.bench.load.native.engine import MockEngine
from hpc_router.bench.relay_cost import requests
from hpc_router.bench.relay_cost.processes import ProcessGroup
from hpc_router.errors import LaunchError

SERVER_PATH: Final = "/usr/local/sbin:/usr/sbin"
START_TIMEOUT_S: Final = 60.0
NO_TOKEN: Final = "0" * 64
"""A token for relays that require none, so that all requests have the same length."""


@dataclass(frozen=True, slots=True)
class RelayPlacement:
    """What a relay needs to start: the engine behind it, a private folder, and its cores."""

    engine: MockEngine
    folder: Path
    cores: frozenset[int]

    @property
    def log(self) -> Path:
        return self.folder / "log"


@dataclass(frozen=True, slots=True)
class StartedRelay:
    """A running relay. `group`: the relay's processes; None if requests go directly to the engine."""

    port: int
    group: ProcessGroup | None
    token: str = NO_TOKEN


@dataclass(frozen=True, slots=True)
class Relay(ABC):
    """A way to relay requests to an engine.

    `classifies`: whether the relay accepts the model `auto`. `hops`: number of processes through which an event passes.
    `behind_socket`: whether its engine listens at a unix socket instead of a port.
    """

    name: str
    classifies: bool = False
    hops: int = 1
    behind_socket: bool = False

    def absent(self) -> str | None:
        """Returns why the relay cannot be measured and what to install; None if it is installed."""
        return None

    def version(self) -> str:
        return ""

    @abstractmethod
    def started(self, placement: RelayPlacement) -> AbstractContextManager[StartedRelay]:
        """Returns a context manager that starts the relay, and ends it with the block. Starting raises LaunchError."""


def find(command: str, folder: Path | None) -> Path | None:
    """Returns the path of the program `command`: from `folder`, a virtual environment, else from PATH, else from
    SERVER_PATH; None if none of them has it."""
    inside = folder / "bin" / command if folder is not None else None
    if inside is not None and inside.exists():
        return inside.absolute()
    found = shutil.which(command) or shutil.which(command, path=SERVER_PATH)
    return Path(found) if found else None


def wait_until_serving(started: StartedRelay, log: Path) -> None:
    """Blocks until the relay serves a request. Raises LaunchError, with the end of the relay's log, after a timeout."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not serves(started, requests.MODEL):
        check_starting(started.group, log, deadline)
        time.sleep(0.05)


def check_starting(group: ProcessGroup | None, log: Path, deadline: float) -> None:
    """Raises LaunchError if a process of the starting relay has ended, or if the deadline (monotonic seconds) has
    passed. `log`: the relay's log, whose end becomes part of the error."""
    if group is not None and group.died():
        raise LaunchError(f"it ended while starting: {log_tail(log)}")
    if time.monotonic() > deadline:
        raise LaunchError(f"it does not serve requests within {START_TIMEOUT_S:g} s: {log_tail(log)}")


def serves(started: StartedRelay, model: str) -> bool:
    """Returns whether a short request for `model` gets status 200."""
    raw = requests.request(started.port, token=started.token, prompt="Is 91 a prime?", model=model, stream=False)
    raw = raw.replace(b"accept: */*", b"connection: close", 1)
    try:
        with socket.create_connection(("127.0.0.1", started.port), timeout=2) as sock:
            sock.sendall(raw)
            return sock.recv(4096).startswith(b"HTTP/1.1 200 ")
    except OSError:
        return False


def log_tail(log: Path, *, lines: int = 3) -> str:
    """Returns the last lines of a log."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "no log"
    return " | ".join(text.splitlines()[-lines:]) or "an empty log"
