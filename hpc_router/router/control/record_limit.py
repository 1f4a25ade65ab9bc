"""Keeps the files of request records and sampled prompts within `router.records_gb`, by removing the oldest ones."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Final

from hpc_router.state.io_thread import FileThread
from hpc_router.state.request_records import remove_oldest
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)

CHECK_S: Final = 10.0
"""Interval in seconds between two checks."""


async def limit_records_forever(run: RunDir, files: FileThread, records_gb: Callable[[], float]) -> None:
    """Removes the oldest files beyond the limit every `CHECK_S` seconds. `records_gb` returns the present limit; 0
    means that no records are written, and then no files are removed either."""
    while True:
        await asyncio.sleep(CHECK_S)
        limit_bytes = int(records_gb() * 1e9)
        if limit_bytes:
            removed = await files.run_within_limit(partial(remove_oldest, run, limit_bytes))
            if removed:
                logger.info("%d files of records were removed, because of router.records_gb", removed)
