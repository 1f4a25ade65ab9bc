"""The text of a request that decides its expert. A value of an unexpected form has no text and is no error."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_router.routing.prompt_text import LAST_TURNS, UserTurns, prompt_text, user_prompt


class CountedList(list[object]):
    """Counts the items that are read by iteration."""

    read = 0

    def __iter__(self) -> Iterator[object]:
        for item in super().__iter__():
            self.read += 1
            yield item


@pytest.mark.parametrize("field", ["prompt", "input"])
@pytest.mark.parametrize("nested", [False, True])
def test_the_work_for_token_ids_does_not_grow_with_their_number(field: str, nested: bool) -> None:
    ids = CountedList(range(100_000))
    assert prompt_text({field: [ids, ids] if nested else ids}) == ""
    assert ids.read == 0


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"messages": [user("hello")]}, "hello"),
        ({"messages": [{"role": "system", "content": "be brief"}, user("hello")]}, "hello"),
        ({"messages": [user("one"), {"role": "assistant", "content": None}, user("two")]}, "one\ntwo"),
        ({"messages": [{"role": "system", "content": "only a system prompt"}]}, ""),
        ({"messages": [{"role": "tool", "content": {"any": "shape"}}, user("x")]}, "x"),
        ({"messages": [user("")]}, ""),
        ({"messages": [user([])]}, ""),
        ({"messages": [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])]}, "a\nb"),
        ({"messages": [user([{"type": "image_url", "image_url": {}}, {"type": "text", "text": "a"}])]}, "a"),
        ({"messages": [user([{"no": "type"}])]}, ""),
        ({"prompt": "hello"}, "hello"),
        ({"prompt": ["one", "two"]}, "one\ntwo"),
        ({"prompt": [1, 2, 3]}, ""),
        ({"prompt": [[1, 2], [3]]}, ""),
        ({"prompt": [[], [3]]}, ""),
        ({"prompt": ["a", 1]}, "a"),
        ({"input": "hello"}, "hello"),
        ({"input": ["one", "two"]}, "one\ntwo"),
        ({"input": [1, 2]}, ""),
        ({"input": [user([{"type": "input_text", "text": "a"}]), {"type": "function_call"}]}, "a"),
        ({"input": [{"role": "developer", "content": "x"}, user("b")]}, "b"),
        ({"input": "hello", "instructions": "be brief", "previous_response_id": "resp_1"}, "hello"),
        ({"input": [user("a"), {"type": "message", "role": "user", "content": "b"}]}, "a\nb"),
        ({"input": [{"type": "message", "role": "assistant", "content": [{"type": "output_text"}]}, user("b")]}, "b"),
        (
            {"input": [user([{"type": "input_image"}, {"type": "input_text", "text": "a"}, {"type": "input_file"}])]},
            "a",
        ),
        ({"input": [{"type": "function_call_output", "output": "x"}, user("b")]}, "b"),
        ({"input": [{"type": "item_reference", "id": "i"}, {"type": "reasoning", "role": "user"}]}, ""),
        ({"messages": [user("hello")], "system": "be brief"}, "hello"),
        ({"messages": [user([{"type": "text", "text": "a"}])], "system": [{"type": "text", "text": "x"}]}, "a"),
        ({"messages": [user([{"type": "tool_result", "content": [{"type": "text", "text": "x"}]}])]}, ""),
        ({"messages": [user([{"type": "image", "source": {}}, {"type": "document"}]), user("b")]}, "b"),
        ({"messages": [user("a"), {"role": "assistant", "content": [{"type": "thinking"}]}]}, "a"),
        ({"prompt": "hello", "unknown": {"field": 1}}, "hello"),
        ({"messages": [user("\ud800lone")]}, "\ud800lone"),
    ],
    ids=repr,
)
def test_only_text_of_the_user_is_read(body: object, text: str) -> None:
    assert prompt_text(body) == text


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (None, ""),
        ([], ""),
        ("text", ""),
        ({}, ""),
        ({"model": "auto"}, ""),
        ({"messages": None}, ""),
        ({"messages": {}}, ""),
        ({"messages": "hello"}, "hello"),
        ({"messages": []}, ""),
        ({"messages": ["hello"]}, "hello"),
        ({"messages": [user("x"), 3, None, user("y")]}, "x\ny"),
        ({"messages": [{"content": "x"}, user("y")]}, "y"),
        ({"messages": [{"role": 1, "content": "x"}, user("y")]}, "y"),
        ({"messages": [{"role": ["user"], "content": "x"}, user("y")]}, "y"),
        ({"messages": [{"role": "user"}, user("y")]}, "y"),
        ({"messages": [user(None), user("y")]}, "y"),
        ({"messages": [user(5), user("y")]}, "y"),
        ({"messages": [user({"type": "text"}), user("y")]}, "y"),
        ({"messages": [user(["a", None, 3, "b"])]}, "a\nb"),
        ({"messages": [user([{"type": "text"}, {"type": "text", "text": "a"}])]}, "a"),
        ({"messages": [user([{"type": "text", "text": None}, {"type": "text", "text": 1.5}])]}, ""),
        ({"messages": [user([{"type": "text", "text": ["a"]}, {"text": "b"}])]}, "b"),
        ({"messages": [user([{"type": [], "text": "a"}, {"type": {}, "text": "b"}, "c"])]}, "c"),
        ({"prompt": None}, ""),
        ({"prompt": 5}, ""),
        ({"prompt": {"id": "p"}}, ""),
        ({"prompt": []}, ""),
        ({"prompt": ["a", None, {"x": 1}, "b"]}, "a\nb"),
        ({"prompt": [True]}, ""),
        ({"prompt": [[1, "a"]]}, ""),
        ({"input": None}, ""),
        ({"input": {}}, ""),
        ({"input": []}, ""),
        ({"input": [None, "a"]}, "a"),
        ({"input": [{"role": "user", "content": 1}, {"type": [], "role": "user", "content": "x"}]}, ""),
    ],
    ids=repr,
)
def test_what_cannot_be_read_has_no_text(body: object, text: str) -> None:
    assert prompt_text(body) == text


@pytest.mark.parametrize(
    ("first", "text"), [("messages", "from messages"), ("prompt", "from prompt"), ("input", "from input")]
)
def test_of_several_fields_the_field_of_the_api_is_read(first: str, text: str) -> None:
    body = {"prompt": "from prompt", "input": "from input", "messages": [user("from messages")]}
    assert prompt_text(body, first=first) == text
    del body[first]
    assert prompt_text(body, first=first) in {"from messages", "from prompt"}


def test_later_turns_do_not_change_a_full_window() -> None:
    first = "x" * 50
    assert prompt_text({"messages": [user(first), user("later")]}, window=50) == first
    assert prompt_text({"messages": [user(first), user("later")]}, window=49) == f"{'x' * 24} {'x' * 24}"
    assert prompt_text({"messages": [user(first), user("later")]}, window=54) == first + "\nlat"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "x"]), inner),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["messages", "prompt", "input", "model"]), JSON) | JSON, st.integers(1, 40))
def test_any_json_gives_a_short_text(body: object, window: int) -> None:
    assert len(prompt_text(body, window=window)) <= window


@pytest.mark.parametrize("field", ["prompt", "input", "messages"])
def test_the_end_of_a_long_message_counts(field: str) -> None:
    """A question after a long paste. With further turns the text stays the same, and so does the expert."""
    text = f"Look at this. {'line of a log ' * 1000} Which drug lowers a fever?"
    value = text if field != "messages" else [user(text)]
    read = prompt_text({field: value}, first=field)
    assert read.startswith("Look at this.")
    assert read.endswith("Which drug lowers a fever?")
    if field == "messages":
        assert prompt_text({"messages": [user(text), user("And for children?")]}) == read


def test_the_turns_of_a_conversation_are_returned_one_by_one() -> None:
    body = {"messages": [user("one"), {"role": "assistant", "content": "x"}, user([{"type": "text", "text": "two"}])]}
    assert user_prompt(body) == UserTurns("one\ntwo", ("one", "two"))
    assert user_prompt({"input": [user("one"), user("two")]}, first="input") == UserTurns("one\ntwo", ("one", "two"))


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [user("one")]},
        {"messages": [user("one"), user(""), {"role": "tool", "content": "x"}]},
        {"messages": "one"},
        {"prompt": ["one"]},
        {"input": "one", "messages": []},
    ],
    ids=repr,
)
def test_a_single_message_is_a_text(body: dict[str, object]) -> None:
    first = "input" if "input" in body else "messages"
    assert user_prompt(body, first=first) == "one"


def test_only_the_latest_turns_are_returned() -> None:
    """The work for a long conversation does not grow with its length."""
    turns = [str(number) for number in range(1000)]
    found = user_prompt({"messages": [user(turn) for turn in turns]}, window=20)
    assert isinstance(found, UserTurns)
    assert found.turns == tuple(turns[-LAST_TURNS:])
    assert found.text == "0\n1\n2\n3\n4\n5\n6\n7\n8\n9\n"
