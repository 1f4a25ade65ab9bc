"""What is amiss with the router's processes, in words."""

from typing import Any

import pytest

from hpc_router.cluster.commands.findings import findings
from hpc_router.cluster.commands.replica_view import DisplayedState, ReplicaView
from hpc_router.state.registry import RecordKind

ROUTER = ReplicaView("router", "router-0.g1", DisplayedState.READY, kind=RecordKind.ROUTER)


def told(**router: Any) -> dict[str, Any]:
    worker = {"worker": 0, "pid": 1, "serving": True, "in_flight": 0, "restarts": 0, "last_end": None}
    about = {"replica": "router-0.g1", "workers": [worker], "control": {"restarts": 0}, "settings_trouble": None}
    return {"router": about | router}


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (told(), []),
        ({}, []),
        (told(workers=[{"worker": 1, "serving": False}]), ["worker 1 does not serve: it is being started"]),
        (
            told(control={"restarts": 2, "last_end": "was killed by signal 9"}),
            ["the control process was started again 2 times: the last one was killed by signal 9"],
        ),
        (told(settings_trouble="policy.kind=nope"), ["a change was not applied: policy.kind=nope"]),
    ],
)
def test_what_is_amiss(status: dict[str, Any], says: list[str]) -> None:
    found = findings([ROUTER], status)
    assert len(found) == len(says)
    for one, words in zip(found, says, strict=True):
        assert words in one.what
        assert one.advice
