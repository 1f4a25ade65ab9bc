"""The agent's folder on its own node: `<scratch>/hpc-router-<uid>/<random>/`, 0700, short enough for a socket path.

The scratch folder is everybody's, so the parent is checked: a real folder, ours, closed to others. `owner.json` names
the process that a folder belongs to; folders of this host whose process has ended are removed at the next start.
"""

import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Any, Final

from hpc_router.errors import ConfigError, LaunchError
from hpc_router.expert.engines import Place
from hpc_router.files import load_json, replace_json
from hpc_router.jobdir import start_ticks

LONGEST_FOLDER: Final = 107 - len("/tmp/") - 40
"""A socket's path has at most 107 bytes; engines put sockets named by a UUID into the folder for temporary files."""
_OWNER: Final = "owner.json"
_UNFINISHED_S: Final = 60.0


def expanded(scratch: str, environment: Mapping[str, str]) -> Path:
    """The folder that `cluster.scratch` means in this job. Raises ConfigError for a variable that it does not have."""
    key = "cluster.scratch"
    try:
        path = Path(Template(scratch).substitute({name: value for name, value in environment.items() if value}))
    except KeyError as error:
        raise ConfigError(f"{key}={scratch}: ${error.args[0]} is not set in this job", key=key) from error
    except ValueError as error:
        raise ConfigError(f"{key}={scratch}: {error} (valid: $NAME or ${{NAME}}; $$ is a $)", key=key) from error
    return path


@contextmanager
def scratch_folder(scratch: str | Path) -> Iterator[Place]:
    """A new folder for this process, gone at the end. Raises ConfigError or LaunchError."""
    parent = _parent(Path(scratch))
    sweep(parent)
    folder = Path(tempfile.mkdtemp(prefix="", dir=parent))
    place = Place(folder)
    try:
        if len(os.fsencode(folder)) > LONGEST_FOLDER:
            raise ConfigError(f"cluster.scratch={scratch}: too long for a socket's path (valid: a short one, as /tmp)")
        replace_json(folder / _OWNER, _this_process())
        place.temporary.mkdir(mode=0o700)
        place.cache.mkdir(mode=0o700)
        yield place
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove what dead agents of this host left. Names are never used twice, so nobody else's can be hit; a parent that
    is not ours alone is left as it is."""
    if (status := _own_folder(parent)) is None or status.st_mode & 0o077:
        return
    for folder in parent.iterdir():
        if (status := _own_folder(folder)) is not None and _abandoned(folder, made_at=status.st_mtime):
            shutil.rmtree(folder, ignore_errors=True)


def _own_folder(path: Path) -> os.stat_result | None:
    """The status of a real folder of ours; None for anything else."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() else None


def _abandoned(folder: Path, *, made_at: float) -> bool:
    """An owner that cannot be told may live."""
    try:
        owner = load_json(folder / _OWNER)
    except FileNotFoundError:  # just being made, or never finished
        return time.time() - made_at > _UNFINISHED_S
    except (OSError, ValueError):
        return False
    pid, ticks = owner.get("pid"), owner.get("start_ticks")
    here = (owner.get("host"), owner.get("pid_namespace")) == (socket.gethostname(), _pid_namespace())
    return here and isinstance(pid, int) and isinstance(ticks, int) and start_ticks(pid) != ticks


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "pid": pid,
        "start_ticks": start_ticks(pid),
        "host": socket.gethostname(),
        "pid_namespace": _pid_namespace(),
    }


def _pid_namespace() -> str:
    """Process ids mean something only within one; a container may share /tmp but not these."""
    return str(Path("/proc/self/ns/pid").readlink())


def _parent(scratch: Path) -> Path:
    parent = scratch / f"hpc-router-{os.getuid()}"
    try:
        parent.mkdir(mode=0o700, exist_ok=True)
        status = parent.lstat()
    except OSError as error:
        raise ConfigError(f"cluster.scratch={scratch}: cannot make {parent}: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise LaunchError(f"{parent} is not ours: it belongs to uid {status.st_uid}; choose another cluster.scratch")
    if status.st_mode & 0o077:
        raise LaunchError(f"{parent} is open to other users: chmod 700 {parent}")
    return parent
