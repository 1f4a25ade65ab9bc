"""The order of waiting requests between users, classes and workers: who starts before whom, counted without time."""

import asyncio
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest

from hpc_router.errors import ShedError
from hpc_router.router.ipc.shared_counters import Counters
from hpc_router.router.replicas.admission import QueueLimits
from hpc_router.router.replicas.fair_order import Flow, RequestClass
from hpc_router.router.replicas.replica import Event, Reservation
from hpc_router.router.replicas.table import QueueFullError, ReplicaTable
from hpc_router.router.replicas.waiting_line import YIELD_S
from tests.router.support import replica

INTERACTIVE, BATCH = RequestClass.INTERACTIVE, RequestClass.BATCH
A, B, C = (Flow(INTERACTIVE, name, slot) for slot, name in enumerate("abc", start=1))
A_BATCH, B_BATCH = A._replace(request_class=BATCH), B._replace(request_class=BATCH)


@dataclass
class Fleet:
    """The tables of several workers over the same counters, each with the same replicas. `started`: the flows in the
    order in which they got a place; `held`: their reservations, the oldest first."""

    workers: int = 4
    capacity: int = 8
    experts: tuple[str, ...] = ("math",)
    limits: QueueLimits = field(default_factory=lambda: QueueLimits(waiting=10**6))
    replicas: int = 1
    started: list[Flow] = field(default_factory=list)
    held: deque[Reservation] = field(default_factory=deque)
    waits: dict["asyncio.Task[Reservation]", Flow] = field(default_factory=dict)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.counters = Counters(workers=self.workers)
        columns = {expert: self.counters.allocate(()) for expert in self.experts}
        places = [self.counters.allocate(()) for _ in range(self.replicas)]
        self.tables = []
        for worker in range(self.workers):
            table = ReplicaTable(
                bounds=self.limits, cells=self.counters.row(worker), peers=self.counters.others(worker),
                order=self.counters.order(worker), clock=lambda: self.now,
            )  # fmt: skip
            table.reassign_queue_columns(columns)
            for at, column in enumerate(places):
                one = replica(f"math-{at}.g1", experts=self.experts, capacity=self.capacity)
                table.reassign_column(one, column)
                table.put(one)
            self.tables.append(table)

    async def send(self, flow: Flow, *, at: int = 0, expert: str = "math") -> "asyncio.Task[Reservation] | None":
        """One request of the flow reaches the worker `at`. Returns its wait, if it waits."""
        hold = self.tables[at].acquire([expert], request_class=flow.request_class)
        if hold is not None:
            self._start(flow, hold)
            return None
        task = asyncio.create_task(self.tables[at].wait([expert], flow=flow))
        self.waits[task] = flow
        await self.settle()
        return task

    async def settle(self) -> None:
        """Every worker looks at every replica until no request gets a place any more."""
        before = -1
        while before != len(self.started):
            before = len(self.started)
            for table in self.tables:
                for one in table.all():
                    table.offer(one)
                await asyncio.sleep(0)
                for task in [task for task in self.waits if task.done()]:
                    flow = self.waits.pop(task)
                    if not task.cancelled() and task.exception() is None:
                        self._start(flow, task.result())

    async def end(self, count: int = 1) -> None:
        """The oldest `count` requests in flight end, one after the other."""
        for _ in range(count):
            self.held.popleft().release()
            await self.settle()

    async def close(self) -> None:
        for task in self.waits:
            task.cancel()
        await asyncio.gather(*self.waits, return_exceptions=True)
        while self.held:
            self.held.popleft().release()
        assert self.counters.nonzero() == 0
        for worker in range(self.workers):
            order = self.counters.order(worker)
            for of in RequestClass:
                for column in self.tables[0].queue_columns.values():
                    assert (order.head(column, of), order.others_waiting(column, of)) == (None, 0)
                    assert order.others_in_flight(column, of) == 0
            assert not any(order.cells[slot] for slot in range(100))

    def _start(self, flow: Flow, hold: Reservation) -> None:
        self.started.append(flow)
        self.held.append(hold)
        for one in self.tables[0].all():
            self.tables[0].refresh_peer_counts([one])
            assert one.load <= one.capacity


