"""Standing, balance, waiting; every counter returns to zero."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from random import Random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hpc_router.relay.upstream.timeouts import IdleTimer
from hpc_router.router.replicas.replica import TRANSITIONS, Event, Replica, Reservation, RoutingState
from hpc_router.router.replicas.table import ReplicaLostError, ReplicaTable
from hpc_router.state.registry import Record, RecordKind, State


def replica(name: str, *, experts: tuple[str, ...] = ("math",), capacity: int = 2, ready: bool = True) -> Replica:
    record = Record(
        kind=RecordKind.EXPERT,
        replica=name,
        url="http://127.0.0.1:1",
        state=State.READY,
        serves=dict.fromkeys(experts, "m"),
        capacity=capacity,
    )
    made = Replica(record, key="k")
    if ready:
        made.apply(Event.SAYS_READY)
    return made


def table_of(*replicas: Replica) -> ReplicaTable:
    table = ReplicaTable()
    for one in replicas:
        table.put(one)
    return table


def another_worker_has(table: ReplicaTable, one: Replica, in_flight: int) -> None:
    """In its row of counters, where the table finds it."""
    if not table.peers:
        table.peers = (defaultdict[int, int](int),)
    one.column = 1 + int(one.place.rpartition("-")[2])
    table.peers[0][one.column] = in_flight


def test_the_transition_table_is_complete() -> None:
    assert set(TRANSITIONS) == {(s, e) for s in RoutingState for e in Event}


def test_nothing_leads_from_draining_back_to_ready_but_being_ejected() -> None:
    for event in (Event.SAYS_READY, Event.SAYS_STARTING):
        assert TRANSITIONS[RoutingState.DRAINING, event] is RoutingState.DRAINING


def test_the_fewest_in_flight_wins_and_ties_take_turns() -> None:
    table = table_of(replica("math-0.g1"), replica("math-1.g1"))
    holds = [table.acquire(["math"]) for _ in range(4)]
    names = [h.replica.name for h in holds if h]
    assert sorted(names[:2]) == ["math-0.g1", "math-1.g1"]
    assert names[2:] == names[:2]
    assert table.acquire(["math"]) is None, "both are at their capacity"
    assert holds[1] is not None
    holds[1].release()
    again = table.acquire(["math"])
    assert again is not None
    assert again.replica.name == names[1]


def test_a_release_counts_once() -> None:
    table = table_of(replica("math-0.g1"))
    hold = table.acquire(["math"])
    assert hold is not None
    with hold:
        hold.release()
    assert hold.replica.in_flight == 0


def test_a_replica_that_left_takes_its_counters_with_it() -> None:
    table = table_of(replica("math-0.g1"))
    hold = table.acquire(["math"])
    assert hold is not None
    table.remove("math-0.g1")
    hold.release()
    assert (hold.replica.in_flight, table.experts()) == (0, set())


def test_requests_of_other_workers_count_in_balance_and_capacity() -> None:
    busy, idle = replica("math-0.g1"), replica("math-1.g1")
    table = table_of(busy, idle)
    another_worker_has(table, busy, 1)
    holds = [table.acquire(["math"]) for _ in range(3)]
    assert [h.replica.name for h in holds if h] == ["math-1.g1", "math-0.g1", "math-1.g1"]
    assert (busy.load, busy.in_flight, table.ready()) == (2, 1, {"math": 4})
    assert table.acquire(["math"]) is None, "with what others have both are at their capacity"


async def test_a_place_that_another_worker_leaves_goes_to_who_waits() -> None:
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


async def test_a_free_place_goes_to_who_has_waited_longest() -> None:
    """In the same step: a newcomer in the same turn cannot overtake."""
    table = table_of(replica("math-0.g1", capacity=1))
    hold = table.acquire(["math"])
    assert hold is not None
    first, second = (asyncio.create_task(table.wait(["math"])) for _ in range(2))
    await asyncio.sleep(0)
    assert table.waiting("math") == 2
    hold.release()
    assert table.acquire(["math"]) is None
    async with asyncio.timeout(5):
        got = await first
        assert not second.done()
        got.release()
        (await second).release()
    assert table.waiting("math") == 0


async def test_experts_of_one_replica_wait_in_one_line() -> None:
    """Whichever of them the record names first."""
    table = table_of(replica("base-0.g1", experts=("base", "math", "law"), capacity=1))
    hold = table.acquire(["base"])
    assert hold is not None
    waiters = []
    for expert in ("law", "math", "base", "law"):
        waiters.append(asyncio.create_task(table.wait([expert])))
        await asyncio.sleep(0)
    for waiter, expert in zip(waiters, ("law", "math", "base", "law"), strict=True):
        hold.release()
        hold = await waiter
        assert hold.expert == expert
        assert [table.waiting(name) for name in ("base", "math", "law")] == [
            sum(not w.done() and e == name for w, e in zip(waiters, ("law", "math", "base", "law"), strict=True))
            for name in ("base", "math", "law")
        ]
    hold.release()


async def test_what_another_worker_gives_back_is_not_for_newcomers_of_another_expert() -> None:
    one = replica("base-0.g1", experts=("base", "math"), capacity=1)
    table = table_of(one)
    another_worker_has(table, one, 1)
    waiter = asyncio.create_task(table.wait(["base"]))
    await asyncio.sleep(0)
    another_worker_has(table, one, 0)
    assert table.acquire(["math"]) is None
    (await waiter).release()


async def test_who_asks_for_several_experts_waits_for_the_first_while_that_serves() -> None:
    """However busy it is; and for the next one as well from the moment in which it has no ready replica left."""
    a, b = replica("a-0.g1", experts=("a",), capacity=1), replica("b-0.g1", experts=("b",), capacity=1)
    table = table_of(a, b)
    holds = [table.acquire(["a"]), table.acquire(["b"])]
    assert table.acquire(["b", "a"]) is None
    either = asyncio.create_task(table.wait(["b", "a"]))
    await asyncio.sleep(0)
    only_a = asyncio.create_task(table.wait(["a"]))
    await asyncio.sleep(0)
    assert (table.waiting("a"), table.waiting("b")) == (1, 1)
    assert holds[0] is not None
    holds[0].release()
    (await only_a).release()
    assert not either.done(), "a is idle, and b only busy"
    table.apply(b, Event.FAILED)
    async with asyncio.timeout(5):
        got = await either
    assert got.replica is a
    assert table.acquire(["b", "a"]) is None, "b is gone, and a is busy now"
    got.release()
    assert (table.waiting("a"), table.waiting("b")) == (0, 0)


async def test_a_waiter_that_leaves_as_it_is_served_hands_its_place_on() -> None:
    table = table_of(replica("math-0.g1", capacity=1))
    hold = table.acquire(["math"])
    assert hold is not None
    first, second = (asyncio.create_task(table.wait(["math"])) for _ in range(2))
    await asyncio.sleep(0)
    hold.release()
    first.cancel()
    async with asyncio.timeout(5):
        (await second).release()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert [r.in_flight for r in table.all()] == [0]
    assert table.waiting("math") == 0


async def test_a_replica_that_becomes_ready_serves_who_waits_and_is_forgiven() -> None:
    late = replica("math-0.g1", ready=False)
    table = table_of(late)
    waiters = [asyncio.create_task(table.wait(["code", "math"], avoid=[late])) for _ in range(2)]
    await asyncio.sleep(0)
    assert table.apply(late, Event.SAYS_READY)
    async with asyncio.timeout(5):
        assert [(await w).expert for w in waiters] == ["math", "math"]
    assert (table.waiting("math"), table.waiting("code")) == (0, 0)


async def test_little_patience_is_had_with_a_replica_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is ejected or has left, not when it drains; also where it was lost before it was asked."""
    monkeypatch.setattr("hpc_router.router.replicas.replica.LOST_S", 0.0)
    for lost_by in ("ejection", "departure"):
        one = replica("math-0.g1")
        table = table_of(one)
        hold = table.acquire(["math"])
        assert hold is not None
        early = given_up(hold)
        table.apply(one, Event.SAYS_DRAINING)
        await asyncio.sleep(0)
        assert not early.is_set()
        if lost_by == "ejection":
            table.apply(one, Event.FAILED)
        else:
            table.remove(one.name)
        late = given_up(hold)
        async with asyncio.timeout(10):
            await early.wait()
            await late.wait()
        hold.release()
        assert one.in_flight == 0


