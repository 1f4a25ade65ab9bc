"""A record in the registry that stays live only while its owner renews it.

The beat counter in the record grows every `beat_s`; readers judge it by their own clocks. A write that fails or hangs
is a warning: a stalled file system takes nobody out of service.
"""

import asyncio
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpc_router.registry import Record, publish, withdraw

logger = logging.getLogger(__name__)


class Lease:
    """Owns one registry file. `async with` publishes, renews, and withdraws it at the end."""

    def __init__(self, folder: Path, record: Record) -> None:
        assert record.beat_s is not None
        self._folder = folder
        self._record = replace(record, beat=0)
        self._beat_s = record.beat_s
        self._writing = asyncio.Lock()
        self._renewal: asyncio.Task[None] | None = None

    @property
    def record(self) -> Record:
        return self._record

    async def __aenter__(self) -> "Lease":
        await asyncio.to_thread(publish, self._folder, self._record)
        self._renewal = asyncio.create_task(self._renew_forever(), name=f"lease of {self._record.replica}")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._renewal is not None
        self._renewal.cancel()
        await asyncio.gather(self._renewal, return_exceptions=True)
        async with self._writing:
            await asyncio.to_thread(withdraw, self._folder, self._record.replica)

    async def update(self, **changes: Any) -> None:
        """Change fields and publish at once."""
        self._record = replace(self._record, **changes)
        await self._publish()

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(self._beat_s)
            self._record = replace(self._record, beat=(self._record.beat or 0) + 1)
            await self._publish()

    async def _publish(self) -> None:
        async with self._writing:  # two writes must not overtake each other
            try:
                await asyncio.to_thread(publish, self._folder, self._record)
            except OSError as error:
                logger.warning("the record of %s cannot be renewed: %s", self._record.replica, error)