async def flood(fleet: Fleet, flow: Flow, count: int, *, workers: Iterable[int] | None = None) -> None:
    at = tuple(range(fleet.workers) if workers is None else workers)
    for number in range(count):
        await fleet.send(flow, at=at[number % len(at)])


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("replicas", [1, 2])
async def test_a_flood_delays_another_user_by_at_most_the_number_of_places_and_workers(
    workers: int, replicas: int
) -> None:
    """User A has 2,000 requests, user B sends one after the other, each to another worker."""
    fleet = Fleet(workers=workers, capacity=4, replicas=replicas)
    await flood(fleet, A, 2000)
    assert len(fleet.started) == 4 * replicas
    for number in range(60):
        await fleet.end(number % 5)
        free, before = 0, len(fleet.started)
        task = await fleet.send(B, at=number % workers)
        while task in fleet.waits:
            await fleet.end()
        overtakers = fleet.started[before:].count(A)
        assert overtakers <= free + workers
    assert fleet.started.count(B) == 60
    await fleet.close()


@pytest.mark.parametrize("of_b", [(0,), (1, 3), (0, 1, 2, 3)])
async def test_two_floods_share_equally_however_they_are_spread_over_the_workers(of_b: tuple[int, ...]) -> None:
    fleet = Fleet(workers=4, capacity=4)
    await flood(fleet, A, 400)
    await flood(fleet, B, 400, workers=of_b)
    before = len(fleet.started)
    await fleet.end(400)
    shares = Counter(fleet.started[before:])
    assert abs(shares[A] - shares[B]) <= 0.1 * 400
    await fleet.close()


async def test_the_requests_of_one_user_keep_their_order() -> None:
    fleet = Fleet(workers=1, capacity=1)
    await fleet.send(C)
    tasks = [await fleet.send(A) for _ in range(5)]
    for number in range(5):
        await fleet.end()
        assert [task in fleet.waits for task in tasks] == [at > number for at in range(5)]
    await fleet.close()


async def test_the_oldest_wait_is_that_of_the_first_arrival_whatever_the_order() -> None:
    """Each worker knows its own requests. A user's later request may be the next one, but is not the oldest."""
    fleet = Fleet(workers=2, capacity=1)
    await fleet.send(C)
    assert [table.oldest_waits() for table in fleet.tables] == [{}, {}]
    for flow, worker, fleet.now in ((A, 0, 1.0), (A, 0, 2.0), (B, 0, 3.0), (A_BATCH, 0, 4.0), (B, 1, 5.0)):
        await fleet.send(flow, at=worker)
    fleet.now = 7.0
    assert [table.oldest_waits() for table in fleet.tables] == [
        {"math": {"interactive": 6.0, "batch": 3.0}},
        {"math": {"interactive": 2.0}},
    ]
    before = len(fleet.started)
    while fleet.started[before:].count(A) < 1:
        await fleet.end()
    assert fleet.tables[0].oldest_waits()["math"]["interactive"] == 5.0
    await fleet.close()
    assert [table.oldest_waits() for table in fleet.tables] == [{}, {}]


async def test_users_of_many_requests_that_leave_start_again_with_nothing_to_catch_up_on() -> None:
    fleet = Fleet(workers=2, capacity=1)
    await flood(fleet, A, 200)
    for task in list(fleet.waits):
        task.cancel()
    await asyncio.gather(*fleet.waits, return_exceptions=True)
    await fleet.settle()
    await flood(fleet, B, 20)
    await fleet.send(A)
    before = len(fleet.started)
    await fleet.end(4)
    assert A in fleet.started[before:]
    await fleet.close()


@pytest.mark.parametrize("workers", [1, 3])
async def test_classes_share_by_their_weights_while_both_wait(workers: int) -> None:
    fleet = Fleet(workers=workers, limits=QueueLimits(10**6, weights=(4.0, 1.0)))
    await flood(fleet, A_BATCH, 300)
    await flood(fleet, B, 300)
    before = len(fleet.started)
    await fleet.end(200)
    shares = Counter(flow.request_class for flow in fleet.started[before:])
    assert abs(shares[BATCH] - 40) <= workers
    await fleet.close()


