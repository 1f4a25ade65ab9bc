"""The replica table: which replicas can serve requests, how many requests each has in flight, and which request gets a
free place.

A request gets a `Reservation` on a replica that `prefix_balance` or `balancing` chooses, or waits in the `WaitingLine`.
A released place goes in the same step to the waiting request whose turn it is, so later requests cannot overtake and no
wake-up is lost. If it is the turn of a request of another worker, the place is left to that worker. A request for
several experts waits for the first expert that has a ready replica. When this expert has no ready replica any more, the
request also waits for the next experts. When a queue is full, a waiting request of the lowest class is shed for one of
a higher class.

No I/O. The table knows neither HTTP nor the source of its replicas.
"""

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from random import Random
from typing import Final

from hpc_router.errors import HpcRouterError, ScaledToZeroError, ShedError
from hpc_router.relay.in_flight import Cells
from hpc_router.router.replicas.admission import QueueLimits
from hpc_router.router.replicas.balancing import power_of_two_choices
from hpc_router.router.replicas.fair_order import (
    INTERACTIVE,
    LOWEST,
    OWNERS_FLOW,
    WAITING_AT_ALL,
    Flow,
    RequestClass,
    SharedOrder,
)
from hpc_router.router.replicas.lifetime import Lifetimes, outliving
from hpc_router.router.replicas.prefix_balance import PrefixBalance, ReplicaEstimate
from hpc_router.router.replicas.prefixes import PromptPrefix
from hpc_router.router.replicas.replica import (
    NO_COLUMN,
    PREFILL_COLUMNS,
    READY,
    ClassReservation,
    Event,
    Replica,
    Reservation,
    RoutingState,
)
from hpc_router.router.replicas.waiting_line import Waiter, WaitingLine
from hpc_router.state.forecast import ON_DEMAND, StartForecast
from hpc_router.state.registry import Record, RecordKind

PEER_REFRESH_S: Final = 0.005
"""Interval in seconds at which waiting requests check for places that other workers have released."""
DEFAULT_WAITING: Final = 1024
"""Maximum number of waiting requests per expert of a table that is made without limits."""


class ReplicaLostError(HpcRouterError):
    """The only replica that may serve the request is not ready."""


class QueueFullError(HpcRouterError):
    """The expert's queue has reached `router.max_waiting`. `serves`: whether the expert has a ready replica."""

    def __init__(self, expert: str, *, serves: bool) -> None:
        super().__init__(f"the queue of {expert} is full: as many requests wait as router.max_waiting allows")
        self.expert, self.serves = expert, serves


_ON_DEMAND: Final = StartForecast(ON_DEMAND)
ReadPrefix = Callable[[], PromptPrefix]
"""Returns the beginnings of a request's prompt."""
ExpectedDuration = Callable[[str], float]
"""Returns the expected duration in seconds of a request on the given expert."""
_has_room: Final[Callable[[Replica], bool]] = attrgetter("has_room")


