"""Log files of bounded size, written at a bounded rate.

Rules: one process writes a log file, through one `LogFile`, so its rotation by renaming is safe on a shared file system
without locks. Writing never raises and never stops a service; bytes that could not be written are counted, and the log
states their number when writing works again. This module does not know asyncio or the run directory.
"""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

LOG_BYTES: Final = 16 * 2**20
"""Maximum size in bytes at which a log file is rotated. One older file is kept, so a log occupies at most twice this
size."""
BURST: Final = 100
REFILL_PER_S: Final = 1.0
"""Number of lines per second that each log statement may write after its first `BURST` lines."""


def rotated_path(path: Path) -> Path:
    """Returns the path of the older part of the log at `path`, which was rotated."""
    return path.with_name(f"{path.name}.1")


class LogFile:
    """A log file. The first write creates it with mode 0600."""

    def __init__(self, path: Path, *, limit: int = LOG_BYTES) -> None:
        self.path = path
        self._limit = limit
        self._descriptor: int | None = None
        self._size = 0
        self._lost = 0

    def write(self, data: bytes) -> None:
        try:
            if self._descriptor is None:
                self._open()
            if self._size > self._limit:
                self.close()
                self.path.replace(rotated_path(self.path))
                self._open()
            if self._lost:
                self._append(f"... {self._lost} bytes could not be written\n".encode())
                self._lost = 0
            self._append(data)
        except OSError:
            self._lost += len(data)
            self.close()

    def skip(self, count: int) -> None:
        """Counts `count` bytes that the caller has dropped. The next write notes their number in the log."""
        self._lost += count

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> None:
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.fchmod(self._descriptor, 0o600)  # sets the mode regardless of the umask
        self._size = os.fstat(self._descriptor).st_size

    def _append(self, data: bytes) -> None:
        assert self._descriptor is not None
        rest = memoryview(data)
        while rest:
            written = os.write(self._descriptor, rest)
            self._size += written
            rest = rest[written:]


class LogFileHandler(logging.Handler):
    """A log handler that writes records as lines of a `LogFile`."""

    def __init__(self, log: LogFile) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.write(self.format(record).encode("utf-8", "backslashreplace") + b"\n")

    def close(self) -> None:
        self._log.close()
        super().close()


class RateLimit(logging.Filter):
    """Limits the log lines of each logging statement in the code: `BURST` lines at once, then `REFILL_PER_S` lines per
    second. The next line of the statement says how many lines were left out."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._statements: dict[tuple[str, int], list[float]] = {}  # lines allowed, time of that count, lines left out

    def filter(self, record: logging.LogRecord) -> bool:
        now = self._clock()
        state = self._statements.setdefault((record.pathname, record.lineno), [BURST, now, 0])
        left, at, omitted = state
        left = min(BURST, left + (now - at) * REFILL_PER_S)
        if left < 1:
            state[:] = left, now, omitted + 1
            return False
        state[:] = left - 1, now, 0
        if omitted:
            record.msg = f"{record.getMessage()} ({omitted:.0f} more lines like this were left out)"
            record.args = None
        return True
