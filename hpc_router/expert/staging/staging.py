"""Copies an engine's models to its node's disk before the engine starts, once for all replicas on the node.

Staging never makes a start fail: an engine whose model cannot be copied loads the model from its source, and the log
says why. One of several agents copies a model, and the others wait for it. All file operations run in threads that do
not keep the process from ending, because the shared file system may hang.
"""

import asyncio
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, Self

from hpc_router.config.schema import ClusterConfig
from hpc_router.errors import ConfigError, StagingError
from hpc_router.expert.engine_process.scratch_dir import expanded, usage_error
from hpc_router.expert.engines import Engine, Place
from hpc_router.expert.staging.copying import CopyProgress, copy_file
from hpc_router.expert.staging.model_files import ModelFiles, list_files, local_models
from hpc_router.expert.staging.node_disk import GB, NodeDisk, StagedModel
from hpc_router.state.io_thread import FileThread

logger = logging.getLogger(__name__)

COPIERS: Final = 4
"""Maximum number of files that are copied at the same time. One stream does not use a parallel file system fully, and
one core does not use a fast disk fully."""
POLL_S: Final = 0.2
"""Interval in seconds at which an agent looks for a copy that another agent makes."""
REPORT_S: Final = 2.0
"""Interval between progress reports, in seconds."""
LOG_S: Final = 30.0
"""Minimum interval between progress lines in the log, in seconds."""
RELEASE_S: Final = 5.0
"""Maximum time in seconds to remove an incomplete copy at the end. The next agent on the node removes what is left."""


@dataclass(slots=True)
class StageReport:
    """The result of staging. `stage_s`: duration in seconds, including the wait for other agents. `copied`: bytes.
    `text`: the current step or the outcome."""

    stage_s: float | None = None
    copied: int = 0
    text: str | None = None


