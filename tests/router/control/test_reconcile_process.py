"""The control loop beside a router is started again when it dies."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_router.router.control import reconcile_process
from hpc_router.router.control.reconcile_process import ReconcileProcess
from hpc_router.router.ipc.supervisor import MAX_PAUSE_S, STABLE_S
from hpc_router.state.io_thread import FileThread
from hpc_router.state.run_directory import RunDir, make_run
from tests.support.processes import with_word
from tests.support.waiting import eventually


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run")


@pytest.fixture
def files() -> Iterator[FileThread]:
    thread = FileThread("test")
    yield thread
    thread.close(timeout_s=5)


async def test_a_killed_loop_is_started_again_at_once(run: RunDir, files: FileThread) -> None:
    pauses: list[float] = []

    async def sleep(pause_s: float) -> None:
        pauses.append(pause_s)

    async with ReconcileProcess(run, files, replica="router-0.g1", sleep=sleep):
        (first,) = await eventually(lambda: with_word(str(run.path)))
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: [pid for pid in with_word(str(run.path)) if pid != first])
        assert pauses == [0.0]
    assert not with_word(str(run.path))


async def test_one_that_always_fails_is_started_more_and_more_rarely(
    run: RunDir, files: FileThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it has lived for a while."""
    monkeypatch.setattr(reconcile_process, "control_argv", lambda *_: ["/bin/false"])
    pauses: list[float] = []
    now, enough = 0.0, asyncio.Event()

    async def sleep(pause_s: float) -> None:
        nonlocal now
        pauses.append(pause_s)
        if len(pauses) == 13:
            enough.set()
            await asyncio.Future()

    def clock() -> float:
        """The twelfth run lasts; the clock is read when a run begins and when it has ended."""
        nonlocal now
        now += STABLE_S if len(pauses) == 11 else 0.0
        return now

    async with ReconcileProcess(run, files, replica="router-0.g1", clock=clock, sleep=sleep):
        await enough.wait()
    assert pauses[0] == 0.0
    assert pauses[:11] == sorted(pauses[:11])
    assert pauses[10] == MAX_PAUSE_S
    assert pauses[11:] == [0.0, 0.2]
