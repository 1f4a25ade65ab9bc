"""Files and batches in the run directory: whose they are, quotas, expiry, and what a dead process leaves."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_router.errors import BatchNotFoundError, BodyTooLargeError, QuotaExceededError, StoredFileNotFoundError
from hpc_router.router.batches.stored_batches import (
    ENDED,
    INCOMPLETE_S,
    NEXT,
    BatchError,
    BatchState,
    Status,
    StoredBatches,
)
from hpc_router.router.batches.stored_files import ABANDONED_S, StoredFile, StoredFiles, new_id, write_part
from hpc_router.state.run_directory import RunDir, make_run
from tests.router.batches.support import line, stored_batch, stored_file


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run")


def test_a_file_is_its_users(run: RunDir) -> None:
    files = StoredFiles(run)
    mine, hers = stored_file(files, b"mine"), stored_file(files, b"hers", user="alice")
    assert files.get(mine.id, None).bytes == 4
    assert files.content(mine.id).read_bytes() == b"mine"
    assert [file.id for file in files.of_user("alice")] == [hers.id]
    for file_id, user in ((mine.id, "alice"), (hers.id, None), (hers.id, "bob"), (new_id("file-"), None), ("..", None)):
        with pytest.raises(StoredFileNotFoundError):
            files.get(file_id, user)


def test_no_other_unix_user_can_read_it(run: RunDir) -> None:
    before = os.umask(0)
    try:
        file = stored_file(StoredFiles(run), b"a prompt")
        _, batch = stored_batch(run, line(0))
    finally:
        os.umask(before)
    for path in (run.files / file.id, *run.batches.rglob("*"), *run.files.rglob("*")):
        assert not path.stat().st_mode & 0o077, path
    assert (run.batches / batch.id).is_dir()


def test_the_newest_is_listed_first(run: RunDir) -> None:
    files = StoredFiles(run)
    ids = [stored_file(files, b"x", id=f"file-{n:031x}").id for n in (3, 1, 2)]
    assert [file.id for file in files.of_user(None)] == sorted(ids, reverse=True)


def test_the_quota_counts_uploads_that_are_not_complete(run: RunDir) -> None:
    files, now = StoredFiles(run), time.time()
    stored_file(files, b"x" * 60)
    stored_file(files, b"x" * 1000, user="alice")
    files.check_quota(None, 40, quota_bytes=100)
    with pytest.raises(QuotaExceededError, match="delete files"):
        files.check_quota(None, 41, quota_bytes=100)
    with files.begin(StoredFile(new_id("file-"), None, "", "batch", 30, now, now + 100)):
        pass
    with pytest.raises(QuotaExceededError):
        files.check_quota(None, 11, quota_bytes=100)
    assert len(list(files.of_user(None))) == 1, "it is not listed"


def test_an_upload_beyond_the_quota_is_removed(run: RunDir) -> None:
    """Its length was not known when it began."""
    files, now = StoredFiles(run), time.time()
    stored_file(files, b"x" * 60)
    file = StoredFile(new_id("file-"), None, "f", "batch", 0, now, now + 100)
    with files.begin(file) as content:
        content.write(b"x" * 41)
    with pytest.raises(QuotaExceededError):
        files.complete(file, quota_bytes=100)
    files.check_quota(None, 40, quota_bytes=100)


def test_a_file_has_a_maximum_length(run: RunDir) -> None:
    files, now = StoredFiles(run), time.time()
    with files.begin(StoredFile(new_id("file-"), None, "", "batch", 0, now, now + 100)) as content:
        written = write_part(content, b"x" * 6, written=0, max_bytes=10)
        with pytest.raises(BodyTooLargeError):
            write_part(content, b"x" * 5, written=written, max_bytes=10)


def test_a_removed_file_can_be_read_to_its_end(run: RunDir) -> None:
    files = StoredFiles(run)
    file = stored_file(files, b"abc")
    with files.content(file.id).open("rb") as content:
        files.remove(file.id)
        assert content.read() == b"abc"
    with pytest.raises(StoredFileNotFoundError):
        files.get(file.id, None)
    files.remove(file.id)


def test_expired_files_and_abandoned_uploads_are_removed(run: RunDir) -> None:
    files, now = StoredFiles(run), time.time()
    kept = stored_file(files, b"kept", expires_at=now + 100)
    expired = stored_file(files, b"expired", expires_at=now - 1)
    with pytest.raises(StoredFileNotFoundError):
        files.get(expired.id, None)
    uploads = [StoredFile(new_id("file-"), None, "", "batch", 1, now, now - 1) for _ in range(2)]
    for upload in uploads:
        files.begin(upload).close()
    old = now - ABANDONED_S - 1
    os.utime(files.content(uploads[0].id), (old, old))
    (run.files / ".removed-x").mkdir()  # a process died while it removed a file
    assert files.remove_expired(now=now) == 2
    assert sorted(path.name for path in run.files.iterdir()) == sorted([kept.id, uploads[1].id])


def test_a_batch_is_its_users(run: RunDir) -> None:
    batches, batch = stored_batch(run, line(0), user="alice")
    assert batches.get(batch.id, "alice") == batch
    assert [one.id for one in batches.of_user("alice")] == [batch.id]
    assert not list(batches.of_user(None))
    for user in (None, "bob"):
        with pytest.raises(BatchNotFoundError):
            batches.get(batch.id, user)


def test_a_batch_does_not_need_its_uploaded_file_any_more(run: RunDir) -> None:
    batches, batch = stored_batch(run, line(0))
    StoredFiles(run).remove(batch.input_file_id)
    assert (batches.folder(batch.id) / "input.jsonl").read_bytes() == line(0)


def test_a_user_has_a_maximum_of_unfinished_batches(run: RunDir) -> None:
    batches, batch = stored_batch(run, line(0), user="alice")
    other = StoredFiles(run)
    file = stored_file(other, line(0), user="alice")
    again = replace(batch, id=new_id("batch_"), input_file_id=file.id)
    with pytest.raises(QuotaExceededError, match=r"router\.batch\.max_batches"):
        batches.create(again, max_batches=1)
    batches.ended(batch.id)
    batches.create(again, max_batches=1)
    assert [one.id for one in batches.active()] == [again.id]


def test_a_mark_without_a_batch_is_removed_after_a_while(run: RunDir) -> None:
    batches, _ = stored_batch(run, line(0))
    mark = run.batches / "active" / new_id("batch_")
    mark.touch()
    assert len(batches.active()) == 1
    assert mark.exists(), "it may be created at this moment"
    old = time.time() - INCOMPLETE_S - 1
    os.utime(mark, (old, old))
    assert len(batches.active()) == 1
    assert not mark.exists()


def test_old_batches_are_removed_once_they_have_ended(run: RunDir) -> None:
    batches, running = stored_batch(run, line(0))
    _, ended = stored_batch(run, line(0))
    batches.ended(ended.id)
    assert batches.remove_ended(before=ended.created_at) == 0
    assert batches.remove_ended(before=time.time() + 1) == 1
    assert [batch.id for batch in batches.of_user(None)] == [running.id]


def test_every_status_is_reached_only_as_the_table_says() -> None:
    for status in Status:
        for following in Status:
            state = BatchState(status)
            if following in NEXT.get(status, ()):
                assert state.to(following, at=5.0).at == {following.value: 5.0}
            else:
                with pytest.raises(ValueError, match="cannot become"):
                    state.to(following, at=5.0)
    assert set(ENDED) == set(Status) - set(NEXT) - {Status.CANCELLING}


def test_the_state_is_read_as_it_was_written(run: RunDir) -> None:
    batches, batch = stored_batch(run, line(0))
    assert batches.state(batch.id) == BatchState()
    state = BatchState(Status.FINALIZING, {"in_progress": 1.0}, Status.EXPIRED, 3, 1, 1)
    batches.write_state(batch.id, state)
    assert batches.state(batch.id) == state
    failed = BatchState(Status.FAILED, {"failed": 2.0}, errors=(BatchError("c", "m", 1, "p"),))
    batches.write_state(batch.id, failed)
    batches.write_state(batch.id, state)
    batches.write_state(batch.id, BatchState(Status.COMPLETED))
    assert batches.state(batch.id) == failed, "the first end stays"


def test_the_batches_of_a_run_without_any(run: RunDir) -> None:
    batches = StoredBatches(run, StoredFiles(run))
    assert not batches.any_active()
    assert batches.active() == []
    assert batches.remove_ended(before=time.time()) == 0
    assert StoredFiles(run).remove_expired(now=time.time()) == 0
