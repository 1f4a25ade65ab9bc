"""Selection of the processes to kill, and their order."""

from typing import Any

from hpc_router.bench.soak.deployment import killable, least_recently_killed


def expert(**states: str) -> dict[str, Any]:
    return {"replicas": [{"replica": name.replace("_", "-") + ".g1", "state": state} for name, state in states.items()]}


def test_the_last_ready_replica_of_an_expert_is_not_killed() -> None:
    experts = {"math": expert(math_0="ready", math_1="ready"), "code": expert(code_0="ready", code_1="starting")}
    assert killable(experts, killed=()) == ["math-0.g1", "math-1.g1"]
    assert killable(experts, killed={"math-1.g1"}) == []


def test_the_slot_that_was_killed_longest_ago_is_next() -> None:
    names = ["math-0.g2", "math-1.g1", "code-0.g1"]
    assert least_recently_killed(names, {}) == "code-0.g1"
    assert least_recently_killed(names, {"code-0.g0": 0, "math-0.g1": 1}) == "math-1.g1"
    assert least_recently_killed(names, {"math-0.g1": 0, "math-1.g0": 1, "code-0.g0": 2}) == "math-0.g2"
    assert least_recently_killed(["worker 0", "worker 1"], {"worker 0": 0}) == "worker 1"
    assert least_recently_killed(["worker 0", "worker 1"], {"worker 0": 2, "worker 1": 1}) == "worker 1"
