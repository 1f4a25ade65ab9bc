"""`eventually` returns the first true result, and fails at its limit."""

import asyncio

import pytest

from tests.support.waiting import eventually, eventually_sync


async def test_it_returns_the_first_true_result_of_a_function_and_of_a_coroutine() -> None:
    results = [0, None, 3, 4]

    async def next_result() -> int | None:
        await asyncio.sleep(0)
        return results.pop(0)

    assert await eventually(next_result) == 3
    assert await eventually(lambda: results.pop(0)) == 4
    assert eventually_sync(lambda: "done") == "done"


async def test_it_fails_at_its_limit() -> None:
    async def false() -> bool:
        return False

    async def never() -> None:
        await asyncio.Event().wait()

    for condition in (lambda: False, false, never):
        with pytest.raises(AssertionError, match=r"not within 0\.02 s"):
            await eventually(condition, within_s=0.02)
    with pytest.raises(AssertionError, match=r"not within 0 s"):
        eventually_sync(lambda: False, within_s=0)


async def test_a_timeout_of_the_condition_itself_is_raised() -> None:
    async def late() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        await eventually(late)
