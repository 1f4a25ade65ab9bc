"""The requests that wait for a replica: one queue per expert, in the fair order of `fair_order`. No I/O.

A request may wait in the queues of several experts; it leaves all of them once it has a reservation. `ReplicaTable`
decides which replica has room and when a request joins the queue of its next expert; this module does not know the
states of replicas.
"""

import asyncio
from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Final, NamedTuple

from hpc_router.router.replicas.admission import DEFAULT_WAIT_S, MIN_WAIT_S, DepartureRate
from hpc_router.router.replicas.fair_order import CLASSES, Flow, QueueHead, RequestClass, SharedOrder
from hpc_router.router.replicas.replica import Replica, Reservation

YIELD_S: Final = 0.5
"""Maximum time in seconds for which a free place is left to another worker whose request is first. A worker that does
not take it within this time does not run, or knows a reason not to take it."""
_fits_any: Final[Callable[["Waiter"], bool]] = attrgetter("fits_any")
_number: Final[Callable[["Waiter"], int]] = attrgetter("number")


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that waits for a replica.

    `experts`: the experts in whose queues it waits; `later`: the experts whose queues it joins when none of `experts`
    has a ready replica. `number`: its position in the order of arrival; `since`: when it arrived, in seconds of the
    clock of `WaitingLine`. `flow`: its class and user. `avoid`: replicas that have failed this request; `only`: the
    only replica that may serve it, or None. `granted` gets the reservation.
    """

    number: int
    since: float
    flow: Flow
    later: list[str]
    avoid: Collection[Replica]
    only: Replica | None
    granted: "asyncio.Future[Reservation]"
    experts: list[str] = field(default_factory=list)
    waits: bool = True

    @property
    def fits_any(self) -> bool:
        """Whether any replica of its experts may serve the request. Only the tags of such requests are published to the
        other workers, which then leave a free place to this request if it is first."""
        return self.only is None and not self.avoid


class Queued(NamedTuple):
    """A request in a queue. The queue is sorted by tag, then by order of arrival (`number`)."""

    tag: int
    number: int
    waiter: Waiter


class Grant(NamedTuple):
    """The request that gets the next place. `expert`: the expert in whose queue it waits. `at`: the virtual time at
    which its class was due (see `SharedOrder.turn`)."""

    queued: Queued
    expert: str
    at: int


class FairQueue:
    """The requests of one worker that wait for one expert, sorted by tag within each class."""

    __slots__ = ("_flows", "_orders")

    def __init__(self) -> None:
        self._orders: tuple[list[Queued], ...] = tuple([] for _ in CLASSES)
        self._flows: dict[tuple[RequestClass, str], dict[Waiter, int]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._orders))

    def __iter__(self) -> Iterator[Waiter]:
        return (queued.waiter for order in self._orders for queued in order)

    def count(self, of: RequestClass) -> int:
        return len(self._orders[of])

    def last_tag(self, flow: Flow) -> int:
        """Returns the tag of the last waiting request of this class and user (`flow`); 0 if none waits."""
        waiting = self._flows.get(flow[:2])
        return waiting[next(reversed(waiting))] if waiting else 0

    def add(self, waiter: Waiter, tag: int) -> None:
        insort(self._orders[waiter.flow.request_class], Queued(tag, waiter.number, waiter))
        self._flows.setdefault(waiter.flow[:2], {})[waiter] = tag

    def remove(self, waiter: Waiter) -> None:
        """Removes the request from the queue; does nothing if it is not in the queue."""
        key = waiter.flow[:2]
        tag = self._flows.get(key, {}).pop(waiter, None)
        if tag is None:
            return
        if not self._flows[key]:
            del self._flows[key]
        order = self._orders[waiter.flow.request_class]
        del order[bisect_left(order, (tag, waiter.number))]

    def first(self, of: RequestClass, fits: Callable[[Waiter], bool]) -> Queued | None:
        """Returns the first request of class `of` for which `fits` is true; None if there is none."""
        return next((queued for queued in self._orders[of] if fits(queued.waiter)), None)

    def oldest(self, of: RequestClass) -> Waiter | None:
        """Returns the request of class `of` that arrived first; None if none waits. Looks at one request per user."""
        firsts = (next(iter(waiting)) for (each, _), waiting in self._flows.items() if each is of)
        return min(firsts, key=_number, default=None)

    def last(self, of: RequestClass) -> Waiter | None:
        """Returns the last request of class `of` that has not got a place yet; None if there is none."""
        return next((queued.waiter for queued in reversed(self._orders[of]) if not queued.waiter.granted.done()), None)


@dataclass(slots=True)
class WaitingLine:
    """The queues of one worker by expert, and their departure rates. `on_length(expert, length)` is called whenever a
    queue changes. `order`: the order that all workers share. `column_of`: returns the column of an expert's queue in
    `order`. `queues` has no empty queue."""

    clock: Callable[[], float]
    on_length: Callable[[str, int], None]
    column_of: Callable[[str], int]
    order: SharedOrder = field(default_factory=SharedOrder)
    queues: dict[str, FairQueue] = field(default_factory=dict)
    _departure_rates: dict[str, DepartureRate] = field(default_factory=dict)
    _arrivals: int = 0
    _left_to: dict[tuple[str, RequestClass], tuple[QueueHead, float]] = field(default_factory=dict)
    """By expert and class, the request of another worker to which a free place was left last, and since when."""

    def arrive(self, experts: Sequence[str], avoid: Collection[Replica], only: Replica | None, flow: Flow) -> Waiter:
        """Returns a waiter for a request that arrives now. It is in no queue until `join_next`. The parameters are as
        in `Waiter`, except that `experts` become its `later` ones."""
        self._arrivals += 1
        self.order.count_user(flow.slot, 1)
        granted = asyncio.get_running_loop().create_future()
        return Waiter(self._arrivals, self.clock(), flow, list(experts), set(avoid), only, granted)

    def join_next(self, waiter: Waiter) -> None:
        """Moves the first expert of `waiter.later` to `waiter.experts`, and adds the waiter to this expert's queue."""
        expert, flow = waiter.later.pop(0), waiter.flow
        waiter.experts.append(expert)
        queue = self.queues.get(expert)
        if queue is None:
            self._departure_rates.setdefault(expert, DepartureRate()).began(self.clock())
            queue = self.queues[expert] = FairQueue()
        last = queue.last_tag(flow)
        queue.add(waiter, self.order.next_tag(self.column_of(expert), flow.request_class, last=last, slot=flow.slot))
        self._changed(expert)

    def leave(self, waiter: Waiter) -> None:
        """Removes the waiter from all queues. A second call has no effect."""
        if not waiter.waits:
            return
        waiter.waits = False
        self.order.count_user(waiter.flow.slot, -1)
        for expert in waiter.experts:
            queue = self.queues[expert]
            queue.remove(waiter)
            if not queue:
                del self.queues[expert]
            self._changed(expert)

    def grant(self, turn: Grant, serves: Collection[str], reserve: Callable[[], Reservation]) -> None:
        """Gives the waiter of `turn` the reservation that `reserve` makes, and removes the waiter from all queues.
        `serves`: the experts of the replica that has the place."""
        waiter, tag = turn.queued.waiter, turn.queued.tag
        columns = [self.column_of(expert) for expert in serves]
        self.order.granted(columns, waiter.flow.request_class, tag=tag, turn=turn.at)
        self.leave(waiter)
        self._departure_rates[turn.expert].left(self.clock())
        waiter.granted.set_result(reserve())

    def fail(self, waiter: Waiter, error: Exception) -> None:
        """Removes the waiter from all queues and makes its wait for a reservation raise `error`."""
        self.leave(waiter)
        waiter.granted.set_exception(error)

    def next_turn(
        self,
        serves: Collection[str],
        fits: Callable[[Waiter], bool],
        is_open: Callable[[str, RequestClass], bool],
        weights: Sequence[float],
    ) -> Grant | None:
        """Returns the request that gets the next free place of a replica, which serves the experts `serves`. Returns
        None if no request of this worker may have the place, or if it is left to another worker whose request is first.

        `fits`: whether a waiter may use this replica. `is_open`: whether an expert may serve one more request of a
        class. `weights`: the weight of each class.
        """
        first: tuple[int, Grant | None, QueueHead | None, tuple[str, RequestClass] | None] | None = None
        any_own = False
        columns = [self.column_of(expert) for expert in serves]
        for of in CLASSES:
            own: Grant | None = None
            other: QueueHead | None = None
            place: tuple[str, RequestClass] | None = None
            at = -1
            for expert in serves:
                if not is_open(expert, of):
                    continue
                queue = self.queues.get(expert)
                queued = None if queue is None else queue.first(of, fits)
                head = self._head(expert, of)
                if (queued is not None or head is not None) and at < 0:
                    at = self.order.turn(columns, of, weights[of])
                if queued is not None and (own is None or queued < own.queued):
                    own = Grant(queued, expert, at)
                if head is not None and (other is None or head < other):
                    other, place = head, (expert, of)
            any_own = any_own or own is not None
            if at >= 0 and (first is None or at < first[0]):
                first = at, own, other, place
        if first is None or not any_own:
            return None
        _, own, other, place = first
        if other is None or place is None or (own is not None and (own.queued.tag, self.order.worker) < other):
            return own
        if self._left_to.get(place, (None, 0.0))[0] != other:
            self._left_to[place] = other, self.clock()
        return None

    def others_wait(self, expert: str, is_open: Callable[[str, RequestClass], bool]) -> bool:
        """Returns whether another worker has a request waiting for the expert, of a class that `is_open` allows."""
        return any(self._head(expert, of) is not None and is_open(expert, of) for of in CLASSES)

    def _head(self, expert: str, of: RequestClass) -> QueueHead | None:
        """Returns the first request of class `of` that waits for the expert at another worker. Returns None if there is
        none, or if a place was left to this request for `YIELD_S` and its worker has not taken it."""
        if not self.order.peers:
            return None
        head = self.order.head(self.column_of(expert), of)
        if head is not None:
            left, since = self._left_to.get((expert, of), (None, 0.0))
            if left == head and self.clock() - since >= YIELD_S:
                return None
        return head

    def move(self, expert: str, column: int) -> None:
        """Moves the values of the expert's queue in this worker's cells from `column` to its present column."""
        self.order.move(column, self.column_of(expert))
        self._changed(expert)

    def length(self, expert: str) -> int:
        """Returns the number of this worker's requests that wait for the expert."""
        return len(self.queues.get(expert, ()))

    def waiting(self, expert: str, of: RequestClass) -> int:
        """Returns the number of requests of class `of` that wait for the expert at any worker."""
        queue = self.queues.get(expert)
        return (0 if queue is None else queue.count(of)) + self.order.others_waiting(self.column_of(expert), of)

    def oldest_waits(self) -> dict[str, dict[str, float]]:
        """Returns for how many seconds the oldest request of each queue has waited, by expert and by name of the class.
        Contains only classes of which a request of this worker waits."""
        now = self.clock()
        return {
            expert: {
                of.label: round(now - oldest.since, 3) for of in CLASSES if (oldest := queue.oldest(of)) is not None
            }
            for expert, queue in self.queues.items()
        }

    def wait_s(self, expert: str) -> float:
        """Returns the expected wait in seconds of a request that would join the expert's queue now."""
        rate = self._departure_rates.get(expert)
        return DEFAULT_WAIT_S if rate is None else rate.wait_s(self.length(expert), self.clock())

    def longest_wait_s(self) -> float:
        """Returns the longest expected wait in seconds over all queues."""
        return max(map(self.wait_s, self.queues), default=MIN_WAIT_S)

    def _changed(self, expert: str) -> None:
        """Publishes the length and the first tag of the expert's queue to the other workers, and calls `on_length`."""
        queue, column = self.queues.get(expert), self.column_of(expert)
        for of in CLASSES:
            first = None if queue is None else queue.first(of, _fits_any)
            self.order.publish(
                column, of, head=0 if first is None else first.tag, waiting=0 if queue is None else queue.count(of)
            )
        self.on_length(expert, 0 if queue is None else len(queue))
