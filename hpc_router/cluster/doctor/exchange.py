"""The files through which `doctor` and its job communicate, and the listener that tests ports and clocks.

The files are in a folder on the shared file system.
"""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hpc_router.errors import ConfigError
from hpc_router.net.addresses import LOOPBACK, address
from hpc_router.state.atomic_files import read_json, refresh_folder

REPLICA: Final = "doctor-0.g1"
"""Name of the job's folder. It has the form of a replica's name."""
ROUNDS: Final = 3
"""Number of file round trips that are measured."""
CONNECT_S: Final = 3.0
"""Time limit for a connection, in seconds."""


@dataclass(frozen=True, slots=True)
class ExchangeFolder:
    """The paths of the files in the folder. `login`: the address at which `doctor` listens. `started`: the address at
    which the job listens. `node`: the facts and findings of the job. `signals`: the processes that received SIGUSR2.
    `stop`: tells the job to end."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def script(self) -> Path:
        return self.folder / "script.sh"

    @property
    def login(self) -> Path:
        return self.folder / "login.json"

    @property
    def started(self) -> Path:
        return self.folder / "started.json"

    @property
    def node(self) -> Path:
        return self.folder / "node.json"

    @property
    def signals(self) -> Path:
        return self.folder / "signals.json"

    @property
    def created(self) -> Path:
        """Returns the path of a file that the job creates to test whether it can."""
        return self.folder / "created"

    @property
    def stop(self) -> Path:
        return self.folder / "stop.json"

    def ping(self, number: int) -> Path:
        return self.folder / f"ping-{number}.json"

    def pong(self, number: int) -> Path:
        return self.folder / f"pong-{number}.json"


def read_now(path: Path) -> dict[str, Any] | None:
    """Returns the JSON object at `path`; None if there is no such file. Refreshes the folder first, because an NFS
    client caches that a file is missing."""
    with suppress(OSError):
        refresh_folder(path.parent)
    return read_json(path)


def own_address(fabric: str | None) -> tuple[str, str | None]:
    """Returns this host's address on the network `fabric` (`cluster.fabric`), and None. If the host has no address on
    that network, returns another address of the host, and the reason as text."""
    try:
        return address(fabric, kind="slurm"), None
    except ConfigError as error:
        with suppress(ConfigError):
            return address(None, kind="slurm"), str(error)
        return LOOPBACK, str(error)


@contextmanager
def clock_server(host: str) -> Iterator[int]:
    """Listens on a free port of the address `host`, answers connections with this host's time, and yields the port."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        thread = threading.Thread(target=_serve, args=(server,), daemon=True)
        thread.start()
        try:
            yield int(server.getsockname()[1])
        finally:
            with suppress(OSError):  # makes `accept` return in the thread
                server.shutdown(socket.SHUT_RDWR)
            thread.join()


def _serve(server: socket.socket) -> None:
    """Answers each connection with the time of this host, until the socket is shut down."""
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection, suppress(OSError):
            connection.sendall(json.dumps({"at": time.time()}).encode())


@dataclass(frozen=True, slots=True)
class ClockReading:
    """A measured clock difference: another host's time minus this host's. `error_s`: its largest possible error in
    seconds."""

    offset_s: float
    error_s: float


def read_clock(host: str, port: int) -> ClockReading:
    """Returns the clock difference to the host whose `clock_server` listens at this port. Raises OSError if it cannot
    be reached."""
    sent = time.time()
    with socket.create_connection((host, port), timeout=CONNECT_S) as connection:
        text = connection.makefile("rb").read()
    received = time.time()
    try:
        at = float(json.loads(text)["at"])
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"another program answers at {host}:{port}") from error
    return ClockReading(at - (sent + received) / 2, (received - sent) / 2)
