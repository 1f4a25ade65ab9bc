"""The address that `connect` serves on this host, and the file by which other verbs find it.

Rules: per run, user and host at most one process serves a unix socket and one a TCP port. The socket and the files that
describe these processes lie in the user's private folder on the local disk, because other hosts share the run
directory but not its sockets. A file counts as long as its process lives; what a killed process left is replaced.
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

from hpc_router.errors import ConfigError, LaunchError
from hpc_router.state.atomic_files import load_json, replace_json
from hpc_router.state.job_records import start_ticks
from hpc_router.state.private_folder import is_private, make_private, user_folder
from hpc_router.state.run_directory import RunDir

SCRATCH: Final = Path("/tmp")
"""Not $XDG_RUNTIME_DIR, which is removed when the user's last session ends."""
LOOPBACK: Final = "127.0.0.1"
MAX_PATH_BYTES: Final = 107
"""Of a unix socket."""
_BACKLOG: Final = 1024


@dataclass(frozen=True, slots=True)
class RunningForwarder:
    """A process that serves `run`. `address`: the path of a socket, or `http://127.0.0.1:PORT` if `port` is set.
    `log`: of a detached process."""

    run: str
    address: str
    port: int | None
    pid: int
    start_ticks: int | None
    log: str | None


def running_forwarder(run: RunDir, *, tcp: bool) -> RunningForwarder | None:
    """The process that serves this run on this host, on a TCP port or on a socket."""
    for folder in _folders():
        if is_private(folder):
            found = _described(_description(folder, run, tcp=tcp))
            if found is not None:
                return found
    return None


@contextlib.contextmanager
def serving_address(
    run: RunDir, *, port: int | None, log: str | None = None
) -> Iterator[tuple[RunningForwarder, socket.socket]]:
    """Listen on the run's unix socket, or on `port` of the loopback, and let other verbs find it during the block.

    Raises LaunchError if another process serves the run in this way, and ConfigError for a port in use.
    """
    tcp, folder = port is not None, _private_folder()
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
    """Where the files may be. If another user has taken our name in `SCRATCH`, the second folder is used."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return [user_folder(SCRATCH), *([Path(runtime) / "hpc-router"] if runtime else [])]


def _private_folder() -> Path:
    tried = []
    for folder in _folders():
        try:
            if make_private(folder):
                return folder
            tried.append(f"{folder} belongs to another user")
        except OSError as error:
            tried.append(f"{folder}: {error.strerror}")
    raise LaunchError(f"connect has no private folder on this host: {'; '.join(tried)}")


def _description(folder: Path, run: RunDir, *, tcp: bool) -> Path:
    name = hashlib.sha256(os.fsencode(run.path.resolve())).hexdigest()[:12]
    return folder / f"connect-{name}{'-tcp' if tcp else ''}.json"


def _described(description: Path) -> RunningForwarder | None:
    """The process that a file describes, if it lives."""
    try:
        found = RunningForwarder(**load_json(description))
    except (OSError, ValueError, TypeError):
        return None
    alive = found.start_ticks is not None and start_ticks(found.pid) == found.start_ticks
    return found if alive else None


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """One process at a time looks for another and starts to listen. The lock works: the folder is on a local disk."""
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
    """A socket of mode 0600, in a folder that is closed to others. Replaces a socket that a killed process left."""
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise LaunchError(f"{path} is too long for a socket (valid: {MAX_PATH_BYTES} bytes)")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_served(path):  # by a process whose description was removed, as cleaners of /tmp do
            raise LaunchError(f"another process serves {path}; `fuser {path}` names it")
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
