"""A background task that raises is logged, reported and started again; cancellation and a return end it."""

import asyncio
import logging

import pytest

from hpc_router import background_tasks
from hpc_router.background_tasks import TaskFailures, restarting


class Body:
    """Raises the given errors one after another, then waits until it is cancelled."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.settled = asyncio.Event()

    async def __call__(self) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.settled.set()
        await asyncio.Event().wait()


async def test_it_is_reported_logged_and_started_again(caplog: pytest.LogCaptureFixture) -> None:
    failures, body = TaskFailures(), Body(ValueError("one"), KeyError("two"))
    async with asyncio.timeout(5), background_tasks.background("scan", body, failures.note):
        await body.settled.wait()
    assert failures.seen == {"scan": (2, "KeyError: 'two'")}
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
    assert caplog.records[0].exc_info is not None
    assert "background task 'scan' failed" in caplog.text


async def test_the_pause_doubles_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def sleep(pause_s: float) -> None:
        pauses.append(pause_s)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    times = iter(range(12))

    async def body() -> None:
        if next(times, None) is not None:
            raise ValueError("again")

    await restarting("scan", body, lambda task, error: None)
    assert pauses[:4] == [0.1, 0.2, 0.4, 0.8]
    assert pauses[-1] == background_tasks.MAX_PAUSE_S


async def test_cancellation_and_a_return_end_it() -> None:
    failures = TaskFailures()

    async def nothing() -> None:
        return

    await restarting("once", nothing, failures.note)
    body = Body()
    task = asyncio.create_task(restarting("long", body, failures.note))
    await body.settled.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert failures.seen == {}
