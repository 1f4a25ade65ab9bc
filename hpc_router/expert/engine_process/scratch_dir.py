"""The agent's folder on its node: `<scratch>/hpc-router-<uid>/<random>/`, mode 0700, short enough for a socket path.

All users share the scratch folder, so the parent `hpc-router-<uid>` must be a real folder that this user owns and that
others cannot access. If another user has taken its name, the agent's folder is `<scratch>/hpc-router-<uid>-<random>/`.
`owner.json` names the process that a folder belongs to. When an agent starts, it removes the folders of processes on
its host that have ended.
"""

import errno
import logging
import math
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Any, Final

from hpc_router.errors import ConfigError, HpcRouterError, LaunchError
from hpc_router.expert.engines import Place
from hpc_router.state.atomic_files import load_json, replace_json
from hpc_router.state.job_records import start_ticks
from hpc_router.state.private_folder import is_private, make_private, own_folder, user_folder

logger = logging.getLogger(__name__)

MAX_FOLDER_BYTES: Final = 107 - len("/tmp/") - 40
"""Maximum length of the folder's path. A socket's path has at most 107 bytes, and engines put sockets named by a UUID
into the folder for temporary files."""
KEY: Final = "cluster.scratch"
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO})
_OWNER: Final = "owner.json"
_RANDOM: Final = "[a-z0-9_]" * 8
"""Pattern of the characters that `tempfile.mkdtemp` adds to its prefix."""
_UNFINISHED_S: Final = 60.0


def expanded(folder: str, environment: Mapping[str, str], *, key: str = KEY) -> Path:
    """Returns the path `folder` with the job's variables replaced by their values. Raises ConfigError for a variable
    that is not set, and names the config `key` that has the path."""
    try:
        path = Path(Template(folder).substitute({name: value for name, value in environment.items() if value}))
    except KeyError as error:
        raise ConfigError(f"{key}={folder}: ${error.args[0]} is not set in this job", key=key) from error
    except ValueError as error:
        raise ConfigError(f"{key}={folder}: {error} (valid: $NAME or ${{NAME}}; $$ is a $)", key=key) from error
    return path


def path_error(scratch: Path) -> str | None:
    """Returns why this scratch folder is unsuitable for a socket: its path is too long or not absolute; else None."""
    folder = user_folder(scratch) / ("x" * 8)
    if (length := len(os.fsencode(folder))) > MAX_FOLDER_BYTES:
        most = len(os.fsencode(scratch)) - (length - MAX_FOLDER_BYTES)
        return f"too long for a socket's path (valid: at most {most} bytes, as /tmp)"
    return None if scratch.is_absolute() else "not an absolute path (valid: such as /tmp)"


def usage_error(scratch: Path) -> str | None:
    """Returns why the scratch folder cannot be used on this host; None if it can."""
    if not scratch.is_dir():
        return f"no such folder on {socket.gethostname()} (valid: a folder that every node has, such as /tmp)"
    if not os.access(scratch, os.W_OK | os.X_OK):
        return f"not writable on {socket.gethostname()}"
    if os.statvfs(scratch).f_flag & os.ST_NOEXEC:
        return (
            f"its file system is mounted noexec on {socket.gethostname()}, and engines load compiled code from there "
            f"(valid: a folder that programs may run from)"
        )
    return None


@contextmanager
def scratch_folder(scratch: str | Path) -> Iterator[Place]:
    """Creates a folder for this process in `scratch`, and removes it at the end of the block. Raises ConfigError or
    LaunchError."""
    fault = path_error(Path(scratch)) or usage_error(Path(scratch))
    if fault is not None:
        raise ConfigError(f"{KEY}={scratch}: {fault}", key=KEY)
    parent = user_folder(Path(scratch))
    own_parent = _make_parent(parent)
    sweep(parent)
    folder = _new_folder(parent, own_parent=own_parent)
    place = Place(folder)
    try:
        try:
            replace_json(folder / _OWNER, _this_process())
            place.temporary.mkdir(mode=0o700)
            place.cache.mkdir(mode=0o700)
        except OSError as error:
            raise _unwritable(Path(scratch), folder, error) from error
        yield place
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Removes the folders of dead agents of this host: those in `parent`, and those with a random name beside it.

    Names are random and never reused, so a live agent's folder is not removed. A parent that other users can access is
    not touched.
    """
    for folder in parent.parent.glob(f"{parent.name}-{_RANDOM}"):
        if is_private(folder) and _owner_has_ended(folder, made_at=math.inf):
            shutil.rmtree(folder, ignore_errors=True)
    if is_private(parent):
        for folder in parent.iterdir():
            if (status := own_folder(folder)) is not None and _owner_has_ended(folder, made_at=status.st_mtime):
                shutil.rmtree(folder, ignore_errors=True)


def _owner_has_ended(folder: Path, *, made_at: float) -> bool:
    """Returns whether the process that owns a folder has ended. A process that cannot be checked from here counts as
    alive. A folder without `owner.json` counts as abandoned _UNFINISHED_S after it was made (`made_at`, Unix
    seconds)."""
    try:
        owner = load_json(folder / _OWNER)
    except FileNotFoundError:  # being created, or never finished
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
    """Returns the id of the namespace of process ids. Containers may share /tmp without sharing this namespace."""
    return str(Path("/proc/self/ns/pid").readlink())


def _make_parent(parent: Path) -> bool:
    """Creates the folder `parent`, or removes other users' access to it. Returns False if another user owns it."""
    try:
        return make_private(parent)
    except OSError as error:
        raise _unwritable(parent.parent, parent, error) from error


def _new_folder(parent: Path, *, own_parent: bool) -> Path:
    where, prefix = (parent, "") if own_parent else (parent.parent, f"{parent.name}-")
    if not own_parent:
        logger.warning("%s belongs to another user; a folder beside it is used", parent)
    try:
        return Path(tempfile.mkdtemp(prefix=prefix, dir=where))
    except OSError as error:
        raise _unwritable(parent.parent, where / f"{prefix}...", error) from error


def _unwritable(scratch: Path, folder: Path, error: OSError) -> HpcRouterError:
    """Returns the error for a folder in `scratch` that could not be written. A full disk is not a wrong value, because
    it may have room later: that is a LaunchError."""
    what = f"{KEY}={scratch}: cannot write {folder} on {socket.gethostname()}: {error.strerror}"
    return LaunchError(what) if error.errno in _FULL else ConfigError(what, key=KEY)
