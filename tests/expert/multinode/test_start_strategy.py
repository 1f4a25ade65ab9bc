"""Rank 0 as the leader of the other ranks, with a clock that only its own sleeps advance."""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hpc_router.config.schema import ClusterConfig, EngineConfig, ExpertConfig, ResourceConfig
from hpc_router.expert.agent.engine_relay import ENGINE_LIMITS
from hpc_router.expert.agent.engine_supervisor import EngineSupervisor
from hpc_router.expert.agent.restart_policy import RestartPolicy
from hpc_router.expert.engine_process.command import EngineCommands
from hpc_router.expert.engine_process.process import Command
from hpc_router.expert.engines import EngineFailure, Place, Ranks, build_engine
from hpc_router.expert.multinode.rank_engine import RankEngine
from hpc_router.expert.multinode.start_strategy import MultiNodeLeader
from hpc_router.net.addresses import free_port
from hpc_router.net.protocol import Action, RankReport, RankState
from hpc_router.relay.upstream.client import UpstreamClient
from hpc_router.state.io_thread import FileThread
from hpc_router.state.job_records import FailureReason, JobPhase
from tests.support.waiting import GUARD_S


@dataclass
class Time:
    """Clock that advances by sleeping. `then`: functions to call at given times."""

    now: float = 0.0
    then: dict[float, Callable[[], object]] = field(default_factory=dict)

    def __call__(self) -> float:
        return self.now

    async def sleep(self, delay_s: float) -> None:
        self.now += delay_s
        for at in sorted(at for at in self.then if at <= self.now):
            self.then.pop(at)()
        await asyncio.sleep(0)


def leading(time: Time, drains: list[str] | None = None) -> MultiNodeLeader:
    return MultiNodeLeader(
        nodes=2,
        key="k",
        address="127.0.0.1",
        interface="lo",
        beat_s=2.0,
        command=lambda ranks: Command([str(ranks.master_port)], {}, Place(Path("/x"), ranks), Path("/log")),
        on_drain=([] if drains is None else drains).append,
        clock=time,
        sleep=time.sleep,
        port=_ports(),
    )


def _ports() -> Callable[[str], int]:
    numbers = iter(range(4000, 5000))
    return lambda _: next(numbers)


def report(state: RankState = RankState.IDLE, *, attempt: int = 0, leaving: bool = False) -> RankReport:
    return RankReport(1, "a", "c", "n2", attempt, state, leaving=leaving)


async def test_each_attempt_has_a_port_of_its_own() -> None:
    time = Time()
    lead = leading(time)
    time.then = {1.0: lambda: lead.on_report(report()), 50.0: lambda: lead.on_report(report(attempt=1))}
    first = await lead.next_command()
    assert isinstance(first, Command)
    assert first.place.ranks == Ranks(0, 2, "127.0.0.1", "lo", "127.0.0.1", 4000)
    assert lead.on_report(report()).action is Action.RUN
    lead.group.end()
    time.now = 48.0
    second = await lead.next_command()
    assert isinstance(second, Command)
    assert second.argv == ["4001"]


async def test_the_first_attempt_waits_two_minutes_a_later_one_half_of_one() -> None:
    time = Time()
    lead = leading(time)
    assert await lead.next_command() == EngineFailure(FailureReason.RANK_LOST, "rank 1 did not report in within 120 s")
    assert time.now == pytest.approx(120.0, abs=0.3)
    lead.on_report(report())
    assert isinstance(await lead.next_command(), Command)
    time.now += 1000.0
    assert await lead.next_command() == EngineFailure(
        FailureReason.RANK_LOST, "rank 1 on n2 did not report in within 30 s"
    )


async def test_a_lost_rank_breaks_the_attempt_ten_seconds_after_its_last_report() -> None:
    time = Time()
    lead = leading(time)
    lead.on_report(report())
    await lead.next_command()
    time.then = {8.0: lambda: lead.on_report(report(RankState.RUNNING, attempt=1))}
    failure = await lead.wait_broken()
    assert failure.reason is FailureReason.RANK_LOST
    assert time.now == pytest.approx(18.0, abs=0.5)
    assert lead.on_report(report(RankState.RUNNING, attempt=1)).action is Action.WAIT


async def test_a_rank_that_was_told_to_stop_drains_them_all() -> None:
    drains: list[str] = []
    lead = leading(Time(), drains)
    lead.on_report(report(leaving=True))
    assert drains == ["rank 1 on n2 received a signal to stop"]


async def test_stopping_does_not_wait_long_for_dead_ranks() -> None:
    time = Time()
    lead = leading(time)
    lead.on_report(report())
    assert await lead.stop_ranks() == EngineFailure(
        FailureReason.RANK_LOST, "rank 1 on n2 was lost before it got the order to stop"
    )
    assert time.now == pytest.approx(4.0, abs=0.3)


@dataclass
class Steps:
    seen: list[tuple[JobPhase, FailureReason | None]] = field(default_factory=list)
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    def phase_changed(
        self, phase: JobPhase, *, failure: EngineFailure | None = None, engine_pid: int | None = None
    ) -> None:
        self.seen.append((phase, failure.reason if failure else None))
        if phase is JobPhase.READY:
            self.ready.set()


async def test_a_port_that_was_taken_costs_one_attempt(socket_folder: Path) -> None:
    """Two real simulated ranks. Another process binds the port that rank 0 chose before the engine does."""
    expert = ExpertConfig(model="m", engine=EngineConfig(kind="sim"), resources=ResourceConfig(nodes=2))
    cluster = ClusterConfig(scratch=str(socket_folder))
    engine, files, steps = build_engine("math", expert), FileThread("t"), Steps()
    commands = EngineCommands(engine, expert, cluster, {}, socket_folder / "log")
    places = [Place(socket_folder / str(rank)) for rank in range(2)]
    for place in places:
        place.temporary.mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as other_server:
        taken = other_server.getsockname()[1]
        ports = iter([taken, free_port()])
        lead = MultiNodeLeader(
            nodes=2,
            key="k",
            address="127.0.0.1",
            interface="lo",
            beat_s=2.0,
            command=lambda ranks: commands.at(Place(places[0].folder, ranks)),
            on_drain=lambda _: None,
            clock=asyncio.get_running_loop().time,
            port=lambda _: next(ports),
        )

        async def follow(other: RankEngine) -> None:
            while True:
                order = lead.on_report(RankReport(1, "a", "c", "n2", other.attempt, other.state))
                if order.action is Action.WAIT:
                    other.end("told to wait")
                elif order.attempt != other.attempt:
                    ranks = Ranks(1, 2, "127.0.0.1", "lo", order.master_address, order.master_port)
                    other.start(order.attempt, commands.at(Place(places[1].folder, ranks)))
                await asyncio.sleep(0.05)

        async with (
            UpstreamClient(ENGINE_LIMITS, socket_path=str(places[0].socket)) as client,
            RankEngine(engine, files) as other,
        ):
            supervisor = EngineSupervisor(
                engine, lead, client, files, steps, RestartPolicy(1), startup_timeout_s=GUARD_S, chance=lambda: 1.0
            )
            tasks = [asyncio.create_task(supervisor.run()), asyncio.create_task(follow(other))]
            await asyncio.wait_for(steps.ready.wait(), GUARD_S)
            assert steps.seen == [
                (JobPhase.LOADING, None),
                (JobPhase.RESTARTING, FailureReason.PORT_TAKEN),
                (JobPhase.LOADING, None),
                (JobPhase.READY, None),
            ]
            assert other.attempt == 2
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    files.close(timeout_s=5)
