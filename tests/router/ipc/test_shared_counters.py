"""The shared counters: each cell is its worker's count, and zero once no request is in flight."""

import asyncio
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from hpc_router.relay.in_flight import InFlight
from hpc_router.router.control.workers import assign_columns
from hpc_router.router.ipc.shared_counters import COLUMNS, CUT_OFF, IN_FLIGHT, Counters
from hpc_router.router.replicas.fair_order import RequestClass
from hpc_router.router.replicas.replica import NO_COLUMN, Event, Reservation
from hpc_router.router.replicas.snapshot import apply_snapshot, snapshot_of
from hpc_router.router.replicas.table import PEER_REFRESH_S, ReplicaTable
from tests.router.support import replica

WORKERS = 3
EXPERTS = {"math-0": "math", "math-1": "math", "code-0": "code"}


def test_a_column_is_handed_out_again_only_after_all_others() -> None:
    counters = Counters(workers=2)
    first = counters.allocate(())
    assert first not in (NO_COLUMN, IN_FLIGHT, CUT_OFF)
    second = counters.allocate({first})
    counters.row(1)[second] = 1
    seen = {first, second} | {counters.allocate({first, second}) for _ in range(COLUMNS)}
    assert seen.isdisjoint({NO_COLUMN, IN_FLIGHT, CUT_OFF})
    assert len(seen) == COLUMNS - 3
    assert counters.allocate({first}) != second, "a worker counts there"


def test_a_row_belongs_to_one_worker_and_is_cleared_whole() -> None:
    counters = Counters(workers=2)
    for worker in range(2):
        counters.row(worker)[IN_FLIGHT] = worker + 1
        counters.row(worker)[COLUMNS - 1] = 7
    assert (counters.total(IN_FLIGHT), [row[IN_FLIGHT] for row in counters.others(0)]) == (3, [2])
    counters.clear(1)
    assert (counters.total(IN_FLIGHT), counters.total(COLUMNS - 1), counters.nonzero()) == (1, 7, 2)


def test_counting_goes_on_in_another_column() -> None:
    """A control process that could not learn the columns gives out new ones."""
    counters = Counters(workers=2)
    table = ReplicaTable(cells=counters.row(0), peers=counters.others(0))
    one = replica("math-0.g1")
    table.put(one)
    table.reassign_column(one, 5)
    hold = table.acquire(["math"])
    table.reassign_column(one, 6)
    assert (counters.total(5), counters.total(6)) == (0, 1)
    assert hold is not None
    hold.release()
    assert counters.nonzero() == 0


@dataclass
class Worker:
    table: ReplicaTable
    in_flight: InFlight
    holds: list[Reservation] = field(default_factory=list)
    waits: list["asyncio.Task[Reservation]"] = field(default_factory=list)


