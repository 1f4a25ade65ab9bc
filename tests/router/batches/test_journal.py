"""Results survive the process that stores them, and each line has one."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_router.router.batches.journal import (
    ERRORS,
    OUTPUT,
    RESULTS,
    Journal,
    Result,
    journals,
    read_done,
    remove_working_files,
    write_results,
)


def store(folder: Path, *results: Result) -> Path:
    before = set(journals(folder))
    journal = Journal(folder)
    journal.append(results)
    journal.close()
    (made,) = set(journals(folder)) - before
    return made


def written(folder: Path, total: int) -> tuple[list[bytes], list[bytes]]:
    requests = iter([b"request %d" % n for n in range(total)])
    write_results(folder, total, requests=requests, error_line=lambda raw: b"no result: " + raw)
    return tuple((folder / RESULTS / name).read_bytes().splitlines() for name in (OUTPUT, ERRORS))  # type: ignore[return-value]


def test_results_are_written_in_the_order_of_the_input(tmp_path: Path) -> None:
    store(tmp_path, Result(3, True, b"three"), Result(0, True, b"zero"), Result(2, False, b"two"))
    store(tmp_path, Result(4, False, b"four"))
    done = read_done(tmp_path, 5)
    assert (done.completed, done.failed) == (2, 2)
    assert [index for index in range(5) if index in done] == [0, 2, 3, 4]
    assert written(tmp_path, 5) == ([b"zero", b"three"], [b"no result: request 1", b"two", b"four"])


def test_the_first_of_two_results_counts(tmp_path: Path) -> None:
    store(tmp_path, Result(0, True, b"a"), Result(0, False, b"b"))
    store(tmp_path, Result(0, False, b"c"), Result(1, True, b"d"))
    output, errors = written(tmp_path, 2)
    assert len(output) + len(errors) == 2
    assert read_done(tmp_path, 2).completed + read_done(tmp_path, 2).failed == 2


@pytest.mark.parametrize("cut", [1, 2, 5, 9, 20])
def test_a_result_that_was_cut_is_ignored(tmp_path: Path, cut: int) -> None:
    path = store(tmp_path, Result(0, True, b"whole"), Result(1, True, b"this one is cut"))
    path.write_bytes(path.read_bytes()[:-cut])
    done = read_done(tmp_path, 2)
    assert 0 in done
    assert 1 not in done
    store(tmp_path, Result(1, True, b"again"))
    assert written(tmp_path, 2) == ([b"whole", b"again"], [])


def test_what_is_damaged_is_ignored(tmp_path: Path) -> None:
    path = store(tmp_path, Result(0, True, b"zero"), Result(1, True, b"one"), Result(7, True, b"of no line"))
    path.write_bytes(path.read_bytes().replace(b"zero", b"z\0ro") + b"garbage\n\n00000000 x\n")
    assert written(tmp_path, 2) == ([b"one"], [b"no result: request 0"])


def test_results_that_were_written_stay(tmp_path: Path) -> None:
    """A second process that comes later counts them, and does not replace them."""
    store(tmp_path, Result(0, True, b"first"))
    assert written(tmp_path, 1) == ([b"first"], [])
    remove = journals(tmp_path)[0]
    remove.unlink()
    store(tmp_path, Result(0, False, b"second"))
    done = write_results(tmp_path, 1, requests=iter([b"x"]), error_line=bytes)
    assert (done.completed, done.failed) == (1, 0)
    assert written(tmp_path, 1) == ([b"first"], [])
    (tmp_path / "input.jsonl").touch()
    remove_working_files(tmp_path)
    assert not list(tmp_path.iterdir())


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 30), st.booleans(), st.binary(max_size=30)), max_size=20), max_size=4)
)
def test_any_results_become_one_line_each(
    tmp_path_factory: pytest.TempPathFactory, processes: list[list[tuple[int, bool, bytes]]]
) -> None:
    folder = tmp_path_factory.mktemp("batch")
    for results in processes:
        store(folder, *(Result(n, ok, text.replace(b"\n", b"")) for n, ok, text in results))
    valid = {n for results in processes for n, _, _ in results if n < 25}
    output, errors = (
        (folder / RESULTS / name).read_bytes().count(b"\n") if written(folder, 25) else 0 for name in (OUTPUT, ERRORS)
    )
    assert output + errors == 25
    assert (folder / RESULTS / ERRORS).read_bytes().count(b"no result: request ") == 25 - len(valid)
