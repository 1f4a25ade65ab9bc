"""What the supervisor asks before, during and after each start of the engine: with what, whether, and why not.

On one node that is always the same command. Of an engine that spans nodes rank 0 leads: `MultiNodeLeader`
makes each attempt with all ranks, ends it when one is lost, and dismisses them at the end. `RankGroup` decides.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from hpc_router.expert.engine_process.process import Command
from hpc_router.expert.engines import EngineFailure, Ranks
from hpc_router.expert.multinode.rank_auth import proof
from hpc_router.expert.multinode.rank_group import (
    ASSEMBLE_BEATS,
    FAREWELL_BEATS,
    RETURN_BEATS,
    SILENCE_BEATS,
    RankGroup,
)
from hpc_router.net.protocol import RankOrder, RankReport

logger = logging.getLogger(__name__)


class StartStrategy(Protocol):
    async def begin(self) -> Command | EngineFailure:
        """The next start, or why there can be none."""

    async def broken(self) -> EngineFailure:
        """Returns when the engine is worth nothing any more, though its process here may live."""

    async def over(self, own: EngineFailure) -> EngineFailure:
        """The start has failed here with `own`; why it did."""


@dataclass(slots=True)
class SingleNode:
    """One process on one node, the same at every start."""

    command: Command

    async def begin(self) -> Command | EngineFailure:
        return self.command

    async def broken(self) -> EngineFailure:
        return await asyncio.Future[EngineFailure]()

    async def over(self, own: EngineFailure) -> EngineFailure:
        return own


def free_port(address: str) -> int:
    """A port that nobody has now; somebody may before the engine binds it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.bind((address, 0))
        return int(sock.getsockname()[1])


@dataclass(slots=True)
class MultiNodeLeader:
    """Rank 0's lead of an engine on `nodes` nodes. `key` proves its orders, `command` makes rank 0's own start, `clock`
    is the event loop's."""

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

    def hear(self, report: RankReport) -> RankOrder:
        """Raises ValueError for a rank that cannot be."""
        order = self.group.heard(report, now=self.clock())
        if report.leaving and not self.group.stopping:
            self.on_drain(f"rank {report.rank} on {report.node} was told to stop")
        return replace(order, proof=proof(self.key, report.challenge, order))

    async def begin(self) -> Command | EngineFailure:
        limit_s = (ASSEMBLE_BEATS if self.group.attempt == 0 else RETURN_BEATS) * self.beat_s
        deadline = self.clock() + limit_s
        while self.group.absent(now=self.clock()):
            if self.clock() >= deadline:
                return self.group.missing(now=self.clock(), waited_s=limit_s)
            await self._tick()
        port = self.port(self.address)
        self.group.begin(self.address, port)
        logger.info("attempt %d: %d ranks meet at %s port %d", self.group.attempt, self.nodes, self.address, port)
        return self.command(Ranks(0, self.nodes, self.address, self.interface, self.address, port))

    async def broken(self) -> EngineFailure:
        while (failure := self.group.trouble(now=self.clock())) is None:
            await self._tick()
        self.group.end()
        return failure

    async def over(self, own: EngineFailure) -> EngineFailure:
        self.group.end()
        ended_at = self.clock()
        while (cause := self.group.cause(own, ended_at=ended_at, now=self.clock())) is None:
            await self._tick()
        return cause

    async def dismiss(self) -> EngineFailure | None:
        """Tell all ranks to stop; returns when they have heard it or are given up, with the loss of one that had gone
        by then: it may be why we were told to end."""
        self.group.stop()
        deadline = self.clock() + FAREWELL_BEATS * self.beat_s
        while not self.group.dismissed(now=self.clock()) and self.clock() < deadline:
            await self._tick()
        return self.group.deserter()

    async def _tick(self) -> None:
        await self.sleep(self.beat_s / 10)
