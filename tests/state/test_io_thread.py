"""The thread for all writes keeps their order, and blocks no caller when it hangs."""

import asyncio
import gc
import logging
import threading
from pathlib import Path

import pytest

from hpc_router.state.io_thread import FileThread, FileThreadHandler


async def test_actions_run_in_order_and_give_their_results() -> None:
    files, seen = FileThread("t"), list[int]()
    for number in range(100):
        files.post(lambda number=number: seen.append(number))  # type: ignore[misc]
    assert await files.run(lambda: len(seen)) == 100
    assert seen == sorted(seen)
    files.close(timeout_s=5)


async def test_an_exception_reaches_the_caller_and_the_thread_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    files = FileThread("t")

    def fail(error: Exception) -> None:
        raise error

    files.post(lambda: fail(OSError("no space")))
    files.post(lambda: fail(ValueError("a bug")))
    with pytest.raises(OSError, match="gone"):
        await files.run(lambda: fail(OSError("gone")))
    assert "no space" in caplog.text
    assert "a bug" in caplog.text
    files.close(timeout_s=5)


async def test_a_limited_action_returns_none_after_an_error_or_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    files, hanging = FileThread("t"), threading.Event()

    def fail() -> int:
        raise OSError("gone")

    assert await files.run_within_limit(lambda: 7) == 7
    assert await files.run_within_limit(fail) is None
    monkeypatch.setattr("hpc_router.state.io_thread.WRITE_TIMEOUT_S", 0.0)
    assert await files.run_within_limit(hanging.wait) is None
    hanging.set()
    files.close(timeout_s=5)


async def test_an_action_runs_even_if_its_caller_is_cancelled() -> None:
    files, hanging, done = FileThread("t"), threading.Event(), threading.Event()
    files.post(hanging.wait)
    task = asyncio.create_task(files.run(done.set))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    hanging.set()
    assert await asyncio.to_thread(done.wait, 5)
    files.close(timeout_s=5)


@pytest.mark.parametrize("error", [OSError("disk gone"), ValueError("a bug")], ids=["OSError", "other"])
async def test_the_failure_of_an_action_whose_caller_was_cancelled_is_logged_once(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio must not report it as an exception that was never retrieved."""
    files, hanging = FileThread("t"), threading.Event()
    reported = list[dict[str, object]]()
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))

    def fail() -> None:
        hanging.wait()
        raise error

    task = asyncio.create_task(files.run(fail))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    hanging.set()
    await files.run(lambda: None)  # its result arrives after that of `fail`
    gc.collect()
    assert reported == []
    assert [record.getMessage() for record in caplog.records] == [
        "cannot write: disk gone" if isinstance(error, OSError) else "an action of the file thread failed"
    ]
    files.close(timeout_s=5)


async def test_a_log_file_that_hangs_blocks_no_caller(tmp_path: Path) -> None:
    files, hanging = FileThread("t"), threading.Event()
    log = tmp_path / "log"
    logger = logging.getLogger("hanging")
    handler = FileThreadHandler(files, logging.FileHandler(log))
    logger.addHandler(handler)
    files.post(hanging.wait)
    logger.warning("said %d", 1)
    assert log.read_text() == ""
    hanging.set()
    logger.removeHandler(handler)
    handler.close()
    files.close(timeout_s=5)
    assert log.read_text() == "said 1\n"
