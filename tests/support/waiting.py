"""Waiting for the outside world: a condition with a deadline, never a bare sleep."""

import asyncio
import time
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")
GUARD_S: Final = 60.0


async def eventually(condition: Callable[[], T | None], *, within_s: float = GUARD_S) -> T:
    """What `condition` returns once it is true; fails when it is not in time."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {within_s} s: {condition}"
        await asyncio.sleep(0.01)
    return value


def eventually_sync(condition: Callable[[], T | None], *, within_s: float = GUARD_S, every_s: float = 0.01) -> T:
    """The same outside an event loop; `every_s` for a condition that is dear to ask."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {within_s} s: {condition}"
        time.sleep(every_s)
    return value
