"""One replica as the router sees it: its routing state, and the requests that hold a reservation on it. No I/O.

The state changes only by the table `TRANSITIONS`, which has the next state for every state and event. Releasing a
`Reservation` twice has no effect, so the counters return to zero however a request ends. `balancing` chooses replicas.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from types import TracebackType
from typing import Final, Protocol, Self

from hpc_router.relay.headers import lines
from hpc_router.relay.in_flight import Cells
from hpc_router.relay.upstream.interface import Address, address_of
from hpc_router.relay.upstream.timeouts import IdleTimer
from hpc_router.router.replicas.engine_load import EngineLoad
from hpc_router.router.replicas.fair_order import RequestClass
from hpc_router.router.replicas.health import ReplicaHealth
from hpc_router.state.registry import Record

LOST_S: Final = 5.0
"""Idle timeout in seconds of requests on a lost replica: one that was ejected, or whose record was withdrawn."""
DEFAULT_CAPACITY: Final = 1024
"""Capacity of an endpoint whose record does not state one."""
NO_COLUMN: Final = 0
"""Column of `Cells` used before the control process has assigned one. It is written and never read."""
REQUEST_BYTES: Final = 256
"""Prefill in bytes that slows an engine as much as one request in flight. ASSUMED: 64 tokens."""
PREFILL_COLUMNS: Final = 2**13
"""Distance in `Cells` from a replica's column to the column with its `prefill_bytes`."""


class RoutingState(StrEnum):
    """The state that the replica reported last, or `ejected`. The router sends requests only to a ready replica
    (docs/states.md)."""

    STARTING = "starting"  # the replica reports that it is not ready yet, or was not probed yet
    READY = "ready"  # gets requests
    DRAINING = "draining"  # finishes its requests, gets no new ones
    EJECTED = "ejected"  # does not answer, fails the challenge, or answers with errors: gets no requests


class Event(StrEnum):
    """What changes the routing state of a replica: a state that the replica reports, or a failure that the router
    observed."""

    SAYS_STARTING = "says_starting"
    SAYS_READY = "says_ready"
    SAYS_DRAINING = "says_draining"
    FAILED = "failed"  # a probe or a connection attempt failed
    EXCLUDED = "excluded"  # its responses were errors, several in a row


READY: Final = RoutingState.READY  # an attribute look-up in the enum costs more than the rest of `has_room`
_S, _E = RoutingState, Event
TRANSITIONS: Final[Mapping[tuple[RoutingState, Event], RoutingState]] = {
    (_S.STARTING, _E.SAYS_STARTING): _S.STARTING,
    (_S.STARTING, _E.SAYS_READY): _S.READY,
    (_S.STARTING, _E.SAYS_DRAINING): _S.DRAINING,
    (_S.STARTING, _E.FAILED): _S.EJECTED,
    (_S.READY, _E.SAYS_STARTING): _S.STARTING,  # its engine is being restarted
    (_S.READY, _E.SAYS_READY): _S.READY,
    (_S.READY, _E.SAYS_DRAINING): _S.DRAINING,
    (_S.READY, _E.FAILED): _S.EJECTED,
    (_S.DRAINING, _E.SAYS_STARTING): _S.DRAINING,  # a drain cannot be undone
    (_S.DRAINING, _E.SAYS_READY): _S.DRAINING,
    (_S.DRAINING, _E.SAYS_DRAINING): _S.DRAINING,
    (_S.DRAINING, _E.FAILED): _S.EJECTED,
    (_S.EJECTED, _E.SAYS_STARTING): _S.STARTING,
    (_S.EJECTED, _E.SAYS_READY): _S.READY,
    (_S.EJECTED, _E.SAYS_DRAINING): _S.DRAINING,
    (_S.EJECTED, _E.FAILED): _S.EJECTED,
    (_S.STARTING, _E.EXCLUDED): _S.STARTING,  # gets no requests already, because the replica reported this state first
    (_S.READY, _E.EXCLUDED): _S.EJECTED,
    (_S.DRAINING, _E.EXCLUDED): _S.DRAINING,
    (_S.EJECTED, _E.EXCLUDED): _S.EJECTED,
}


