"""The process that runs batches: started only when it is needed, and again when it dies."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_router.config import frozen
from hpc_router.config.schema import Deployment
from hpc_router.net.job_environment import END_SIGNALS, WARNING_SIGNALS
from hpc_router.router.batches.stored_batches import StoredBatches
from hpc_router.router.batches.stored_files import StoredFiles
from hpc_router.router.control import batch_process
from hpc_router.router.control.batch_process import BatchProcess
from hpc_router.state.io_thread import FileThread
from hpc_router.state.run_directory import RunDir, make_run
from tests.router.batches.support import line, stored_batch, stored_file
from tests.support.processes import handles, ignores, with_word
from tests.support.waiting import eventually


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run")


@pytest.fixture
def files() -> Iterator[FileThread]:
    thread = FileThread("test")
    yield thread
    thread.close(timeout_s=5)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_process, "CHECK_S", 0.01)


class Router:
    """A router whose batches are run; `leads` may be changed."""

    def __init__(self, run: RunDir, files: FileThread, *, keep_days: float = 30.0) -> None:
        self.run, self.leads = run, True
        self.process = BatchProcess(
            run, files, replica="router-0.g1", leads=lambda: self.leads, keep_days=lambda: keep_days
        )

    async def __aenter__(self) -> "Router":
        self._task = asyncio.create_task(self.process.run_forever())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def programs(self) -> list[int]:
        return with_word(str(self.run.path))


async def test_it_runs_while_there_is_a_batch_and_this_router_leads(run: RunDir, files: FileThread) -> None:
    async with Router(run, files) as router:
        checked = asyncio.Event()
        router.process._leads = lambda: checked.set() or True  # type: ignore[func-returns-value]
        await checked.wait()
        assert not router.programs()
        router.process._leads = lambda: router.leads
        batches, batch = stored_batch(run, line(0))
        (first,) = await eventually(router.programs)
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: [pid for pid in router.programs() if pid != first])
        router.leads = False
        await eventually(lambda: not router.programs())
        batches.ended(batch.id)
        router.leads = True
    assert not router.programs()


async def test_only_its_router_handles_the_signals_of_their_job(run: RunDir, files: FileThread) -> None:
    """At some sites Slurm sends them to every process of the job."""
    run.config.write_text(frozen.to_yaml(Deployment()))  # without it, the program ends at once
    stored_batch(run, line(0))
    numbers = (signal.SIGHUP, *WARNING_SIGNALS, *END_SIGNALS)
    async with Router(run, files) as router:
        (program,) = await eventually(router.programs)
        await eventually(lambda: handles(program, signal.SIGTERM))
        await eventually(lambda: all(ignores(program, number) for number in numbers))
        for number in numbers:
            os.kill(program, number)
        assert router.programs() == [program]


async def test_it_ends_with_its_router(run: RunDir, files: FileThread) -> None:
    stored_batch(run, line(0))
    async with Router(run, files) as router:
        await eventually(router.programs)
    assert not router.programs()


async def test_what_has_expired_is_removed(run: RunDir, files: FileThread) -> None:
    stored = StoredFiles(run)
    stored_file(stored, b"x", expires_at=time.time() - 1)
    kept = stored_file(stored, b"x")
    batches, old = stored_batch(run, line(0), created_at=time.time() - 86400)
    batches.ended(old.id)
    async with Router(run, files, keep_days=0.5):
        await eventually(lambda: not batches.folder(old.id).exists())
    assert not list(StoredBatches(run, stored).of_user(None))
    assert {file.id for file in stored.of_user(None)} == {kept.id, old.input_file_id}
