"""The messages between the router's processes, one frozen dataclass each, and their encoding.

The supervisor sends commands to its children; control process and workers send each other notifications and calls. A
`Call[R]` is answered with a `Reply` whose value has type `R`, or with a `Failure`. On the wire a message is a JSON list
of its class name, the call's number (null for a notification) and its fields; `decode` restores the field types from
their annotations. All processes are forked from one program, so the encoding has no versions.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import lru_cache
from types import UnionType
from typing import Any, ClassVar, Final, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

from hpc_router.config.schema import PolicyConfig, RouterConfig
from hpc_router.router.replicas.health import Incident
from hpc_router.router.replicas.replica import Event
from hpc_router.router.replicas.sessions import Turn
from hpc_router.router.replicas.snapshot import ReplicaSnapshot

REPORT_S: Final = 1.0
"""Interval at which a worker reports its metrics."""

R = TypeVar("R")
MetricsDump = dict[str, Any]
"""Of `Metrics.dump`."""


class Message:
    """Base class; each subclass is known to `decode` by its name."""

    __slots__ = ()
    types: ClassVar[dict[str, "type[Message]"]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Message.types[cls.__name__] = cls


class Call(Message, Generic[R]):
    """A message that is answered with an `R`."""

    __slots__ = ()


# From the supervisor to a child


@dataclass(frozen=True, slots=True)
class DrainCommand(Message):
    """Accept no new connections, finish the requests in flight."""


@dataclass(frozen=True, slots=True)
class EndCommand(Message):
    """All workers have ended: the control process ends as well."""


@dataclass(frozen=True, slots=True)
class ReloadCommand(Message):
    """Check the settings and artefacts for changes now."""


@dataclass(frozen=True, slots=True)
class AttachCommand(Message):
    """Comes with the socket of a channel: to this worker, or (None) to the control process."""

    worker: int | None


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """`pid` None: it is not running. `last_end`: how it ended last."""

    restarts: int
    last_end: str | None
    pid: int | None


@dataclass(frozen=True, slots=True)
class ProcessesChanged(Message):
    """The status of all child processes by name. `notice`: what happened, for the log."""

    processes: dict[str, ProcessStatus]
    notice: str | None


# From a worker to the control process


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """The first message on a channel: what a control process that has just started does not know.

    `replicas` None: the worker has not received any yet.
    """

    pid: int
    serving: bool
    replicas: tuple[ReplicaSnapshot, ...] | None
    queue_columns: dict[str, int]
    turns: tuple[tuple[str, Turn], ...]
    metrics: MetricsDump


@dataclass(frozen=True, slots=True)
class Serving(Message):
    """The worker accepts connections."""


@dataclass(frozen=True, slots=True)
class ReplicaObservation(Message):
    """What a request saw of a replica: a failure or success, or the state that the replica reported; neither: probe it.

    `number` counts the observations of this worker, from 1 on each channel.
    """

    number: int
    replica: str
    nonce: str | None
    incident: Incident | None
    event: Event | None
    trouble: str | None


@dataclass(frozen=True, slots=True)
class SnapshotApplied(Message):
    """The worker is ready for the next `Snapshot`."""


@dataclass(frozen=True, slots=True)
class TurnAnswered(Message):
    session: str
    turn: Turn


@dataclass(frozen=True, slots=True)
class MetricsReport(Message):
    metrics: MetricsDump


@dataclass(frozen=True, slots=True)
class TaskFailed(Message):
    """A background task failed and starts again."""

    task: str
    error: str


@dataclass(frozen=True, slots=True)
class FindTurn(Call[Turn | None]):
    """Where the session's last turn was answered, whichever worker served it."""

    session: str


@dataclass(frozen=True, slots=True)
class GetStatus(Call[dict[str, Any]]):
    """The body of `GET /status`."""


@dataclass(frozen=True, slots=True)
class GetHandover(Call[dict[str, Any]]):
    """What a successor takes over, from this turn on."""

    skip: int


@dataclass(frozen=True, slots=True)
class GetExposition(Call[str]):
    """The body of `GET /metrics`."""


# From the control process to a worker


@dataclass(frozen=True, slots=True)
class Snapshot(Message):
    """All replicas. `observed`: the number of the last `ReplicaObservation` that it includes. `expected_ready_at`: of
    `ReplicaTable`."""

    observed: int
    replicas: tuple[ReplicaSnapshot, ...]
    queue_columns: dict[str, int]
    expected_ready_at: dict[str, float]


@dataclass(frozen=True, slots=True)
class Settings(Message):
    """The settings in force, and the versions of the artefacts to load. `scaled_to_zero`: see `ReplicaTable`."""

    policy: PolicyConfig
    router: RouterConfig
    artefact: str | None
    shadow: str | None
    scaled_to_zero: dict[str, str]


@dataclass(frozen=True, slots=True)
class Inherit(Message):
    """What the worker's predecessor had counted, and the session turns it had served."""

    metrics: MetricsDump
    turns: tuple[tuple[str, Turn], ...]


@dataclass(frozen=True, slots=True)
class ReplicaWell(Message):
    """A probe found the replica ready: requests that avoided it may have it."""

    replica: str


@dataclass(frozen=True, slots=True)
class Release(Message):
    """The router's record is withdrawn: no new clients come."""


@dataclass(frozen=True, slots=True)
class GetMetrics(Call[MetricsDump]):
    """What the worker has counted."""


@dataclass(frozen=True, slots=True)
class Sync(Call[None]):
    """The reply comes after everything that the worker sent before."""


# Answers to calls


@dataclass(frozen=True, slots=True)
class Reply(Message):
    value: Any


@dataclass(frozen=True, slots=True)
class Failure(Message):
    error: str


def encode(message: Message, number: int | None = None) -> bytes:
    content = [type(message).__name__, number, message]
    return json.dumps(content, separators=(",", ":"), default=_fields).encode()


def decode(data: bytes | bytearray) -> tuple[Message, int | None]:
    """The message and the number of its call."""
    name, number, value = json.loads(data)
    message: Message = _restore(Message.types[name], value)
    return message, number


def reply_value(call: Call[R], reply: Reply) -> R:
    """The value of a decoded reply to this call."""
    value: R = _restore(get_args(type(call).__orig_bases__[0])[0], reply.value)  # type: ignore[attr-defined]
    return value


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _restore(kind: Any, value: Any) -> Any:
    """A value of the annotated type, from JSON."""
    origin, of = get_origin(kind), get_args(kind)
    if value is None:
        return None
    if origin in (Union, UnionType):
        return _restore(next(option for option in of if option is not type(None)), value)
    if origin is tuple:
        kinds = [of[0]] * len(value) if of[-1] is Ellipsis else of
        return tuple(_restore(each, item) for each, item in zip(kinds, value, strict=True))
    if origin in (dict, Mapping):
        return {key: _restore(of[1], item) for key, item in value.items()}
    if not isinstance(kind, type):
        return value
    if is_dataclass(kind):
        hints = _hints(kind)
        return kind(**{name: _restore(hints[name], item) for name, item in value.items()})
    return kind(value) if issubclass(kind, Enum) else value


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