@dataclass(slots=True, eq=False)
class Replica:
    """One endpoint, and what the router knows of its state and load.

    `key`: the bearer token that requests to the replica carry; `models`: the model names that its engine reported;
    `listed_max_model_len`: the context length that an external endpoint lists for its model. `peer_in_flight`: number
    of requests that the router's other workers have in flight on the replica. Balancing and limits use `load`, the sum
    over all workers. `engine_load`: the load in the engine's own metrics; None if it is unknown.
    """

    record: Record
    key: str | None
    state: RoutingState = RoutingState.STARTING
    models: tuple[str, ...] = ()
    listed_max_model_len: int | None = None
    last_used: int = 0
    health: ReplicaHealth = field(default_factory=ReplicaHealth)
    recent_error: bool = False  # its last request failed: the next success must be reported
    trouble: str | None = None  # text of the last failure
    reservations: "set[Reservation]" = field(default_factory=set)
    peer_in_flight: int = 0
    prefill_bytes: int = 0  # prompt bytes that this worker has sent and the engine has still to compute
    peer_prefill_bytes: int = 0  # the same of the router's other workers, and `foreign_bytes`
    foreign_bytes: int = 0  # prefill in bytes that slows the engine as much as its requests of other clients
    recent_bytes: float = 0.0  # prompt bytes to compute that this worker has sent lately, in units of `PrefixBalance`
    prefix_bit: int = 0  # stands for this replica in `PrefixMemory`
    column: int = NO_COLUMN  # column of the shared counters with this replica's requests in flight
    engine_load: EngineLoad | None = None
    request_starts: dict[str, bytes] = field(default_factory=dict)  # API path -> request line, host, authorization
    routing_lines: dict[tuple[str, str], bytes] = field(default_factory=dict)  # expert, reason -> response headers
    address: Address = field(init=False)
    capacity: int = field(init=False)
    nearly_full: int = field(init=False)  # load from which free places are first for requests that wait at any worker
    by_priority: bool = field(init=False)  # its engine orders requests by their `priority`

    def __post_init__(self) -> None:
        self.renew(self.record)
        self.address = address_of(self.record.url)

    def renew(self, record: Record) -> None:
        """Replaces the record with a newer one of the same server process, and sets the capacity from it."""
        self.record = record
        self.capacity = record.capacity or DEFAULT_CAPACITY
        self.nearly_full = self.capacity - self.capacity // 8 - 1
        self.by_priority = record.engine.priority is True

    def is_at(self, record: Record) -> bool:
        """Returns whether `record` describes the same server process as this replica's record."""
        own = self.record
        return (own.url, own.nonce, own.generation, own.kind) == (
            record.url, record.nonce, record.generation, record.kind,
        )  # fmt: skip

    @property
    def authorization(self) -> bytes:
        """The `authorization` header line of requests to this replica; empty if the replica has no key."""
        return _authorization(self.key)

    @property
    def in_flight(self) -> int:
        """Number of requests that this worker has in flight on the replica."""
        return len(self.reservations)

    @property
    def load(self) -> int:
        """Number of requests that all workers have in flight on the replica."""
        return len(self.reservations) + self.peer_in_flight

    @property
    def has_room(self) -> bool:
        return self.state is READY and len(self.reservations) + self.peer_in_flight < self.capacity

    @property
    def name(self) -> str:
        return self.record.replica

    @property
    def max_model_len(self) -> int | None:
        """Maximum number of tokens of prompt and response together; None if it is unknown."""
        return self.record.engine.max_model_len or self.listed_max_model_len

    @property
    def slot_name(self) -> str:
        """The replica's name without the generation. Affinity uses it, so that a successor gets the conversations."""
        return self.record.replica.rpartition(".")[0]

    def model_for(self, expert: str) -> str | None:
        """Returns the name by which the replica's engine knows the model of this expert; None if it is unknown. If the
        engine has a single model, the record need not name it."""
        name = self.record.serves.get(expert)
        return name if name is not None or len(self.models) != 1 else self.models[0]

    def set_engine_load(self, load: EngineLoad | None) -> None:
        """Stores the load that the engine's metrics have just told. Requests beyond those of this router come from
        other clients."""
        self.engine_load = load
        before = self.foreign_bytes
        requests = 0.0 if load is None else (load.running or 0.0) + (load.waiting or 0.0) - self.load
        self.foreign_bytes = REQUEST_BYTES * max(0, int(requests))
        self.peer_prefill_bytes += self.foreign_bytes - before

    def apply(self, event: Event) -> None:
        self.state = TRANSITIONS[self.state, event]

    def mark_lost(self) -> None:
        """Called when the replica is lost: shortens the idle timeout of every request on it to `LOST_S`."""
        for reservation in tuple(self.reservations):
            reservation.mark_lost()

    def __repr__(self) -> str:
        return f"<Replica {self.name} {self.state} {self.load}/{self.capacity}>"


