"""The load generator with servers that behave like real ones: it counts correctly and records every error."""

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from hpc_router.bench.load.native.engine import mock_engine
from hpc_router.bench.load.native.load import LoadSpec, Recorded, Running, run, running, write_requests
from hpc_router.bench.load.native.records import REUSED, STREAM, Error, errors
from hpc_router.errors import LaunchError
from hpc_router.net.addresses import free_port
from tests.bench.load.native import scripted as s

RUN_TIMEOUT_S = 60.0


def prepared(folder: Path, *bodies: bytes) -> Path:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n"
    return write_requests(folder / "requests", [head % len(body) + body for body in bodies or (b"{}",)])


def send(folder: Path, port: int, *bodies: bytes, connections: int = 1, count: int = 1, label: str | None = None,
        timeout_s: float = 30.0, think_s: Sequence[float] | None = None) -> Recorded:  # fmt: skip
    load = LoadSpec(
        requests=prepared(folder, *bodies),
        port=port,
        connections=connections,
        count=count,
        events=True,
        label=label,
        timeout_s=timeout_s,
        think_s=think_s,
    )
    return run(load, folder / "load", timeout_s=RUN_TIMEOUT_S)


def test_responses_that_arrive_byte_by_byte(tmp_path: Path) -> None:
    with s.scripted(s.by_bytes(s.plain(b"x" * 40))) as (port, server):
        found = send(tmp_path, port, b'{"n":1}', b'{"n":2}', count=5)
    assert errors(found.requests) == {}
    assert found.requests["bytes"].tolist() == [40] * 5
    assert found.requests["status"].tolist() == [200] * 5
    assert [bool(flags & REUSED) for flags in found.requests["flags"]] == [False, True, True, True, True]
    assert server.connections == found.summary["connects"] == 1
    assert [request[-1:] for request in server.requests] == [b"}"] * 5
    assert [request[-2:-1] for request in server.requests] == [b"1", b"2", b"1", b"2", b"1"]


def awkward_stream() -> bytes:
    """Returns a stream with events across chunks, several per chunk, both line ends, comments and a chunk extension."""
    whole = (
        b': a comment\n\ndata: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
        + s.event("one", stamp=1)
        + s.event("two").replace(b"\n", b"\r\n")
        + b"event: message\nid: 7\n"
        + s.event('thr\\"content\\":\\"ee')
        + b'data: {"choices":[{"delta":{"content": "four"}}]}\n\n'
        + s.DONE
    )
    cut = [whole[i : i + 37] for i in range(0, len(whole), 37)]
    first = b"%x;name=value\r\n%b\r\n" % (len(cut[0]), cut[0])
    return s.STREAM + first + s.chunks(*cut[1:], end=b"0\r\nx-trailer: 1\r\n\r\n")


ABORTED = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"abort"}]}\n\n'


@pytest.mark.parametrize("pieces", [s.by_bytes(awkward_stream()), [awkward_stream()]], ids=["bytes", "whole"])
def test_events_are_counted_however_they_are_cut(tmp_path: Path, pieces: list[bytes]) -> None:
    with s.scripted(pieces) as (port, server):
        found = send(tmp_path, port, count=2)
    assert errors(found.requests) == {}
    assert found.requests["events"].tolist() == [4, 4]
    assert all(flags & STREAM for flags in found.requests["flags"])
    assert server.connections == 1, "the end of the body was found"
    row = found.requests[0]
    assert 0 < row["begin"] <= row["first_byte"] <= row["first_event"] <= row["end"]
    events = found.events[found.events["sequence"] == 0]
    assert (events["hop"] == -1).tolist() == [False, True, True, True]
    assert events["hop"][0] == events["at"][0] - 1


def test_a_response_delimited_by_the_end_of_the_connection(tmp_path: Path) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    with s.scripted([head + s.event("a") + s.DONE, s.HANG_UP]) as (port, server):
        found = send(tmp_path, port, count=2)
    assert errors(found.requests) == {}
    assert found.requests["events"].tolist() == [1, 1]
    assert server.connections == 2


@pytest.mark.parametrize("head", [s.plain(more=b"Connection: close\r\n"), s.plain().replace(b"HTTP/1.1", b"HTTP/1.0")])
def test_a_server_without_keep_alive(tmp_path: Path, head: bytes) -> None:
    with s.scripted([head, s.HANG_UP]) as (port, server):
        found = send(tmp_path, port, count=3)
    assert errors(found.requests) == {}
    assert server.connections == found.summary["connects"] == 3


@pytest.mark.parametrize("last", [b"data: [DONE]\n", b"data: [DONE]\r\n", b"data: [DONE]"], ids=["LF", "CRLF", "none"])
def test_a_last_event_without_its_blank_line_is_an_end(tmp_path: Path, last: bytes) -> None:
    with s.scripted([s.STREAM + s.chunks(s.event("a"), last)]) as (port, server):
        found = send(tmp_path, port, count=2)
    assert errors(found.requests) == {}
    assert found.requests["events"].tolist() == [1, 1]
    assert server.connections == 1


