"""Waits for conditions of other processes, with a deadline instead of a fixed sleep."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

T = TypeVar("T")
GUARD_S: Final = 60.0


async def eventually(condition: Callable[[], object], *, within_s: float = GUARD_S) -> Any:
    """Returns the first true result of `condition`, a function or a coroutine function. Fails after `within_s` seconds,
    also if the coroutine does not return."""
    limit = asyncio.timeout(within_s)
    try:
        async with limit:
            while not (value := await _result(condition)):
                await asyncio.sleep(0.01)
    except TimeoutError as error:
        assert not limit.expired(), f"not within {within_s} s: {condition}"
        raise error
    return value


async def _result(condition: Callable[[], object]) -> object:
    value = condition()
    return await value if isinstance(value, Awaitable) else value


def eventually_sync(condition: Callable[[], T | None], *, within_s: float = GUARD_S, every_s: float = 0.01) -> T:
    """`eventually` without an event loop. `every_s`: pause between two calls, for an expensive condition."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {within_s} s: {condition}"
        time.sleep(every_s)
    return value
