"""Where a client learns which router leads, how that router proves itself, and which token it gets.

The owner's clients use the run directory: any router of its registry, the deployment's secret, the owner's token. The
clients of other users use the share folder (`state.share_dir`): the router in `router.json`, and their own token, from
whose digest the key of the proof is derived. Such a client knows no secret of the deployment.
"""

import logging
import os
import pwd
import stat
from pathlib import Path
from typing import Final, Protocol

from hpc_router.client.leader import Leader, NoRouterError
from hpc_router.client.router_identity import IdentityCheck, check_identity, check_identity_to_user
from hpc_router.config.schema import RouterConfig
from hpc_router.errors import ConfigError
from hpc_router.state.atomic_files import refresh_folder
from hpc_router.state.registry import Record
from hpc_router.state.run_directory import RunDir, named_path, open_run
from hpc_router.state.share_dir import MAX_TOKEN_BYTES, ShareDir, is_share, open_share, read_token
from hpc_router.state.user_tokens import token_id

logger = logging.getLogger(__name__)

TOKEN_FILE: Final = "HPC_ROUTER_TOKEN_FILE"
"""Environment variable with the path of a file that has the user's token. It precedes the file in the share folder."""
EndpointFolder = RunDir | ShareDir
"""A folder by which clients find a router."""


class RouterSource(Protocol):
    """Interface for what a client needs to know of its router. All methods may block on the file system or network."""

    @property
    def last(self) -> Record | None:
        """Returns the result of the last `find`."""

    def find(self, *, recheck: bool = False) -> Record | None:
        """Returns the record of the router that leads; None if no router serves. `recheck`: whether the last result may
        be outdated, so that all files are read again."""

    def token(self) -> str:
        """Reads the token that the router gets. Raises ConfigError."""

    def check(self, router: Record, token: str) -> IdentityCheck:
        """Checks that the process at the router's address is that router. `token`: the result of `token`."""

    def no_router_error(self) -> NoRouterError:
        """Returns an error whose message says that no router serves, and what to do."""


class RunSource:
    """The source of the owner's clients: a run directory."""

    def __init__(self, run: RunDir) -> None:
        self._run, self._leader = run, Leader(run)
        self._secret: str | None = None

    @property
    def last(self) -> Record | None:
        return self._leader.last

    def find(self, *, recheck: bool = False) -> Record | None:
        return self._leader.find(recheck=recheck)

    def token(self) -> str:
        return self._run.token()

    def check(self, router: Record, token: str) -> IdentityCheck:
        if self._secret is None:
            self._secret = self._run.secret()
        return check_identity(router, self._secret)

    def no_router_error(self) -> NoRouterError:
        return self._leader.no_router_error()


class SharedSource:
    """The source of another user's clients: a share folder and the user's own token."""

    def __init__(self, share: ShareDir) -> None:
        self._share = share
        self._file = share.router_file()

    @property
    def last(self) -> Record | None:
        return None if self._file.value is None else self._file.value.router

    def find(self, *, recheck: bool = False) -> Record | None:
        try:
            if recheck:
                refresh_folder(self._share.path)
            self._file.read()
        except OSError as error:
            logger.warning("%s cannot be read, so its last content is used: %s", self._share.router_json, error)
        return self.last

    def token(self) -> str:
        return users_token(self._share)

    def check(self, router: Record, token: str) -> IdentityCheck:
        return check_identity_to_user(router, token)

    def no_router_error(self) -> NoRouterError:
        return NoRouterError(f"no router serves {self._share.path}; its owner starts one with `hpc-router up`")


def source_of(folder: EndpointFolder) -> RouterSource:
    return RunSource(folder) if isinstance(folder, RunDir) else SharedSource(folder)


def find_folder(given: Path | None) -> EndpointFolder:
    """Returns the run directory or share folder that a client uses: `given`, else `$HPC_ROUTER_RUN`, else
    `runs/latest`. Raises ConfigError."""
    path = named_path(given)
    return open_share(path) if is_share(path) else open_run(path)


def shared_limit_mb(share: ShareDir) -> float:
    """Returns the router's limit for the body of a request, in MiB; the config's default if no router has led yet."""
    content = share.router_file().read()
    return RouterConfig().max_body_mb if content is None else content.max_body_mb


def users_token(share: ShareDir) -> str:
    """Returns this user's token for the router of a share folder: from the file that `$HPC_ROUTER_TOKEN_FILE` names,
    else from `tokens/USER` in the folder. Raises ConfigError if there is none or it does not have the form of a
    token."""
    named = os.environ.get(TOKEN_FILE)
    user = _own_name()
    if named:
        where, text = named, _read_private(Path(named))
    else:
        where, found = str(share.tokens / user), read_token(share, user)
        if found is None:
            raise ConfigError(
                f"{share.path} has no token for {user}: its owner makes one with `hpc-router token create --user "
                f"{user}`; a token that you have goes into a file of mode 0600, and {TOKEN_FILE} names the file"
            )
        text = found
    if token_id(text) is None:
        raise ConfigError(f"{where}: not a token (valid: one line as `hpc-router token create` prints it, hpcr-...)")
    return text


def _read_private(path: Path) -> str:
    """Returns the content of the user's file. Raises ConfigError if it cannot be read, or if other users can."""
    try:
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            if status.st_uid != os.getuid() or status.st_mode & 0o077 or not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{TOKEN_FILE}={path}: other users may have access to it (chmod 600 {path})")
            return stream.read(MAX_TOKEN_BYTES).decode("utf-8", "replace").strip()
    except OSError as error:
        raise ConfigError(f"{TOKEN_FILE}={path}: {error.strerror}") from error


def _own_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
