"""The control process keeps the records within their limit."""

import asyncio
from pathlib import Path

import pytest

from hpc_router.router.control import record_limit
from hpc_router.state.io_thread import FileThread
from tests.router.fakes import a_deployment, a_router, a_run
from tests.support.waiting import eventually


async def test_old_records_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_limit, "CHECK_S", 0.01)
    run = a_run(tmp_path)
    run.records.mkdir()
    for day in (10, 11, 12):
        (run.records / f"router-0.g1.worker0-2026-11-{day}.jsonl").write_bytes(b"x" * 1000)
    async with a_router(run, a_deployment("math", records_gb=2.5e-6)):
        await eventually(lambda: len(list(run.records.iterdir())) == 2)


async def test_without_a_limit_none_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 turns records off; those that exist stay."""
    monkeypatch.setattr(record_limit, "CHECK_S", 0.0)
    run = a_run(tmp_path)
    asked: list[int] = []
    run.records.mkdir()
    (run.records / "router-0.g1.worker0-2026-11-10.jsonl").write_bytes(b"x" * 1000)
    files = FileThread("test")

    def limit() -> float:
        asked.append(len(list(run.records.iterdir())))
        return 0.0 if len(asked) < 3 else 1e-7

    task = asyncio.create_task(record_limit.limit_records_forever(run, files, limit))
    await eventually(lambda: not list(run.records.iterdir()))
    assert asked[:3] == [1, 1, 1]
    task.cancel()
    files.close(timeout_s=5)
