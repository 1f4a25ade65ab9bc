"""Reads `tokens.json` every `CHECK_S` seconds, so that a new or a revoked token takes effect within a second.

The run directory is opened before the file, because an NFS client would otherwise not notice for some seconds that the
file was replaced. While the file cannot be read, the last tokens stay valid. If its content is wrong, no token is
valid.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from hpc_router.background_tasks import OnFailure, background
from hpc_router.state.atomic_files import refresh_folder
from hpc_router.state.io_thread import FileThread
from hpc_router.state.run_directory import RunDir
from hpc_router.state.stamped_file import StampedFile
from hpc_router.state.user_tokens import UserToken, parse_tokens

logger = logging.getLogger(__name__)

CHECK_S: Final = 0.5
"""Interval in seconds between two checks."""
FIRST_READ_S: Final = 2.0
"""Maximum time in seconds that the start of the control process waits for the first read."""


@dataclass(slots=True)
class TokenWatcher:
    """Calls `on_change` with all tokens in the file, after the first read and after each change."""

    run: RunDir
    files: FileThread
    on_change: Callable[[tuple[UserToken, ...]], None]
    on_failure: OnFailure = lambda task, error: None
    _file: StampedFile[tuple[UserToken, ...]] = field(init=False)
    _known: tuple[UserToken, ...] | None = None

    def __post_init__(self) -> None:
        self._file = StampedFile(self.run.tokens_json, parse_tokens)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Reads the file once, in at most `FIRST_READ_S` seconds, and then reads it repeatedly within the block."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_READ_S):
                await self._check()
        async with background("token watcher", self._check_forever, self.on_failure):
            yield

    async def _check_forever(self) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            await self._check()

    async def _check(self) -> None:
        try:
            tokens = await self.files.run(self._read)
        except OSError as error:
            logger.warning("%s cannot be read, so the last tokens stay: %s", self.run.tokens_json, error)
            return
        if tokens != self._known:
            self._known = tokens
            self.on_change(tokens)

    def _read(self) -> tuple[UserToken, ...]:
        refresh_folder(self.run.path)
        return self._file.read() or ()
