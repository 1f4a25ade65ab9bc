"""Every message arrives as it was sent, with the types of its fields."""

from dataclasses import astuple

import pytest

from hpc_router.config.schema import PolicyConfig, RouterConfig
from hpc_router.router.ipc.messages import (
    AttachCommand,
    Call,
    CertificateChanged,
    DrainCommand,
    EndCommand,
    Failure,
    FindTurn,
    GetExposition,
    GetHandover,
    GetMetrics,
    GetOldestWaits,
    GetOverview,
    GetStatus,
    Hello,
    Inherit,
    Message,
    MetricsReport,
    ProcessesChanged,
    ProcessStatus,
    Release,
    ReloadCommand,
    ReplicaObservation,
    ReplicaWell,
    Reply,
    Serving,
    Settings,
    Snapshot,
    SnapshotApplied,
    Sync,
    TaskFailed,
    TurnAnswered,
    UserTokensChanged,
    decode,
    encode,
    reply_value,
)
from hpc_router.router.metrics import Metrics
from hpc_router.router.replicas.health import Incident
from hpc_router.router.replicas.replica import Event, RoutingState
from hpc_router.router.replicas.sessions import Turn
from hpc_router.router.replicas.snapshot import snapshot_of
from hpc_router.routing.policy import RouteReason
from hpc_router.state.forecast import StartForecast
from hpc_router.state.registry import RecordKind, State
from hpc_router.state.user_tokens import TokenLimits, UserToken
from tests.router.support import replica, table_of

TURN = Turn("math", "math-0.g1", "http://127.0.0.1:1", None, RouteReason.UNAVAILABLE, at=1.5)
REPLICAS = snapshot_of(table_of(replica("math-0.g1", experts=("math", "code")), replica("math-1.g1", ready=False)))
METRICS = Metrics().dump()
MESSAGES: list[Message] = [
    DrainCommand(), EndCommand(), ReloadCommand(), AttachCommand(None), AttachCommand(3),
    ProcessesChanged({"control": ProcessStatus(1, None, 7)}, "died"),
    Hello(7, True, REPLICAS, {"math": 5}, (("session", TURN),), METRICS), Hello(7, False, None, {}, (), METRICS),
    Serving(), SnapshotApplied(), TurnAnswered("session", TURN), MetricsReport(METRICS), TaskFailed("lease", "OSError"),
    ReplicaObservation(1, "math-0.g1", "n", Incident.ERROR, None, "500"),
    ReplicaObservation(2, "math-0.g1", None, None, Event.SAYS_DRAINING, None),
    FindTurn("session"), GetStatus(), GetOverview(), GetHandover(3), GetExposition(),
    Snapshot(4, REPLICAS, {"math": 5}, {"code": StartForecast("loading", 7.5, None)}),
    Inherit(METRICS, (("session", TURN),)), ReplicaWell("math-0.g1"), Release(), CertificateChanged(),
    GetMetrics(), GetOldestWaits(), Sync(),
    Settings(PolicyConfig(), RouterConfig(workers=2, queue_timeout_s=1.5), "v1", None, {"law": "base"}),
    UserTokensChanged(
        (
            UserToken("0a1b2c3d", "al", "0" * 64, 5, 1.5, 7.5, TokenLimits(requests=3, tokens=2), ("math", "law")),
            UserToken("0a1b2c3e", "bob", "1" * 64, 6, 1.5),
        )
    ),
    Reply([1, None]), Failure("ValueError: x"),
]  # fmt: skip


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent(message: Message) -> None:
    assert decode(encode(message, 9)) == (message, 9)
    assert decode(encode(message)) == (message, None)


def test_no_message_is_left_out() -> None:
    sent = {type(message).__name__ for message in MESSAGES}
    assert sent == {name for name, kind in Message.types.items() if kind.__module__ == DrainCommand.__module__} - {
        "Call"
    }


def test_the_fields_have_their_types() -> None:
    message, _ = decode(encode(Snapshot(4, REPLICAS, {}, {})))
    assert isinstance(message, Snapshot)
    first = message.replicas[0]
    assert (type(first.state), type(first.record.kind), type(first.record.state)) == (RoutingState, RecordKind, State)
    assert astuple(first.health) == astuple(REPLICAS[0].health)


@pytest.mark.parametrize(("call", "value"), [(FindTurn("s"), TURN), (FindTurn("s"), None), (Sync(), None)])
def test_a_reply_has_the_type_of_its_call(call: Call[object], value: object) -> None:
    reply, number = decode(encode(Reply(value), 4))
    assert isinstance(reply, Reply)
    assert (reply_value(call, reply), number) == (value, 4)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(KeyError, match="name"):
        decode(encode(TaskFailed("a", "b")).replace(b'"task"', b'"name"'))
