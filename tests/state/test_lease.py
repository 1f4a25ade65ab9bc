"""A record is live while it is renewed; a file system that hangs stops neither work nor shutdown."""

import asyncio
import errno
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_router.background_tasks import TaskFailures
from hpc_router.state import lease as lease_module
from hpc_router.state import registry
from hpc_router.state.io_thread import FileThread
from hpc_router.state.lease import Lease
from hpc_router.state.registry import Record, RecordKind, RegistryReader, State
from tests.support.waiting import eventually

HANG_S = 0.05


def record(beat_s: float = 3600.0) -> Record:
    return Record(RecordKind.EXPERT, "math-0.g1", "http://127.0.0.1:1", State.STARTING, {"math": "math"}, beat_s=beat_s)


def published(folder: Path) -> Record | None:
    return RegistryReader(folder).snapshot().get("math-0.g1")


@pytest.fixture
def files() -> Iterator[FileThread]:
    files = FileThread("t")
    yield files
    files.close(timeout_s=5)


async def test_published_updated_withdrawn(tmp_path: Path) -> None:
    async with Lease(tmp_path, record()) as lease:
        assert published(tmp_path) == lease.record
        await lease.update(state=State.READY)
        now = published(tmp_path)
        assert now is not None
        assert (now.state, now.beat) == (State.READY, 0)
        lease.change(state=State.DRAINING)
        await eventually(lambda: published(tmp_path) == lease.record)
    assert list(tmp_path.iterdir()) == []


async def test_beats_grow(tmp_path: Path) -> None:
    def beat() -> int:
        seen = published(tmp_path)
        return (seen and seen.beat) or 0

    async with Lease(tmp_path, record(beat_s=0.01)):
        first = await eventually(beat)
        await eventually(lambda: beat() > first)


async def test_a_folder_that_is_gone_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "registry"
    folder.mkdir()
    async with Lease(folder, record()) as lease:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        await lease.update(state=State.READY)
        assert "cannot be published" in caplog.text
        assert lease.record.state is State.READY


async def test_while_the_file_system_hangs_work_goes_on_and_beats_do_not_pile_up(
    tmp_path: Path, files: FileThread, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease_module, "WRITE_TIMEOUT_S", HANG_S)
    hanging, beats = threading.Event(), list[int]()

    def noting(folder: Path, value: Record) -> None:
        beats.append(value.beat or 0)
        registry.publish(folder, value)

    async with Lease(tmp_path, record(beat_s=0.001), files) as lease:
        files.post(hanging.wait)
        monkeypatch.setattr("hpc_router.state.lease.publish", noting)
        await lease.update(state=State.DRAINING)
        before = lease.record.beat or 0
        await eventually(lambda: (lease.record.beat or 0) > before + 20)
        assert "has not answered" in caplog.text
        hanging.set()
        await eventually(lambda: (seen := published(tmp_path)) and seen.state is State.DRAINING)
        await eventually(lambda: len(beats) >= 2)
        assert beats[1] - beats[0] > 20
    assert published(tmp_path) is None


async def test_the_end_of_a_lease_does_not_wait_for_a_hanging_file_system(
    tmp_path: Path, files: FileThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "WRITE_TIMEOUT_S", HANG_S)
    hanging = threading.Event()
    async with asyncio.timeout(5), Lease(tmp_path, record(), files):
        files.post(hanging.wait)
    hanging.set()
    await eventually(lambda: published(tmp_path) is None)


async def test_the_owner_is_informed_once_that_the_folder_was_removed(tmp_path: Path) -> None:
    folder, calls = tmp_path / "registry", list[int]()
    folder.mkdir()
    async with Lease(folder, record(beat_s=0.001), on_gone=lambda: calls.append(lease.record.beat or 0)) as lease:
        folder.rename(tmp_path / "away")
        await eventually(lambda: calls)
        await eventually(lambda: (lease.record.beat or 0) > calls[0] + 3 * lease_module.GONE_BEATS)
    assert len(calls) == 1


async def test_a_failing_file_system_does_not_count_as_a_removed_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is missing only for a while does not count as removed either."""
    numbers = itertools.cycle([*[errno.ENOENT] * (lease_module.GONE_BEATS - 1), errno.EIO])
    calls: list[bool] = []

    def failing(*_: object) -> None:
        raise OSError(next(numbers), "scripted")

    async with Lease(tmp_path, record(beat_s=0.001), on_gone=lambda: calls.append(True)) as lease:
        monkeypatch.setattr("hpc_router.state.lease.publish", failing)
        await eventually(lambda: (lease.record.beat or 0) > 4 * lease_module.GONE_BEATS)
    assert calls == []


async def test_renewal_continues_after_an_unexpected_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = iter([ZeroDivisionError("a fault of ours")])
    real = registry.publish

    def publish(folder: Path, record: Record) -> None:
        if record.beat and (fault := next(faults, None)) is not None:
            raise fault
        real(folder, record)

    monkeypatch.setattr(lease_module, "publish", publish)
    failures = TaskFailures()
    async with Lease(tmp_path, record(beat_s=0.001), on_failure=failures.note):
        await eventually(lambda: ((now := published(tmp_path)) is not None and (now.beat or 0) >= 3) or None)
    assert failures.seen == {"lease": (1, "ZeroDivisionError: a fault of ours")}


async def test_the_record_tells_the_end_of_the_job_and_its_changes(tmp_path: Path) -> None:
    ends = [1000.0]

    def expires_at() -> float | None:
        seen = published(tmp_path)
        return None if seen is None else seen.expires_at

    async with Lease(tmp_path, record(beat_s=0.01), expires_at=lambda: ends[0]):
        assert expires_at() == 1000
        ends[0] = 700.0
        await eventually(lambda: expires_at() == 700)
