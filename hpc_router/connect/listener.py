"""The address that `connect` serves on this host, and the file by which other verbs find it.

Rules: per run, user and host at most one process serves a unix socket and one a TCP port. Each such process has a
description file. This file and the socket lie in the user's private folder on the local disk, because other hosts share
the run directory but not its sockets. Files and sockets of processes that have ended are not valid and are replaced.
"""

import contextlib
import fcntl
import hashlib
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from hpc_router.client.router_source import EndpointFolder
from hpc_router.errors import ConfigError, LaunchError
from hpc_router.state.atomic_files import load_json, replace_json
from hpc_router.state.job_records import start_ticks
from hpc_router.state.private_folder import is_private, make_private, user_folder

SCRATCH: Final = Path("/tmp")
"""Parent of the private folder. $XDG_RUNTIME_DIR is only the second choice, because it is removed when the user's last
session ends."""
LOOPBACK: Final = "127.0.0.1"
MAX_PATH_BYTES: Final = 107
"""Limit for the path of a unix socket."""
_BACKLOG: Final = 1024


@dataclass(frozen=True, slots=True)
class RunningForwarder:
    """A `connect` process. `run`: path of the run directory or share folder by which it finds the router. `address`:
    `http://127.0.0.1:PORT` if `port` is set, else the path of a unix socket. `log`: its log file; None if it runs in
    the foreground."""

    run: str
    address: str
    port: int | None
    pid: int
    start_ticks: int | None
    log: str | None


def running_forwarder(run: EndpointFolder, *, tcp: bool) -> RunningForwarder | None:
    """Returns the `connect` process that serves this run on this host: on a TCP port if `tcp` is true, else on a unix
    socket. Returns None if there is none."""
    for folder in _folders():
        if is_private(folder):
            found = _described(_description(folder, run, tcp=tcp))
            if found is not None:
                return found
    return None


@contextlib.contextmanager
def serving_address(
    run: EndpointFolder, *, port: int | None, log: str | None = None
) -> Iterator[tuple[RunningForwarder, socket.socket]]:
    """Listens on the run's unix socket if `port` is None, else on `port` of the loopback. During the block, other verbs
    find the address through a file. Yields the description of this process, and the listening socket.

    Raises LaunchError if another process already serves the run in the same way, on a socket or on a port, and
    ConfigError if the port is in use.
    """
    tcp, folder = port is not None, private_folder()
    description = _description(folder, run, tcp=tcp)
    with _one_at_a_time(folder):
        other = running_forwarder(run, tcp=tcp)
        if other is not None:
            raise LaunchError(
                f"connect already serves {run.path} at {other.address}; `kill {other.pid}` ends that process"
            )
        sock = _listen_tcp(port) if port is not None else _listen_unix(description.with_suffix(".sock"))
        pid = os.getpid()
        address = sock.getsockname() if port is None else f"http://{LOOPBACK}:{port}"
        running = RunningForwarder(str(run.path), address, port, pid, start_ticks(pid), log)
        replace_json(description, asdict(running))
    try:
        yield running, sock
    finally:
        description.unlink(missing_ok=True)
        if not tcp:
            Path(address).unlink(missing_ok=True)
        sock.close()


def _folders() -> list[Path]:
    """Returns the folders in which the socket and the description file may lie, in order of preference. The second one
    is used if another user has created a folder with the name of the first."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return [user_folder(SCRATCH), *([Path(runtime) / "hpc-router"] if runtime else [])]


def private_folder() -> Path:
    """Returns this user's folder for `connect` on this host, and creates it. Raises LaunchError."""
    tried = []
    for folder in _folders():
        try:
            if make_private(folder):
                return folder
            tried.append(f"{folder} belongs to another user")
        except OSError as error:
            tried.append(f"{folder}: {error.strerror}")
    reasons = "; ".join(tried)
    raise LaunchError(
        f"connect has no private folder on this host: {reasons}; set XDG_RUNTIME_DIR to a folder that only you can open"
    )


def _description(folder: Path, run: EndpointFolder, *, tcp: bool) -> Path:
    name = hashlib.sha256(os.fsencode(run.path.resolve())).hexdigest()[:12]
    return folder / f"connect-{name}{'-tcp' if tcp else ''}.json"


def _described(description: Path) -> RunningForwarder | None:
    """Returns the process that the file `description` describes; None if the file is not valid or the process has
    ended."""
    try:
        found = RunningForwarder(**load_json(description))
    except (OSError, ValueError, TypeError):
        return None
    alive = found.start_ticks is not None and start_ticks(found.pid) == found.start_ticks
    return found if alive else None


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Locks `folder` during the block. Only the process with the lock may look for a running `connect` process and
    start to listen. The lock is reliable, because the folder is on a local disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _listen_tcp(port: int) -> socket.socket:
    try:
        return socket.create_server((LOOPBACK, port), backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(f"--port {port}: {os.strerror(error.errno or 0)}; choose another port") from error


def _listen_unix(path: Path) -> socket.socket:
    """Listens on a socket of mode 0600 in a private folder. Replaces a socket that a killed process left."""
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise LaunchError(f"{path} is too long for a socket (valid: at most {MAX_PATH_BYTES} bytes)")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_served(path):  # its description may have been removed by a cleaner of /tmp
            raise LaunchError(f"another process serves {path}; end it (`fuser {path}` prints its process id)")
        path.unlink(missing_ok=True)
        sock.bind(str(path))
        path.chmod(0o600)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(str(path))
        except OSError:
            return False
    return True
