"""The requests that wait for a replica: one queue per expert, in order of arrival. No I/O.

A request may wait in the queues of several experts; it leaves all of them once it has a reservation. `ReplicaTable`
decides which replica has room and when a request joins the queue of its next expert; this module does not know the
states of replicas.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from hpc_router.router.replicas.admission import DEFAULT_WAIT_S, MIN_WAIT_S, DepartureRate
from hpc_router.router.replicas.replica import Replica, Reservation


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that waits for a replica.

    `experts`: the experts in whose queues it waits; `later`: the experts whose queues it joins when none of `experts`
    has a ready replica. `number`: its position in the order of arrival. `avoid`: replicas that have failed this
    request; `only`: the only replica that may serve it, or None. `granted` gets the reservation.
    """

    number: int
    later: list[str]
    avoid: Collection[Replica]
    only: Replica | None
    granted: "asyncio.Future[Reservation]"
    experts: list[str] = field(default_factory=list)


@dataclass(slots=True)
class WaitingLine:
    """The queues of one worker by expert, and their departure rates. `on_length(expert, length)` is called whenever a
    queue changes. `queues` has no empty queue."""

    clock: Callable[[], float]
    on_length: Callable[[str, int], None]
    queues: dict[str, dict[Waiter, None]] = field(default_factory=dict)
    _departure_rates: dict[str, DepartureRate] = field(default_factory=dict)
    _arrivals: int = 0

    def arrive(self, experts: Sequence[str], avoid: Collection[Replica], only: Replica | None) -> Waiter:
        """Returns a new waiter that is in no queue yet."""
        self._arrivals += 1
        return Waiter(self._arrivals, list(experts), set(avoid), only, asyncio.get_running_loop().create_future())

    def join_next(self, waiter: Waiter) -> None:
        """Moves the first of the waiter's later experts to its experts, and adds the waiter to the queue of that
        expert."""
        expert = waiter.later.pop(0)
        waiter.experts.append(expert)
        if expert not in self.queues:
            self._departure_rates.setdefault(expert, DepartureRate()).began(self.clock())
        self.queues.setdefault(expert, {})[waiter] = None
        self.on_length(expert, self.length(expert))

    def leave(self, waiter: Waiter) -> None:
        """Removes the waiter from all queues."""
        for expert in waiter.experts:
            queue = self.queues.get(expert, {})
            queue.pop(waiter, None)
            if not queue:
                self.queues.pop(expert, None)
            self.on_length(expert, self.length(expert))

    def grant(self, waiter: Waiter, expert: str, reserve: Callable[[], Reservation]) -> None:
        """Removes the waiter from all queues and gives it the reservation that `reserve` makes on a replica of
        `expert`."""
        self.leave(waiter)
        self._departure_rates[expert].left(self.clock())
        waiter.granted.set_result(reserve())

    def fail(self, waiter: Waiter, error: Exception) -> None:
        """Removes the waiter from all queues and raises `error` where the reservation is awaited."""
        self.leave(waiter)
        waiter.granted.set_exception(error)

    def in_order(self, experts: Iterable[str]) -> Sequence[tuple[Waiter, str]]:
        """Returns pairs of waiter and expert for the queues of these experts, in order of arrival over all queues."""
        queues = [(expert, self.queues[expert]) for expert in experts if expert in self.queues]
        waiting = [(waiter, expert) for expert, queue in queues for waiter in queue]
        if len(queues) > 1:
            waiting.sort(key=lambda one: one[0].number)
        return waiting

    def length(self, expert: str) -> int:
        """Returns the number of this worker's requests that wait for the expert."""
        return len(self.queues.get(expert, ()))

    def wait_s(self, expert: str) -> float:
        """Returns the expected wait in seconds of a request that would join the expert's queue now."""
        rate = self._departure_rates.get(expert)
        return DEFAULT_WAIT_S if rate is None else rate.wait_s(self.length(expert), self.clock())

    def longest_wait_s(self) -> float:
        """Returns the longest expected wait in seconds over all queues."""
        return max(map(self.wait_s, self.queues), default=MIN_WAIT_S)
