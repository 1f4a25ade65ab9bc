"""The faults of a batch's input file."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from hpc_router.router.batches import input_lines as module
from hpc_router.router.batches.input_lines import MAX_ERRORS, LineError, check_input, input_lines, parse_line
from tests.router.batches.support import CHAT, line

BODY: Any = {"model": "math", "messages": []}
FAULTS = {
    "no JSON": (b"{nope\n", "invalid_json_line", None),
    "half a line": (line(1)[:-20] + b"\n", "invalid_json_line", None),
    "NaN": (b'{"custom_id": NaN}\n', "invalid_json_line", None),
    "no object": (b"[1]\n", "invalid_json_line", None),
    "no UTF-8": (b'{"custom_id": "\xff"}\n', "invalid_json_line", None),
    "too deep": (b"[" * 3900 + b"\n", "invalid_json_line", None),
    "no custom_id": (line(1, custom_id=None), "missing_required_parameter", "custom_id"),
    "custom_id is a number": (line(1, custom_id=7), "missing_required_parameter", "custom_id"),
    "empty custom_id": (line(1, custom_id=""), "missing_required_parameter", "custom_id"),
    "method": (line(1, method="GET"), "invalid_method", "method"),
    "url": (line(1, url="/v1/embeddings"), "invalid_url", "url"),
    "no body": (line(1, body=None), "missing_required_parameter", "body"),
    "no model": (line(1, body={"messages": []}), "missing_required_parameter", "body.model"),
    "stream": (line(1, body={**BODY, "stream": True}), "invalid_request", "body.stream"),
    "another model": (line(1, body={**BODY, "model": "law"}), "mismatched_model", "body.model"),
    "duplicate": (line(0), "duplicate_custom_id", "custom_id"),
    "too long": (line(1, body={**BODY, "x": "x" * 5000}), "invalid_request", None),
}


def checked(folder: Path, content: bytes, **changes: Any) -> module.InputCheck:
    path = folder / "input.jsonl"
    path.write_bytes(content)
    return check_input(path, **{"endpoint": CHAT, "max_lines": 1000, "max_bytes": 4000, **changes})


@pytest.mark.parametrize(("bad", "code", "param"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_reported_with_its_line(tmp_path: Path, bad: bytes, code: str, param: str | None) -> None:
    content = line(0) + b"\n" + bad + line(2)  # the blank line counts for the numbers of lines
    (error,) = checked(tmp_path, content).errors
    assert (error.code, error.line, error.param) == (code, 3, param)


def test_a_valid_file(tmp_path: Path) -> None:
    """Blank lines, CRLF and a last line without its end are fine."""
    content = b"\n" + line(0) + b"  \r\n" + line(1).replace(b"\n", b"\r\n") + line(2)[:-1]
    assert checked(tmp_path, content) == module.InputCheck(3, ())
    with (tmp_path / "input.jsonl").open("rb") as file:
        found = list(input_lines(file, max_bytes=4000))
    assert [(one.index, one.number) for one in found] == [(0, 2), (1, 4), (2, 5)]
    for one in found:
        assert content[one.offset : one.offset + one.length] == one.raw
        assert parse_line(one.raw, endpoint=CHAT).custom_id == f"line-{one.index}"


def test_the_body_is_sent_as_it_means(tmp_path: Path) -> None:
    body = {**BODY, "big": 2**70, "small": 1e-7, "text": "a\nb \u2028 😀"}
    request = parse_line(line(0, body=body), endpoint=CHAT)
    assert json.loads(request.body) == body
    assert b"\n" not in request.body
    with pytest.raises(LineError):
        parse_line(line(0), endpoint="/v1/embeddings")


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_an_empty_file(tmp_path: Path, content: bytes) -> None:
    (error,) = checked(tmp_path, content).errors
    assert error.code == "empty_file"


def test_too_many_lines(tmp_path: Path) -> None:
    (error,) = checked(tmp_path, line(0) + line(1) + line(2), max_lines=2).errors
    assert (error.code, error.line) == ("too_many_tasks", 3)


def test_a_bounded_number_of_faults_is_reported(tmp_path: Path) -> None:
    assert len(checked(tmp_path, b"x\n" * 1000).errors) == MAX_ERRORS
    assert len(checked(tmp_path, line(7) * 900).errors) == MAX_ERRORS


def test_duplicates_are_found_in_any_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ranges so small that there are many of them."""
    monkeypatch.setattr(module, "RANGE_HASHES", 8)
    content = b"".join(line(n) for n in range(200)) + line(150) + line(3)
    assert [error.line for error in checked(tmp_path, content).errors] == [201, 202]


def test_the_check_ends_early_when_the_process_stops(tmp_path: Path) -> None:
    assert checked(tmp_path, line(0) + line(1), stopped=lambda: True).total == 0


def test_the_memory_of_a_check_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        (tmp_path / "input.jsonl").write_bytes(b"".join(line(n) for n in range(count)))
        tracemalloc.start()
        check_input(tmp_path / "input.jsonl", endpoint=CHAT, max_lines=10**6, max_bytes=4000)
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(20_000) < peak(2_000) + 2**19
