"""One process at a time changes a file that it reads first."""

import threading
from pathlib import Path

import pytest

from hpc_router.state.exclusive import POLL_S, STALE_S, exclusive
from hpc_router.state.run_directory import make_run


def test_changes_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    run, start = make_run(tmp_path / "run"), threading.Barrier(8)

    def change(number: int) -> None:
        start.wait()
        for _ in range(5):
            run.change_desired(lambda desired: {"sum": desired.get("sum", 0) + 1, str(number): True})

    threads = [threading.Thread(target=change, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert run.read_desired() == {"sum": 40, **{str(number): True for number in range(8)}}
    assert not run.desired_claim.exists()


def test_a_change_that_fails_releases_the_claim(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(KeyError):
        run.change_desired(lambda desired: {"x": desired["missing"]})
    assert not run.desired_claim.exists()
    assert run.read_desired() == {}


@pytest.mark.parametrize("renewed", [False, True])
def test_the_claim_of_a_dead_process_is_removed_after_a_while(tmp_path: Path, renewed: bool) -> None:
    """But not while other processes take their turns."""
    claim, now = tmp_path / "claim", [0.0]
    claim.mkdir()

    def sleep(length_s: float) -> None:
        now[0] += length_s
        if renewed and now[0] < 3 * STALE_S:
            claim.rmdir()
            (tmp_path / str(now[0])).mkdir()  # takes the inode
            claim.mkdir()

    with exclusive(claim, clock=lambda: now[0], sleep=sleep):
        assert claim.exists()
    assert not claim.exists()
    first = STALE_S + (3 * STALE_S if renewed else 0.0)
    assert first - 2 * POLL_S < now[0] < first + 3 * POLL_S
