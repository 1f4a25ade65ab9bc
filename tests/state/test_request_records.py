"""The files of records: whole lines, one writer per file, a bounded size, and readers that tolerate what they find."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from hpc_router.state.request_records import (
    MIN_PART_BYTES,
    LineFile,
    find_records,
    part_bytes,
    read_records,
    remove_oldest,
)
from hpc_router.state.run_directory import RunDir, make_run

DAY_S = 86_400
AT = 1_700_000_000 // DAY_S * DAY_S + 100.0  # early on a day
LARGE = 2**20


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run")


def line(request_id: str, at: float = AT, **more: object) -> bytes:
    return json.dumps({"kind": "request", "id": request_id, "at": at, **more}, separators=(",", ":")).encode() + b"\n"


def names(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.records.iterdir())


def test_a_file_per_day_that_only_its_owner_can_read(run: RunDir) -> None:
    os.umask(0o022)
    file = LineFile(run.records, "r.worker0")
    for day in (0, 0, 1):
        file.write(line("a"), at=AT + day * DAY_S, max_bytes=LARGE)
    file.close()
    assert names(run) == ["r.worker0-2023-11-14.jsonl", "r.worker0-2023-11-15.jsonl"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in run.records.iterdir()} == {0o600}
    assert stat.S_IMODE(run.records.stat().st_mode) == 0o700
    assert len(list(read_records(run, since=0))) == 3


def test_a_large_file_is_followed_by_another_and_a_new_process_continues_the_last(run: RunDir) -> None:
    for _ in range(2):  # two processes, one after the other
        file = LineFile(run.records, "w")
        for _ in range(3):
            file.write(b"x" * 599 + b"\n", at=AT, max_bytes=1300)
        file.close()
    sizes = {path.name: path.stat().st_size for path in run.records.iterdir()}
    assert sizes == {"w-2023-11-14.jsonl": 1200, "w-2023-11-14.2.jsonl": 1200, "w-2023-11-14.3.jsonl": 1200}


def test_a_write_that_fails_leaves_no_part_of_a_line(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    file, write = LineFile(run.records, "w"), os.write
    file.write(line("a"), at=AT, max_bytes=LARGE)

    def half(descriptor: int, data: memoryview) -> int:
        if len(data) < 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space left"):
        file.write(line("b"), at=AT, max_bytes=LARGE)
    monkeypatch.undo()
    file.write(line("c"), at=AT, max_bytes=LARGE)
    file.close()
    assert (run.records / "w-2023-11-14.jsonl").read_bytes() == line("a") + line("c")


def test_an_unfinished_line_of_a_lost_node_spoils_only_itself(run: RunDir) -> None:
    run.records.mkdir()
    (run.records / "w-2023-11-14.jsonl").write_bytes(line("a") + line("b")[:20])
    file = LineFile(run.records, "w")
    file.write(line("c"), at=AT, max_bytes=LARGE)
    file.close()
    assert [record["id"] for record in read_records(run, since=0)] == ["a", "c"]


def test_a_file_that_was_removed_is_made_again(run: RunDir) -> None:
    file = LineFile(run.records, "w")
    file.write(line("a"), at=AT, max_bytes=LARGE)
    (run.records / "w-2023-11-14.jsonl").unlink()
    file.write(line("b"), at=AT, max_bytes=LARGE)
    file.close()
    assert (run.records / "w-2023-11-14.jsonl").read_bytes() == line("b")


def test_the_oldest_files_of_records_and_samples_are_removed(run: RunDir) -> None:
    for folder in (run.records, run.samples):
        folder.mkdir()
    for age, path in enumerate(
        (run.records / "w-2023-11-14.jsonl", run.samples / "w-2023-11-14.jsonl", run.records / "v-2023-11-13.2.jsonl")
    ):
        path.write_bytes(b"x" * 1000)
        os.utime(path, (AT - age, AT - age))
    other = run.records / "notes.txt"
    other.write_bytes(b"x" * 5000)
    assert remove_oldest(run, 3000) == 0
    assert remove_oldest(run, 2999) == 1
    assert names(run) == ["notes.txt", "w-2023-11-14.jsonl"]
    assert remove_oldest(run, 1000) == 1
    assert list(run.samples.iterdir()) == []


def test_records_are_found_by_id_and_time(run: RunDir) -> None:
    first, second = LineFile(run.records, "v"), LineFile(run.records, "w")
    first.write(line("a", AT) + line("ab", AT + 1) + b"[1]\nnot json\n", at=AT, max_bytes=LARGE)
    second.write(line("a", AT - 5, status=503) + line("b", AT + 2, note='"id":"a"'), at=AT, max_bytes=LARGE)
    first.close()
    second.close()
    assert [(r["at"], r.get("status")) for r in find_records(run, "a")] == [(AT - 5, 503), (AT, None)]
    assert find_records(run, "c") == []
    assert sorted(r["id"] for r in read_records(run, since=AT + 1)) == ["ab", "b"]
    assert list(read_records(make_run(run.path.parent / "empty"), since=0)) == []


def test_parts_are_small_beside_the_limit() -> None:
    assert part_bytes(10**9) == 10**9 // 16
    assert part_bytes(10**12) == 64 * 2**20
    assert part_bytes(1) == MIN_PART_BYTES