class ReservationOwner(Protocol):
    """The table that made a reservation, and to which its place returns."""

    cells: Cells

    def offer(self, replica: Replica) -> None: ...

    def measure_prefill(self, reservation: "Reservation") -> None: ...


@dataclass(eq=False)
class Reservation:
    """The place of one request on a replica, acquired for `expert`. Once the replica is lost (`lost`), the request's
    idle timeout is `LOST_S`.

    `prefill_bytes`: how much of the prompt the engine has still to compute before the response begins, in bytes;
    `queued_bytes`: what it had to compute then for this request and earlier ones; `placed_at`: monotonic time. Fields
    with a default are class attributes until they are set, which saves time per request.
    """

    replica: Replica
    expert: str
    _owner: ReservationOwner
    idle_timer: IdleTimer | None = field(default=None, init=False)
    lost: bool = field(default=False, init=False)
    prefill_bytes: int = field(default=0, init=False)
    queued_bytes: int = field(default=0, init=False)
    placed_at: float = field(default=0.0, init=False)

    def watch(self, idle_timer: IdleTimer) -> None:
        """Stores the timer of the request's idle timeout, so that the timeout can be shortened to `LOST_S` when the
        replica is lost. If it is lost already, shortens the timeout at once."""
        self.idle_timer = idle_timer
        if self.lost:
            idle_timer.tighten(LOST_S)

    def mark_lost(self) -> None:
        self.lost = True
        if self.idle_timer is not None:
            self.idle_timer.tighten(LOST_S)

    def prefill_ended(self) -> None:
        """Records that the response has begun, so that the engine has computed the prompt."""
        if self.prefill_bytes:
            self._owner.measure_prefill(self)
            self._subtract_prefill()

    def _subtract_prefill(self) -> None:
        replica = self.replica
        replica.prefill_bytes -= self.prefill_bytes
        self.prefill_bytes = 0
        self._owner.cells[replica.column + PREFILL_COLUMNS] = replica.prefill_bytes

    def release(self) -> None:
        """Gives the place back to the table, which offers it to a waiting request. A second call has no effect."""
        replica, owner = self.replica, self._owner
        reservations = replica.reservations
        if self in reservations:
            if self.prefill_bytes:
                self._subtract_prefill()
            reservations.remove(self)
            owner.cells[replica.column] = len(reservations)
            owner.offer(replica)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class ClassCounter(Protocol):
    """The table, as the counter of the requests that each class has in flight."""

    def count_class(self, replica: Replica, of: RequestClass, change: int) -> None: ...


@dataclass(eq=False)
class ClassReservation(Reservation):
    """A reservation that is also counted for its request's class; used only if a class has a limit."""

    _counter: ClassCounter = field(kw_only=True)
    _class: RequestClass = field(kw_only=True)

    def __post_init__(self) -> None:
        self._counter.count_class(self.replica, self._class, 1)

    def release(self) -> None:
        if self in self.replica.reservations:
            self._counter.count_class(self.replica, self._class, -1)
        Reservation.release(self)


@lru_cache(maxsize=1024)
def _authorization(key: str | None) -> bytes:
    return b"" if key is None else lines({"authorization": f"Bearer {key}"})
