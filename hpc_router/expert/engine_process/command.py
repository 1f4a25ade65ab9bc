"""Builds the command line and environment of an engine's process on this node, with or without a container."""

import asyncio
import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hpc_router.config.schema import ClusterConfig, ExpertConfig
from hpc_router.expert.engine_process.process import Command
from hpc_router.expert.engines import Engine, Place, engine_environment, version_command
from hpc_router.expert.engines.base import ENGINE_GRACE_S
from hpc_router.expert.engines.container import command_in_container

VERSION_TIMEOUT_S: Final = 20.0
RANK_GRACE_S: Final = 3.0
"""Seconds from SIGTERM to SIGKILL for one of several ranks, which cannot finish a response without the other ranks."""


def drain_limit_s(cluster: ClusterConfig) -> int:
    """Returns the time in seconds that an engine has for its responses after SIGTERM: `cluster.drain_s` +
    ENGINE_GRACE_S."""
    return math.ceil(cluster.drain_s + ENGINE_GRACE_S)


@dataclass(frozen=True, slots=True)
class EngineCommands:
    """Builds the commands of one engine. `inherited`: the job's environment. `log`: file for the engine's output."""

    engine: Engine
    expert: ExpertConfig
    cluster: ClusterConfig
    inherited: Mapping[str, str]
    log: Path

    def at(self, place: Place, *, version: str | None = None) -> Command:
        """Returns the engine's command at this place. `version`: the engine's version, if known."""
        argv = self.engine.argv(place)
        if place.ranks is None or place.ranks.rank == 0:
            argv += self.engine.drain_flags(drain_limit_s(self.cluster), version=version)
        return Command(
            self._in_container(argv, place),
            self._environment(place),
            place,
            self.log,
            grace_s=self.engine.grace_s if place.ranks is None else RANK_GRACE_S,
        )

    async def version(self, place: Place) -> str | None:
        """Returns the version that is installed in the engine's interpreter; None if that is not known."""
        try:
            process = await asyncio.create_subprocess_exec(
                *self._in_container(version_command(self.engine), place),
                env=self._environment(place),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError:
            return None
        try:
            async with asyncio.timeout(VERSION_TIMEOUT_S):
                output, _ = await process.communicate()
        except TimeoutError:
            return None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return output.decode().strip() or None

    def _in_container(self, argv: Sequence[str], place: Place) -> list[str]:
        return command_in_container(argv, self.cluster.container, place, self.expert, models=self.engine.models)

    def _environment(self, place: Place) -> dict[str, str]:
        return engine_environment(self.engine, self.expert, place, inherited=self.inherited, cluster=self.cluster)
