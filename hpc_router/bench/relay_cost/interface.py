"""A way to relay: what the benchmark must know of each. `peers` and `ours` are the list."""

import shutil
import socket
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from hpc_router.bench.load.native.engine import MockEngine
from hpc_router.bench.relay_cost import requests
from hpc_router.bench.relay_cost.processes import ProcessGroup
from hpc_router.errors import LaunchError

SERVERS: Final = "/usr/local/sbin:/usr/sbin"
START_S: Final = 60.0
NO_TOKEN: Final = "0" * 64
"""For relays that ask for none: all requests are of one length."""


@dataclass(frozen=True, slots=True)
class RelayPlacement:
    """Where one is started: the engine behind it, a private folder, the cores that are its own."""

    engine: MockEngine
    folder: Path
    cores: frozenset[int]

    @property
    def log(self) -> Path:
        return self.folder / "log"


@dataclass(frozen=True, slots=True)
class StartedRelay:
    """`group` is None where there is no relay."""

    port: int
    group: ProcessGroup | None
    token: str = NO_TOKEN


class Relay(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def classifies(self) -> bool:
        """Whether it takes `auto`."""

    @property
    def hops(self) -> int:
        """Processes in a row that an event passes."""

    @property
    def behind_socket(self) -> bool:
        """Whether the engine listens at a unix socket, not at a port."""

    def absent(self) -> str | None:
        """What is missing, and how to get it."""

    def version(self) -> str: ...

    def started(self, site: RelayPlacement) -> AbstractContextManager[StartedRelay]: ...


def find(command: str, folder: Path | None) -> Path | None:
    """In a virtual environment at `folder`, then on PATH, then where servers lie, which no user's PATH has."""
    inside = folder / "bin" / command if folder is not None else None
    if inside is not None and inside.exists():
        return inside.absolute()
    found = shutil.which(command) or shutil.which(command, path=SERVERS)
    return Path(found) if found else None


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def await_answer(started: StartedRelay, site: RelayPlacement) -> None:
    """Until it relays a request. Raises LaunchError with the end of its log."""
    deadline = time.monotonic() + START_S
    while not answers(started, requests.MODEL):
        if started.group is not None and started.group.died():
            raise LaunchError(f"it ended while starting: {last_words(site.log)}")
        if time.monotonic() > deadline:
            raise LaunchError(f"it does not serve within {START_S:g} s: {last_words(site.log)}")
        time.sleep(0.05)


def answers(started: StartedRelay, model: str) -> bool:
    """Whether a short request for `model` is relayed and answered."""
    raw = requests.request(started.port, token=started.token, prompt="Is 91 a prime?", model=model, stream=False)
    raw = raw.replace(b"accept: */*", b"connection: close", 1)
    try:
        with socket.create_connection(("127.0.0.1", started.port), timeout=2) as sock:
            sock.sendall(raw)
            return sock.recv(4096).startswith(b"HTTP/1.1 200 ")
    except OSError:
        return False


def last_words(log: Path, *, lines: int = 3) -> str:
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "no log"
    return " | ".join(text.splitlines()[-lines:]) or "an empty log"


def chosen(relays: Sequence[Relay], names: Sequence[str]) -> list[Relay]:
    return [relay for relay in relays if not names or relay.name in names]
