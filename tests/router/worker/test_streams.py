"""Streams that a warm router serves without a task, and those for which it needs one after all."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from hpc_router.state.registry import Record, RecordKind, State, publish
from tests.relay.scripted import CHUNKED, Answer, End, Scripted, head, scripted
from tests.relay.serving import Client
from tests.router.fakes import RunningRouter, a_deployment, a_router, a_run, event
from tests.router.support import CHAT, all_gauges_zero
from tests.support.waiting import eventually

HEAD = head(CHUNKED, b"content-type: text/event-stream")
LONG = b"data: " + b"x" * 2**16 + b"\n\n"
DONE = b"data: [DONE]\n\n"
LAST = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@asynccontextmanager
async def warm(folder: Path, *answers: Answer, **router: Any) -> AsyncIterator[tuple[Scripted, RunningRouter]]:
    """A router with a kept connection to a replica that plays these answers."""
    run = a_run(folder)
    async with scripted(*answers) as engine, a_router(run, a_deployment("math", **router)) as made:
        url = f"http://{engine.address.header.decode()}"
        publish(run.registry, Record(RecordKind.EXTERNAL, "math-x0.g1", url, State.READY, {"math": "math"}, probe=None))
        await eventually(lambda: "math" in made.gateway.table.ready())
        await made.warm(1)
        yield engine, made


async def ask(router: RunningRouter, client: Client) -> None:
    body = b'{"model": "math", "messages": [], "stream": true}'
    lines = [f"POST {CHAT} HTTP/1.1", "host: x", f"authorization: Bearer {router.token}"]
    await client.send("\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body)


def client_of(router: RunningRouter, **how: Any) -> Client:
    return Client(int(router.url.rpartition(":")[2]), **how)


def requests(router: RunningRouter) -> dict[tuple[str, ...], int]:
    router.gateway.metrics.settle()
    return dict(router.gateway.metrics.requests.items())


def cancelled(router: RunningRouter) -> dict[tuple[str, ...], int]:
    return dict(router.gateway.metrics.cancelled.items())


def tasks_of_connections() -> list[asyncio.Task[Any]]:
    return [task for task in asyncio.all_tasks() if "ClientConnection" in repr(task.get_coro())]


@pytest.mark.parametrize("first", [HEAD + chunk(event("a")), HEAD, HEAD[:20]], ids=["with an event", "alone", "in two"])
async def test_a_stream_needs_no_task(tmp_path: Path, first: bytes) -> None:
    whole = HEAD + chunk(event("a"))
    script: Answer = [first, End.PAUSE, whole[len(first) :] or chunk(event("b")), End.PAUSE, chunk(DONE) + LAST]
    async with warm(tmp_path, script) as (engine, router), client_of(router) as client:
        for served in (1, 2):
            await ask(router, client)
            for _ in range(2):
                await asyncio.sleep(0)
                engine.go_on.release()
            received = await client.until(LAST)
            assert event("a") in received
            assert received.endswith(chunk(DONE) + LAST)
            assert requests(router) == {("math", "named", "200"): served}
            assert all_gauges_zero(router)
        assert not tasks_of_connections()


async def test_a_stream_that_is_received_at_once_needs_no_task(tmp_path: Path) -> None:
    async with (
        warm(tmp_path, [HEAD + chunk(event("a")) + chunk(DONE) + LAST]) as (_, router),
        client_of(router) as client,
    ):
        await ask(router, client)
        assert (await client.until(LAST)).endswith(chunk(event("a") + DONE) + LAST)
        assert requests(router) == {("math", "named", "200"): 1}
        assert not tasks_of_connections()


async def test_a_client_that_reads_slowly_gets_all_of_it(tmp_path: Path) -> None:
    script = [HEAD + chunk(event("a")), *[chunk(LONG)] * 256, chunk(DONE) + LAST]
    async with warm(tmp_path, script) as (engine, router), client_of(router, receives=2**14) as client:
        await ask(router, client)
        await eventually(lambda: bool(tasks_of_connections()))  # its buffers are full
        assert engine.written < 256 * len(LONG)
        received = await client.until(LAST)
        assert received.count(b"data: x") == 256
        await eventually(lambda: requests(router) == {("math", "named", "200"): 1})
        assert all_gauges_zero(router)


async def test_a_client_that_reads_nothing_is_disconnected(tmp_path: Path) -> None:
    script = [HEAD + chunk(event("a")), *[chunk(LONG)] * 1024]
    async with (
        warm(tmp_path, script, idle_timeout_s=0.2) as (_, router),
        client_of(router, receives=2**14) as client,
    ):
        await ask(router, client)
        await eventually(lambda: cancelled(router) == {("streaming",): 1})
        await eventually(lambda: all_gauges_zero(router))


async def test_a_client_that_leaves_ends_the_replicas_work(tmp_path: Path) -> None:
    async with warm(tmp_path, [HEAD + chunk(event("a")), End.READ]) as (engine, router):
        async with client_of(router) as client:
            await ask(router, client)
            await client.until(chunk(event("a")))
            assert not tasks_of_connections()
        await eventually(lambda: cancelled(router) == {("streaming",): 1})
        await eventually(lambda: engine.left == engine.connections)
        assert all_gauges_zero(router)


@pytest.mark.parametrize(
    "end", [[End.RESET], [chunk(b"data: cut") + LAST], [b"zz\r\n"]], ids=["reset", "cut", "garbage"]
)
async def test_a_failure_after_the_first_event_is_an_error_event(tmp_path: Path, end: Answer) -> None:
    async with (
        warm(tmp_path, [HEAD + chunk(event("a")), End.PAUSE, *end]) as (engine, router),
        client_of(router) as client,
    ):
        await ask(router, client)
        await client.until(chunk(event("a")))
        engine.go_on.release()
        received = await client.until(LAST)
        assert b"replica_failed" in received
        assert b"data: cut" not in received
        await eventually(lambda: all_gauges_zero(router))
        assert sum(count for _, count in router.gateway.metrics.broken.items()) == 1


async def test_a_failure_before_the_first_event_is_tried_again(tmp_path: Path) -> None:
    cut: Answer = [HEAD, End.PAUSE, End.RESET]
    async with warm(tmp_path, cut, [HEAD + chunk(event("b")) + LAST]) as (engine, router), client_of(router) as client:
        await ask(router, client)
        await eventually(lambda: engine.written == len(HEAD))
        engine.go_on.release()
        assert (await client.until(LAST)).endswith(chunk(event("b")) + LAST)
        assert requests(router) == {("math", "named", "200"): 1}


async def test_a_last_event_without_a_blank_line_is_completed(tmp_path: Path) -> None:
    script: Answer = [HEAD + chunk(event("a")), End.PAUSE, chunk(b"data: [DONE]\n") + LAST]
    async with warm(tmp_path, script) as (engine, router), client_of(router) as client:
        await ask(router, client)
        await client.until(chunk(event("a")))
        engine.go_on.release()
        assert await client.until(LAST) == chunk(b"data: [DONE]\n\n") + LAST


async def test_a_client_of_http_1_0_gets_bare_events(tmp_path: Path) -> None:
    async with warm(tmp_path, [HEAD + chunk(event("a")) + chunk(DONE) + LAST]) as (_, router):
        async with client_of(router) as client:
            body = b'{"model": "math", "messages": [], "stream": true}'
            fields = f"POST {CHAT} HTTP/1.0\r\nauthorization: Bearer {router.token}\r\n"
            await client.send(f"{fields}content-length: {len(body)}\r\n\r\n".encode() + body)
            await client.head()
            assert await client.rest() == event("a") + DONE
        await eventually(lambda: all_gauges_zero(router))
