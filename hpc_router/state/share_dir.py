"""The share folder (`router.share_dir`): what the members of a Unix group need to use a router, and nothing else.

`router.json` has the address of the router that leads; `tokens/U` has the token of user U, readable only by U and the
owner. The run directory stays closed to members. The owner writes the folder and members only read it. They trust its
files, so only its owner and root may be able to replace it or an entry of it; both sides check this.
"""

import contextlib
import grp
import logging
import os
import pwd
import secrets
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

from hpc_router.errors import ConfigError, RegistryError
from hpc_router.state.atomic_files import naming, refresh_folder, replace_json
from hpc_router.state.registry import Record, RecordKind, State
from hpc_router.state.run_directory import RunDir, private_umask
from hpc_router.state.stamped_file import StampedFile
from hpc_router.state.user_tokens import token_id

logger = logging.getLogger(__name__)

SCHEMA: Final = 1
DIR_KEY: Final = "router.share_dir"
GROUP_KEY: Final = "router.share_group"
FOLDER_MODE: Final = 0o750
TOKENS_MODE: Final = 0o710
"""Members can open a file in `tokens` by its name, but cannot list the folder."""
ROUTER_MODE: Final = 0o640
MAX_TOKEN_BYTES: Final = 4096
"""Maximum size of a file with a token, in bytes."""
_ACL: Final = "system.posix_acl_access"
ROUTER_FILE: Final = "router.json"
_OURS: Final = frozenset({ROUTER_FILE, "tokens"})


@dataclass(frozen=True, slots=True)
class ShareDir:
    """The paths in a share folder. `owner`: uid of the deployment's owner, who must own all files in it."""

    path: Path
    owner: int

    @property
    def router_json(self) -> Path:
        return self.path / ROUTER_FILE

    @property
    def tokens(self) -> Path:
        return self.path / "tokens"

    def router_file(self) -> "StampedFile[SharedRouter]":
        """Returns a reader of `router.json`, which refuses a file of another user than the folder's owner."""
        return StampedFile(self.router_json, SharedRouter.from_json, owner=self.owner)


@dataclass(frozen=True, slots=True)
class SharedRouter:
    """The content of `router.json`. `run`: the run directory whose router it is. `max_body_mb`: the router's limit for
    the body of a request, in MiB. `router`: the record of the router that leads; None if none does."""

    run: str
    max_body_mb: float
    router: Record | None

    def to_json(self) -> dict[str, Any]:
        router = None if self.router is None else self.router.to_json()
        return {"schema": SCHEMA, "run": self.run, "max_body_mb": self.max_body_mb, "router": router}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Parses the file's content. Raises RegistryError."""
        if value.get("schema") != SCHEMA:
            raise RegistryError(f"schema {value.get('schema')!r}; this version reads {SCHEMA}")
        run, limit, router = value.get("run"), value.get("max_body_mb"), value.get("router")
        if not isinstance(run, str) or not isinstance(limit, int | float) or not isinstance(router, dict | None):
            raise RegistryError("not the address of a router")
        record = None if router is None else Record.from_json(router)
        if record is not None and (record.kind is not RecordKind.ROUTER or record.state is not State.READY):
            raise RegistryError(f"{record.replica!r} is not a ready router")
        return cls(run, float(limit), record)


def shared_record(router: Record) -> Record:
    """Returns the part of a router's record that members get: it has no job, node or heartbeat."""
    return replace(router, job_id=None, node=None, expires_at=None, beat=None, beat_s=None)


def group_id(group: str) -> int:
    """Returns the id of a Unix group. `group`: its name or id. Raises ConfigError if there is no such group, or if this
    user is not a member of it and so cannot give files to it."""
    try:
        gid = int(group) if group.isascii() and group.isdecimal() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(f"{GROUP_KEY}={group}: there is no such group on this host", key=GROUP_KEY) from None
    if os.getuid() != 0 and gid not in {os.getegid(), *os.getgroups()}:
        mine = ", ".join(sorted(_group_name(one) for one in {os.getegid(), *os.getgroups()}))
        raise ConfigError(f"{GROUP_KEY}={group}: you are not in this group (valid: {mine})", key=GROUP_KEY)
    return gid


