"""What the router takes for the end of an answer: complete, cut by the engine, or a stream without events."""

import asyncio
import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web

from hpc_router.net import protocol
from tests.router.fakes import FakeReplica, a_deployment, a_router, a_run, answer, event, fake_replica, stream
from tests.router.support import all_gauges_zero, chat, client_of, post, ready, session, sim_replica
from tests.sim.calls import INSTANT
from tests.support.relays import RELAYS, WARM
from tests.support.waiting import eventually

DONE = b"data: [DONE]\n\n"
JSON = "application/json"


@pytest.fixture(params=[*RELAYS, "warm"], autouse=True)
def relay(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test holds over the reference as well."""
    monkeypatch.setattr("tests.router.fakes.RELAY", {**RELAYS, "warm": WARM}[request.param])


def cut(path: str) -> dict[str, Any]:
    """A whole answer of this API that vLLM cut when it was told to stop."""
    if path == protocol.MESSAGES:
        return {"type": "message", "content": [{"type": "text", "text": "so"}], "stop_reason": None}
    if path == protocol.RESPONSES:
        return {"object": "response", "status": "cancelled", "output": []}
    return {"object": "any", "choices": [{"index": 0, "text": "so", "finish_reason": "abort"}]}


def asked(path: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": "2+2?"}]
    return {"model": "math", "messages": turns, "prompt": "2+2?", "input": "2+2?", "max_tokens": 4}


GENERATE = pytest.mark.parametrize("path", [p for p in protocol.GENERATE_PATHS if p != protocol.EMBEDDINGS])


@GENERATE
async def test_an_answer_that_the_engine_cut_goes_elsewhere(tmp_path: Path, path: str) -> None:
    run = a_run(tmp_path)
    stopping = stream([json.dumps(cut(path)).encode()], content_type=JSON)
    async with (
        fake_replica(run, "math-0.g1", stopping) as stopped,
        fake_replica(run, "math-1.g1", answer),
        a_router(run, a_deployment("math", pin_bound=None)) as router,
    ):
        await ready(router, 2)
        while not stopped.bodies:
            status, value, _ = await post(router, asked(path), path=path)
            assert (status, value["choices"][0]["message"]["content"]) == (200, "math-1.g1")
        await eventually(lambda: all_gauges_zero(router))


@GENERATE
async def test_an_answer_that_the_only_engine_cut_is_502_at_once(tmp_path: Path, path: str) -> None:
    """It is not computed again on the replica that is being stopped."""
    run = a_run(tmp_path)
    stopping = stream([json.dumps(cut(path)).encode()], content_type=JSON)
    async with fake_replica(run, "math-0.g1", stopping) as stopped, a_router(run, a_deployment("math")) as router:
        await ready(router)
        status, value, headers = await post(router, asked(path), path=path, **{"x-request-id": "r-1"})
        assert (status, headers["x-request-id"]) == (502, "r-1")
        assert "its engine was stopped and cut the answer" in value["error"]["message"]
        assert value["error"]["type"] == ("api_error" if path == protocol.MESSAGES else "upstream_error")
        assert len(stopped.bodies) == 1
        await eventually(lambda: all_gauges_zero(router))


async def test_a_stream_that_the_engine_cut_ends_with_an_error_event(tmp_path: Path) -> None:
    aborted = json.loads(event("").removeprefix(b"data: "))
    aborted["choices"][0]["finish_reason"] = "abort"
    last = b"data: " + json.dumps(aborted).encode() + b"\n\n"

    async def act(fake: FakeReplica, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(event("a"))
        await fake.go_on.wait()
        await response.write(last)
        await response.write(DONE)
        return response

    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", act) as fake,
        a_router(run, a_deployment("math")) as router,
        client_of(router) as client,
    ):
        await ready(router)
        chunks = await client.chat.completions.create(
            model="math", messages=[{"role": "user", "content": "x"}], stream=True
        )
        assert (await anext(chunks)).choices[0].delta.content == "a"
        fake.go_on.set()
        with pytest.raises(openai.APIError, match="its engine was stopped and cut the answer"):
            await anext(chunks)
        await eventually(lambda: all_gauges_zero(router))


@pytest.mark.parametrize("path", [protocol.CHAT, protocol.COMPLETIONS, protocol.MESSAGES])
async def test_what_runs_on_an_engine_that_somebody_else_stops_fails(tmp_path: Path, path: str) -> None:
    """An endpoint of a colleague, where no agent breaks connections off: the simulated engine stops as vLLM does."""
    run = a_run(tmp_path)
    body = asked(path) | {"max_tokens": 100_000}
    async with (
        sim_replica(run, "math-0.g1", replace(INSTANT, itl_s=0.01, max_tokens_default=100_000)) as engine,
        a_router(run, a_deployment("math")) as router,
        session() as made,
    ):
        await ready(router)
        whole = asyncio.create_task(post(router, body, path=path))
        data = json.dumps(body | {"stream": True}).encode()
        async with made.post(router.url + path, data=data, headers=router.headers) as response:
            received = await response.content.readuntil(b"\n\n")
            await eventually(lambda: engine.counts.running == 2)
            await engine.stop()
            received += await response.read()
        status, value, _ = await whole
        assert (status, "cut the answer" in value["error"]["message"]) == (502, True)
        assert b"cut the answer" in received.strip().rpartition(b"\n\n")[2]
        for end in (b"[DONE]", b"message_stop", b'"abort"'):
            assert end not in received
        await eventually(lambda: all_gauges_zero(router))


@pytest.mark.parametrize("last", [b"data: [DONE]\n", b"data: [DONE]\r\n", b"data: [DONE]"], ids=["LF", "CRLF", "none"])
@pytest.mark.parametrize("first", [event("a"), b""], ids=["after another", "alone"])
async def test_a_last_event_without_a_blank_line_is_one_complete_run(tmp_path: Path, first: bytes, last: bytes) -> None:
    run = a_run(tmp_path)
    pieces = [first, last] if first else [last]
    async with fake_replica(run, "math-0.g1", stream(pieces)) as fake, a_router(run, a_deployment("math")) as router:
        await ready(router)
        status, raw, _ = await post(router, chat(stream=True))
        assert (status, raw.rstrip(b"\r\n")) == (200, first + b"data: [DONE]")
        assert raw.endswith((b"\n\n", b"\r\n\r\n"))
        assert len(fake.bodies) == 1
        await eventually(lambda: all_gauges_zero(router))


@pytest.mark.parametrize("content_type", [JSON, "application/x-ndjson", "text/plain"])
async def test_a_stream_passes_as_it_comes_whatever_its_type(tmp_path: Path, content_type: str) -> None:
    """The client has the first piece before the replica is told to go on."""
    run = a_run(tmp_path)
    held = stream([b'{"a": 1}\n'], then="hang", content_type=content_type)
    async with (
        fake_replica(run, "math-0.g1", held) as fake,
        a_router(run, a_deployment("math")) as router,
        session() as made,
    ):
        await ready(router)
        body = json.dumps(chat(stream=True)).encode()
        async with made.post(router.url + protocol.CHAT, data=body, headers=router.headers) as response:
            assert response.status == 200
            assert await response.content.readline() == b'{"a": 1}\n'
            fake.go_on.set()
            assert await response.read() == b""
        await eventually(lambda: all_gauges_zero(router))


async def test_a_stream_of_another_kind_that_breaks_breaks_the_connection(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", stream([b"one", b"two"], then="reset", content_type=JSON)),
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router)
        with pytest.raises(aiohttp.ClientError):
            await post(router, chat(stream=True))
        await eventually(lambda: all_gauges_zero(router))


async def test_an_answer_that_was_not_to_be_a_stream_is_held(tmp_path: Path) -> None:
    """So that what breaks it is nothing to the client."""
    run = a_run(tmp_path)
    half = stream([b'{"a'], then="reset", content_type=JSON)
    async with (
        fake_replica(run, "math-0.g1", half, answer),
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router)
        async with asyncio.timeout(20):
            assert (await post(router, chat()))[0] == 200


async def test_a_compressed_event_stream_passes_as_it_comes(tmp_path: Path) -> None:
    """Although the request asked for identity. Events cannot be found in it, but its client can read it."""
    pack = zlib.compressobj(wbits=31)
    pieces = [pack.compress(event("a")) + pack.flush(zlib.Z_SYNC_FLUSH), pack.compress(DONE) + pack.flush()]

    async def act(fake: FakeReplica, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream", "content-encoding": "gzip"})
        await response.prepare(request)
        await response.write(pieces[0])
        await fake.go_on.wait()
        await response.write(pieces[1])
        return response

    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", act) as fake,
        a_router(run, a_deployment("math")) as router,
        client_of(router) as client,
    ):
        await ready(router)
        chunks = await client.chat.completions.create(
            model="math", messages=[{"role": "user", "content": "x"}], stream=True
        )
        assert (await anext(chunks)).choices[0].delta.content == "a"
        fake.go_on.set()
        assert [chunk async for chunk in chunks] == []
        assert [headers["accept-encoding"] for headers in fake.headers] == ["identity"]
        await eventually(lambda: all_gauges_zero(router))