class Interleaving(RuleBasedStateMachine):
    """Arrivals, answers, cancellations, failures, views that come late, and kills of workers and of control."""

    def __init__(self) -> None:
        super().__init__()
        self.loop, self.now = asyncio.new_event_loop(), 0.0
        setattr(self.loop, "time", lambda: self.now)  # noqa: B010  # time passes where it is told to
        self.counters = Counters(workers=WORKERS)
        self.control = ReplicaTable(peers=self.counters.all())
        self.generations = dict.fromkeys(EXPERTS, 1)
        for place in EXPERTS:
            self._put(place)
        self.workers = [self._born(at) for at in range(WORKERS)]
        for at in range(WORKERS):
            self.tell(at)

    def _put(self, place: str) -> None:
        name = f"{place}.g{self.generations[place]}"
        self.control.put(replica(name, experts=(EXPERTS[place],), capacity=3))

    def _born(self, at: int) -> Worker:
        row, peers = self.counters.row(at), self.counters.others(at)
        table = ReplicaTable(cells=row, peers=peers, order=self.counters.order(at), random=Random(at))
        return Worker(table, InFlight(row, peers, IN_FLIGHT))

    def _step(self) -> None:
        """What waits may have been granted."""
        for _ in range(3):
            self.loop.run_until_complete(asyncio.sleep(0))
        for worker in self.workers:
            for task in [task for task in worker.waits if task.done()]:
                worker.waits.remove(task)
                if not task.cancelled() and task.exception() is None:
                    worker.holds.append(task.result())
                else:
                    worker.in_flight.__exit__(None, None, None)

    @rule(at=st.integers(0, WORKERS - 1), expert=st.sampled_from(["math", "code"]))
    def arrive(self, at: int, expert: str) -> None:
        worker = self.workers[at]
        hold = worker.table.acquire([expert])
        if hold is not None:
            same = [h for w in self.workers for h in w.holds if h.replica.column == hold.replica.column]
            assert len(same) < hold.replica.capacity, "bounded by what all workers have"
            worker.holds.append(hold)
            worker.in_flight.__enter__()
        self._step()

    @rule()
    def pass_time(self) -> None:
        """Until waiting requests have looked for places that other workers released."""
        self.now += 2 * PEER_REFRESH_S
        self._step()

    @rule(at=st.integers(0, WORKERS - 1), expert=st.sampled_from(["math", "code"]))
    def wait(self, at: int, expert: str) -> None:
        worker = self.workers[at]
        worker.in_flight.__enter__()
        worker.waits.append(self.loop.create_task(worker.table.wait([expert])))
        self._step()

    @rule(at=st.integers(0, WORKERS - 1), which=st.integers(0, 20))
    def cancel(self, at: int, which: int) -> None:
        if waits := self.workers[at].waits:
            waits[which % len(waits)].cancel()
        self._step()

    @rule(at=st.integers(0, WORKERS - 1), which=st.integers(0, 20))
    def answer(self, at: int, which: int) -> None:
        worker = self.workers[at]
        if worker.holds:
            with worker.holds.pop(which % len(worker.holds)):
                worker.in_flight.__exit__(None, None, None)
        self._step()

    @rule(place=st.sampled_from(sorted(EXPERTS)), event=st.sampled_from(Event))
    def happen(self, place: str, event: Event) -> None:
        if one := self.control.get(f"{place}.g{self.generations[place]}"):
            self.control.apply(one, event)

    @rule(at=st.integers(0, WORKERS - 1), place=st.sampled_from(sorted(EXPERTS)))
    def fail(self, at: int, place: str) -> None:
        """One worker sees it before the others."""
        table = self.workers[at].table
        if one := table.get(f"{place}.g{self.generations[place]}"):
            table.apply(one, Event.FAILED)
        self._step()

    @rule(place=st.sampled_from(sorted(EXPERTS)))
    def be_replaced(self, place: str) -> None:
        self.control.remove(f"{place}.g{self.generations[place]}")
        self.generations[place] += 1
        self._put(place)

    @rule(at=st.integers(0, WORKERS - 1))
    def tell(self, at: int) -> None:
        assign_columns(self.control, self.counters)
        self.workers[at].table.reassign_queue_columns(self.control.queue_columns)
        apply_snapshot(self.workers[at].table, snapshot_of(self.control))
        self._step()

    @rule(at=st.integers(0, WORKERS - 1))
    def kill(self, at: int) -> None:
        for task in self.workers[at].waits:
            task.cancel()
        self.workers[at] = self._born(at)
        self._step()  # of the dead one, into its own row still
        self.counters.clear(at)
        self.tell(at)

    @rule(at=st.integers(0, WORKERS - 1), remembers=st.booleans())
    def replace_control(self, at: int, remembers: bool) -> None:
        """By one that learns the view from a worker; the columns perhaps not."""
        known = ReplicaTable(peers=self.counters.all())
        apply_snapshot(known, snapshot_of(self.workers[at].table))
        known.queue_columns = dict(self.workers[at].table.queue_columns)
        if not remembers:
            known.queue_columns = {}
            for one in known.all():
                one.column = NO_COLUMN
        names = {one.record.replica: one for one in known.all()}
        for one in self.control.all():
            if one.name not in names:
                fresh = replica(one.name, experts=tuple(one.record.serves), capacity=one.capacity)
                fresh.record = replace(one.record)
                known.put(fresh)
        for name in names.keys() - {one.name for one in self.control.all()}:
            known.remove(name)
        self.control = known
        for worker in range(WORKERS):
            self.tell(worker)

    @invariant()
    def every_cell_is_what_its_worker_has(self) -> None:
        for at, worker in enumerate(self.workers):
            row = self.counters.counts(at)
            waiting = sum(worker.table.waiting_here(expert) for expert in ("math", "code"))
            under_way = len(worker.holds) + len(worker.waits)
            assert worker.in_flight.count == self.counters.row(at)[IN_FLIGHT] == under_way
            assert sum(row) == under_way + len(worker.holds) + waiting
            assert waiting == len(worker.waits)

    def teardown(self) -> None:
        for at, worker in enumerate(self.workers):
            while worker.waits:
                self.cancel(at, 0)
            while worker.holds:
                self.answer(at, 0)
        assert self.counters.nonzero() == 0
        for at in range(WORKERS):
            order, columns = self.counters.order(at), range(COLUMNS)
            assert not any(order.head(column, of) for column in columns for of in RequestClass)
            assert not any(order.others_waiting(column, of) for column in columns for of in RequestClass)
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()


Interleaving.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestInterleaving = Interleaving.TestCase


@pytest.mark.long
def test_many_interleavings() -> None:
    run_state_machine_as_test(Interleaving, settings=settings(max_examples=300, stateful_step_count=60, deadline=None))