async def test_a_class_without_requests_saves_no_turns() -> None:
    """An interactive request is next after a long time without one; the share of later ones is the usual one."""
    fleet = Fleet(workers=2, capacity=2, limits=QueueLimits(10**6, weights=(4.0, 1.0)))
    await flood(fleet, A_BATCH, 300)
    await fleet.end(100)
    before = len(fleet.started)
    await fleet.send(B)
    await fleet.end()
    assert fleet.started[before:] == [B]
    await flood(fleet, B, 100)
    before = len(fleet.started)
    await fleet.end(50)
    assert abs(fleet.started[before:].count(A_BATCH) - 10) <= 2
    await fleet.close()


async def test_a_newcomer_does_not_take_a_place_for_which_a_request_of_another_worker_waits() -> None:
    fleet = Fleet(workers=2, capacity=1)
    await fleet.send(C, at=1)
    first = await fleet.send(A, at=0)
    fleet.held.popleft().release()
    assert fleet.tables[1].acquire(["math"]) is None, "the place is free, but it is the other worker's turn"
    later = await fleet.send(B, at=1)
    assert fleet.started == [C, A]
    await fleet.end()
    assert fleet.started == [C, A, B]
    assert first is not None
    assert later is not None
    await fleet.close()


async def test_a_place_that_a_worker_does_not_take_goes_to_another_one() -> None:
    """After `YIELD_S`: the worker is stopped, or knows a reason. Only this request of it loses its turn."""
    fleet = Fleet(workers=2, capacity=1)
    await fleet.send(C, at=1)
    await fleet.send(A, at=0)
    await fleet.send(B, at=1)
    (one,) = fleet.tables[1].all()
    await asyncio.sleep(0)
    fleet.held.popleft().release()
    fleet.tables[1].offer(one)
    assert one.load == 0, "left to worker 0, which does not run"
    fleet.now = YIELD_S
    fleet.tables[1].offer(one)
    assert one.in_flight == 1
    await fleet.settle()
    assert fleet.started == [C, B]
    await fleet.end()
    assert fleet.started == [C, B, A]
    await fleet.close()


async def test_a_dead_worker_holds_no_place_back() -> None:
    fleet = Fleet(workers=2, capacity=1)
    await fleet.send(C, at=1)
    dead = await fleet.send(A, at=0)
    await fleet.send(B, at=1)
    fleet.counters.clear(0)
    fleet.tables[0] = ReplicaTable()
    await fleet.end()
    assert fleet.started == [C, B]
    assert dead is not None
    dead.cancel()
    await asyncio.gather(dead, return_exceptions=True)
    fleet.waits.pop(dead, None)
    fleet.counters.clear(0)


async def test_the_limit_of_a_class_holds_over_all_workers_and_leaves_places_to_the_other() -> None:
    fleet = Fleet(workers=3, capacity=8, limits=QueueLimits(10**6, classes=(None, 5)))
    await flood(fleet, A_BATCH, 50)
    assert len(fleet.started) == 5
    assert fleet.tables[1].acquire(["math"], request_class=BATCH) is None
    await flood(fleet, B, 3)
    assert fleet.started[5:] == [B] * 3, "at once, although batch requests wait"
    await flood(fleet, B, 10)
    for _ in range(30):
        await fleet.end()
        assert fleet.tables[0].class_in_flight("math", BATCH) <= 5
    await fleet.close()


async def test_a_queue_with_a_limited_class_delays_no_other_class() -> None:
    """A free place is taken at once, without a wait in the queue."""
    fleet = Fleet(workers=2, capacity=8, limits=QueueLimits(10**6, classes=(None, 1)))
    await flood(fleet, A_BATCH, 10)
    assert await fleet.send(B, at=0) is None
    assert await fleet.send(B, at=1) is None
    await fleet.close()


