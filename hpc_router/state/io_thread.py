"""A thread that makes all writes of a service to the shared file system, in order.

A shared file system may hang for minutes. Then only this thread hangs; it is a daemon thread, so the process can still
exit. Callers wait for their write with a time limit of their own, or do not wait.
"""

import asyncio
import logging
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from logging.handlers import QueueHandler
from pathlib import Path
from typing import Final, TypeVar

from hpc_router.state.log_file import LogFile, LogFileHandler, RateLimit

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

WRITE_TIMEOUT_S: Final = 5.0
"""Maximum time in seconds that a caller waits for a write. The write itself completes when the file system responds
again."""
MAX_UNWRITTEN_BYTES: Final = 4 * 2**20
"""Maximum output of a process, in bytes, that is queued while the file system hangs. Further output is dropped and
counted."""
_READ_BYTES: Final = 2**16
LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class FileThread:
    """A thread that runs functions one after another, in the order in which they were passed to it."""

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def run(self, action: Callable[[], _T]) -> _T:
        """Runs `action` in the thread. Returns its result or raises its exception. If the caller is cancelled while it
        waits, `action` runs nevertheless, and its exception is logged."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[_T] = loop.create_future()

        def finish(deliver: Callable[[], None], error: BaseException | None) -> None:
            if not done.cancelled():
                deliver()
            elif error is not None:
                _log_failure(error)

        def act() -> None:
            failure: BaseException | None = None
            try:
                deliver = partial(done.set_result, action())
            except BaseException as error:  # noqa: BLE001 - raised in the caller
                deliver, failure = partial(done.set_exception, error), error
            with suppress(RuntimeError):  # the loop is closed: no caller waits
                loop.call_soon_threadsafe(finish, deliver, failure)

        self._queue.put(act)
        return await done

    async def run_within_limit(self, action: Callable[[], _T]) -> _T | None:
        """Runs `action` in the thread and returns its result; None after an OSError, or if it takes longer than
        `WRITE_TIMEOUT_S`."""
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                return await self.run(action)
        return None

    def post(self, action: Callable[[], object]) -> None:
        """Queues `action` without waiting for it. An exception is logged."""

        def act() -> None:
            try:
                action()
            except Exception as error:  # noqa: BLE001 - logged
                _log_failure(error)

        self._queue.put(act)

    def close(self, *, timeout_s: float) -> None:
        """Waits until all queued actions have run, for at most `timeout_s`, and ends the thread."""
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while (action := self._queue.get()) is not None:
            action()


def _log_failure(error: BaseException) -> None:
    """Logs the exception of an action on which no caller waits. An OSError is logged without a traceback."""
    if isinstance(error, OSError):
        logger.warning("cannot write: %s", error)
    else:
        logger.error("an action of the file thread failed", exc_info=error)


class FileThreadHandler(QueueHandler):
    """A log handler that passes records to another handler in the file thread, so that a hanging file system blocks no
    caller."""

    def __init__(self, files: FileThread, target: logging.Handler) -> None:
        super().__init__(queue.SimpleQueue())
        self._files = files
        self._target = target

    def enqueue(self, record: logging.LogRecord) -> None:
        self._files.post(lambda: self._target.handle(record))

    def close(self) -> None:
        self._files.post(self._target.close)
        super().close()


class OutputLog:
    """Copies the output of a process from a pipe to a log file, through the file thread.

    The process never waits for the file system, and the size of its log is bounded. `tail` holds the last `tail_bytes`
    bytes of the output.
    """

    def __init__(self, files: FileThread, path: Path, *, tail_bytes: int = 0) -> None:
        self._files = files
        self._log = LogFile(path)
        self._tail_bytes = tail_bytes
        self._posted = self._written = self._dropped = 0  # bytes
        self.tail = b""

    async def copy(self, stream: asyncio.StreamReader) -> None:
        """Copies `stream` to the log until the stream ends."""
        try:
            while data := await stream.read(_READ_BYTES):
                self._append(data)
        finally:
            self._files.post(self._log.close)

    def _append(self, data: bytes) -> None:
        if self._tail_bytes:
            self.tail = (self.tail + data)[-self._tail_bytes :]
        if self._posted - self._written > MAX_UNWRITTEN_BYTES:
            self._dropped += len(data)
            return
        self._posted += len(data)
        dropped, self._dropped = self._dropped, 0
        self._files.post(partial(self._write, data, dropped))

    def _write(self, data: bytes, dropped: int) -> None:
        self._log.skip(dropped)
        self._log.write(data)
        self._written += len(data)


@contextmanager
def file_thread(name: str, *, log: Path, label: str = "") -> Iterator[FileThread]:
    """Yields a file thread for all writes of a service. Also makes this process write its log through the thread to the
    file `log`, which no other process writes, and to stderr if that is a terminal. `label`: name of the process in each
    line."""
    files = FileThread(name)
    to_file = FileThreadHandler(files, LogFileHandler(LogFile(log)))
    to_file.addFilter(RateLimit())
    handlers: list[logging.Handler] = [to_file]
    if sys.stderr.isatty():
        handlers.append(logging.StreamHandler())
    logging.basicConfig(
        level=logging.INFO,
        format=LOG_FORMAT if not label else LOG_FORMAT.replace(" %(name)s", f" {label}: %(name)s"),
        handlers=handlers,
        force=True,
    )
    try:
        yield files
    finally:
        files.close(timeout_s=WRITE_TIMEOUT_S)