class NodeStaging:
    """Copies models for an engine within `async with`, and keeps the copies and the compile cache locked until the
    block ends.

    `limit_s`: time limit for all copies together, in seconds. `environment`: the job's variables, which may occur in
    `cluster.stage_to`. `on_report`: called after every change of `report`.
    """

    def __init__(
        self,
        engine: Engine,
        cluster: ClusterConfig,
        environment: Mapping[str, str],
        *,
        limit_s: float,
        on_report: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._cluster = cluster
        self._environment = environment
        self._limit_s = limit_s
        self._on_report = on_report
        self._held: list[StagedModel] = []
        self._cache: StagedModel | None = None
        self._disk: NodeDisk | None = None
        self._logged_at = -LOG_S
        self.report = StageReport()

    async def __aenter__(self) -> Self:
        if self._cluster.stage_to is not None:
            self._local = FileThread("node disk")
            cores = len(os.sched_getaffinity(0))
            self._copiers = [FileThread(f"copy {number}") for number in range(min(COPIERS, cores))]
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._cluster.stage_to is None:
            return
        for held in [*self._held, *([self._cache] if self._cache is not None else [])]:
            held.lock.touch()
            held.lock.release()
        for copier in self._copiers:
            copier.close(timeout_s=0)
        self._local.close(timeout_s=RELEASE_S)

    async def prepare(self, place: Place, *, version: str | None) -> Place:
        """Copies the models to the disk of the node. Returns `place` with the paths of the copies and of the compile
        cache. `version`: the engine's version; None: no cache is kept."""
        if self._cluster.stage_to is None:
            return place
        began = time.monotonic()
        outcomes, copies = [], {}
        try:
            async with asyncio.timeout(self._limit_s):
                disk = self._disk = await self._open(self._cluster.stage_to)
                for model in await self._copiers[0].run(partial(local_models, self._engine.models)):
                    path, outcome = await self._path_of(disk, model)
                    outcomes.append(outcome)
                    if path is not None:
                        copies[model] = str(path)
                place = await self._with_cache(disk, replace(place, copies=copies), version)
        except TimeoutError:
            outcomes.append(f"models are loaded from their folders: not copied within {self._limit_s:g} s")
            logger.warning("%s", outcomes[-1])
        except (ConfigError, StagingError, OSError) as error:
            outcomes.append(f"models are loaded from their folders: {error}")
            logger.warning("%s", outcomes[-1])
        self.report.stage_s = round(time.monotonic() - began, 3)
        self._say("; ".join(outcomes) or None)
        return replace(place, copies=copies)

    def without_cache(self, place: Place) -> Place:
        """Returns `place` with a new, empty cache folder, for an engine that failed perhaps because its cache is
        damaged. Removes the old cache if no other engine uses it."""
        if self._cache is not None and self._disk is not None:
            logger.warning("the engine starts with an empty compile cache, in case the kept one is damaged")
            self._local.post(partial(self._disk.drop, self._cache))
            self._cache = None
        return replace(place, kept_cache=None)

    def drop_copies(self) -> None:
        """Removes the copies that no other engine uses. Called when the engine could not load its models, because a
        copy may be damaged."""
        if self._disk is not None:
            for copy in self._held:
                logger.warning("%s is removed, in case it is damaged", copy.path)
                self._local.post(partial(self._disk.drop, copy))
            self._held.clear()

    async def _open(self, stage_to: str) -> NodeDisk:
        """Returns this user's folder on the node's disk, after removing what is no longer used from it."""
        folder = expanded(stage_to, self._environment, key="cluster.stage_to")
        limit = self._cluster.stage_gb
        opening = partial(NodeDisk.open, folder, limit=None if limit is None else int(limit * GB))
        disk = await self._local.run(opening)
        await self._local.run(partial(disk.sweep, now=time.time()))
        return disk

    async def _path_of(self, disk: NodeDisk, model: str) -> tuple[Path | None, str]:
        """Returns the path of the copy of `model` (None if there is no copy), and a text that says what was done."""
        before = self.report.copied
        began = time.monotonic()
        try:
            if await self._copiers[0].run(partial(disk.has, Path(model))):
                return None, f"{model} is on the node's disk already"
            copy = await self._stage(disk, model)
        except (StagingError, OSError) as error:
            logger.warning("%s is loaded from its folder: %s", model, error)
            return None, f"{model} is loaded from its folder: {error}"
        self._held.append(copy)
        copied = self.report.copied - before
        what = f"was copied in {time.monotonic() - began:.1f} s" if copied else "is on the node's disk"
        logger.info("%s %s: the engine loads %s", model, what, copy.path)
        return copy.path, f"{model} {what}"

    async def _stage(self, disk: NodeDisk, model: str) -> StagedModel:
        """Returns the copy of `model`, made by this agent or another on the node. Raises StagingError and OSError."""
        files = await self._copiers[0].run(partial(list_files, Path(model)))
        while (copy := await self._local.run(partial(disk.find, files))) is None:
            part = await self._local.run(partial(disk.begin, files))
            if part is not None:
                await self._copy(disk, part, files, model)
            else:
                self._say(f"waits for another engine on this node, which copies {model}")
                await asyncio.sleep(POLL_S)
        return copy

    async def _copy(self, disk: NodeDisk, part: StagedModel, files: ModelFiles, model: str) -> None:
        """Copies all files of a model to `part` with several threads, and then publishes the copy."""
        progress, hashes, left = CopyProgress(), dict[str, str](), iter(files.files)

        async def copy_with(copier: FileThread) -> None:
            for file in left:
                copying_one = partial(copy_file, files, file, part.path / file.path, progress)
                hashes[str(file.path)] = await copier.run(copying_one)

        copying = asyncio.gather(*map(copy_with, self._copiers))
        try:
            while not copying.done():
                self._say(f"copies {model}: {progress.size / GB:.1f} of {files.size / GB:.1f} GB")
                await asyncio.wait({copying}, timeout=REPORT_S)
            await copying
            await self._local.run(partial(disk.finish, part, files, hashes))
        except BaseException:
            progress.stop()
            copying.cancel()
            await asyncio.gather(copying, return_exceptions=True)
            self._local.post(partial(disk.discard, part))
            raise
        self.report.copied += files.size

    async def _with_cache(self, disk: NodeDisk, place: Place, version: str | None) -> Place:
        """Returns `place` with the node's compile cache for these models and this version of the engine; without it if
        the version is unknown or the cache cannot be used."""
        if version is None or await self._local.run(partial(usage_error, disk.folder)) is not None:
            return place
        info = self._engine.info()
        about = [self._engine.python, info.revision, *map(place.path_of, self._engine.models)]
        digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        self._cache = await self._local.run(partial(disk.cache, f"{info.kind}-{version}-{digest}"))
        return place if self._cache is None else replace(place, kept_cache=self._cache.path)

    def _say(self, text: str | None) -> None:
        """Sets `report.text` and calls `on_report`, unless the text is the same. Also logs it, at most every LOG_S."""
        if text == self.report.text:
            return
        self.report.text = text
        if text is not None and time.monotonic() - self._logged_at > LOG_S:
            self._logged_at = time.monotonic()
            logger.info("staging: %s", text)
        self._on_report()