async def test_experts_on_one_replica_have_one_order() -> None:
    """Neither the expert with the longer past nor the other one has an advantage."""
    fleet = Fleet(workers=2, capacity=1, experts=("base", "math"))
    for number in range(60):
        await fleet.send(A, at=number % 2, expert="math")
    await fleet.end(30)
    for number in range(20):
        await fleet.send(B, at=number % 2, expert="base")
    before = len(fleet.started)
    await fleet.end(20)
    shares = Counter(fleet.started[before:])
    assert abs(shares[A] - shares[B]) <= 2
    await fleet.close()


async def shed_of(fleet: Fleet, task: "asyncio.Task[Reservation] | None") -> ShedError:
    assert task is not None
    with pytest.raises(ShedError, match="batch are shed first") as caught:
        await task
    return caught.value


async def test_a_full_queue_sheds_the_last_batch_request_for_an_interactive_one() -> None:
    fleet = Fleet(workers=1, capacity=1, limits=QueueLimits(waiting=2))
    await fleet.send(C)
    first, last = await fleet.send(A_BATCH), await fleet.send(A_BATCH)
    refused = await fleet.send(B_BATCH)
    assert (await shed_of(fleet, refused)).limit == "max_waiting"
    await fleet.send(B)
    assert (await shed_of(fleet, last)).limit == "max_waiting"
    await fleet.send(B)
    await shed_of(fleet, first)
    full = await fleet.send(B)
    assert full is not None
    with pytest.raises(QueueFullError):
        await full
    assert fleet.tables[0].waiting("math") == 2
    await fleet.close()


async def test_another_worker_sheds_its_batch_request_for_an_interactive_one_here() -> None:
    fleet = Fleet(workers=2, capacity=1, limits=QueueLimits(waiting=1))
    await fleet.send(C)
    batch = await fleet.send(A_BATCH, at=0)
    await fleet.send(B, at=1)
    await shed_of(fleet, batch)
    assert [table.waiting("math") for table in fleet.tables] == [1, 1]
    await fleet.close()


async def test_other_columns_take_the_order_along() -> None:
    """A control process that does not know the columns assigns new ones."""
    fleet = Fleet(workers=2, capacity=1, limits=QueueLimits(10**6, classes=(None, 1), weights=(4.0, 1.0)))
    await fleet.send(A_BATCH)
    await flood(fleet, A_BATCH, 10)
    await flood(fleet, B, 2)
    for table in fleet.tables:
        table.reassign_queue_columns({"math": 77})
    assert [table.class_waiting("math", BATCH) for table in fleet.tables] == [10, 10]
    assert [table.class_in_flight("math", BATCH) for table in fleet.tables] == [1, 1]
    before = len(fleet.started)
    await fleet.end(2)
    assert fleet.started[before:] == [B, B]
    await fleet.close()


async def test_a_retried_request_waits_for_another_replica_and_holds_none_back() -> None:
    fleet = Fleet(workers=2, capacity=1, replicas=2)
    one, other = fleet.tables[0].all()
    for _ in range(2):
        await fleet.send(C, at=1)
    retried = asyncio.create_task(fleet.tables[0].wait(["math"], avoid=[one], flow=A))
    await asyncio.sleep(0)
    fleet.waits[retried] = A
    await fleet.send(B, at=1)
    held = {hold.replica.name: hold for hold in fleet.held}
    held[one.name].release()
    await fleet.settle()
    assert fleet.started == [C, C, B], "worker 1 does not leave it to a request that avoids this replica"
    held[other.name].release()
    await fleet.settle()
    assert fleet.started == [C, C, B, A]
    await fleet.close()


async def test_a_replica_that_becomes_ready_is_filled_in_order() -> None:
    fleet = Fleet(workers=2, capacity=2)
    for table in fleet.tables:
        _apply(table, Event.FAILED)
    await flood(fleet, A, 6)
    await fleet.send(B, at=1)
    for table in fleet.tables:
        _apply(table, Event.SAYS_READY)
    await fleet.settle()
    await fleet.end(2)
    assert B in fleet.started[:4]
    await fleet.close()


def _apply(table: ReplicaTable, event: Event) -> None:
    for one in table.all():
        table.apply(one, event)
