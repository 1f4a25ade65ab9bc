"""The messages between the router's processes, one frozen dataclass each, and their encoding.

The supervisor sends commands to its children; the control process and the workers send notifications and calls to each
other. The receiver of a `Call[R]` answers with a `Reply` whose value has type `R`, or with a `Failure`. A message is
sent as a JSON list of its class name, the call's number (null for a notification) and its fields; `decode` restores the
types of the fields from their annotations. All processes are forked from one program, so the encoding has no versions.
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
from hpc_router.state.forecast import StartForecast
from hpc_router.state.user_tokens import UserToken

REPORT_S: Final = 1.0
"""Interval in seconds at which a worker reports its metrics."""

R = TypeVar("R")
MetricsDump = dict[str, Any]
"""The counts of a process as JSON values, made by `Metrics.dump`."""


class Message:
    """The base class of all messages. `decode` finds a subclass by its name."""

    __slots__ = ()
    types: ClassVar[dict[str, "type[Message]"]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Message.types[cls.__name__] = cls


class Call(Message, Generic[R]):
    """A message that the receiver answers with a value of type `R`."""

    __slots__ = ()


# From the supervisor to a child


@dataclass(frozen=True, slots=True)
class DrainCommand(Message):
    """The command to accept no new connections and to finish the requests in flight."""


@dataclass(frozen=True, slots=True)
class EndCommand(Message):
    """The command that ends the control process after all workers have ended."""


@dataclass(frozen=True, slots=True)
class ReloadCommand(Message):
    """The command to check at once whether settings or artefacts have changed."""


@dataclass(frozen=True, slots=True)
class AttachCommand(Message):
    """The command that brings a child a socket to another process: to the worker with the number `worker`, or to the
    control process if `worker` is None."""

    worker: int | None


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """The status of one child process. `pid`: None if the process is not running. `last_end`: how it ended last, as
    text."""

    restarts: int
    last_end: str | None
    pid: int | None


@dataclass(frozen=True, slots=True)
class ProcessesChanged(Message):
    """Reports the status of all child processes by name. `notice`: text for the log on what has happened."""

    processes: dict[str, ProcessStatus]
    notice: str | None


# From a worker to the control process


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """The first message of a worker to a control process: what the worker knows and a control process that was just
    started does not. `replicas`: None if the worker has not received any yet."""

    pid: int
    serving: bool
    replicas: tuple[ReplicaSnapshot, ...] | None
    queue_columns: dict[str, int]
    turns: tuple[tuple[str, Turn], ...]
    metrics: MetricsDump


@dataclass(frozen=True, slots=True)
class Serving(Message):
    """Reports that the worker accepts connections."""


@dataclass(frozen=True, slots=True)
class ReplicaObservation(Message):
    """Reports what a worker's request observed of a replica.

    `incident`: a failure or success; `event`: the state that the replica reported. If both are None, the control
    process probes the replica. `number`: number of this observation, counted from 1 on each connection.
    """

    number: int
    replica: str
    nonce: str | None
    incident: Incident | None
    event: Event | None
    trouble: str | None


@dataclass(frozen=True, slots=True)
class SnapshotApplied(Message):
    """Reports that the worker has applied the last `Snapshot` and can take the next one."""


@dataclass(frozen=True, slots=True)
class TurnAnswered(Message):
    """Reports that a replica has answered a turn of the session."""

    session: str
    turn: Turn


@dataclass(frozen=True, slots=True)
class MetricsReport(Message):
    """Reports the worker's counts, at regular intervals."""

    metrics: MetricsDump


@dataclass(frozen=True, slots=True)
class TaskFailed(Message):
    """Reports that a background task of the worker failed and is started again."""

    task: str
    error: str


@dataclass(frozen=True, slots=True)
class FindTurn(Call[Turn | None]):
    """Asks for the session's last turn, whichever worker served it."""

    session: str


@dataclass(frozen=True, slots=True)
class GetStatus(Call[dict[str, Any]]):
    """Asks for the body of `GET /status`."""