def given_up(hold: Reservation) -> asyncio.Event:
    """Set when the idle_timer that this hold watches is at its end."""
    event = asyncio.Event()
    idle_timer = IdleTimer(event.set)
    idle_timer.begin(3600.0)
    hold.watch(idle_timer)
    return event


class Juggling(RuleBasedStateMachine):
    """Any interleaving of arrivals, ends, events and departures keeps each counter equal to the holds alive."""

    def __init__(self) -> None:
        super().__init__()
        self.replicas = [replica(f"math-{i}.g1", capacity=3) for i in range(3)]
        self.table = table_of(*self.replicas)
        self.holds: list[Reservation] = []

    @rule()
    def arrive(self) -> None:
        if hold := self.table.acquire(["math"]):
            assert hold.replica.standing is RoutingState.READY
            self.holds.append(hold)

    @rule(at=st.integers(0, 2))
    def arrive_for_one(self, at: int) -> None:
        if hold := self.table.acquire(["math"], only=self.replicas[at]):
            assert hold.replica is self.replicas[at]
            self.holds.append(hold)

    @rule(at=st.integers(0, 30), twice=st.booleans())
    def end(self, at: int, twice: bool) -> None:
        if self.holds:
            hold = self.holds.pop(at % len(self.holds))
            hold.release()
            if twice:
                hold.release()

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
            assert one.in_flight == sum(h.replica is one for h in self.holds)
            assert one.in_flight <= one.capacity

    def teardown(self) -> None:
        for hold in self.holds:
            hold.release()
        assert [r.in_flight for r in self.replicas] == [0, 0, 0]


