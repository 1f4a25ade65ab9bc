"""The run directory: all files of one deployment, in one folder of mode 0700 on the shared file system.

`config.yaml` has the config of the launch, or of the last `apply`; what `scale`, `down` and `set` change is in
`desired.json`. Secrets are files of mode 0600, created by whichever of `up`, `register` and `launch.router` runs first.
"""

import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hpc_router.errors import ConfigError, RegistryError
from hpc_router.net.auth import new_token
from hpc_router.state.atomic_files import load_json, naming, replace_json
from hpc_router.state.exclusive import exclusive
from hpc_router.state.log_file import LOG_BYTES, rotated_path

ROTATION_S: Final = 60.0
"""Age in seconds at which a claim to rotate `events.jsonl` counts as left behind by a dead process."""
MIN_FREE_BYTES: Final = 2**20
"""Free space in bytes below which a file system counts as full."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """The paths in a run directory. `make_run` creates a run directory, and `open_run` checks an existing one."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def desired(self) -> Path:
        return self.path / "desired.json"

    @property
    def registry(self) -> Path:
        return self.path / "registry"

    @property
    def registry_json(self) -> Path:
        return self.path / "registry.json"

    @property
    def prometheus_sd_json(self) -> Path:
        """Returns the path of the file by which Prometheus finds the leading router."""
        return self.path / "prometheus_sd.json"

    @property
    def jobs(self) -> Path:
        return self.path / "jobs"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def records(self) -> Path:
        """Returns the folder of the records of requests (see `request_records`)."""
        return self.path / "records"

    @property
    def samples(self) -> Path:
        """Returns the folder of the prompts that `router.sample_prompts` selects."""
        return self.path / "samples"

    @property
    def files(self) -> Path:
        """Returns the folder of the files that users have uploaded for batches, and of their results."""
        return self.path / "files"

    @property
    def batches(self) -> Path:
        """Returns the folder of the batches of requests."""
        return self.path / "batches"

    @property
    def squeue_json(self) -> Path:
        """Returns the path of the file with the last output of `squeue`, which all processes that observe the run
        share."""
        return self.path / "squeue.json"

    @property
    def tokens_json(self) -> Path:
        """Returns the path of the file with the users' tokens (see `user_tokens`)."""
        return self.path / "tokens.json"

    @property
    def previous_config(self) -> Path:
        """Returns the path of the config before the last `apply`."""
        return self.path / "config.previous.yaml"

    @property
    def config_claim(self) -> Path:
        """Returns the path of the lock folder for replacing the config (see `state.exclusive`)."""
        return self.path / ".config.changing"

    @property
    def desired_claim(self) -> Path:
        """Returns the path of the lock folder for changing `desired.json`."""
        return self.path / ".desired.changing"

    @property
    def estimates_json(self) -> Path:
        """Returns the path of the file with each expert's measured times in Slurm's queue, for loading, and for
        draining."""
        return self.path / "estimates.json"

    @property
    def forecast_json(self) -> Path:
        """Returns the path of the file that says when experts without a ready replica are expected to have one, and
        which handovers will happen next."""
        return self.path / "forecast.json"

    @property
    def demand(self) -> Path:
        """Returns the folder with the demand at each router (see `state.demand`)."""
        return self.path / "demand"

    @property
    def elastic_json(self) -> Path:
        """Returns the path of the file with the number of replicas that each elastic expert should have, and why."""
        return self.path / "elastic.json"

    @property
    def gpu_hours_json(self) -> Path:
        """Returns the path of the file with the GPU time that each expert has used."""
        return self.path / "gpu_hours.json"

    @property
    def classifier(self) -> Path:
        """Returns the folder of the classifier artefact that `up` trains from the experts' exemplars."""
        return self.path / "classifier"

    def space_error(self) -> str | None:
        """Returns why no files can be written to the run directory's file system: it is full, or it cannot be read.
        Returns None if neither is so. Does not notice an exhausted quota."""
        try:
            space = os.statvfs(self.path)
        except OSError as error:
            return f"{self.path} cannot be read: {error.strerror}"
        free = space.f_bavail * space.f_frsize
        if free < MIN_FREE_BYTES and space.f_blocks:
            return f"the file system of {self.path} is full: {free} bytes are free"
        if space.f_files and not space.f_favail:
            return f"the file system of {self.path} has no room for another file: all its inodes are in use"
        return None

    def is_removed(self) -> bool:
        """Returns whether the run directory was removed; False if the file system does not give a clear answer."""
        try:
            self.registry.lstat()
        except OSError as error:
            return isinstance(error, FileNotFoundError)
        return False

    def token(self) -> str:
        """Returns the client token of the deployment's owner."""
        return _read_secret(self.path / "token")

    def secret(self) -> str:
        """Returns the deployment's secret, from which the keys of the replicas are derived."""
        return _read_secret(self.path / "secret")

    def external_token(self, replica: str) -> str | None:
        """Returns the token of an external endpoint, as given to `register`; None if it needs none."""
        path = self.path / "tokens" / replica
        return _read_secret(path) if path.exists() else None

    def store_external_token(self, replica: str, token: str) -> None:
        make_private_folder(self.path / "tokens")
        _write_secret(self.path / "tokens" / replica, token)

    def event(self, kind: str, **facts: Any) -> None:
        """Appends an event of this kind, with `facts` as further keys, to `events.jsonl`. Only control loops, commands
        and the router's control process call this."""
        line = json.dumps({"at": round(time.time(), 3), "event": kind, "kind": kind, **facts}, sort_keys=True) + "\n"
        with naming(self.events), private_umask():
            descriptor = os.open(self.events, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.write(descriptor, line.encode())
                full = os.fstat(descriptor).st_size > LOG_BYTES
            finally:
                os.close(descriptor)
        if full:
            self._rotate_events()

    def _rotate_events(self) -> None:
        """Renames `events.jsonl` if it is too long. Of several processes that try this at once, only the one that
        creates a lock folder renames the file."""
        claim = self.path / ".events.rotating"
        try:
            claim.mkdir()
        except FileExistsError:
            with contextlib.suppress(OSError):
                if time.time() - claim.stat().st_mtime > ROTATION_S:
                    claim.rmdir()
            return
        try:
            if self.events.stat().st_size > LOG_BYTES:
                self.events.replace(rotated_path(self.events))
        finally:
            claim.rmdir()

    def read_desired(self) -> dict[str, Any]:
        """Returns the content of `desired.json`; empty if there is none. Raises RegistryError if it cannot be read."""
        try:
            return load_json(self.desired)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise RegistryError(f"cannot read {self.desired}: {why} (repair or remove it)") from error

    def change_desired(self, changes: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
        """Calls `changes` with the content of `desired.json`, and writes the keys that it returns into the file.
        Meanwhile other processes wait before they change the file. Raises RegistryError if the file cannot be read, and
        what `changes` raises."""
        with exclusive(self.desired_claim):
            desired = self.read_desired()
            self.write_desired({**desired, **changes(desired)})

    def write_desired(self, value: dict[str, Any]) -> None:
        replace_json(self.desired, value)


def make_run(path: Path) -> RunDir:
    """Creates the run directory at `path`, or what is missing of it, with mode 0700 regardless of the umask."""
    path.parent.mkdir(parents=True, exist_ok=True)
    run = RunDir(path.absolute())
    make_private_folder(run.path)
    _check_owner(run.path)
    for folder in (run.registry, run.jobs, run.logs, run.demand):
        make_private_folder(folder)
    for name in ("token", "secret"):
        if not (run.path / name).exists():
            _write_secret(run.path / name, new_token())
    return run


def open_run(path: Path) -> RunDir:
    """Returns an existing run directory. Raises ConfigError if `path` is not one, or if other users can read it."""
    if not path.is_dir():
        raise ConfigError(f"there is no run directory {path}; `hpc-router up` creates one, `--run DIR` names another")
    run = RunDir(path.resolve())
    if not run.registry.is_dir():
        raise ConfigError(f"{path} is not a run directory: it has no registry/ folder")
    _check_owner(run.path)
    return run


def find_run(given: Path | None, *, runs: Path = Path("runs")) -> RunDir:
    """Returns the run directory that a command works on; see `named_path`."""
    return open_run(named_path(given, runs=runs))


def named_path(given: Path | None, *, runs: Path = Path("runs")) -> Path:
    """Returns the path of the folder that a command works on: `given` (from `--run`), else `$HPC_ROUTER_RUN`, else
    `latest` in the folder `runs`."""
    if given is not None:
        return given
    named = os.environ.get("HPC_ROUTER_RUN")
    return Path(named) if named else runs / "latest"


def new_run_path(runs: Path, name: str) -> Path:
    """Returns a path in the folder `runs` that does not exist yet: `<name>-<date>-<time>-<random>`."""
    return runs / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def place_error(path: Path) -> str | None:
    """Returns why this user cannot have a folder at `path`, which need not exist; None if that is possible."""
    try:
        nearest = next(folder for folder in (path, *path.parents) if folder.exists() or folder.is_symlink())
        if not nearest.is_dir():
            return f"{nearest} is not a folder"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return None if os.access(nearest, os.W_OK | os.X_OK) else f"you cannot create a folder in {nearest}"


def point_latest(runs: Path, run: RunDir) -> None:
    """Makes the link `latest` in the folder `runs` point to `run`, atomically."""
    link = runs / "latest"
    temporary = link.with_name(f".latest.{secrets.token_hex(4)}")
    temporary.symlink_to(run.path.name)
    temporary.replace(link)


_umask_lock: Final = threading.Lock()
_saved_umasks: Final[list[int]] = []
"""The umasks that were in force when `private_umask` blocks were entered. The first one is the umask outside of all
blocks."""


@contextlib.contextmanager
def private_umask() -> Iterator[None]:
    """Makes files and folders created inside the block accessible to the owner only. Blocks of several threads may
    overlap."""
    with _umask_lock:
        _saved_umasks.append(os.umask(0o077))
    try:
        yield
    finally:
        with _umask_lock:
            os.umask(_saved_umasks.pop())


def make_private_folder(path: Path) -> None:
    """Creates the folder with mode 0700, regardless of the umask. An existing folder stays as it is."""
    with contextlib.suppress(FileExistsError), private_umask():
        path.mkdir(mode=0o700)


def _check_owner(path: Path) -> None:
    status = path.stat()
    if status.st_uid != os.getuid():
        raise ConfigError(f"the run directory {path} belongs to uid {status.st_uid}, not to you")
    if status.st_mode & 0o077:
        raise ConfigError(f"the run directory {path} is open to other users: chmod 700 {path}")


def _write_secret(path: Path, value: str) -> None:
    """Creates a file of mode 0600 with a secret. Keeps an existing file, so that all processes that try this use one
    value."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with private_umask():
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with naming(path), os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(value + "\n")
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(temporary)
    finally:
        temporary.unlink()


def _read_secret(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {path}: not UTF-8 text; it was changed or is damaged") from error
