"""Files through which `doctor` and its job talk, in a folder on the shared file system; and the listener for ports."""

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
"""Name of the job's folder, as a replica's would be."""
ROUNDS: Final = 3
CONNECT_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class ExchangeFolder:
    """Paths in the folder. `login`: where `doctor` listens. `started`: that of the job. `node`: the job's facts and
    findings. `signals`: which processes got SIGUSR2. `stop`: the job is to end."""

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
        """A file that the job creates to try whether that works."""
        return self.folder / "created"

    @property
    def stop(self) -> Path:
        return self.folder / "stop.json"

    def ping(self, number: int) -> Path:
        return self.folder / f"ping-{number}.json"

    def pong(self, number: int) -> Path:
        return self.folder / f"pong-{number}.json"


def read_now(path: Path) -> dict[str, Any] | None:
    """The JSON object at `path`, past what an NFS client has cached about a missing file."""
    with suppress(OSError):
        refresh_folder(path.parent)
    return read_json(path)


def own_address(fabric: str | None) -> tuple[str, str | None]:
    """This host's address on `cluster.fabric`; without one another address, and why."""
    try:
        return address(fabric, kind="slurm"), None
    except ConfigError as error:
        with suppress(ConfigError):
            return address(None, kind="slurm"), str(error)
        return LOOPBACK, str(error)


@contextmanager
def clock_server(host: str) -> Iterator[int]:
    """The port of a listener that answers each connection with this host's clock."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        thread = threading.Thread(target=_serve, args=(server,), daemon=True)
        thread.start()
        try:
            yield int(server.getsockname()[1])
        finally:
            with suppress(OSError):  # wakes the thread up
                server.shutdown(socket.SHUT_RDWR)
            thread.join()


def _serve(server: socket.socket) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection, suppress(OSError):
            connection.sendall(json.dumps({"at": time.time()}).encode())


@dataclass(frozen=True, slots=True)
class ClockReading:
    """Another host's clock minus this one's, in seconds, and how far that may be wrong."""

    offset_s: float
    error_s: float


def read_clock(host: str, port: int) -> ClockReading:
    """Raises OSError if the port cannot be reached."""
    sent = time.time()
    with socket.create_connection((host, port), timeout=CONNECT_S) as connection:
        text = connection.makefile("rb").read()
    received = time.time()
    try:
        at = float(json.loads(text)["at"])
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"another program answers at {host}:{port}") from error
    return ClockReading(at - (sent + received) / 2, (received - sent) / 2)
