"""States, balance, waiting; every counter returns to zero."""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hpc_router.relay.upstream.timeouts import IdleTimer
from hpc_router.router.replicas.replica import TRANSITIONS, Event, Replica, Reservation, RoutingState
from hpc_router.router.replicas.table import ReplicaLostError, ReplicaTable
from tests.router.support import replica, table_of


def another_worker_has(table: ReplicaTable, one: Replica, in_flight: int) -> None:
    """In its row of counters, where the table finds it."""
    if not table.peers:
        table.peers = (defaultdict[int, int](int),)
    one.column = 1 + int(one.slot_name.rpartition("-")[2])
    table.peers[0][one.column] = in_flight


def test_the_transition_table_is_complete() -> None:
    assert set(TRANSITIONS) == {(s, e) for s in RoutingState for e in Event}


def test_draining_ends_only_by_ejection() -> None:
    for event in (Event.SAYS_READY, Event.SAYS_STARTING):
        assert TRANSITIONS[RoutingState.DRAINING, event] is RoutingState.DRAINING


def test_the_fewest_in_flight_wins_and_ties_take_turns() -> None:
    table = table_of(replica("math-0.g1"), replica("math-1.g1"))
    reservations = [table.acquire(["math"]) for _ in range(4)]
    names = [h.replica.name for h in reservations if h]
    assert sorted(names[:2]) == ["math-0.g1", "math-1.g1"]
    assert names[2:] == names[:2]
    assert table.acquire(["math"]) is None, "both are at their capacity"
    assert reservations[1] is not None
    reservations[1].release()
    again = table.acquire(["math"])
    assert again is not None
    assert again.replica.name == names[1]


async def test_its_repr_shows_replicas_load_and_queues() -> None:
    """Per expert: each replica with its state, load over all workers and capacity; then how many requests wait."""
    assert repr(ReplicaTable()) == "<ReplicaTable empty>"
    busy, dead = replica("math-0.g1", capacity=2), replica("math-1.g1", capacity=8)
    table = table_of(busy, dead, replica("code-0.g1", experts=("code",), ready=False))
    assert table.acquire(["math"], only=busy)
    table.apply(dead, Event.FAILED)
    another_worker_has(table, busy, 1)
    waiters = [asyncio.create_task(table.wait([expert])) for expert in ("math", "math", "law")]
    await asyncio.sleep(0)
    assert repr(table) == (
        "<ReplicaTable code: code-0.g1 starting 0/2, 0 waiting; law: no replica, 1 waiting; "
        "math: math-0.g1 ready 2/2, math-1.g1 ejected 0/8, 2 waiting>"
    )
    for waiter in waiters:
        waiter.cancel()
    await asyncio.gather(*waiters, return_exceptions=True)
    table.remove("code-0.g1")
    assert repr(table) == "<ReplicaTable math: math-0.g1 ready 2/2, math-1.g1 ejected 0/8, 0 waiting>"


def test_a_release_counts_once() -> None:
    table = table_of(replica("math-0.g1"))
    reservation = table.acquire(["math"])
    assert reservation is not None
    with reservation:
        reservation.release()
    assert reservation.replica.in_flight == 0


def test_a_replica_that_left_takes_its_counters_with_it() -> None:
    table = table_of(replica("math-0.g1"))
    reservation = table.acquire(["math"])
    assert reservation is not None
    table.remove("math-0.g1")
    reservation.release()
    assert (reservation.replica.in_flight, table.experts()) == (0, set())


def test_requests_of_other_workers_count_in_balance_and_capacity() -> None:
    busy, idle = replica("math-0.g1"), replica("math-1.g1")
    table = table_of(busy, idle)
    another_worker_has(table, busy, 1)
    reservations = [table.acquire(["math"]) for _ in range(3)]
    assert [h.replica.name for h in reservations if h] == ["math-1.g1", "math-0.g1", "math-1.g1"]
    assert (busy.load, busy.in_flight, table.ready()) == (2, 1, {"math": 4})
    assert table.acquire(["math"]) is None, "with what others have both are at their capacity"


async def test_a_place_that_another_worker_releases_goes_to_a_waiting_request() -> None:
    one = replica("math-0.g1", capacity=1)
    table = table_of(one)
    another_worker_has(table, one, 1)
    waiter = asyncio.create_task(table.wait(["math"]))
    await asyncio.sleep(0)
    another_worker_has(table, one, 2)
    assert table.waiting("math") == 1
    another_worker_has(table, one, 0)
    (await waiter).release()
    assert one.load == 0


