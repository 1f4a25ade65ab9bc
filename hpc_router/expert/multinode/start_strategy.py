"""The ways in which the supervisor starts an engine: on one node, or on several.

`SingleNode` starts one command. For an engine on several nodes, `MultiNodeLeader` runs on rank 0: it makes each attempt
with all ranks, ends the attempt when a rank is lost, and stops the ranks at the end. `RankGroup` makes the decisions.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from hpc_router.expert.engine_process.process import Command
from hpc_router.expert.engines import EngineFailure, Ranks
from hpc_router.expert.multinode.rank_auth import proof
from hpc_router.expert.multinode.rank_group import (
    ASSEMBLE_BEATS,
    RETURN_BEATS,
    SILENCE_BEATS,
    STOP_BEATS,
    RankGroup,
)
from hpc_router.net.addresses import free_port
from hpc_router.net.protocol import RankOrder, RankReport

logger = logging.getLogger(__name__)


class StartStrategy(Protocol):
    """The interface between the supervisor and a way to start an engine."""

    async def next_command(self) -> Command | EngineFailure:
        """Returns the command of the next start, or the reason why no start is possible."""

    async def wait_broken(self) -> EngineFailure:
        """Waits until the engine can no longer serve, even if its process on this node still runs. Returns the
        reason."""

    async def resolve_failure(self, own: EngineFailure) -> EngineFailure:
        """Returns the actual cause of a failure that rank 0's engine shows as `own`: `own` itself, or the failure of
        another rank."""


@dataclass(slots=True)
class SingleNode:
    """The strategy for an engine with one process on one node."""

    command: Callable[[], Command]

    async def next_command(self) -> Command | EngineFailure:
        return self.command()

    async def wait_broken(self) -> EngineFailure:
        return await asyncio.Future[EngineFailure]()

    async def resolve_failure(self, own: EngineFailure) -> EngineFailure:
        return own


@dataclass(slots=True)
class MultiNodeLeader:
    """The strategy of rank 0, for an engine on `nodes` nodes. `key`: the key that authenticates its orders. `command`:
    returns the command of rank 0's own engine process."""

    nodes: int
    key: str
    address: str
    interface: str | None
    beat_s: float
    command: Callable[[Ranks], Command]
    on_drain: Callable[[str], None]
    clock: Callable[[], float]
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    port: Callable[[str], int] = free_port
    group: RankGroup = field(init=False)

    def __post_init__(self) -> None:
        self.group = RankGroup(self.nodes, silence_s=SILENCE_BEATS * self.beat_s)

    def on_report(self, report: RankReport) -> RankOrder:
        """Returns the order for the rank that sent `report`. Makes the agent drain if that rank has received a signal.
        Raises ValueError for an unknown rank."""
        order = self.group.on_report(report, now=self.clock())
        if report.leaving and not self.group.stopping:
            self.on_drain(f"rank {report.rank} on {report.node} received a signal to stop")
        return replace(order, proof=proof(self.key, report.challenge, order))

    async def next_command(self) -> Command | EngineFailure:
        limit_s = (ASSEMBLE_BEATS if self.group.attempt == 0 else RETURN_BEATS) * self.beat_s
        deadline = self.clock() + limit_s
        while self.group.unavailable(now=self.clock()):
            if self.clock() >= deadline:
                return self.group.assembly_failure(now=self.clock(), waited_s=limit_s)
            await self._tick()
        port = self.port(self.address)
        self.group.begin(self.address, port)
        logger.info("attempt %d: %d ranks meet at %s port %d", self.group.attempt, self.nodes, self.address, port)
        return self.command(Ranks(0, self.nodes, self.address, self.interface, self.address, port))

    async def wait_broken(self) -> EngineFailure:
        while (failure := self.group.find_failure(now=self.clock())) is None:
            await self._tick()
        self.group.end()
        return failure

    async def resolve_failure(self, own: EngineFailure) -> EngineFailure:
        self.group.end()
        ended_at = self.clock()
        while (cause := self.group.find_cause(own, ended_at=ended_at, now=self.clock())) is None:
            await self._tick()
        return cause

    async def stop_ranks(self) -> EngineFailure | None:
        """Orders all ranks to stop, and waits until they have the order, for at most STOP_BEATS. Returns the failure of
        a rank that was lost before that (else None), because its loss may be why Slurm has ended this job."""
        self.group.stop()
        deadline = self.clock() + STOP_BEATS * self.beat_s
        while not self.group.all_stopped(now=self.clock()) and self.clock() < deadline:
            await self._tick()
        return self.group.missing_rank()

    async def _tick(self) -> None:
        await self.sleep(self.beat_s / 10)
