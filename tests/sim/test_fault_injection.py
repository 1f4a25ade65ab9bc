"""The effect of each fault on a client, and the gauges after the fault."""

import asyncio
import json
import socket
from contextlib import suppress
from dataclasses import replace

import aiohttp
import pytest

from hpc_router.sim.fault_injection import GARBAGE
from hpc_router.sim.faults import parse_rules
from hpc_router.sim.server import SimServer
from tests.sim.calls import (
    DISCONNECTED,
    INSTANT,
    JsonObject,
    SteppedClock,
    at,
    chat,
    decoded,
    events,
    faulty,
    post,
    stream,
    stream_until_broken,
    until,
)
from tests.sim.support import Start

CHAT = "/v1/chat/completions"


def quiet(engine: SimServer) -> bool:
    return engine.counts.running == engine.counts.waiting == 0


def contents(raw: bytes) -> int:
    return raw.count(b'"content":"') - raw.count(b'"content":""')


@pytest.mark.parametrize("at_token", [0, 1, 3, 10])
async def test_a_cut_ends_in_the_middle_of_an_event(start: Start, at_token: int) -> None:
    engine, session = await start(INSTANT)
    raw = await stream_until_broken(session, faulty(kind="cut", at=at_token))
    whole, _, tail = raw.rpartition(b"\n\n")
    assert contents(whole) == at_token
    assert tail.startswith(b"data: ")
    assert b"[DONE]" not in raw
    assert quiet(engine)
    assert engine.counts.faults == {"cut": 1}
    assert engine.counts.finished == {"error": 1}


@pytest.mark.parametrize("at_token", [0, 4, 10])
async def test_an_error_event_ends_the_stream_properly(start: Start, at_token: int) -> None:
    engine, session = await start(INSTANT)
    chunks = await stream(session, faulty(kind="error_event", at=at_token, message="engine lost"))
    assert contents("".join(chunks).encode()) == at_token
    assert at(decoded(chunks[-2]), "error", "message") == "engine lost"
    assert at(decoded(chunks[-2]), "error", "code") == 500
    assert chunks[-1] == "[DONE]"
    assert engine.counts.finished == {"error": 1}


async def test_a_fault_beyond_the_end_never_strikes(start: Start) -> None:
    engine, session = await start(INSTANT)
    assert (await stream(session, faulty(kind="cut", at=11)))[-1] == "[DONE]"
    assert not engine.counts.faults


@pytest.mark.parametrize("position", ["headers", "first_token", 3])
@pytest.mark.parametrize("kind", ["reset", "garbage"])
async def test_a_connection_breaks_at_its_place(start: Start, kind: str, position: str | int) -> None:
    """Reads from the socket itself, because aiohttp's client (3.14) hangs when a chunked body becomes invalid."""
    engine, _ = await start(INSTANT)
    raw = await exchange(engine, json.dumps(faulty(kind=kind, at=position)).encode())
    assert raw.startswith(b"HTTP/1.1 200 OK") == (position != "headers" and bool(raw))
    assert contents(raw) <= (position if isinstance(position, int) else 0)
    if kind == "garbage":
        assert raw.endswith(GARBAGE)
        assert contents(raw) == (position if isinstance(position, int) else 0)
    assert quiet(engine)
    assert engine.counts.finished == {"error": 1}
    assert not engine.counts.aborted


async def test_garbage_is_what_it_is(start: Start) -> None:
    engine, _ = await start(replace(INSTANT, faults=parse_rules([{"kind": "garbage", "path": "/health"}])))
    reader, writer = await connect(engine)
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert await reader.read() == GARBAGE
    writer.close()
    await writer.wait_closed()


async def test_a_connection_is_reset_before_a_byte_is_read(start: Start) -> None:
    """Every second connection is reset over TCP, before any request on it is read."""
    engine, _ = await start(replace(INSTANT, faults=parse_rules([{"kind": "reset", "every": 2}])))
    for expected_reset in (False, True, False, True):
        try:
            reader, writer = await connect(engine)
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            answer = await reader.read()
            writer.close()
            await writer.wait_closed()
        except ConnectionError:
            answer = b""
        assert (not answer) == expected_reset
    assert engine.counts.faults == {"reset": 2}