def test_a_server_that_closes_idle_connections(tmp_path: Path) -> None:
    """The request is sent again, whether the client notices before or after sending it."""
    with s.scripted([s.plain(), s.HANG_UP]) as (port, _):
        found = send(tmp_path, port, count=20)
    assert errors(found.requests) == {}
    assert len(found.requests) == 20


def test_interim_responses_are_skipped(tmp_path: Path) -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
    with s.scripted(s.by_bytes(interim + s.plain())) as (port, _):
        found = send(tmp_path, port, count=2)
    assert errors(found.requests) == {}
    assert found.requests["status"].tolist() == [200, 200]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ([s.plain(status=b"503 Service Unavailable")], "http_503"),
        ([b"HTTP/1.1 204 No Content\r\n\r\n"], "http_204"),
        ([s.STREAM + s.chunks(s.event("a"))], "unfinished"),
        ([s.STREAM + s.chunks(s.event("a"), b'data: {"error": {"message": "x"}}\n\n', s.DONE)], "stream_error"),
        ([s.STREAM + s.chunks(s.event("a"), ABORTED, s.DONE)], "stream_error"),
        ([s.STREAM + s.chunks(s.event("a"), ABORTED.replace(b":", b": "), s.DONE)], "stream_error"),
        ([s.STREAM + s.chunks(s.event("a"), b"data: [DON")], "unfinished"),
        ([s.STREAM + s.chunks(s.event("a"), end=b""), s.HANG_UP], "cut"),
        ([s.plain(b"x" * 10)[:-1], s.HANG_UP], "cut"),
        ([s.HANG_UP], "disconnected"),
        ([s.plain()[:20], s.HANG_UP], "disconnected"),
        ([b"SSH-2.0-nonsense\r\n\r\n"], "bad_http"),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n"], "bad_http"),
        ([b"HTTP/1.1 200 OK\r\ncontent-length:\r\n\r\n"], "bad_http"),
        ([s.STREAM + b"zz\r\n"], "bad_http"),
        ([s.STREAM + b"2\r\nabcd\r\n"], "bad_http"),
        ([b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000], "bad_http"),
    ],
)
def test_each_kind_of_error(tmp_path: Path, answer: list[bytes], kind: str) -> None:
    with s.scripted(answer) as (port, _):
        found = send(tmp_path, port, count=2)
    assert errors(found.requests) == {kind: 2}


