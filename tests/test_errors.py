"""The end of an error message that lists the valid names."""

import time

import pytest

from hpc_router.errors import MAX_SUGGEST_CHARS, suggest


def test_the_most_similar_name_is_suggested() -> None:
    assert suggest("maht", ["math", "code"]) == "; did you mean 'math'? (valid: code, math)"
    assert suggest("zzz", ["math", "code"]) == " (valid: code, math)"
    assert suggest("zzz", []) == " (valid: none)"


def test_only_a_short_name_gets_a_suggestion() -> None:
    longest = "m" * MAX_SUGGEST_CHARS
    assert "did you mean" in suggest(longest, [longest + "x"])
    assert suggest(longest + "m", [longest + "x"]) == f" (valid: {longest}x)"


@pytest.mark.parametrize("text", ["a", "ab", "math "])
def test_the_work_does_not_grow_with_the_length_of_the_name(text: str) -> None:
    """Without the limit the search takes seconds for a name of 30 MB."""
    name = text * (30_000_000 // len(text))
    started = time.thread_time()
    assert suggest(name, ["auto", "math"]) == " (valid: auto, math)"
    assert time.thread_time() - started < 0.1