def check_share(path: Path, group: str) -> list[str]:
    """Checks whether the owner can share the router through the folder `path` with `group`, without changing anything.
    Returns warnings. Raises ConfigError if the folder cannot be used or another user could replace it."""
    gid = group_id(group)
    parent = path.parent
    if not parent.is_dir():
        raise _unusable(path, f"there is no folder {parent}")
    outer = next((folder for folder in (path, *path.parents, *path.resolve().parents) if _is_run(folder)), None)
    if outer is not None:
        raise _unusable(path, f"is inside the run directory {outer}, which members cannot open (valid: another place)")
    if (reason := replaceable(path, owners={0, os.getuid()})) is not None:
        raise _unusable(path, reason)
    try:
        status = path.lstat()
    except FileNotFoundError:
        if not os.access(parent, os.W_OK | os.X_OK):
            raise _unusable(path, f"you cannot create a folder in {parent}") from None
    else:
        if not stat.S_ISDIR(status.st_mode):
            raise _unusable(path, "is not a folder")
        if status.st_uid != os.getuid():
            raise _unusable(path, f"belongs to {_user_name(status.st_uid)}, not to you")
        if others := sorted({entry.name for entry in path.iterdir() if not entry.name.startswith(".")} - _OURS):
            raise _unusable(path, f"has other files, such as {others[0]!r}, which the group could read; use a new one")
    closed = next((folder for folder in reversed(path.resolve().parents) if not _is_passable(folder, gid)), None)
    if closed is None:
        return []
    return [f"{DIR_KEY}={path}: members of {group} may be unable to reach it, because {closed} is closed to them"]


def make_share(path: Path, group: str) -> ShareDir:
    """Creates the share folder, or gives an existing one the right group and modes. Raises ConfigError if it cannot be
    used, and OSError."""
    check_share(path, group)
    gid = group_id(group)
    share = ShareDir(path, os.getuid())
    for folder, mode in ((share.path, FOLDER_MODE), (share.tokens, TOKENS_MODE)):
        with contextlib.suppress(FileExistsError), private_umask():
            folder.mkdir(mode=0o700)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            with naming(folder):
                status = os.fstat(descriptor)
                if status.st_uid != os.getuid():
                    raise _unusable(folder, f"belongs to {_user_name(status.st_uid)}, not to you")
                if status.st_gid != gid:
                    os.fchown(descriptor, -1, gid)
                if stat.S_IMODE(status.st_mode) != mode:
                    os.fchmod(descriptor, mode)
        finally:
            os.close(descriptor)
    return share


def write_router(share: ShareDir, content: SharedRouter, *, group: str) -> None:
    """Replaces `router.json` atomically; the members of `group` can read it. Raises ConfigError and OSError."""
    replace_json(share.router_json, content.to_json(), mode=ROUTER_MODE, group=group_id(group))


def sharing_run(share: ShareDir) -> Path | None:
    """Returns the run directory whose router `router.json` names; None if there is no valid file. Raises OSError."""
    content = share.router_file().read()
    return None if content is None else Path(content.run)


def claimed_share(path: Path, group: str, run: RunDir) -> ShareDir:
    """Returns the share folder, created if necessary, for the router of `run`. Raises ConfigError if another run uses
    it, or if it cannot be used, and OSError."""
    share = make_share(path, group)
    other = sharing_run(share)
    if other is not None and other != run.path.resolve():
        raise _unusable(path, f"belongs to the run {other}; `hpc-router up` takes it over once that run has ended")
    return share


def open_share(path: Path) -> ShareDir:
    """Returns the share folder `path` for a member. Raises ConfigError if this user cannot read it, or if users other
    than its owner could have replaced it."""
    path = path.resolve()
    try:
        status = path.stat()
        refresh_folder(path)
    except OSError as error:
        raise ConfigError(
            f"cannot open {path}: {error.strerror} (only the members of a group can use a share folder; ask its owner)"
        ) from error
    share = ShareDir(path, status.st_uid)
    for folder in (path, share.tokens):
        about = folder.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != share.owner or about.st_mode & 0o022:
            raise ConfigError(f"{folder}: other users than the owner of {path} can change it, so it is not used")
    if (reason := replaceable(path, owners={0, os.getuid(), share.owner})) is not None:
        raise ConfigError(f"{path} {reason}, so it is not used")
    return share


