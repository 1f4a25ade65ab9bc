"""Runs parts of a test as another Unix user, which only root can."""

import codecs
import json
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

for encoding in ("ascii", "idna"):  # Python loads them on first use, when another user may be unable to read its files
    codecs.lookup(encoding)

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


@dataclass(frozen=True)
class UnixUser:
    """A user of the system's files. `groups`: ids of the supplementary groups."""

    uid: int
    gid: int
    groups: Collection[int] = ()


SHARED_GROUP = 60
"""The id of the Debian group `games`, which the tests share with."""
OWNER = UnixUser(1, 1, (SHARED_GROUP,))
"""`daemon`, in the group."""
MEMBER = UnixUser(5, 60)
"""`games`, in the group."""
OTHER_MEMBER = UnixUser(6, 12, (SHARED_GROUP,))
"""`man`, in the group."""
OUTSIDER = UnixUser(65534, 65534)
"""`nobody`, not in the group."""


def as_user(user: UnixUser, function: Callable[[], Any]) -> Any:
    """Calls `function` in a fork of this process that has become `user`, and returns its result, a JSON value. The
    modules that it needs must be imported already, because another user may be unable to read the interpreter's files.
    Raises AssertionError with the traceback if the function raises."""
    reading, writing = os.pipe()
    child = _fork()
    if child == 0:
        try:
            _become(user)
            report = {"result": function()}
        except BaseException:  # noqa: BLE001 - raised in the caller
            report = {"error": traceback.format_exc()}
        try:
            with os.fdopen(writing, "w") as stream:
                json.dump(report, stream)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        report = json.load(stream)
    os.waitpid(child, 0)
    assert "error" not in report, report["error"]
    return report["result"]


@contextmanager
def running_as(user: UnixUser, function: Callable[[Callable[[Any], None]], None]) -> Iterator[Any]:
    """Runs `function` in a fork of this process that has become `user`. Yields the JSON value with which it calls its
    argument, and ends the process with SIGTERM after the block."""
    reading, writing = os.pipe()
    child = _fork()
    if child == 0:
        try:
            _become(user)
            os.close(reading)

            def report(value: Any) -> None:
                with os.fdopen(writing, "w") as stream:
                    json.dump(value, stream)

            function(report)
        except BaseException:  # noqa: BLE001 - pytest shows it
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    try:
        with os.fdopen(reading) as stream:
            yield json.load(stream)
    finally:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)


def _fork() -> int:
    with warnings.catch_warnings():  # Python 3.12 and later warn of other threads, which the child does not use
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _become(user: UnixUser) -> None:
    os.setgroups(list(user.groups))
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)


@contextmanager
def open_folder() -> Iterator[Path]:
    """A temporary folder that other users may pass through. pytest's own are below one that is private, which each
    session of pytest closes again if a test has opened it."""
    with TemporaryDirectory(prefix="hpcr-open-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
