"""Writes and reads files that other hosts read and write at the same time.

A writer uses a temporary name in the same folder, fsync, and `os.replace`, so a reader sees either the old file or the
new one. There are no locks: flock fails, or has no effect, on many parallel file systems.
"""

import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

from hpc_router.errors import ConfigError

MAX_FILE_BYTES: Final = 2**20
"""Maximum size of a JSON file in the run directory, in bytes."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Context manager: if the block raises an OSError that names no file, such as that of `fsync` on a full disk, adds
    `path` to it."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace_text(path: Path, text: str, *, mode: int = 0o600, group: int | None = None) -> None:
    """Writes `text` to `path` atomically. The file gets exactly `mode`, regardless of the umask, and the group with the
    id `group`; with None, it gets this process's group."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode & 0o700)
    try:
        with naming(path), os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            if group is not None:
                os.fchown(stream.fileno(), -1, group)
            os.fchmod(stream.fileno(), mode)
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def create_text(path: Path, text: str, *, mode: int = 0o600) -> bool:
    """Creates a file atomically. Returns True if this call created it, False if the file exists; of several concurrent
    writers exactly one gets True."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    replace_text(temporary, text, mode=mode)
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def replace_json(path: Path, value: Any, *, mode: int = 0o600, group: int | None = None) -> None:
    """Writes a JSON value to `path` atomically. `mode`, `group`: as in `replace_text`."""
    replace_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n", mode=mode, group=group)


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the JSON object at `path`; None if the file is missing, not readable, incomplete or not a JSON object."""
    try:
        return load_json(path)
    except (OSError, ValueError):
        return None


def load_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object at `path`. Raises FileNotFoundError, another OSError, or ValueError for invalid content.

    Reads only regular files of at most `MAX_FILE_BYTES`. A pipe would block the reader, and a symbolic link may lead
    anywhere, so both are refused.
    """
    with _open_for_reading(path) as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise ValueError("not a regular file")
        content = stream.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"longer than {MAX_FILE_BYTES} bytes")
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yields number (from 1) and text of each line that is not blank. Raises ConfigError with file and line.

    Only a line feed ends a line, as in JSON lines: `str.splitlines` would also split at U+2028, which JSON texts may
    contain.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(f"{path}:{number}: not UTF-8 (byte {error.start} of the line)") from error


def refresh_folder(folder: Path) -> None:
    """Makes an NFS client look up the names in `folder` at the server again. Raises OSError.

    The client may cache for 30 s or more that a file does not exist (`lookupcache` and `acdirmin` in nfs(5)). Opening
    the folder invalidates that cache.
    """
    os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))


def exists_now(path: Path) -> bool:
    """Returns whether `path` exists according to the server, even if the NFS client has cached that it does not."""
    with suppress(OSError):
        refresh_folder(path.parent)
    return path.exists()


def _open_for_reading(path: Path) -> BinaryIO:
    try:
        return open(path, "rb", opener=_open_without_links)
    except FileNotFoundError:
        refresh_folder(path.parent)
        return open(path, "rb", opener=_open_without_links)


def _open_without_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
