"""Watches the files that may change while a router serves: `desired.json`, and the artefacts of the classifier and of
its shadow.

Every second, and at once after `check_now`, it compares the stamps (time, size and inode) of these files with those at
the last load. Invalid settings or artefacts are logged and shown in `/status`, and change nothing.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from hpc_router.background_tasks import OnFailure, background
from hpc_router.config.schema import Deployment
from hpc_router.errors import HpcRouterError
from hpc_router.router.policies import artefact_folders, load_policy
from hpc_router.router.settings import with_desired
from hpc_router.routing.artefact import MANIFEST
from hpc_router.routing.policy import Policy
from hpc_router.state.io_thread import FileThread
from hpc_router.state.run_directory import RunDir
from hpc_router.state.stamped_file import Stamp, stamp_at

logger = logging.getLogger(__name__)

CHECK_S: Final = 1.0
"""Interval in seconds between two checks."""


@dataclass(slots=True)
class ConfigWatcher:
    """Calls `on_change` with the new deployment and its policy when one of the watched files has changed. `base`: the
    deployment that the router was started with. `trouble`: why the last change was not applied; None if it was."""

    run: RunDir
    base: Deployment
    files: FileThread
    on_change: Callable[[Deployment, Policy], None]
    on_failure: OnFailure = lambda task, error: None
    trouble: str | None = None
    _stamp_loaded: tuple[Stamp | None, ...] | None = None
    _folders: tuple[Path, ...] | None = None
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    def check_now(self) -> None:
        """Loads the files again now, whether or not they have changed."""
        self._stamp_loaded = None
        self._wake.set()

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Checks the files repeatedly within the block."""
        async with background("config watcher", self._check_forever, self.on_failure):
            yield

    async def _check_forever(self) -> None:
        while True:
            try:
                await self._check()
            except (HpcRouterError, OSError) as error:
                self.trouble = str(error)
                logger.warning("a change was not applied: %s", error)
            self._wake.clear()
            try:
                async with asyncio.timeout(CHECK_S):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _check(self) -> None:
        stamp = await self.files.run(self._stamp)
        if stamp == self._stamp_loaded:
            return
        self._stamp_loaded = stamp
        deployment, policy = await self.files.run(self._load)
        self.trouble = None
        self.on_change(deployment, policy)

    def _load(self) -> tuple[Deployment, Policy]:
        """Returns the deployment and its policy, loaded from the files. Notes the files' stamps before it reads them,
        so that a change during the reading is found by the next check."""
        desired = stamp_at(self.run.desired)
        deployment = with_desired(self.base, self.run.read_desired())
        self._folders = artefact_folders(self.run, deployment)
        self._stamp_loaded = (desired, *self._artefact_stamps())
        return deployment, load_policy(self.run, deployment)

    def _stamp(self) -> tuple[Stamp | None, ...]:
        return (stamp_at(self.run.desired), *self._artefact_stamps())

    def _artefact_stamps(self) -> tuple[Stamp | None, ...]:
        folders = self._folders or artefact_folders(self.run, self.base)
        return tuple(stamp_at(folder / MANIFEST) for folder in folders)
