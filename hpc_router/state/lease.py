"""Publishes a record in the registry, and renews it until the end; without renewals, it no longer counts as live.

Every `beat_s` seconds the owner increases the beat counter in the record; readers measure the time between changes with
their own clocks. A failed or hanging write only causes a warning, so a stalled file system neither takes a service out
of use nor keeps it from exiting. If the registry folder is missing at `GONE_BEATS` renewals in a row, the run directory
was removed. The owner is then informed, because without the record no other process can find the owner.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from hpc_router.background_tasks import OnFailure, restarting
from hpc_router.state.io_thread import WRITE_TIMEOUT_S, FileThread
from hpc_router.state.registry import Record, publish, withdraw

logger = logging.getLogger(__name__)


GONE_BEATS: Final = 5
"""Number of consecutive renewals with a missing folder after which the run directory counts as removed."""


class Lease:
    """A context manager that owns one registry file: it publishes the record, renews it, and removes it at the end.

    `expires_at`: returns the end of the owner's job in Unix seconds, or None; called in the file thread at each
    renewal. `on_gone`: called once, in the event loop, if the registry folder was removed. `on_failure`: called if the
    renewing task fails, before it is started again (see `background_tasks`).
    """

    def __init__(
        self,
        folder: Path,
        record: Record,
        files: FileThread | None = None,
        *,
        expires_at: Callable[[], float | None] = lambda: None,
        on_gone: Callable[[], None] | None = None,
        on_failure: OnFailure = lambda task, error: None,
    ) -> None:
        assert record.beat_s is not None
        self._folder = folder
        self._record = replace(record, beat=0)
        self._beat_s = record.beat_s
        self._files = files or FileThread(f"lease of {record.replica}")
        self._owns_files = files is None
        self._expires_at = expires_at
        self._on_gone = on_gone
        self._on_failure = on_failure
        self._ends_at: float | None = None
        self._missed = 0
        self.trouble: str | None = None
        """Error of the last write; None if the write succeeded."""
        self._write: asyncio.Future[None] | None = None
        self._renewal: asyncio.Task[None] | None = None

    @property
    def record(self) -> Record:
        return self._record

    async def __aenter__(self) -> "Lease":
        self._ends_at = await self._files.run(self._expires_at)
        self._record = replace(self._record, expires_at=self._ends_at)
        await self._files.run(partial(publish, self._folder, self._record))
        renewal = restarting("lease", self._renew_forever, self._on_failure)
        self._renewal = asyncio.create_task(renewal, name=f"lease of {self._record.replica}")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._renewal is not None
        self._renewal.cancel()
        await asyncio.gather(self._renewal, return_exceptions=True)
        await self._write_within_limit(partial(withdraw, self._folder, self._record.replica), "withdrawn")
        if self._owns_files:
            self._files.close(timeout_s=0)

    async def update(self, **changes: Any) -> None:
        """Changes fields of the record and publishes it. Waits for the write, for at most `WRITE_TIMEOUT_S`."""
        self._record = replace(self._record, **changes)
        await self._write_within_limit(partial(publish, self._folder, self._record), "published")

    def change(self, **changes: Any) -> None:
        """Changes fields of the record and publishes it, without waiting for the write."""
        self._record = replace(self._record, **changes)
        self._files.post(partial(publish, self._folder, self._record))

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(self._beat_s)
            beat = (self._record.beat or 0) + 1
            self._record = replace(self._record, beat=beat, expires_at=self._ends_at)
            if self._write is None or self._write.done():  # at most one write is queued while the file system hangs
                error = await self._write_within_limit(partial(self._renew, self._record), "renewed")
                self._missed = self._missed + 1 if isinstance(error, FileNotFoundError) else 0
                if self._missed == GONE_BEATS and self._on_gone is not None:
                    logger.error("%s is gone", self._folder)
                    self._on_gone()

    def _renew(self, record: Record) -> None:
        """Writes `record`, then finds out when the job ends; the next renewal publishes that time. Runs in the file
        thread."""
        publish(self._folder, record)
        self._ends_at = self._expires_at()

    async def _write_within_limit(self, action: Callable[[], None], done: str) -> OSError | None:
        """Runs `action`, a write, in the file thread, and waits for it at most `WRITE_TIMEOUT_S`. Returns the error, if
        any. `done`: past participle for the warning, such as "renewed"."""
        self._write = write = asyncio.ensure_future(self._files.run(action))
        write.add_done_callback(lambda late: late.cancelled() or late.exception())  # the write may end after the limit
        await asyncio.wait({write}, timeout=WRITE_TIMEOUT_S)
        failure: OSError | None = None
        if not write.done():
            failure = TimeoutError(f"the file system has not answered for {WRITE_TIMEOUT_S:g} s")
        elif isinstance(error := write.exception(), OSError):
            failure = error
        else:
            write.result()
        self.trouble = None if failure is None else str(failure)
        if failure is not None:
            logger.warning("the record of %s cannot be %s: %s", self._record.replica, done, failure)
        return failure