async def test_a_partial_body_announces_the_whole_length(start: Start) -> None:
    engine, session = await start(INSTANT)
    for path, body in ((CHAT, chat()), ("/v1/embeddings", {"input": "x"})):
        async with session.post(path, json={**body, "sim_fault": {"kind": "partial_body"}}) as response:
            promised = int(response.headers["Content-Length"])
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
        assert promised > 100
    assert quiet(engine)
    assert engine.counts.finished == {"error": 2}


async def test_a_status_refuses_before_the_queue(start: Start) -> None:
    """A full engine refuses at once, as an overloaded engine does."""
    engine, session = await start(replace(INSTANT, capacity=1))
    blocker = asyncio.create_task(stream(session, faulty(kind="hang")))
    await until(lambda: engine.counts.running == 1)
    status, body = await post(session, CHAT, chat(sim_fault={"kind": "status", "status": 503, "message": "full"}))
    assert (status, at(body, "error", "message")) == (503, "full")
    blocker.cancel()
    await engine.idle()


async def test_a_hang_for_a_time_goes_on_afterwards() -> None:
    clock = SteppedClock()
    async with SimServer(INSTANT, clock=clock) as engine, aiohttp.ClientSession(engine.url) as session:
        chunks = await stream(session, faulty(kind="hang", at=3, for_s=30))
    assert chunks[-1] == "[DONE]"
    assert 30.0 in clock.slept


async def test_slowness_stretches_every_latency(start: Start) -> None:
    clock = SteppedClock()
    config = replace(INSTANT, ttft_s=0.5, itl_s=0.25, faults=parse_rules([{"kind": "slow", "factor": 4}]))
    async with SimServer(config, clock=clock) as engine, aiohttp.ClientSession(engine.url) as session:
        await post(session, CHAT, chat(max_tokens=3))
    assert clock.slept == [2.0, 1.0, 1.0]
    assert engine.counts.faults == {"slow": 1}


async def test_paths_that_compute_nothing_hang_and_refuse_when_named(start: Start) -> None:
    rules = [{"kind": "hang", "path": "/health"}, {"kind": "status", "status": 500, "path": "/v1/models"}]
    _, session = await start(replace(INSTANT, faults=parse_rules(rules)))
    async with session.get("/v1/models") as response:
        assert response.status == 500
    probe = asyncio.create_task(_get(session, "/health"))
    assert (await post(session, CHAT, chat()))[0] == 200
    assert not probe.done()
    probe.cancel()


@pytest.mark.parametrize("streaming", [True, False])
async def test_an_engine_that_dies_takes_every_connection_along(streaming: bool) -> None:
    """In-process: all connections are aborted, the engine does not listen any more, and other streams break too."""
    async with SimServer(INSTANT) as engine, aiohttp.ClientSession(engine.url) as session:
        bystander = asyncio.create_task(stream_until_broken(session, faulty(kind="hang", at=2)))
        await until(lambda: engine.counts.running == 1)
        with pytest.raises(DISCONNECTED):
            async with session.post(CHAT, json=chat(stream=streaming, sim_fault={"kind": "die", "at": 3})) as response:
                await response.read()
        assert contents(await bystander) <= 2
        await engine.died.wait()
        with pytest.raises(aiohttp.ClientConnectorError):
            await _get(session, "/health")
        await engine.idle()
        assert quiet(engine)
    assert engine.counts.aborted.total() == 1
    assert engine.counts.finished == {"error": 1, "abort": 1}


async def connect(engine: SimServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = engine.address.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port), family=socket.AF_INET)


async def exchange(engine: SimServer, body: bytes) -> bytes:
    """Sends one request and returns all bytes received until its connection is closed or reset."""
    reader, writer = await connect(engine)
    writer.write(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(body)) + body)
    received = bytearray()
    with suppress(ConnectionError):
        while piece := await reader.read(65_536):
            received += piece
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
    return bytes(received)


async def _get(session: aiohttp.ClientSession, path: str) -> int:
    async with session.get(path) as response:
        return response.status


def test_the_tests_read_events_as_a_client_does() -> None:
    body: JsonObject = faulty(kind="cut")
    assert body["stream"] is True
    assert events(b"data: a\n\ndata: b\n\n") == ["a", "b"]