def is_share(path: Path) -> bool:
    """Returns whether `path` is a share folder; False for a run directory and anything else. Raises ConfigError if this
    user cannot open the folder."""
    try:
        return stat.S_ISDIR((path / "tokens").stat().st_mode) and not (path / "registry").exists()
    except PermissionError as error:
        raise ConfigError(
            f"cannot open {path}: {error.strerror} (a run directory is open to its owner only, a share folder to the "
            "members of its group)"
        ) from error
    except OSError:
        return False


def replaceable(path: Path, *, owners: set[int]) -> str | None:
    """Returns why a user who is not in `owners` (uids) could put another folder in the place of `path`; None if none
    could. In a folder with the sticky bit, such as /tmp, users can only replace their own entries."""
    for folder in dict.fromkeys((*path.parents, *path.resolve().parents)):
        status = folder.stat()
        if status.st_uid not in owners:
            return f"could be replaced by {_user_name(status.st_uid)}, who owns {folder}"
        if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
            return f"could be replaced by other users, who can write to {folder} (`chmod go-w` or `chmod +t` closes it)"
    return None


def write_token(share: ShareDir, user: str, text: str) -> str | None:
    """Writes a token to `tokens/USER`, which only the owner and the Unix user `user` can read: the file has mode 0600
    and an access control list with that user. Returns why this is not possible, or None if the file is written.
    Raises OSError if the file cannot be written."""
    try:
        uid = pwd.getpwnam(user).pw_uid
    except KeyError:
        return f"there is no Unix user {user} on this host"
    path = share.tokens / user
    temporary = share.tokens / f".{user}.{secrets.token_hex(4)}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with naming(path), os.fdopen(descriptor, "w", encoding="ascii") as stream:
            os.fchmod(stream.fileno(), 0o600)
            stream.write(text + "\n")
            stream.flush()
            os.fsync(stream.fileno())
            if uid != os.getuid():
                try:
                    os.setxattr(stream.fileno(), _ACL, _readable_by(uid))
                except OSError as error:
                    return f"the file system of {share.path} has no POSIX access control lists: {error.strerror}"
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return None


def remove_token(share: ShareDir, user: str, name: str) -> None:
    """Removes `tokens/USER` if it has the token with the ID `name`, and not a newer one."""
    if token_id(read_token(share, user) or "") == name:
        (share.tokens / user).unlink(missing_ok=True)


def is_member(user: str, group: str) -> bool:
    """Returns whether the Unix user `user` is in the group, which is given by its name or id."""
    try:
        entry = pwd.getpwnam(user)
        return group_id(group) in os.getgrouplist(user, entry.pw_gid)
    except KeyError:
        return False


def read_token(share: ShareDir, user: str) -> str | None:
    """Returns the token in `tokens/USER`, which must belong to the folder's owner; None if there is none that this user
    can read."""
    try:
        descriptor = os.open(share.tokens / user, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(stream.fileno())
        if status.st_uid != share.owner or not stat.S_ISREG(status.st_mode):
            logger.warning("%s is not a file of the folder's owner: refused", share.tokens / user)
            return None
        return stream.read(MAX_TOKEN_BYTES).decode("utf-8", "replace").strip()


def _readable_by(uid: int) -> bytes:
    """Returns an access control list in the kernel's binary form (linux/posix_acl_xattr.h): the owner may read and
    write, the user `uid` may read, the group and others may do nothing."""
    user_obj, user, group_obj, mask, other, no_id = 0x01, 0x02, 0x04, 0x10, 0x20, 0xFFFFFFFF
    entries = ((user_obj, 6, no_id), (user, 4, uid), (group_obj, 0, no_id), (mask, 4, no_id), (other, 0, no_id))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def _is_run(folder: Path) -> bool:
    return (folder / "registry").is_dir() and (folder / "secret").exists()


def _is_passable(folder: Path, gid: int) -> bool:
    """Returns whether members of the group `gid` can open entries of `folder` by name, as its mode shows."""
    status = folder.stat()
    return bool(status.st_mode & (stat.S_IXGRP if status.st_gid == gid else stat.S_IXOTH))


def _unusable(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"{DIR_KEY}={path}: {reason}", key=DIR_KEY)


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
