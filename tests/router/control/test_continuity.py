"""Time without a ready replica, and how replicas reach the end of their walltime, by a clock of the test's."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hpc_router.router.control.continuity import Continuity
from hpc_router.router.replicas.replica import Replica, RoutingState
from hpc_router.router.replicas.table import ReplicaTable
from hpc_router.state.registry import Record, RecordKind, State, split_replica
from tests.router.fakes import a_deployment, a_router, a_run

END = 1000.0
NEAR_END_S = 120.0


@dataclass
class World:
    """A table whose changes are observed, as the control process does it."""

    now: float = 0.0
    table: ReplicaTable = field(init=False)
    seen: Continuity = field(init=False)

    def __post_init__(self) -> None:
        self.seen = Continuity(NEAR_END_S, clock=lambda: self.now, wall_clock=lambda: self.now)
        self.table = ReplicaTable(on_change=lambda: self.seen.update(self.table))

    def starts(self, name: str, expires_at: float | None = END) -> Replica:
        generation = split_replica(name)[2]
        record = Record(
            RecordKind.EXPERT, name, "http://127.0.0.1:1", State.READY, {"math": "m"}, generation, expires_at=expires_at
        )
        replica = Replica(record, None)
        self.table.put(replica)
        self.turns(replica, RoutingState.READY)
        return replica

    def turns(self, replica: Replica, state: RoutingState) -> None:
        self.table.set_state(replica, state, lost=False)

    def exposed(self) -> dict[str, float]:
        return {
            f"{sample.name}{sorted(sample.labels.values())}": sample.value
            for metric in self.seen.metrics()
            for sample in metric.samples
        }


@pytest.fixture
def world() -> World:
    return World()


def test_time_without_a_ready_replica_adds_up(world: World) -> None:
    first = world.starts("math-0.g1")
    world.now = 10
    world.turns(first, RoutingState.EJECTED)
    world.now = 13
    assert world.seen.unready_s("math") == 3
    world.turns(first, RoutingState.READY)
    world.now = 20
    world.turns(first, RoutingState.DRAINING)
    world.now = 25
    assert world.exposed()["hpc_router_unready_seconds_total['math']"] == 8


def test_an_expert_counts_from_its_first_readiness(world: World) -> None:
    world.now = 50
    world.starts("math-0.g1")
    assert world.seen.unready_s("math") == 0


def test_an_expert_that_is_not_wanted_does_not_count(world: World) -> None:
    first = world.starts("math-0.g1")
    world.table.remove(first.name)
    world.now = 10
    world.seen.update(world.table, unwanted={"math"})
    world.now = 20
    assert world.seen.unready_s("math") == 10


def test_a_handover_with_a_ready_successor_is_an_overlap_without_gap(world: World) -> None:
    first = world.starts("math-0.g1")
    world.now = 900
    world.starts("math-0.g2", expires_at=5000)
    world.turns(first, RoutingState.DRAINING)
    world.table.remove(first.name)
    assert world.seen.handovers == {("math", "overlap"): 1}
    assert world.exposed() == {
        "hpc_router_unready_seconds_total['math']": 0,
        "hpc_router_handovers_total['math', 'overlap']": 1,
        "hpc_router_replica_expires_timestamp_seconds['math-0.g2']": 5000,
    }


@pytest.mark.parametrize("other", [None, "math-1.g1"])
def test_an_end_without_a_successor_is_a_gap(world: World, other: str | None) -> None:
    """Also where a replica of another slot serves."""
    first = world.starts("math-0.g1")
    if other is not None:
        world.starts(other, expires_at=5000)
    world.now = END - NEAR_END_S
    world.turns(first, RoutingState.DRAINING)
    assert world.seen.handovers == {("math", "gap"): 1}


def test_a_drain_long_before_the_end_is_no_handover(world: World) -> None:
    first = world.starts("math-0.g1")
    world.turns(first, RoutingState.DRAINING)
    endless = world.starts("math-1.g1", expires_at=None)
    world.turns(endless, RoutingState.DRAINING)
    assert world.seen.handovers == {}


def test_a_handover_that_only_the_older_router_saw_is_counted(world: World) -> None:
    """The new one learned the older one's counts before that, and sees the old replica first while it drains."""
    newer = World()
    newer.seen.absorb({"handovers": [["math", "overlap", 2]], "counted": {"math-0.g1": [["math", "overlap"]]}})
    old = world.starts("math-0.g2")
    for each in (world, newer):
        each.now = 900
        each.starts("math-0.g3", expires_at=5000)
    world.turns(old, RoutingState.DRAINING)
    for _ in range(2):
        newer.seen.follow(world.seen.dump())
    assert newer.seen.handovers == {("math", "overlap"): 3}


def test_what_a_new_router_has_not_seen_ready_is_not_measured() -> None:
    """It learns the older one's seconds before it has called any replica."""
    newer = World()
    newer.seen.absorb({"unready_s": {"math": 3.0}})
    newer.seen.update(newer.table)
    newer.now = 10
    assert newer.seen.unready_s("math") == 3.0
    first = newer.starts("math-0.g1")
    newer.now = 20
    newer.turns(first, RoutingState.EJECTED)
    newer.now = 25
    assert newer.seen.unready_s("math") == 8.0


@pytest.mark.parametrize("first", ["absorb", "count"])
def test_a_handover_that_two_routers_saw_counts_once(world: World, first: str) -> None:
    newer = World()
    if first == "absorb":
        newer.seen.absorb(world.seen.dump())
    for each in (world, newer):
        old = each.starts("math-0.g1")
        each.now = 900
        each.starts("math-0.g2", expires_at=5000)
        each.turns(old, RoutingState.DRAINING)
    if first == "count":
        newer.seen.absorb(world.seen.dump())
    newer.seen.follow(world.seen.dump())
    assert newer.seen.handovers == {("math", "overlap"): 1}


def test_an_ejected_replica_has_not_handed_over(world: World) -> None:
    first = world.starts("math-0.g1")
    world.now = END - 1
    world.turns(first, RoutingState.EJECTED)
    assert world.seen.handovers == {}


async def test_changes_of_one_step_are_one_change(tmp_path: Path) -> None:
    """One read of the registry brings that the predecessor drains and that its successor is ready. Workers are told of
    both at once, so no request sees the time in between."""
    async with a_router(a_run(tmp_path), a_deployment("math")) as router:
        world = World()
        world.table, world.seen = router.control.table, router.control.continuity
        first = world.starts("math-0.g1")
        await asyncio.sleep(0)
        world.turns(first, RoutingState.DRAINING)
        world.starts("math-0.g2")
        await asyncio.sleep(0)
        assert world.seen.unready_s("math") == 0
        world.turns(first, RoutingState.READY)
        world.table.remove("math-0.g2")
        world.turns(first, RoutingState.DRAINING)
        await asyncio.sleep(0)
        assert world.seen.unready_s("math") > 0
