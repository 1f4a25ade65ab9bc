"""Writing files that other hosts read while we write them.

One rule: a temporary name in the same folder, fsync, `os.replace`. A reader sees the old file or the new one, never a
part. No locks: flock fails or lies on the parallel file systems this runs on.
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
"""Bytes of a JSON file of ours; a longer one is not ours."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of a write inside name the file: `write` and `fsync` on a full disk do not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace_text(path: Path, text: str, *, mode: int = 0o600) -> None:
    """Put `text` at `path` atomically, with exactly `mode` whatever the umask."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with naming(path), os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def create_text(path: Path, text: str, *, mode: int = 0o600) -> bool:
    """The same for a file that must not be there yet: of several writers at once exactly one gets True."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    replace_text(temporary, text, mode=mode)
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def replace_json(path: Path, value: Any, *, mode: int = 0o600) -> None:
    """`replace_text` of one JSON value."""
    replace_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n", mode=mode)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object at `path`; None when it is absent, half-copied or no object."""
    try:
        return load_json(path)
    except (OSError, ValueError):
        return None


def load_json(path: Path) -> dict[str, Any]:
    """The same for those to whom absent and unreadable are not one. Raises OSError (FileNotFoundError) or ValueError.

    Only a regular file of at most `MAX_FILE_BYTES`: a pipe would hang its reader, a link may lead anywhere.
    """
    with _opened(path) as stream:
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
    """Number and text of each line that is not blank. Lines end at a line feed alone, as JSON lines do: text may hold
    U+2028, U+0085 and other characters at which `str.splitlines` splits. Raises ConfigError with file and line."""
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


def _look_anew(folder: Path) -> None:
    """To be called before it is believed that a file is not there yet. Raises OSError.

    An NFS client remembers for half a minute or more that `folder` had no such name (`lookupcache` and `acdirmin` in
    nfs(5)); it asks the server once the folder itself is opened.
    """
    os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))


def is_there(path: Path) -> bool:
    """Now, and not when this host last looked."""
    with suppress(OSError):
        _look_anew(path.parent)
    return path.exists()


def _opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb", opener=_open_itself)
    except FileNotFoundError:
        _look_anew(path.parent)
        return open(path, "rb", opener=_open_itself)


def _open_itself(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
