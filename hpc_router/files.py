"""Writing files that other hosts read while we write them.

One rule: a temporary name in the same folder, fsync, `os.replace`. A reader sees the old file or the new one, never a
part. No locks: flock fails or lies on the parallel file systems this runs on.
"""

import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any, Final

LONGEST: Final = 2**20
"""Bytes of a JSON file of ours; a longer one is not ours."""


def replace_text(path: Path, text: str, *, mode: int = 0o600) -> None:
    """Put `text` at `path` atomically, with exactly `mode` whatever the umask."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
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

    Only a regular file of at most `LONGEST`: a pipe would hang its reader, a link may lead anywhere.
    """
    with open(path, "rb", opener=_open_itself) as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise ValueError("no regular file")
        content = stream.read(LONGEST + 1)
    if len(content) > LONGEST:
        raise ValueError(f"longer than {LONGEST} bytes")
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def _open_itself(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
