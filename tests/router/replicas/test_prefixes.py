"""The beginnings of prompts: equal bytes have equal hashes, and what is remembered of them is bounded."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_router.router.replicas.prefixes import (
    ENDS,
    FIRST_BIT,
    LIFE_S,
    MAX_PREFIXES,
    SAMPLED_BYTES,
    SHARED,
    PrefixMemory,
    PromptPrefix,
    prompt_prefix,
)

A, B = FIRST_BIT, FIRST_BIT << 1


def prefix_of(body: dict[str, Any], session: bytes | None = None) -> PromptPrefix:
    raw = json.dumps(body, separators=(",", ":")).encode()
    return prompt_prefix(raw, orjson.loads(raw), session)


def chat(*texts: str, **fields: Any) -> dict[str, Any]:
    roles = ["system", *["user", "assistant"] * len(texts)]
    return {"model": "m", "messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)], **fields}


@given(st.lists(st.text(max_size=400), min_size=2, max_size=6), st.text(max_size=400))
def test_a_later_turn_begins_with_the_whole_of_the_earlier_one(texts: list[str], later: str) -> None:
    earlier, now = prefix_of(chat(*texts)), prefix_of(chat(*texts, later))
    assert list(earlier.hashes) == list(now.hashes[: len(earlier.hashes)])
    assert earlier.total <= now.total


def test_what_comes_before_and_after_the_messages_does_not_matter() -> None:
    texts = ("s" * 300, "u" * 300)
    plain = prefix_of(chat(*texts))
    other = prefix_of({"model": "another model", "max_tokens": 7, "messages": chat(*texts)["messages"], "n": 1})
    assert plain == other
    assert len(plain.hashes) == sum(end <= plain.total for end in ENDS)


@pytest.mark.parametrize("at", [200, 1000, 7000])
def test_a_difference_changes_all_longer_beginnings_and_no_shorter_one(at: int) -> None:
    text = "x" * 10_000
    one, other = (prefix_of(chat("s", t)).hashes for t in (text, text[:at] + "y" + text[at + 1 :]))
    at += len('[{"role":"system","content":"s"},{"role":"user","content":"') + 1  # the colon after the key
    equal = [a == b for a, b in zip(one, other, strict=True)]
    assert equal == [end <= at for end in ENDS[: len(one)]]


def test_a_long_prompt_is_sampled_and_all_of_it_counts() -> None:
    long = prefix_of(chat("s", "x" * 300_000))
    assert len(long.hashes) == len(ENDS)
    assert long.total > 300_000
    assert long.hashes != prefix_of(chat("s", "x" * (2 * SAMPLED_BYTES - 200) + "y" + "x" * 300_000)).hashes


def test_the_system_field_of_other_apis_comes_first_wherever_it_stands() -> None:
    """Claude Code sends `system` after `messages`."""
    turns: list[dict[str, str]] = [{"role": "user", "content": "u" * 200}]
    after = prefix_of({"messages": turns, "system": [{"type": "text", "text": "s" * 500}]})
    before = prefix_of({"system": [{"type": "text", "text": "s" * 500}], "messages": turns})
    assert (after.hashes, after.ends) == (before.hashes, before.ends)
    assert abs(after.total - before.total) < 10
    assert after.ends[0] > 500
    tools = [{"type": "function", "function": {"name": "run", "description": "system " * 100}}]
    assert prefix_of({"messages": turns, "tools": tools}).hashes == prefix_of({"messages": turns}).hashes
    assert prefix_of({"messages": turns, "system": "another"}).hashes[0] != after.hashes[0]
    shared = prefix_of({"instructions": "s" * 500, "input": "u" * 200})
    assert shared.hashes[0] == prefix_of({"input": "other", "instructions": "s" * 500}).hashes[0]


@pytest.mark.parametrize("field", ["prompt", "input"])
def test_a_text_may_contain_what_ends_messages(field: str) -> None:
    prefix = prefix_of({"model": "m", field: "x = [{1: 2}]" + "y" * 1390, "n": 1})
    assert len(prefix.hashes) == sum(end <= 1400 for end in ENDS)


@pytest.mark.parametrize(
    "body",
    [{"model": "m"}, {"messages": []}, {"prompt": ""}, {"input": 7}, {"prompt": [[1, 2]]}, {"tools": []}],
)
def test_a_body_without_a_long_prompt_has_no_beginning(body: dict[str, Any]) -> None:
    assert not prefix_of(body).hashes
    assert prefix_of(body).total >= 0


def test_a_session_is_a_key() -> None:
    assert prefix_of(chat("s"), b"one").key == prefix_of(chat("t"), b"one").key is not None
    assert prefix_of(chat("s"), b"two").key != prefix_of(chat("s"), b"one").key
    assert prefix_of(chat("s")).key is None


def test_what_was_sent_is_found_with_all_its_replicas() -> None:
    memory = PrefixMemory()
    memory.add([1, 2, 3], A, 0.0)
    memory.add([1, 2], B, 0.0)
    found = memory.find([1, 2, 3, 4])
    assert [(bool(e & A), bool(e & B)) for e in found] == [(True, True), (True, True), (True, False)]
    assert memory.find([9, 2]) == []
    memory.forget(A)
    assert [e & (A | B) for e in memory.find([1, 2, 3])] == [B, B, 0]


def test_a_beginning_with_two_continuations_is_shared() -> None:
    memory = PrefixMemory()
    memory.add([1, 2], A, 0.0)
    memory.add([1, 2, 3], A, 0.0)  # the conversation goes on
    assert not any(e & SHARED for e in memory.find([1, 2, 3]))
    memory.add([1, 7], B, 0.0)
    assert [bool(e & SHARED) for e in memory.find([1, 2, 3])] == [True, False, False]


def test_it_is_bounded_and_forgets_what_is_not_used() -> None:
    memory = PrefixMemory()
    for value in range(5 * MAX_PREFIXES):
        memory.add([value], A, 0.0)
        if value % 1000 == 0:
            memory.add([-1], A, 0.0)  # used again and again
    assert len(memory) <= 2 * MAX_PREFIXES + 2
    assert not memory.find([0])
    assert memory.find([-1])
    for times in (1, 2):
        memory.add([-2], A, times * (LIFE_S + 1))
    assert not memory.find([-1])