def test_a_program_that_ends_before_its_output_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both its first line and its summary are already in the pipe, and both are read."""

    class Late(Running):
        def __init__(self, process: subprocess.Popen[bytes], load: LoadSpec, folder: Path) -> None:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            super().__init__(process, load, folder)

    monkeypatch.setattr("hpc_router.bench.load.native.load.Running", Late)
    with s.scripted([s.plain()]) as (port, _):
        found = send(tmp_path, port, count=2)
    assert found.summary["requests"] == 2


def test_data_beyond_the_response_is_counted(tmp_path: Path) -> None:
    with s.scripted([s.plain() + b"more"]) as (port, server):
        found = send(tmp_path, port, count=2)
    assert found.summary["unsolicited"] == 2
    assert server.connections == 2, "such a connection is not used again"


def test_a_refused_connection(tmp_path: Path) -> None:
    assert errors(send(tmp_path, free_port(), count=2).requests) == {"connect": 2}


def test_a_server_that_sends_nothing(tmp_path: Path) -> None:
    with s.scripted([s.SILENCE]) as (port, _):
        found = send(tmp_path, port, connections=3, count=3, timeout_s=0.1)
    assert errors(found.requests) == {"timeout": 3}
    assert found.requests["first_byte"].tolist() == [0, 0, 0]


def test_header_values_are_recorded(tmp_path: Path) -> None:
    answers = [[s.plain(more=f"X-Expert: {name}\r\n".encode())] for name in ("math", "law", "math")]
    with s.scripted(*answers, [s.plain()]) as (port, _):
        found = send(tmp_path, port, count=4, label="x-expert")
    names = [None, *found.summary["labels"]]
    assert [names[label] for label in found.requests["label"]] == ["math", "law", "math", None]


def test_an_open_loop_records_when_requests_were_due(tmp_path: Path) -> None:
    """With one connection, requests that arrive while it is busy wait, but keep their arrival time."""
    offsets = [0.0, 0.0, 0.0, 0.25, 0.5]
    with s.scripted([s.plain()]) as (port, server):
        load = LoadSpec(requests=prepared(tmp_path), port=port, connections=1, arrivals_s=offsets)
        found = run(load, tmp_path / "load", timeout_s=RUN_TIMEOUT_S)
    assert errors(found.requests) == {}
    rows = found.requests
    assert ((rows["due"] - found.summary["begun"]) / 1e9).tolist() == offsets
    assert (rows["begin"] >= rows["due"]).all()
    assert (rows["begin"][1:] >= rows["end"][:-1]).all()
    assert server.connections == 1


def test_prompts_in_a_given_order(tmp_path: Path) -> None:
    with s.scripted([s.plain()]) as (port, server):
        load = LoadSpec(
            requests=prepared(tmp_path, b"a", b"b", b"c"), port=port, connections=1, count=5, order=[2, 0, 0]
        )
        found = run(load, tmp_path / "load", timeout_s=RUN_TIMEOUT_S)
    assert found.requests["prompt"].tolist() == [2, 0, 0, 2, 0]
    assert [request[-1:] for request in server.requests] == [b"c", b"a", b"a", b"c", b"a"]


def test_users_pause_between_requests(tmp_path: Path) -> None:
    with s.scripted([s.plain()]) as (port, _):
        found = send(tmp_path, port, connections=2, count=6, think_s=[0.0, 0.05])
    rows = found.requests[found.requests["connection"] == 0]
    odd = rows[:-1]["sequence"] % 2 == 1
    assert (rows[1:]["begin"] - rows[:-1]["end"] >= 50_000_000)[odd].all()


def stream_request(marker: str = "", events: int = 1_000_000) -> bytes:
    content = f"[[mock {marker}]]" if marker else "hello"
    return b'{"stream":true,"max_tokens":%d,"messages":[{"role":"user","content":"%b"}]}' % (events, content.encode())


def test_the_engine_logs_disconnects(tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    with mock_engine(tmp_path, rate=200) as engine:
        for kind, leaving in (("mid", {"leave_after_events": 2}), ("before", {"leave_after_ms": 20})):
            delay_ms = 0 if kind == "mid" else 600_000
            bodies = [stream_request(f"{kind}-{name} {delay_ms}") for name in names]
            load = LoadSpec(requests=prepared(tmp_path, *bodies), port=engine.port, connections=2, count=3, **leaving)  # type: ignore[arg-type]
            found = run(load, tmp_path / "load", timeout_s=RUN_TIMEOUT_S)
            assert errors(found.requests) == {"left": 3}
            assert found.requests["events"].tolist() == ([2] * 3 if kind == "mid" else [0] * 3)
        engine.lateness()  # the response comes after all earlier events
        assert set(engine.disconnects()) == {f"{kind}-{name}" for kind in ("mid", "before") for name in names}


def test_requests_in_progress_are_recorded_when_it_is_stopped(tmp_path: Path) -> None:
    with mock_engine(tmp_path, rate=100) as engine:
        load = LoadSpec(requests=prepared(tmp_path, stream_request()), port=engine.port, connections=4, count=4)
        with running(load, tmp_path / "load") as process:
            process.stop()
            found = process.wait(timeout_s=RUN_TIMEOUT_S)
    assert set(found.requests["error"].tolist()) <= {Error.STOPPED}


def test_a_unix_socket(tmp_path: Path) -> None:
    place = tmp_path / "engine"
    with mock_engine(tmp_path, rate=1000, socket=place):
        load = LoadSpec(requests=prepared(tmp_path, stream_request(events=3)), socket=place, connections=2, count=4)
        found = run(load, tmp_path / "load", timeout_s=RUN_TIMEOUT_S)
    assert errors(found.requests) == {}
    assert found.requests["events"].tolist() == [3] * 4


def test_invalid_arguments(tmp_path: Path) -> None:
    path = prepared(tmp_path)
    with pytest.raises(LaunchError, match="at most 4000"):
        run(LoadSpec(requests=path, port=1, connections=4001, count=1), tmp_path / "load", timeout_s=RUN_TIMEOUT_S)
    with pytest.raises(LaunchError, match="--seconds, --count or --arrivals"):
        run(LoadSpec(requests=path, port=1, connections=1), tmp_path / "load", timeout_s=RUN_TIMEOUT_S)
    path.write_bytes(b"\x10\x00\x00\x00short")
    with pytest.raises(LaunchError, match="cut"):
        run(LoadSpec(requests=path, port=1, connections=1, count=1), tmp_path / "load", timeout_s=RUN_TIMEOUT_S)


def test_request_files_are_private(tmp_path: Path) -> None:
    """They contain the token, which must not appear on a command line."""
    path = write_requests(tmp_path / "requests", [b"GET / HTTP/1.1\r\nauthorization: Bearer hunter2\r\n\r\n"])
    assert path.stat().st_mode & 0o777 == 0o600
    assert not any("hunter2" in word for word in LoadSpec(requests=path, port=1, connections=1).argv(tmp_path))


def test_the_program_ends_with_the_block(tmp_path: Path) -> None:
    with mock_engine(tmp_path, rate=10) as engine:
        load = LoadSpec(requests=prepared(tmp_path, stream_request()), port=engine.port, connections=1, count=1)
        with pytest.raises(KeyboardInterrupt), running(load, tmp_path / "load") as process:
            raise KeyboardInterrupt
    assert process.process.returncode == -signal.SIGKILL
