"""After any interleaving of arrivals, answers, failures, cancellations, reloads and kills every counter is zero.

Two workers, each with its own table over the same counters, as in the router; what a killed worker had counted is
cleared by its supervisor.
"""

import asyncio
from collections import defaultdict
from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hpc_router.router.replicas.admission import QueueLimits
from hpc_router.router.replicas.prefixes import PromptPrefix
from hpc_router.router.replicas.replica import PREFILL_COLUMNS, Event, Replica, Reservation, RoutingState
from hpc_router.router.replicas.table import QueueFullError, ReplicaTable
from tests.router.support import replica

EXPERTS = ("math", "code")
QUEUES = {"math": 1, "code": 2}
SPOTS = [("math-0.g1", ("math",)), ("math-1.g1", ("math",)), ("code-0.g1", ("code", "math"))]
at_most = st.integers(0, 30)


class Worker:
    """A table with the reservations and waits made on it. `cells`: its row, which outlives it."""

    def __init__(self, cells: dict[int, int], peers: list[dict[int, int]], pin_bound: float | None) -> None:
        self.table = ReplicaTable(pin_bound, QueueLimits(waiting=3), cells=cells, peers=peers)
        self.table.random = Random(0)
        self.table.reassign_queue_columns(QUEUES)
        self.replicas: list[Replica] = []
        for column, (name, experts) in enumerate(SPOTS, start=3):
            one = replica(name, experts=experts, capacity=1)
            self.table.reassign_column(one, column)
            self.table.put(one)
            self.replicas.append(one)
        self.holds: list[Reservation] = []
        self.waits: list[asyncio.Task[Reservation]] = []


class Juggling(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.rows: list[dict[int, int]] = [defaultdict(int), defaultdict(int)]
        self.workers = [self.born(0), self.born(1)]

    def born(self, at: int) -> Worker:
        return Worker(self.rows[at], [self.rows[1 - at]], pin_bound=1.25 if at else None)

    def step(self) -> None:
        """Let everything that can happen now happen, and take what was granted."""

        async def pause() -> None:
            for _ in range(3):
                await asyncio.sleep(0)

        self.loop.run_until_complete(pause())
        for worker in self.workers:
            for task in [task for task in worker.waits if task.done()]:
                worker.waits.remove(task)
                if not task.cancelled() and not isinstance(task.exception(), QueueFullError):
                    worker.holds.append(task.result())

    @rule(at=st.integers(0, 1), experts=st.permutations(EXPERTS), many=st.integers(1, 2), slot=at_most)
    def arrive(self, at: int, experts: list[str], many: int, slot: int) -> None:
        worker, wanted = self.workers[at], experts[:many]
        prefix = PromptPrefix((slot, slot + 100), (128, 256), 300, slot if many > 1 else None)
        hold = worker.table.acquire(wanted, prefix=lambda: prefix)
        if hold is not None:
            assert hold.replica.state is RoutingState.READY
            worker.holds.append(hold)
        else:
            worker.waits.append(self.loop.create_task(worker.table.wait(wanted)))
        self.step()

    @rule(at=st.integers(0, 1), which=at_most, twice=st.booleans())
    def answer(self, at: int, which: int, twice: bool) -> None:
        holds = self.workers[at].holds
        if holds:
            hold = holds.pop(which % len(holds))
            hold.release()
            if twice:
                hold.release()
            self.step()

    @rule(at=st.integers(0, 1), which=at_most)
    def begin_answer(self, at: int, which: int) -> None:
        """The engine has computed the prompt."""
        if holds := self.workers[at].holds:
            holds[which % len(holds)].prefill_ended()

    @rule(at=st.integers(0, 1), which=at_most, beside=st.booleans())
    def leave(self, at: int, which: int, beside: bool) -> None:
        """A client that waits goes, perhaps in the moment in which it is given a place."""
        worker = self.workers[at]
        if worker.waits:
            if beside and worker.holds:
                worker.holds.pop().release()
            worker.waits[which % len(worker.waits)].cancel()
            self.step()

    @rule(at=st.integers(0, 1), which=st.integers(0, 2), event=st.sampled_from(Event))
    def happen(self, at: int, which: int, event: Event) -> None:
        self.workers[at].table.apply(self.workers[at].replicas[which], event)
        self.step()

    @rule(at=st.integers(0, 1), which=st.integers(0, 2))
    def depart(self, at: int, which: int) -> None:
        self.workers[at].table.remove(self.workers[at].replicas[which].name)
        self.step()

    @rule(at=st.integers(0, 1), which=st.integers(0, 2))
    def come(self, at: int, which: int) -> None:
        self.workers[at].table.put(self.workers[at].replicas[which])
        self.step()

    @rule(at=st.integers(0, 1), waiting=st.integers(0, 4), bound=st.none() | st.integers(1, 3), shift=st.integers(0, 1))
    def reload(self, at: int, waiting: int, bound: int | None, shift: int) -> None:
        """Other bounds, and other columns to count in."""
        table = self.workers[at].table
        table.bounds = QueueLimits(waiting, {} if bound is None else {"math": bound})
        table.pin_bound = 1.25 if shift else None
        table.reassign_queue_columns({expert: column + 10 * shift for expert, column in QUEUES.items()})
        self.step()

    @rule(at=st.integers(0, 1))
    def kill(self, at: int) -> None:
        """All it had is gone, and another begins in its place."""
        for task in self.workers[at].waits:
            task.cancel()
        self.step()
        self.rows[at].clear()
        self.workers[at] = self.born(at)

    @invariant()
    def counted(self) -> None:
        for worker, row in zip(self.workers, self.rows, strict=True):
            for one in worker.replicas:
                mine = sum(hold.replica is one for hold in worker.holds)
                prefill = sum(hold.prefill_bytes for hold in worker.holds if hold.replica is one)
                assert (one.in_flight, row[one.column]) == (mine, mine)
                assert (one.prefill_bytes, row[one.column + PREFILL_COLUMNS]) == (prefill, prefill)
                assert one.in_flight <= one.capacity
            waiting = sum(worker.table.waiting_here(expert) for expert in EXPERTS)
            assert waiting >= len(worker.waits)
            assert (waiting == 0) == (not worker.waits)

    def teardown(self) -> None:
        """Every client gone, every answer given: nothing is counted anywhere."""
        for worker in self.workers:
            for task in worker.waits:
                task.cancel()
        self.step()
        for worker in self.workers:
            for hold in worker.holds:
                hold.release()
        self.step()
        for worker in self.workers:
            for hold in worker.holds:  # who was given a place by the releases above
                hold.release()
            assert [one.in_flight for one in worker.replicas] == [0, 0, 0]
            assert [worker.table.waiting(expert) for expert in EXPERTS] == [0, 0]
            assert worker.waits == []
        assert not any(value for row in self.rows for value in row.values())
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()


TestJuggling = Juggling.TestCase
TestJuggling.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
