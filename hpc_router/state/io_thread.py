"""One thread that does all of a service's writing to the shared file system, in order.

A shared file system may hang for minutes. Then this thread hangs and nothing else: it is a daemon, so not even the end
of the process waits for it. Callers either wait for their action under a time limit of their own, or don't.
"""

import asyncio
import logging
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from logging.handlers import QueueHandler
from pathlib import Path
from typing import Final, TypeVar

from hpc_router.state.log_file import LogFile, LogFileHandler, RateLimit

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

PATIENCE_S: Final = 5.0
"""A write may keep its caller waiting for so long; it is done when the file system comes back."""
MAX_UNWRITTEN_BYTES: Final = 4 * 2**20
"""Output of a process that waits for a file system that hangs; what comes beyond that is dropped and counted."""
_READ_BYTES: Final = 2**16
LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class FileThread:
    """Runs actions one after another. `close` waits for what was posted, up to a limit."""

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def run(self, action: Callable[[], _T]) -> _T:
        """The action's result or exception. An action that has been posted is done even if its caller gives up."""
        done: Future[_T] = Future()

        def act() -> None:
            try:
                done.set_result(action())
            except BaseException as error:  # noqa: BLE001 - handed to the caller
                done.set_exception(error)

        self._queue.put(act)
        return await asyncio.shield(asyncio.wrap_future(done))

    def post(self, action: Callable[[], object]) -> None:
        """Do it without waiting; a failure is a warning."""

        def act() -> None:
            try:
                action()
            except OSError as error:
                logger.warning("cannot write: %s", error)
            except Exception:
                logger.exception("an action of the file thread failed")

        self._queue.put(act)

    def close(self, *, timeout_s: float) -> None:
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while (action := self._queue.get()) is not None:
            action()


class FileThreadHandler(QueueHandler):
    """Hands log records to another handler in the file thread: a log file on a hanging file system stops nobody."""

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
    """Copies the output of a process from its pipe to a log file, through the file thread.

    The process never waits for the file system, and its log is bounded however much it says. `tail` holds its last
    `tail_bytes` bytes.
    """

    def __init__(self, files: FileThread, path: Path, *, tail_bytes: int = 0) -> None:
        self._files = files
        self._log = LogFile(path)
        self._tail_bytes = tail_bytes
        self._posted = self._written = self._dropped = 0  # bytes
        self.tail = b""

    async def copy(self, stream: asyncio.StreamReader) -> None:
        """Until the end of the stream."""
        try:
            while data := await stream.read(_READ_BYTES):
                self._take(data)
        finally:
            self._files.post(self._log.close)

    def _take(self, data: bytes) -> None:
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
    """The thread for all of a service's writes, its log among them; a terminal sees the log as well.

    `log`: written by this process alone. `label`: names the process in each line."""
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
        files.close(timeout_s=PATIENCE_S)
