"""What `status` and `up --wait all` say of replicas that the router has not found yet."""

from typing import Any

import pytest

from hpc_router.cluster.commands import status as status_module
from hpc_router.cluster.commands.replica_view import DisplayedState, ReplicaView
from hpc_router.cluster.commands.status import found_by_router
from hpc_router.state.run_directory import RunDir

NAME = "math-0.g1"


@pytest.mark.parametrize("state", DisplayedState)
@pytest.mark.parametrize("answered", [True, False])
def test_a_replica_that_the_router_has_not_found_is_not_ready(state: DisplayedState, answered: bool) -> None:
    """If the router does not answer, only the files tell its state."""
    merged = status_module._merged(ReplicaView("math", NAME, state), None, answered=answered)
    unknown = answered and state is DisplayedState.READY
    assert merged["state"] == ("starting" if unknown else state)
    assert merged["phase"] == state


@pytest.mark.parametrize(
    ("said", "found"),
    [(None, False), ({}, False), ({NAME: "starting"}, False), ({NAME: "ready"}, True), ({NAME: "ejected"}, True)],
)
def test_all_replicas_are_found_once_the_router_has_probed_them(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, said: dict[str, str] | None, found: bool
) -> None:
    """`said`: the states in the router's answer; None if it does not answer."""
    replicas = [{"replica": name, "state": state} for name, state in (said or {}).items()]
    body: dict[str, Any] = {} if said is None else {"router": {}, "experts": {"math": {"replicas": replicas}}}
    monkeypatch.setattr(status_module, "ask_router", lambda _: (None, body, None))
    assert found_by_router(run, [NAME]) is found
    assert found_by_router(run, []) is (said is not None)