async def test_a_free_place_goes_to_the_longest_waiting_request() -> None:
    """In the same step: a newcomer in the same turn cannot overtake."""
    table = table_of(replica("math-0.g1", capacity=1))
    reservation = table.acquire(["math"])
    assert reservation is not None
    first, second = (asyncio.create_task(table.wait(["math"])) for _ in range(2))
    await asyncio.sleep(0)
    assert table.waiting("math") == 2
    reservation.release()
    assert table.acquire(["math"]) is None
    async with asyncio.timeout(5):
        got = await first
        assert not second.done()
        got.release()
        (await second).release()
    assert table.waiting("math") == 0


async def test_experts_of_one_replica_share_the_order_of_arrival() -> None:
    """Whichever of them the record names first."""
    table = table_of(replica("base-0.g1", experts=("base", "math", "law"), capacity=1))
    reservation = table.acquire(["base"])
    assert reservation is not None
    waiters = []
    for expert in ("law", "math", "base", "law"):
        waiters.append(asyncio.create_task(table.wait([expert])))
        await asyncio.sleep(0)
    for waiter, expert in zip(waiters, ("law", "math", "base", "law"), strict=True):
        reservation.release()
        reservation = await waiter
        assert reservation.expert == expert
        assert [table.waiting(name) for name in ("base", "math", "law")] == [
            sum(not w.done() and e == name for w, e in zip(waiters, ("law", "math", "base", "law"), strict=True))
            for name in ("base", "math", "law")
        ]
    reservation.release()


async def test_a_place_released_by_another_worker_is_not_for_newcomers_of_another_expert() -> None:
    one = replica("base-0.g1", experts=("base", "math"), capacity=1)
    table = table_of(one)
    another_worker_has(table, one, 1)
    waiter = asyncio.create_task(table.wait(["base"]))
    await asyncio.sleep(0)
    another_worker_has(table, one, 0)
    assert table.acquire(["math"]) is None
    (await waiter).release()


async def test_a_request_for_several_experts_waits_for_the_first_ready_one() -> None:
    """However busy it is; and for the next one as well from the moment in which it has no ready replica left."""
    a, b = replica("a-0.g1", experts=("a",), capacity=1), replica("b-0.g1", experts=("b",), capacity=1)
    table = table_of(a, b)
    reservations = [table.acquire(["a"]), table.acquire(["b"])]
    assert table.acquire(["b", "a"]) is None
    either = asyncio.create_task(table.wait(["b", "a"]))
    await asyncio.sleep(0)
    only_a = asyncio.create_task(table.wait(["a"]))
    await asyncio.sleep(0)
    assert (table.waiting("a"), table.waiting("b")) == (1, 1)
    assert reservations[0] is not None
    reservations[0].release()
    (await only_a).release()
    assert not either.done(), "a is idle, and b only busy"
    table.apply(b, Event.FAILED)
    async with asyncio.timeout(5):
        got = await either
    assert got.replica is a
    assert table.acquire(["b", "a"]) is None, "b is gone, and a is busy now"
    got.release()
    assert (table.waiting("a"), table.waiting("b")) == (0, 0)


async def test_a_waiter_cancelled_as_it_is_granted_releases_its_place() -> None:
    table = table_of(replica("math-0.g1", capacity=1))
    reservation = table.acquire(["math"])
    assert reservation is not None
    first, second = (asyncio.create_task(table.wait(["math"])) for _ in range(2))
    await asyncio.sleep(0)
    reservation.release()
    first.cancel()
    async with asyncio.timeout(5):
        (await second).release()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert [r.in_flight for r in table.all()] == [0]
    assert table.waiting("math") == 0


async def test_a_replica_that_becomes_ready_is_offered_to_those_that_avoided_it() -> None:
    late = replica("math-0.g1", ready=False)
    table = table_of(late)
    waiters = [asyncio.create_task(table.wait(["code", "math"], avoid=[late])) for _ in range(2)]
    await asyncio.sleep(0)
    assert table.apply(late, Event.SAYS_READY)
    async with asyncio.timeout(5):
        assert [(await w).expert for w in waiters] == ["math", "math"]
    assert (table.waiting("math"), table.waiting("code")) == (0, 0)


