"""The hang detector: agents whose beats have stopped by this process's clock and that do not answer."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from hpc_router.cluster.control_loop import liveness
from hpc_router.cluster.control_loop.liveness import HUNG_BEATS, LATE_BEATS, LOST_BEATS, HangDetector, SilentReplicas
from hpc_router.state.registry import Record, RecordKind, State

BEAT_S = 2.0
LIMIT_S = HUNG_BEATS * BEAT_S
NOBODY = "http://127.0.0.1:1"
NAME = {"math-0.g1"}
NONE = SilentReplicas(set(), set(), set(), set())
LOST = SilentReplicas(NAME, set(), set(), set())
HUNG = SilentReplicas(NAME, NAME, set(), set())
OFF = SilentReplicas(NAME, NAME, NAME, set())
GONE = SilentReplicas(NAME, NAME, set(), NAME)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def answering(replica: str) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"replica": replica}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def record(url: str = NOBODY, *, beat: int | None = 1) -> Record:
    return Record(RecordKind.EXPERT, "math-0.g1", url, State.READY, {}, nonce="n", beat=beat, beat_s=BEAT_S)


def test_beats_that_stop_for_long_enough_are_missed() -> None:
    clock = Clock()
    pulse = HangDetector()
    assert pulse.silent([record()], read_at=clock()).hung == set()
    clock.now += LIMIT_S - 0.1
    assert pulse.silent([record()], read_at=clock()).hung == set()
    clock.now += 0.1
    assert pulse.silent([record()], read_at=clock()).hung == {"math-0.g1"}
    assert pulse.silent([record(beat=2)], read_at=clock()).hung == set()
    clock.now += LIMIT_S
    assert pulse.silent([replace(record(beat=2), nonce="m")], read_at=clock()).hung == set(), (
        "another life of the same name"
    )


def test_an_agent_is_lost_before_it_hangs() -> None:
    """A lost agent's job may have ended, which only Slurm knows."""
    clock = Clock()
    pulse = HangDetector()
    pulse.silent([record()], read_at=clock())
    clock.now += LOST_BEATS * BEAT_S - 0.1
    assert pulse.silent([record()], read_at=clock()) == NONE
    clock.now += 0.1
    assert pulse.silent([record()], read_at=clock()) == LOST
    with answering("math-0.g1") as url:
        assert pulse.silent([record(url)], read_at=clock()) == NONE


@contextmanager
def unreachable() -> Iterator[str]:
    """An address that neither accepts nor refuses connections, as that of a node that is off: its queue is full."""
    with socket.socket() as listener, ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_hung_agent_with_a_full_queue_does_not_show_that_its_node_is_off() -> None:
    clock = Clock()
    pulse = HangDetector()
    with unreachable() as url:
        pulse.silent([record(url)], read_at=clock())
        clock.now += LOST_BEATS * BEAT_S
        assert pulse.silent([record(url)], read_at=clock()) == LOST
        clock.now += LIMIT_S
        assert pulse.silent([record(url)], read_at=clock()) == HUNG


def test_one_whose_node_is_off_hangs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm marks the node down much later."""
    clock = Clock()
    pulse = HangDetector()
    with unreachable() as url:
        monkeypatch.setattr(liveness, "UNUSED_PORT", urlsplit(url).port)
        pulse.silent([record(url)], read_at=clock())
        clock.now += LOST_BEATS * BEAT_S - 0.1
        assert pulse.silent([record(url)], read_at=clock()) == NONE
        clock.now += 0.1
        assert pulse.silent([record(url)], read_at=clock()) == OFF
        assert pulse.silent([record()], read_at=clock()) == LOST, "its node refuses: it is up"


def test_an_agent_whose_port_refuses_connections_is_gone_at_its_first_late_beat() -> None:
    """Slurm may say for hours that its job runs."""
    clock = Clock()
    pulse = HangDetector()
    with answering("math-0.g1") as url:
        assert pulse.silent([record(url)], read_at=clock()) == NONE
    clock.now += LATE_BEATS * BEAT_S - 0.1
    assert pulse.silent([record(url)], read_at=clock()) == NONE
    clock.now += 0.1
    assert pulse.silent([record(url)], read_at=clock()) == GONE
    assert pulse.silent([record(url, beat=2)], read_at=clock()) == NONE


def test_a_host_that_always_refused_connections_shows_nothing() -> None:
    """A firewall may refuse them; the file system may be slow at the same time."""
    clock = Clock()
    pulse = HangDetector()
    pulse.silent([record()], read_at=clock())
    clock.now += LATE_BEATS * BEAT_S
    assert pulse.silent([record()], read_at=clock()) == NONE
    clock.now += (LOST_BEATS - LATE_BEATS) * BEAT_S
    assert pulse.silent([record()], read_at=clock()) == LOST


@pytest.mark.parametrize("state", State)
def test_a_refusal_shows_nothing_of_an_agent_that_drains(state: State) -> None:
    """It closes its port before it writes its exit record."""
    clock = Clock()
    pulse = HangDetector()
    with answering("math-0.g1") as url:
        pulse.silent([record(url)], read_at=clock())
    clock.now += LATE_BEATS * BEAT_S
    seen = pulse.silent([replace(record(url), state=state)], read_at=clock())
    assert seen == (NONE if state is State.DRAINING else GONE)


@pytest.mark.parametrize("second", ["ACCEPTED", "NONE", "REFUSED"])
def test_one_refusal_is_not_enough(monkeypatch: pytest.MonkeyPatch, second: str) -> None:
    clock = Clock()
    pulse = HangDetector()
    answers = [liveness._Answer[name] for name in ("ACCEPTED", "REFUSED", second)]

    async def attempt(_url: str) -> object:
        return answers.pop(0)

    monkeypatch.setattr(liveness, "_attempt", attempt)
    pulse.silent([record()], read_at=clock())
    clock.now += LATE_BEATS * BEAT_S
    assert pulse.silent([record()], read_at=clock()) == (GONE if second == "REFUSED" else NONE)
    assert not answers


def test_a_frozen_agent_refuses_nothing() -> None:
    """The kernel accepts connections in its place."""
    clock = Clock()
    pulse = HangDetector()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        pulse.silent([record(url)], read_at=clock())
        clock.now += LATE_BEATS * BEAT_S
        assert pulse.silent([record(url)], read_at=clock()) == NONE
        clock.now += (LOST_BEATS - LATE_BEATS) * BEAT_S
        assert pulse.silent([record(url)], read_at=clock()) == LOST


def test_one_that_answers_does_not_hang() -> None:
    """A stalled file system alone ends nobody; a stranger at its address does not count."""
    clock = Clock()
    pulse = HangDetector()
    with answering("math-0.g1") as url, answering("code-0.g1") as stranger:
        pulse.silent([record(url)], read_at=clock())
        clock.now += LIMIT_S
        assert pulse.silent([record(url)], read_at=clock()).hung == set()
        assert pulse.silent([record(stranger)], read_at=clock()).hung == {"math-0.g1"}


def test_a_record_without_beats_is_ignored() -> None:
    clock = Clock()
    pulse = HangDetector()
    external = replace(record(beat=None), beat_s=None)
    pulse.silent([external], read_at=clock())
    clock.now += 1e6
    assert pulse.silent([external], read_at=clock()).hung == set()
