"""Whom a strike may hit, and whose turn it is."""

from typing import Any

from hpc_router.bench.soak.deployment import spare, whose_turn


def expert(**states: str) -> dict[str, Any]:
    return {"replicas": [{"replica": name.replace("_", "-") + ".g1", "state": state} for name, state in states.items()]}


def test_the_last_ready_one_is_spared_also_before_the_router_knows_who_was_struck() -> None:
    experts = {"math": expert(math_0="ready", math_1="ready"), "code": expert(code_0="ready", code_1="starting")}
    assert spare(experts, struck=()) == ["math-0.g1", "math-1.g1"]
    assert spare(experts, struck={"math-1.g1"}) == []


def test_each_place_has_its_turn_whatever_generation_is_there() -> None:
    names = ["math-0.g2", "math-1.g1", "code-0.g1"]
    assert whose_turn(names, {}) == "code-0.g1"
    assert whose_turn(names, {"code-0.g0": 0, "math-0.g1": 1}) == "math-1.g1"
    assert whose_turn(names, {"math-0.g1": 0, "math-1.g0": 1, "code-0.g0": 2}) == "math-0.g2"
    assert whose_turn(["worker 0", "worker 1"], {"worker 0": 0}) == "worker 1"
    assert whose_turn(["worker 0", "worker 1"], {"worker 0": 2, "worker 1": 1}) == "worker 1"
