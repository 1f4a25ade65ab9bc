"""How many files of the package a warm request enters, and how often it moves between them.

This measures how much a reader must follow; docs/architecture.md lists the files. A move is a call or a return that
continues in another file.
"""

import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType

import pytest

import hpc_router
from hpc_router.relay.downstream.connection import ClientConnection
from hpc_router.relay.upstream.connection import Connection
from hpc_router.state.registry import Record, RecordKind, State, publish
from tests.relay.scripted import CHUNKED, Answer, End, Scripted, head, scripted, sized
from tests.relay.serving import Client
from tests.router.classifying import deployed, trained
from tests.router.fakes import RunningRouter, a_router, a_run, event
from tests.router.support import CHAT
from tests.support.waiting import eventually

PACKAGE = str(Path(hpc_router.__file__).parent)
FIRST = event("a")
CHUNK = b"%x\r\n%b\r\n" % (len(FIRST), FIRST)
JSON = b"content-type: application/json"
EVENTS = b"content-type: text/event-stream"
BODY = b'{"choices": []}'
SHORT: Answer = [sized(BODY, JSON)]
STREAM: Answer = [head(CHUNKED, EVENTS) + CHUNK, End.PAUSE, b"0\r\n\r\n"]


class PathRecorder:
    """Records the files between a call of `begin` and the next write of a transport, as a profile function."""

    def __init__(self, begin: CodeType) -> None:
        self._begin = begin
        self.entered: set[str] = set()
        self.visited: list[str] = []
        self._state = "waiting"

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        code = frame.f_code
        if event == "call" and code is self._begin and self._state == "waiting":
            self._state = "recording"
        if self._state != "recording" or event not in ("call", "return"):
            return
        if event == "call":
            if code.co_name == "write" and code.co_filename.endswith("asyncio/selector_events.py"):
                self._state = "complete"
                return
            if code.co_filename.startswith(PACKAGE):
                self.entered.add(code.co_filename)
                self.visited.append(code.co_filename)
            return
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(PACKAGE):
            caller = caller.f_back
        if caller is not None:
            self.visited.append(caller.f_code.co_filename)

    @property
    def counts(self) -> tuple[int, int]:
        """Files and moves."""
        assert self._state == "complete"
        return len(self.entered), sum(a != b for a, b in pairwise(self.visited))


@asynccontextmanager
async def warm_router(folder: Path, answer: Answer) -> AsyncIterator[tuple[Scripted, RunningRouter, Client]]:
    """Two experts, so that there is a choice, and a client."""
    run = a_run(folder)
    trained(run.classifier)
    async with scripted(answer) as engine, a_router(run, deployed(run)) as router:
        for expert in ("math", "code"):
            url = f"http://{engine.address.header.decode()}"
            publish(
                run.registry,
                Record(RecordKind.EXTERNAL, f"{expert}-x0.g1", url, State.READY, {expert: expert}, probe=None),
            )
        await eventually(lambda: len(router.gateway.table.ready()) == 2)
        async with Client(int(router.url.rpartition(":")[2])) as client:
            yield engine, router, client


async def recorded(folder: Path, model: str, answer: Answer, begin: Callable[..., object]) -> tuple[int, int]:
    """Files and moves of a request whose head, connection and response head have been used before."""
    recorder = PathRecorder(begin.__code__)
    async with warm_router(folder, answer) as (engine, router, client):
        message = {"role": "user", "content": "solve the polynomial"}
        body = json.dumps({"model": model, "messages": [message], "stream": answer is STREAM}).encode()
        fields = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {router.token}\r\n"
        for last in (False, False, False, True):
            if last:
                sys.setprofile(recorder)
            try:
                await client.send(b"%bcontent-length: %d\r\n\r\n%b" % (fields.encode(), len(body), body))
                await client.until(CHUNK if answer is STREAM else BODY)
            finally:
                sys.setprofile(None)
            if answer is STREAM:
                engine.go_on.release()
                await client.until(b"0\r\n\r\n")
    return recorder.counts


@pytest.mark.parametrize(("model", "limit"), [("math", 12), ("auto", 18)])
async def test_a_request_enters_few_files_until_it_is_sent(tmp_path: Path, model: str, limit: int) -> None:
    files, _ = await recorded(tmp_path, model, SHORT, ClientConnection.data_received)
    assert files <= limit


@pytest.mark.parametrize("model", ["math", "auto"])
async def test_a_stream_enters_few_files_until_its_first_byte_is_sent(tmp_path: Path, model: str) -> None:
    """From the first byte of the replica."""
    files, moves = await recorded(tmp_path, model, STREAM, Connection.data_received)
    assert files <= 10
    assert moves <= 30