@dataclass(slots=True, repr=False)
class ReplicaTable:
    """The table of all replicas by name, and the requests of this worker that wait for a replica.

    `pin_bound`: maximum load of a replica that is chosen for its prefix cache, as a multiple of the average load; None
    turns the prefix-aware choice off. `bounds`: limits of the requests per expert. `on_change` is called when a replica
    has changed. `forecasts`: for experts without a ready replica, the forecast of the next one. `on_demand`: the
    experts that get a replica when a request comes, even before there is a forecast.

    This worker writes its request counts to `cells` and reads those of the other workers from `peers`. `queue_columns`:
    by expert, the column that counts its waiting requests. `order`: the order of waiting requests over all workers.
    `excess`: returns by how many requests the router exceeds `router.max_in_flight`.
    """

    pin_bound: float | None = None
    bounds: QueueLimits = field(default_factory=lambda: QueueLimits(waiting=DEFAULT_WAITING))
    random: Random = field(default_factory=Random)
    clock: Callable[[], float] = time.monotonic
    cells: Cells = field(default_factory=lambda: defaultdict[int, int](int))
    peers: Sequence[Cells] = ()
    queue_columns: Mapping[str, int] = field(default_factory=dict)
    order: SharedOrder = field(default_factory=SharedOrder)
    on_change: Callable[[], None] | None = None
    excess: Callable[[], int] = field(default=lambda: 0)
    forecasts: Mapping[str, StartForecast] = field(default_factory=dict)
    on_demand: Collection[str] = ()
    lifetimes: Lifetimes = field(default_factory=Lifetimes)
    _scaled_to_zero: Mapping[str, str] = field(default_factory=dict)
    _replicas: dict[str, Replica] = field(default_factory=dict)
    _by_expert: dict[str, list[Replica]] = field(default_factory=dict)
    _balance: PrefixBalance = field(init=False)
    _line: WaitingLine = field(init=False)
    _class_in_flight: dict[tuple[str, RequestClass], int] = field(default_factory=dict)  # of this worker
    _acquired_total: int = 0
    _shortest_context: float | None = None  # None: to be computed again
    _peer_refresh: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        self._line = WaitingLine(lambda: self.clock(), self._count_waiting, self._queue_column, self.order)
        self._balance = PrefixBalance(self._replicas, other_workers=len(self.peers))

    def __repr__(self) -> str:
        """Shows the replicas of each expert with their load and capacity, and the length of its queue, over all
        workers. Example: `math: math-0.g1 ready 2/8, math-1.g1 ejected 0/8, 3 waiting`."""
        self.refresh_peer_counts(self.all())
        parts = []
        for expert in sorted(self.experts() | self._line.queues.keys()):
            replicas = [f"{r.name} {r.state} {r.load}/{r.capacity}" for r in self.of(expert)] or ["no replica"]
            parts.append(f"{expert}: {', '.join(replicas)}, {self.waiting(expert)} waiting")
        return f"<ReplicaTable {'; '.join(parts) or 'empty'}>"

    def all(self) -> Collection[Replica]:
        return self._replicas.values()

    def get(self, name: str) -> Replica | None:
        return self._replicas.get(name)

    def put(self, replica: Replica) -> None:
        """Adds a replica, in place of one with the same name, and offers its places to waiting requests."""
        self.remove(replica.name)
        self._replicas[replica.name] = replica
        self._balance.added(replica)
        self._index()
        self._changed()
        self.offer(replica)

    def renew(self, replica: Replica, record: Record) -> None:
        """Replaces the replica's record with a newer one of the same server process."""
        before, self._shortest_context = replica.record, None
        replica.renew(record)
        if record.serves != before.serves:
            self._index()
            self.offer(replica)
        if replace(record, beat=before.beat) != before:
            self._changed()

    def refresh_peer_counts(self, replicas: Iterable[Replica]) -> None:
        """Reads how many requests the other workers have in flight on these replicas, and how much of their prompts is
        still to be computed."""
        for replica in replicas:
            column, in_flight, prefill_bytes = replica.column, 0, replica.foreign_bytes
            for row in self.peers:
                in_flight += row[column]
                prefill_bytes += row[column + PREFILL_COLUMNS]
            replica.peer_in_flight, replica.peer_prefill_bytes = in_flight, prefill_bytes

    def reassign_column(self, replica: Replica, column: int) -> None:
        """Moves the counts of the replica's requests and of their prefill to another column of the shared counters."""
        if column != replica.column:
            self.cells[replica.column] = self.cells[replica.column + PREFILL_COLUMNS] = 0
            self.cells[column] = len(replica.reservations)
            self.cells[column + PREFILL_COLUMNS] = replica.prefill_bytes
            replica.column = column

    def remove(self, name: str) -> None:
        """Removes the replica. Requests that it still serves are marked as lost; their later releases change nothing
        here."""
        if replica := self._replicas.pop(name, None):
            self._balance.removed(replica)
            self._index()
            replica.mark_lost()
            self._fail_waiters(replica)
            self._changed()

    @property
    def acquired_total(self) -> int:
        """Number of reservations made since the start."""
        return self._acquired_total

    def of(self, expert: str) -> Sequence[Replica]:
        """Returns the replicas of the expert, in any state."""
        return self._by_expert.get(expert, ())

    def shortest_context(self) -> float:
        """Returns the shortest context length of any replica, in tokens, among those that are known; infinite if none
        is. It is computed again after a replica was added, renewed or removed."""
        if self._shortest_context is None:
            lengths = (replica.max_model_len for replica in self._replicas.values())
            self._shortest_context = min((length for length in lengths if length is not None), default=math.inf)
        return self._shortest_context

    def experts(self) -> set[str]:
        return {expert for replica in self._replicas.values() for expert in replica.record.serves}

    def ready(self) -> dict[str, int]:
        """Returns the experts that have a ready replica, each with the number of requests in flight on all its
        replicas."""
        if self.peers:
            self.refresh_peer_counts(self.all())
        load: dict[str, int] = {}
        for replica in self._replicas.values():
            if replica.state is RoutingState.READY:
                for expert in replica.record.serves:
                    load[expert] = load.get(expert, 0) + replica.load
        return load

    def apply(self, replica: Replica, event: Event) -> bool:
        """Applies the event to the replica's state; returns whether the state changed. A replica that becomes ready is
        also offered to waiting requests that avoided it."""
        before = replica.state
        replica.apply(event)
        return self._state_changed(replica, before, lost=event is Event.FAILED)

    def set_state(self, replica: Replica, state: RoutingState, *, lost: bool) -> bool:
        """Sets the state that the control process has decided; returns whether the state changed. Requests are handled
        as in `apply`."""
        before, replica.state = replica.state, state
        return self._state_changed(replica, before, lost=lost)

    def _state_changed(self, replica: Replica, before: RoutingState, *, lost: bool) -> bool:
        if replica.state is before:
            return False
        self._changed()
        if replica.state is RoutingState.READY:
            self.offer(replica, ignore_avoid=True)
            return True
        self._fail_waiters(replica)
        if lost:
            replica.mark_lost()
        return True

    def acquire(
        self,
        experts: Sequence[str],
        *,
        avoid: Collection[Replica] = (),
        only: Replica | None = None,
        prefix: ReadPrefix | None = None,
        needed_s: ExpectedDuration | None = None,
        request_class: RequestClass = INTERACTIVE,
    ) -> Reservation | None:
        """Reserves a place on the replica that `pick` chooses; returns None if `pick` finds no replica."""
        picked = self.pick(
            experts, avoid=avoid, only=only, prefix=prefix, needed_s=needed_s, request_class=request_class
        )
        if picked is None:
            return None
        reservation = self.reserve(*picked, request_class if self.bounds.limits_classes else None)
        if prefix is not None:
            self.place(reservation, prefix)
        return reservation

    def place(self, reservation: Reservation, prefix: ReadPrefix) -> None:
        """Records which prompt the reserved replica gets, if its expert has other replicas to choose from."""
        if self.pin_bound and len(self._by_expert.get(reservation.expert, ())) > 1:
            replica = reservation.replica
            self._balance.place(reservation, prefix(), now=self.clock())
            self.cells[replica.column + PREFILL_COLUMNS] = replica.prefill_bytes

    def measure_prefill(self, reservation: Reservation) -> None:
        self._balance.measure(reservation, now=self.clock())

    def explain(self, expert: str, prefix: PromptPrefix) -> list[ReplicaEstimate]:
        """Returns what the choice of a replica of the expert would weigh for a prompt; empty without a choice."""
        replicas = self._by_expert.get(expert, ())
        if not self.pin_bound or len(replicas) < 2:
            return []
        if self.peers:
            self.refresh_peer_counts(replicas)
        return self._balance.explain(expert, replicas, prefix, pin_bound=self.pin_bound, now=self.clock())

    def pick(
        self,
        experts: Sequence[str],
        *,
        avoid: Collection[Replica] = (),
        only: Replica | None = None,
        prefix: ReadPrefix | None = None,
        needed_s: ExpectedDuration | None = None,
        request_class: RequestClass = INTERACTIVE,
    ) -> tuple[Replica, str] | None:
        """Returns a replica with room and its expert, which is the first of these experts that has a ready replica;
        None if that expert has no replica with room, or if another worker has a request that waits for the room.

        `avoid`: replicas that are not chosen; `only`: the only replica that may be chosen. `prefix` is called
        only if there is a choice. `needed_s` is called only if a replica nears the end of its walltime; the request
        then goes to a replica with enough walltime left, or else to the replica whose walltime ends last.
        """
        for expert in experts:
            replicas = self._by_expert.get(expert, ())
            if self.peers:
                self.refresh_peer_counts(replicas)
                if self._line.queues:  # places that other workers released go to the waiting requests first
                    for replica in replicas:
                        self.offer(replica)
            if self.bounds.limits_experts:
                if not self._is_open(expert, request_class):
                    if self.has_ready(expert, avoid):
                        return None
                    continue
                if self._others_first(expert):
                    return None
            if len(replicas) == 1:
                replica = replicas[0]
                if replica.state is not READY or replica in avoid or replica is not (only or replica):
                    continue
                load = len(replica.reservations) + replica.peer_in_flight
                if load >= replica.nearly_full and (load >= replica.capacity or self._others_first(expert)):
                    return None
                return replica, expert
            if replicas:
                plain = only is None and not avoid
                fits = _has_room if plain else partial(_is_candidate, avoid=avoid, only=only)
                if needed_s is not None and expert in self.lifetimes.expiring:
                    plain, fits = False, outliving(list(filter(fits, replicas)), needed_s(expert)).__contains__
                best = None
                if prefix is not None and self.pin_bound:
                    best = self._balance.choose(
                        expert, replicas, prefix(), fits=None if plain else fits, pin_bound=self.pin_bound,
                        now=self.clock(),
                    )  # fmt: skip
                best = best or power_of_two_choices(replicas, fits=fits, random=self.random)
                if best is not None:
                    nearly_full = len(best.reservations) + best.peer_in_flight >= best.nearly_full
                    return None if nearly_full and self._others_first(expert) else (best, expert)
                if self.has_ready(expert, avoid):
                    return None
        return None

    def _at_bound(self, expert: str) -> bool:
        """Returns whether the expert has as many requests in flight as its limit allows."""
        bound = self.bounds.in_flight.get(expert)
        return bound is not None and self.load(expert) >= bound

    def _others_first(self, expert: str) -> bool:
        """Returns whether the few free places of the expert are for requests that wait at other workers."""
        return any(row[WAITING_AT_ALL] for row in self.order.peers) and self._line.others_wait(expert, self._is_open)

    def _is_open(self, expert: str, of: RequestClass) -> bool:
        """Returns whether the limits of the expert and of the class allow a further request in flight."""
        bounds = self.bounds
        if not bounds.limits_experts:
            return True
        limit = bounds.classes[of]
        if limit is not None and self.class_in_flight(expert, of) >= limit:
            return False
        return not self._at_bound(expert)

    def class_in_flight(self, expert: str, of: RequestClass) -> int:
        """Returns the number of requests of a class with a limit that are in flight on the expert's replicas."""
        own = self._class_in_flight.get((expert, of), 0)
        return own + self.order.others_in_flight(self._queue_column(expert), of)

    def count_class(self, replica: Replica, of: RequestClass, change: int) -> None:
        """Adds `change` to the number of this worker's requests of the class in flight, for each expert of the
        replica."""
        for expert in replica.record.serves:
            count = self._class_in_flight[expert, of] = self._class_in_flight.get((expert, of), 0) + change
            self.order.publish_in_flight(self._queue_column(expert), of, count)

    def load(self, expert: str) -> int:
        """Returns the number of requests in flight on all replicas of the expert."""
        return sum(replica.load for replica in self._by_expert.get(expert, ()))

    def has_ready(self, expert: str, avoid: Collection[Replica]) -> bool:
        """Returns whether the expert has a ready replica that is not one of `avoid`."""
        return any(r.state is READY and r not in avoid for r in self._by_expert.get(expert, ()))

    def reserve(self, replica: Replica, expert: str, of: RequestClass | None = None) -> Reservation:
        """Makes a reservation on a replica that has room. `of`: the class for which it counts; None if no class has a
        limit."""
        self._acquired_total += 1
        replica.last_used = self._acquired_total
        if of is None:
            reservation = Reservation(replica, expert, self)
        else:
            reservation = ClassReservation(replica, expert, self, _counter=self, _class=of)
        replica.reservations.add(reservation)
        self.cells[replica.column] = len(replica.reservations)
        return reservation

    async def wait(
        self,
        experts: Sequence[str],
        *,
        avoid: Collection[Replica] = (),
        only: Replica | None = None,
        flow: Flow = OWNERS_FLOW,
    ) -> Reservation:
        """Waits in the queues of the experts, and returns a reservation on the first of these experts that has a ready
        replica.

        With `only`, the reservation is on that replica; raises ReplicaLostError as soon as that replica is not ready.
        If a queue is full, raises ShedError for a request of the lowest class, and QueueFullError if all requests that
        wait have the highest. Raises ScaledToZeroError if none of the experts can have a replica.
        """
        if only is not None and (only.state is not RoutingState.READY or self._replicas.get(only.name) is not only):
            raise ReplicaLostError(f"{only.name} is not ready")
        if self._scaled_to_zero and only is None:
            possible = [expert for expert in experts if not self._is_absent(expert)]
            if not possible:
                raise self._absent_error(experts)
            experts = possible
        waiter = self._line.arrive(experts, avoid, only, flow)
        try:
            self._extend_to_next_expert(waiter)
            for expert in waiter.experts:
                if self.waiting(expert) > self.bounds.waiting:
                    self._make_room(expert, waiter)
            if self.peers:
                for expert in tuple(waiter.experts):  # a place may be free that was left to a request of another worker
                    for replica in self.of(expert):
                        self.offer(replica)
                if self._peer_refresh is None:
                    later = asyncio.get_running_loop().call_later
                    self._peer_refresh = later(PEER_REFRESH_S, self._offer_released_by_peers)
            return await waiter.granted
        except asyncio.CancelledError:
            granted = waiter.granted
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                granted.result().release()  # granted in the same step as the cancellation: the next waiter gets it
            raise
        finally:
            self._line.leave(waiter)

    def _make_room(self, expert: str, waiter: Waiter) -> None:
        """Sheds a request of the lowest class because `waiter` exceeds the limit of the expert's queue. If another
        worker has that request, it sheds it. Raises ShedError if `waiter` itself is shed, and QueueFullError if there
        is no request to shed."""
        lowest = self._line.waiting(expert, LOWEST)
        if waiter.flow.request_class is LOWEST:
            raise self._shed_error(expert, "max_waiting")
        if self.waiting(expert) - lowest > self.bounds.waiting:
            raise QueueFullError(expert, serves=self.has_ready(expert, waiter.avoid))
        self._shed(expert, "max_waiting")

    def _shed(self, expert: str, limit: str) -> bool:
        """Makes the last request of the lowest class that waits for the expert at this worker fail with ShedError.
        Returns whether there is one."""
        queue = self._line.queues.get(expert)
        last = None if queue is None else queue.last(LOWEST)
        if last is None:
            return False
        self._line.fail(last, self._shed_error(expert, limit))
        return True

    def _shed_error(self, expert: str, limit: str) -> ShedError:
        what = {
            "max_waiting": f"{self.bounds.waiting} requests wait for {expert}, the limit of router.max_waiting",
            "max_in_flight": "as many requests are in flight as router.max_in_flight allows",
        }[limit]
        return ShedError(
            f"{what}, and requests of class {LOWEST.label} are shed first",
            limit=limit,
            retry_after_s=self.wait_s(expert),
        )

    def shed_for_newcomer(self) -> bool:
        """Makes room for a request beyond `router.max_in_flight`: sheds a waiting request of the lowest class at this
        worker, or lets another worker shed one. Returns False if there is none."""
        if any(self._shed(expert, "max_in_flight") for expert in tuple(self._line.queues)):
            return True
        return any(self._line.waiting(expert, LOWEST) for expert in self.queue_columns)

    def _shed_excess(self) -> None:
        """Sheds this worker's waiting requests of the lowest class while a limit is exceeded, because another worker
        has admitted a request of a higher class."""
        for expert in tuple(self._line.queues):
            for _ in range(self.waiting(expert) - self.bounds.waiting):
                if not self._shed(expert, "max_waiting"):
                    break
        for _ in range(self.excess()):
            if not any(self._shed(expert, "max_in_flight") for expert in tuple(self._line.queues)):
                break

    def set_scaled_to_zero(self, experts: Mapping[str, str]) -> None:
        """Sets the experts that shall have no replicas. The value is the expert to scale up instead: for an adapter,
        its host. Requests that wait only for such experts fail."""
        self._scaled_to_zero = experts
        for expert in experts:
            self._fail_absent(expert)

    def _is_absent(self, expert: str) -> bool:
        """Returns whether no request can get a replica of this expert: it is scaled to 0, has no ready replica left,
        and has no external endpoint."""
        return expert in self._scaled_to_zero and not any(
            replica.state is READY or replica.record.kind is RecordKind.EXTERNAL for replica in self.of(expert)
        )

    def _fail_absent(self, expert: str) -> None:
        """Fails those requests in the queue of `expert` for which all experts that may serve them are absent (see
        `_is_absent`)."""
        for waiter in tuple(self._line.queues.get(expert, ())):
            wanted = (*waiter.experts, *waiter.later)
            if not waiter.granted.done() and waiter.only is None and all(map(self._is_absent, wanted)):
                self._line.fail(waiter, self._absent_error(wanted))

    def _absent_error(self, experts: Sequence[str]) -> ScaledToZeroError:
        scale = " ".join(f"{host}=1" for host in dict.fromkeys(self._scaled_to_zero[expert] for expert in experts))
        return ScaledToZeroError(
            f"{' and '.join(experts)} {'is' if len(experts) == 1 else 'are'} scaled to 0 replicas: "
            f"`hpc-router scale {scale}` starts one"
        )

    def waiting(self, expert: str) -> int:
        """Returns the number of requests of all workers that wait for the expert."""
        column = self.queue_columns.get(expert, NO_COLUMN)
        others = sum(row[column] for row in self.peers) if column != NO_COLUMN else 0
        return self._line.length(expert) + others

    def class_waiting(self, expert: str, of: RequestClass) -> int:
        """Returns the number of requests of the class, of all workers, that wait for the expert."""
        return self._line.waiting(expert, of)

    def oldest_waits(self) -> dict[str, dict[str, float]]:
        """Returns for how many seconds the oldest waiting request of this worker has waited, by expert and by name of
        its class."""
        return self._line.oldest_waits()

    def waiting_here(self, expert: str) -> int:
        """Returns the number of requests of this worker that wait for the expert."""
        return self._line.length(expert)

    def wait_s(self, expert: str) -> float:
        """Returns the expected wait in seconds for the expert: the length of this worker's queue divided by its recent
        departure rate, or the time until the expert is expected to be ready, whichever is longer."""
        forecast, now = self.forecasts.get(expert), time.time()
        ready_at = None if forecast is None else forecast.expected_ready_at(now)
        return max(self._line.wait_s(expert), (ready_at or 0.0) - now)

    def coming(self, experts: Iterable[str]) -> StartForecast | None:
        """Returns the forecast of the first of these experts for which a replica is expected; None if one of them has a
        ready replica, or if none is expected."""
        experts = tuple(experts)
        if any(self.has_ready(expert, ()) for expert in experts):
            return None
        known = (self.forecasts.get(e) or (_ON_DEMAND if e in self.on_demand else None) for e in experts)
        return next((forecast for forecast in known if forecast is not None and not forecast.hopeless), None)

    def without_fallback(
        self, experts: tuple[str, ...], mode: str, *, avoid: Collection[Replica] = ()
    ) -> tuple[str, ...]:
        """Returns the experts of a request without those that would only stand in for the first one, if it has no ready
        replica and `mode`, a value of `router.cold_start`, says so. With `wait`, one must be expected to become ready,
        because otherwise there is nothing to wait for. `avoid`: replicas that do not count as ready."""
        if mode == "fallback" or len(experts) == 1 or self.has_ready(experts[0], avoid):
            return experts
        return experts[:1] if mode == "fail" or self.coming(experts[:1]) is not None else experts

    def longest_wait_s(self) -> float:
        """Returns the longest expected wait in seconds over this worker's queues."""
        return self._line.longest_wait_s()

    def reassign_queue_columns(self, columns: Mapping[str, int]) -> None:
        """Sets the columns that count the waiting requests of each expert, and moves the present counts there."""
        before, self.queue_columns = self.queue_columns, columns
        for expert, column in before.items():
            if columns.get(expert) != column:
                self.cells[column] = 0
        for expert in before.keys() | columns.keys():
            column = before.get(expert, NO_COLUMN)
            if column != columns.get(expert, NO_COLUMN):
                self._line.move(expert, column)
        for (expert, of), count in self._class_in_flight.items():
            self.order.publish_in_flight(self._queue_column(expert), of, count)

    def offer(self, replica: Replica, *, ignore_avoid: bool = False) -> None:
        """Gives the replica's free places to waiting requests. `ignore_avoid`: also to requests that avoid this
        replica."""
        if not self._line.queues or self._replicas.get(replica.name) is not replica:
            return
        if self.peers:
            self.refresh_peer_counts((replica,))
        serves = replica.record.serves

        def fits(waiter: Waiter) -> bool:
            if waiter.granted.done() or (replica in waiter.avoid and not ignore_avoid):
                return False
            return waiter.only is None or waiter.only is replica

        while replica.has_room:
            turn = self._line.next_turn(serves, fits, self._is_open, self.bounds.weights)
            if turn is None:
                return
            of = turn.queued.waiter.flow.request_class if self.bounds.limits_classes else None
            self._line.grant(turn, serves, partial(self.reserve, replica, turn.expert, of))

    def _fail_waiters(self, replica: Replica) -> None:
        """Handles a replica that is not ready any more: fails the requests that accept only this replica, and lets the
        others join the queue of their next expert."""
        for expert in replica.record.serves:
            for waiter in tuple(self._line.queues.get(expert, ())):
                if waiter.granted.done():
                    continue
                if waiter.only is replica:
                    self._line.fail(waiter, ReplicaLostError(f"{replica.name} is not ready any more"))
                elif waiter.later:
                    self._extend_to_next_expert(waiter)
            self._fail_absent(expert)

    def _extend_to_next_expert(self, waiter: Waiter) -> None:
        """Adds the request to the queues of its later experts until one of its experts has a ready replica."""
        before = len(waiter.experts)
        while waiter.later and not any(self.has_ready(expert, waiter.avoid) for expert in waiter.experts):
            self._line.join_next(waiter)
        if before:
            for expert in waiter.experts[before:]:
                for replica in self.of(expert):
                    self.offer(replica)

    def _index(self) -> None:
        """Rebuilds the lists of replicas by expert."""
        self._balance.indexed()
        self._by_expert, self._shortest_context = {}, None
        for replica in self._replicas.values():
            if replica.record.kind is not RecordKind.ROUTER:
                for expert in replica.record.serves:
                    self._by_expert.setdefault(expert, []).append(replica)

    def _queue_column(self, expert: str) -> int:
        return self.queue_columns.get(expert, NO_COLUMN)

    def _count_waiting(self, expert: str, length: int) -> None:
        self.cells[self._queue_column(expert)] = length
        self.order.cells[WAITING_AT_ALL] = sum(map(len, self._line.queues.values()))

    def _offer_released_by_peers(self) -> None:
        """Offers all replicas to waiting requests, because other workers do not announce released places. Repeats every
        `PEER_REFRESH_S` while a request waits."""
        self._peer_refresh = None
        try:
            self._shed_excess()
            for replica in {replica for expert in self._line.queues for replica in self.of(expert)}:
                self.offer(replica)
        finally:  # an error in one round does not end the rounds
            if self._line.queues:
                later = asyncio.get_running_loop().call_later
                self._peer_refresh = later(PEER_REFRESH_S, self._offer_released_by_peers)

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()


def _is_candidate(replica: Replica, *, avoid: Collection[Replica], only: Replica | None) -> bool:
    return replica.has_room and replica not in avoid and (only is None or replica is only)
