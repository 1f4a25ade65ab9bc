"""A record in the registry that stays live only while its owner renews it.

The beat counter in the record grows every `beat_s`; readers judge it by their own clocks. A write that fails or hangs
is a warning: a stalled file system takes nobody out of service and stops nobody from leaving. Only a folder that is
gone, beat after beat, is told to the owner: somebody removed the run directory, and nobody else could find the owner.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from hpc_router.background_tasks import OnFailure, restarting
from hpc_router.state.io_thread import PATIENCE_S, FileThread
from hpc_router.state.registry import Record, publish, withdraw

logger = logging.getLogger(__name__)


GONE_BEATS: Final = 5
"""The folder is gone when so many renewals in a row do not find it."""


class Lease:
    """Owns one registry file. `async with` publishes, renews, and withdraws it at the end.

    `on_gone` is called once, in the event loop, when the folder is gone; `on_failure` as in `background`.
    """

    def __init__(
        self,
        folder: Path,
        record: Record,
        files: FileThread | None = None,
        *,
        on_gone: Callable[[], None] | None = None,
        on_failure: OnFailure = lambda task, error: None,
    ) -> None:
        assert record.beat_s is not None
        self._folder = folder
        self._record = replace(record, beat=0)
        self._beat_s = record.beat_s
        self._files = files or FileThread(f"lease of {record.replica}")
        self._owns_files = files is None
        self._on_gone = on_gone
        self._on_failure = on_failure
        self._missed = 0
        self.trouble: str | None = None
        """Why the record could not be written last time."""
        self._write: asyncio.Future[None] | None = None
        self._renewal: asyncio.Task[None] | None = None

    @property
    def record(self) -> Record:
        return self._record

    async def __aenter__(self) -> "Lease":
        await self._files.run(partial(publish, self._folder, self._record))
        renewal = restarting("lease", self._renew_forever, self._on_failure)
        self._renewal = asyncio.create_task(renewal, name=f"lease of {self._record.replica}")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._renewal is not None
        self._renewal.cancel()
        await asyncio.gather(self._renewal, return_exceptions=True)
        await self._patiently(partial(withdraw, self._folder, self._record.replica), "withdrawn")
        if self._owns_files:
            self._files.close(timeout_s=0)

    async def update(self, **changes: Any) -> None:
        """Change fields and publish at once."""
        self._record = replace(self._record, **changes)
        await self._patiently(partial(publish, self._folder, self._record), "published")

    def change(self, **changes: Any) -> None:
        """Change fields and publish without waiting."""
        self._record = replace(self._record, **changes)
        self._files.post(partial(publish, self._folder, self._record))

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(self._beat_s)
            self._record = replace(self._record, beat=(self._record.beat or 0) + 1)
            if self._write is None or self._write.done():  # while the file system hangs, beats don't pile up
                error = await self._patiently(partial(publish, self._folder, self._record), "renewed")
                self._missed = self._missed + 1 if isinstance(error, FileNotFoundError) else 0
                if self._missed == GONE_BEATS and self._on_gone is not None:
                    logger.error("%s is gone", self._folder)
                    self._on_gone()

    async def _patiently(self, action: Callable[[], None], done: str) -> OSError | None:
        """Why it is not done, if so. The file thread keeps the order, so two writes never overtake each
        other."""
        self._write = write = asyncio.ensure_future(self._files.run(action))
        write.add_done_callback(lambda late: late.cancelled() or late.exception())  # it may outlive our patience
        await asyncio.wait({write}, timeout=PATIENCE_S)
        failure: OSError | None = None
        if not write.done():
            failure = TimeoutError(f"the file system has not answered for {PATIENCE_S:g} s")
        elif isinstance(error := write.exception(), OSError):
            failure = error
        else:
            write.result()
        self.trouble = None if failure is None else str(failure)
        if failure is not None:
            logger.warning("the record of %s cannot be %s: %s", self._record.replica, done, failure)
        return failure