@dataclass(frozen=True, slots=True)
class GetOverview(Call[dict[str, Any]]):
    """Asks for the body of `GET /overview`."""


@dataclass(frozen=True, slots=True)
class GetHandover(Call[dict[str, Any]]):
    """Asks for the session turns and the counts that the router's successor takes over. `skip`: number of turns, newest
    first, to leave out."""

    skip: int


@dataclass(frozen=True, slots=True)
class GetExposition(Call[str]):
    """Asks for the body of `GET /metrics`."""


# From the control process to a worker


@dataclass(frozen=True, slots=True)
class Snapshot(Message):
    """The state of all replicas. `observed`: number of the last `ReplicaObservation` of the receiving worker that the
    snapshot takes into account. `forecasts`: as in `ReplicaTable`."""

    observed: int
    replicas: tuple[ReplicaSnapshot, ...]
    queue_columns: dict[str, int]
    forecasts: dict[str, StartForecast]


@dataclass(frozen=True, slots=True)
class Settings(Message):
    """The present settings, and the versions of the artefacts to load. `scaled_to_zero`: as in `ReplicaTable`."""

    policy: PolicyConfig
    router: RouterConfig
    artefact: str | None
    shadow: str | None
    scaled_to_zero: dict[str, str]


@dataclass(frozen=True, slots=True)
class UserTokensChanged(Message):
    """All valid tokens of users other than the owner."""

    tokens: tuple[UserToken, ...]


@dataclass(frozen=True, slots=True)
class CertificateChanged(Message):
    """Reports that the files of `router.tls_cert` and `router.tls_key` have a new certificate and its key."""


@dataclass(frozen=True, slots=True)
class Inherit(Message):
    """The counts and the session turns of an ended worker, with which the worker that replaces it continues."""

    metrics: MetricsDump
    turns: tuple[tuple[str, Turn], ...]


@dataclass(frozen=True, slots=True)
class ReplicaWell(Message):
    """Reports that a probe found the replica ready. The worker then offers it to all waiting requests, even to those
    that avoid it because it has failed them."""

    replica: str


@dataclass(frozen=True, slots=True)
class Release(Message):
    """Reports that the router's record is withdrawn, so that no new clients come."""


@dataclass(frozen=True, slots=True)
class GetMetrics(Call[MetricsDump]):
    """Asks for the worker's counts."""


@dataclass(frozen=True, slots=True)
class GetOldestWaits(Call[dict[str, dict[str, float]]]):
    """Asks for the result of `oldest_waits` of the worker's `ReplicaTable`."""


@dataclass(frozen=True, slots=True)
class Sync(Call[None]):
    """Asks for a reply without a value. When it arrives, all messages that the worker sent before have arrived."""


# Answers to calls


@dataclass(frozen=True, slots=True)
class Reply(Message):
    """The value that answers a call."""

    value: Any


@dataclass(frozen=True, slots=True)
class Failure(Message):
    """The error that answers a call that failed."""

    error: str


def encode(message: Message, number: int | None = None) -> bytes:
    """Returns the message as JSON. `number`: number of the call that the message makes or answers; None if it is a
    notification."""
    content = [type(message).__name__, number, message]
    return json.dumps(content, separators=(",", ":"), default=_fields).encode()


def decode(data: bytes | bytearray) -> tuple[Message, int | None]:
    """Returns the message, and the number of the call that it makes or answers; None for a notification."""
    name, number, value = json.loads(data)
    message: Message = _restore(Message.types[name], value)
    return message, number


def reply_value(call: Call[R], reply: Reply) -> R:
    """Returns the value of a decoded reply to this call, with the type that the call declares."""
    value: R = _restore(get_args(type(call).__orig_bases__[0])[0], reply.value)  # type: ignore[attr-defined]
    return value


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _restore(kind: Any, value: Any) -> Any:
    """Returns `value`, a decoded JSON value, as an object of the type `kind`, which is the annotation of a field."""
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
