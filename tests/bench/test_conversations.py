"""Conversations of the load: histories that grow, shared system prompts, tool turns, cancellations, mixed classes."""

import json
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from hpc_router.bench.config import BenchConfig, read_config
from hpc_router.bench.prompts import built_in
from hpc_router.bench.workload import Point, Workload, workload
from hpc_router.errors import ConfigError

PROMPTS = built_in()
CHAT: dict[str, Any] = {
    "turns": {"mean": 3},
    "think_s": 2.0,
    "input_words": {"kind": "uniform", "low": 20, "high": 40},
    "output_tokens": {"mean": 8},
}


def configured(classes: dict[str, Any], **more: Any) -> BenchConfig:
    return read_config({"rates": [1], "conversations": 60, "history": "prepared", "classes": classes, **more})


def loaded(classes: dict[str, Any], *, rate: float = 1, repeat: int = 0, job: int = 0, **more: Any) -> Workload:
    return workload(configured(classes, **more), PROMPTS, Point(rate_per_s=rate, repeat=repeat), job=job)


def conversations(work: Workload) -> list[list[dict[str, Any]]]:
    """Returns the request bodies of each conversation."""
    assert work.chains is not None
    found: list[list[dict[str, Any]]] = [[]]
    for step in work.chains:
        found[-1].append(json.loads(work.bodies[step.request].body))
        if step.last:
            found.append([])
    return found[:-1]


def roles(body: dict[str, Any]) -> str:
    return " ".join(message["role"] for message in body["messages"])


def test_each_turn_repeats_what_was_said_before() -> None:
    work = loaded({"chat": CHAT})
    for one in conversations(work):
        assert [roles(body) for body in one] == [
            "user",
            "user assistant user",
            "user assistant user assistant user",
        ]
        for before, after in pairwise(one):
            assert after["messages"][: len(before["messages"])] == before["messages"]
        assert all(20 <= len(m["content"].split()) <= 40 for m in one[-1]["messages"] if m["role"] == "user")
        assert all(body["max_tokens"] == 8 for body in one)
    assert work.chains is not None
    assert [bool(step.pause_s) for step in work.chains[:6]] == [False, True, True] * 2
    assert [(body.load_class, body.turn) for body in work.bodies[:3]] == [("chat", 1), ("chat", 2), ("chat", 3)]


def test_conversations_share_only_system_prompts() -> None:
    families = {**CHAT, "turns": {"mean": 1}, "system_words": {"mean": 30}, "system_prompts": 5, "zipf": 1.0}
    made = conversations(loaded({"chat": families}, conversations=400))
    systems = Counter(body["messages"][0]["content"] for [body] in made)
    assert all(roles(body) == "system user" for [body] in made)
    assert len(systems) == 5
    counts = [count for _, count in systems.most_common()]
    assert counts[0] > 2.5 * counts[-1]
    starts = Counter(" ".join(body["messages"][1]["content"].split()[:8]) for [body] in made)
    assert max(starts.values()) == 1


def test_system_prompts_are_those_of_every_point_and_nothing_else_is() -> None:
    """A cache that is warm from one point does not favour the next one by more than the system prompts."""
    classes = {"chat": {**CHAT, "system_words": {"mean": 30}, "system_prompts": 3}}
    first, *others = (
        conversations(loaded(classes)),
        conversations(loaded(classes, rate=2)),
        conversations(loaded(classes, repeat=1)),
        conversations(loaded(classes, job=1, load_jobs=2)),
    )

    def texts(made: list[list[dict[str, Any]]], role: str) -> set[str]:
        return {m["content"] for one in made for body in one for m in body["messages"] if m["role"] == role}

    for other in others:
        assert texts(other, "system") == texts(first, "system")
        assert not texts(other, "user") & texts(first, "user")
    assert conversations(loaded(classes)) == first


def test_an_agent_loop_has_tool_turns_within_a_turn_of_the_user() -> None:
    agent = {**CHAT, "turns": {"mean": 2}, "tool_turns": {"mean": 2}, "tool_words": {"mean": 50}, "tool_s": 1.0}
    work = loaded({"agent": agent})
    one = conversations(work)[0]
    assert len(one) == 6
    assert roles(one[2]) == "user assistant tool assistant tool"
    assert roles(one[3]) == "user assistant tool assistant tool assistant user"
    messages = one[-1]["messages"]
    calls = [call["id"] for m in messages for call in m.get("tool_calls", ())]
    assert calls == [m["tool_call_id"] for m in messages if m["role"] == "tool"]
    assert all(json.loads(m["tool_calls"][0]["function"]["arguments"]) for m in messages if "tool_calls" in m)
    assert [body.turn for body in work.bodies[:6]] == [1, 1, 1, 2, 2, 2]


def test_a_share_of_the_requests_is_cancelled() -> None:
    work = loaded({"chat": {**CHAT, "cancel_share": 0.25}}, conversations=300)
    assert work.chains is not None
    left = [step.leave_events for step in work.chains if step.leave_events]
    assert 0.2 < len(left) / len(work.chains) < 0.3
    assert set(left) == set(range(1, 9))


def test_classes_are_mixed_by_weight() -> None:
    work = loaded({"chat": {**CHAT, "weight": 3}, "short": {}}, conversations=400)
    assert work.chains is not None
    counts = Counter(work.bodies[step.request].load_class for step in work.chains if step.last)
    assert 2.2 < counts["chat"] / counts["short"] < 4


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"think_s": 1.0}, "bench.think_s"),
        ({"output_tokens": {"mean": 4}}, "bench.output_tokens"),
        ({"direct": True}, "bench.direct"),
        ({"classes": {"a": {"turns": {"mean": 5001}, "tool_turns": {"mean": 1}}}}, "bench.classes.a.turns"),
        ({"classes": {"a": {"turns": {"kind": "uniform", "low": 3, "high": 2}}}}, "bench.classes.a.turns.low"),
        ({"classes": {"a": {"cancel_share": 2}}}, "bench.classes.a.cancel_share"),
    ],
)
def test_a_contradiction_is_refused(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(values.pop("classes", {"chat": CHAT}), **values)
    assert caught.value.key == key