async def test_requests_on_a_lost_replica_get_a_short_idle_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is ejected or removed, not while it drains; also if that happened before the timer was attached."""
    monkeypatch.setattr("hpc_router.router.replicas.replica.LOST_S", 0.0)
    for lost_by in ("ejection", "departure"):
        one = replica("math-0.g1")
        table = table_of(one)
        reservation = table.acquire(["math"])
        assert reservation is not None
        early = expired(reservation)
        table.apply(one, Event.SAYS_DRAINING)
        await asyncio.sleep(0)
        assert not early.is_set()
        if lost_by == "ejection":
            table.apply(one, Event.FAILED)
        else:
            table.remove(one.name)
        late = expired(reservation)
        async with asyncio.timeout(10):
            await early.wait()
            await late.wait()
        reservation.release()
        assert one.in_flight == 0


def expired(reservation: Reservation) -> asyncio.Event:
    """Set when the idle timer of this reservation expires."""
    event = asyncio.Event()
    idle_timer = IdleTimer(event.set)
    idle_timer.begin(3600.0)
    reservation.watch(idle_timer)
    return event


class Juggling(RuleBasedStateMachine):
    """Any interleaving of arrivals, ends, events and departures keeps each counter equal to the reservations alive."""

    def __init__(self) -> None:
        super().__init__()
        self.replicas = [replica(f"math-{i}.g1", capacity=3) for i in range(3)]
        self.table = table_of(*self.replicas)
        self.reservations: list[Reservation] = []

    @rule()
    def arrive(self) -> None:
        if reservation := self.table.acquire(["math"]):
            assert reservation.replica.state is RoutingState.READY
            self.reservations.append(reservation)

    @rule(at=st.integers(0, 2))
    def arrive_for_one(self, at: int) -> None:
        if reservation := self.table.acquire(["math"], only=self.replicas[at]):
            assert reservation.replica is self.replicas[at]
            self.reservations.append(reservation)

    @rule(at=st.integers(0, 30), twice=st.booleans())
    def end(self, at: int, twice: bool) -> None:
        if self.reservations:
            reservation = self.reservations.pop(at % len(self.reservations))
            reservation.release()
            if twice:
                reservation.release()

    @rule(at=st.integers(0, 2), event=st.sampled_from(Event))
    def happen(self, at: int, event: Event) -> None:
        self.table.apply(self.replicas[at], event)

    @rule(at=st.integers(0, 2))
    def leave(self, at: int) -> None:
        self.table.remove(self.replicas[at].name)

    @rule(at=st.integers(0, 2))
    def return_(self, at: int) -> None:
        self.table.put(self.replicas[at])

    @invariant()
    def counters_match(self) -> None:
        for one in self.replicas:
            assert one.in_flight == sum(h.replica is one for h in self.reservations)
            assert one.in_flight <= one.capacity

    def teardown(self) -> None:
        for reservation in self.reservations:
            reservation.release()
        assert [r.in_flight for r in self.replicas] == [0, 0, 0]


TestJuggling = Juggling.TestCase


async def waiting(table: ReplicaTable, only: Replica) -> asyncio.Task[Reservation]:
    task = asyncio.create_task(table.wait(["math"], only=only))
    await asyncio.sleep(0)
    return task


async def test_a_request_for_one_replica_gets_no_other() -> None:
    one, other = replica("math-0.g1", capacity=1), replica("math-1.g1")
    table = table_of(one, other)
    held = table.acquire(["math"], only=one)
    assert held is not None
    assert table.acquire(["math"], only=one) is None
    waiter = await waiting(table, one)
    table.offer(other)
    assert table.waiting("math") == 1
    held.release()
    assert (await waiter).replica is one


@pytest.mark.parametrize("event", [Event.SAYS_DRAINING, Event.SAYS_STARTING, Event.FAILED, None])
async def test_a_request_for_one_replica_fails_when_it_is_lost(event: Event | None) -> None:
    """So does one that begins to wait after that; one that is cancelled in the same step is just cancelled."""
    one = replica("math-0.g1", capacity=1)
    table = table_of(one, replica("math-1.g1"))
    assert table.acquire(["math"], only=one)
    waiter, leaving = await waiting(table, one), await waiting(table, one)
    if event is None:
        table.remove(one.name)
    else:
        table.apply(one, event)
    leaving.cancel()
    with pytest.raises(ReplicaLostError, match=r"math-0\.g1"):
        await waiter
    with pytest.raises(asyncio.CancelledError):
        await leaving
    with pytest.raises(ReplicaLostError):
        await table.wait(["math"], only=one)
    assert table.waiting("math") == 0


async def test_others_go_on_waiting_when_a_replica_is_lost() -> None:
    one = replica("math-0.g1", ready=False)
    table = table_of(one)
    waiter = asyncio.create_task(table.wait(["math"]))
    await asyncio.sleep(0)
    table.apply(one, Event.FAILED)
    table.apply(one, Event.SAYS_READY)
    assert (await waiter).replica is one


def jain(counts: Sequence[int]) -> float:
    return sum(counts) ** 2 / (len(counts) * sum(n * n for n in counts))


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
def test_equal_replicas_share_equally(replicas: int) -> None:
    """What is in flight, and what has been served: two replicas to the request, more to nine in ten and better."""
    table = table_of(*(replica(f"math-{i}.g1", capacity=400) for i in range(replicas)))
    table.random = Random(1)
    for _ in range(100 * replicas):
        assert table.acquire(["math"])
    load = [r.in_flight for r in table.all()]
    assert max(load) - min(load) <= (0 if replicas <= 2 else 4)
    assert jain(load) >= 0.999