TestJuggling = Juggling.TestCase


async def waiting(table: ReplicaTable, only: Replica) -> asyncio.Task[Reservation]:
    task = asyncio.create_task(table.wait(["math"], only=only))
    await asyncio.sleep(0)
    return task


async def test_who_wants_one_replica_gets_no_other() -> None:
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
async def test_who_wants_one_replica_is_told_when_it_is_lost(event: Event | None) -> None:
    """Also who begins to wait after that; and who leaves in the moment of being told just leaves."""
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


def slots(of: int) -> Callable[[], int | None]:
    return lambda: of


def test_a_conversation_stays_on_its_replica_under_its_bound() -> None:
    """And is moved by no other replica's coming and going; the next generation takes the place of the last."""
    table = table_of(*(replica(f"math-{i}.g1", capacity=100) for i in range(4)))
    table.pin_bound = 1.25

    def homes() -> list[str]:
        found = [table.pick(["math"], slot=slots(at)) for at in range(200)]
        return [one[0].place for one in found if one]

    before = homes()
    assert jain([before.count(f"math-{i}") for i in range(4)]) > 0.95
    table.remove("math-2.g1")
    without = homes()
    assert all(now == then for now, then in zip(without, before, strict=True) if then != "math-2")
    assert {now for now, then in zip(without, before, strict=True) if then == "math-2"} == {
        "math-0",
        "math-1",
        "math-3",
    }
    table.put(replica("math-2.g2", capacity=100))
    assert homes() == before


def test_a_pin_gives_way_where_its_replica_has_more_than_its_share() -> None:
    """Never more than the bound, here 1.25 times the average of what is then in flight, and back once it is lower."""
    replicas = [replica(f"math-{i}.g1", capacity=100) for i in range(4)]
    table = table_of(*replicas)
    table.pin_bound = 1.25
    holds = [table.acquire(["math"], slot=slots(7)) for _ in range(40)]
    first = table.pick(["math"], slot=slots(7))
    load = {r.name: r.load for r in replicas}
    assert sum(load.values()) == 40
    assert max(load.values()) == 13, "the ceiling of 1.25 x 40 / 4"
    for hold in holds:
        assert hold is not None
        hold.release()
    home = table.pick(["math"], slot=slots(7))
    assert home is not None
    assert load[home[0].name] == 13
    assert first is not None
    another_worker_has(table, home[0], 1)
    assert table.pick(["math"], slot=slots(7)) != home, "its others count as well"


def test_without_a_bound_nothing_is_pinned() -> None:
    table = table_of(*(replica(f"math-{i}.g1", capacity=100) for i in range(2)))
    picked = [table.acquire(["math"], slot=slots(7)) for _ in range(4)]
    assert [h.replica.place for h in picked if h] in (["math-0", "math-1"] * 2, ["math-1", "math-0"] * 2)
