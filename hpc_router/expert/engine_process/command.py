"""How an engine's process is started on this node: its command line, in its container or not, and its environment."""

import asyncio
import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hpc_router.config.schema import ClusterConfig, ExpertConfig
from hpc_router.expert.engine_process.process import ENGINE_GRACE_S, Command
from hpc_router.expert.engines import Engine, Place, engine_environment, version_command
from hpc_router.expert.engines.container import contained

VERSION_TIMEOUT_S: Final = 20.0
RANK_GRACE_S: Final = 3.0
"""For one rank of several: the others are gone or going, and it can finish nothing without them."""


def drain_limit_s(cluster: ClusterConfig) -> int:
    """How long an engine that gets SIGTERM may finish running answers. The agent breaks them off before that."""
    return math.ceil(cluster.drain_s + ENGINE_GRACE_S)


@dataclass(frozen=True, slots=True)
class Commands:
    """`inherited`: the job's environment; `log`: where the engine's words go."""

    engine: Engine
    expert: ExpertConfig
    cluster: ClusterConfig
    inherited: Mapping[str, str]
    log: Path

    def at(self, place: Place, *, version: str | None = None) -> Command:
        """`version`: of the engine, where it is known."""
        argv = self.engine.argv(place)
        if place.ranks is None or place.ranks.rank == 0:
            argv += self.engine.drain_flags(drain_limit_s(self.cluster), version=version)
        return Command(
            self._contained(argv, place),
            self._environment(place),
            place,
            self.log,
            grace_s=ENGINE_GRACE_S if place.ranks is None else RANK_GRACE_S,
        )

    async def version(self, place: Place) -> str | None:
        """What the engine's interpreter has installed; None where it cannot say."""
        try:
            process = await asyncio.create_subprocess_exec(
                *self._contained(version_command(self.engine), place),
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

    def _contained(self, argv: Sequence[str], place: Place) -> list[str]:
        return contained(argv, self.cluster.container, place, self.expert, models=self.engine.models)

    def _environment(self, place: Place) -> dict[str, str]:
        return engine_environment(self.engine, self.expert, place, inherited=self.inherited, cluster=self.cluster)
