"""What clients of `connect` see when routers move, drain, fail and are missing."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from hpc_router.connect import forwarder as forwarder_module
from hpc_router.connect.forwarder import Forwarder, needs_token
from hpc_router.connect.listener import _listen_unix
from hpc_router.net.protocol import CHAT
from hpc_router.relay.downstream.server import listening
from hpc_router.relay.headers import Headers
from hpc_router.state.registry import State
from hpc_router.state.run_directory import RunDir, make_run
from tests.client.fakes import (
    FakeRouter,
    Starter,
    answers,
    breaks_off,
    drains,
    enter,
    hangs_up,
    leaves_after,
    overloaded,
    record_of,
    router_starter,
)
from tests.support.waiting import GUARD_S, eventually


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run")


@pytest.fixture
async def start(run: RunDir) -> AsyncIterator[Starter]:
    async with router_starter(run) as start:
        yield start


@dataclass
class Connected:
    """A forwarder on a unix socket, and a client of it."""

    forwarder: Forwarder
    session: aiohttp.ClientSession
    held: asyncio.Event
    """Set when a request waits for a router; the wait ends at `go_on`."""
    go_on: asyncio.Event

    async def chat(self, *, stream: bool = False, **headers: str) -> tuple[int, str]:
        body = {"model": "auto", "messages": [], **({"stream": True} if stream else {})}
        async with (
            asyncio.timeout(GUARD_S),
            self.session.post(f"http://localhost{CHAT}", json=body, headers=headers) as response,
        ):
            return response.status, content_of(await response.text())

    async def one_held(self) -> None:
        async with asyncio.timeout(GUARD_S):
            await self.held.wait()


def content_of(text: str) -> str:
    """The text of a streamed or whole answer, or the error's message."""
    if not text.startswith("data: "):
        value = json.loads(text)
        return str(value["error"]["message"] if "error" in value else value["choices"][0]["message"]["content"])
    assert text.endswith("data: [DONE]\n\n")
    events = [json.loads(event.removeprefix("data: ")) for event in text.strip().split("\n\n")[:-1]]
    return "".join(event["choices"][0]["delta"]["content"] for event in events)


Connect = Callable[..., Awaitable[Connected]]


@pytest.fixture
async def connect(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Connect]:
    monkeypatch.setattr(forwarder_module, "VIEW_S", 0.0)
    held, go_on = asyncio.Event(), asyncio.Event()

    async def pause(_length_s: float) -> None:
        held.set()
        await go_on.wait()

    monkeypatch.setattr(forwarder_module, "_sleep", pause)
    async with AsyncExitStack() as stack:

        async def one(*, hold_s: float = 60.0, adds_tokens: bool = True) -> Connected:
            path = tmp_path / "s"
            forwarder = stack.enter_context(closing(Forwarder(run, hold_s=hold_s, adds_tokens=adds_tokens)))
            await stack.enter_async_context(listening(forwarder.handle, _listen_unix(path), max_body=2**16))
            connector = aiohttp.UnixConnector(str(path), limit=0)
            session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
            return Connected(forwarder, session, held, go_on)

        yield one


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_reaches_the_router(run: RunDir, start: Starter, connect: Connect, stream: bool) -> None:
    """The router gets the owner's token, because the request has none, and the same bytes of the body."""
    router, connected = await start(), await connect()
    enter(run, record_of(router.url))
    assert await connected.chat(stream=stream) == (200, f"from {router.url}")
    assert router.offered == [f"Bearer {run.token()}"]
    assert router.hosts == [router.url.removeprefix("http://")]
    assert json.loads(router.bodies[0])["model"] == "auto"


@pytest.mark.parametrize("stream", [False, True])
async def test_two_handovers_in_a_row(run: RunDir, start: Starter, connect: Connect, stream: bool) -> None:
    connected = await connect()
    for generation in (1, 2, 3):
        router = await start(answers, answers, drains)
        enter(run, record_of(router.url, generation=generation))
        for _ in range(2):
            assert await connected.chat(stream=stream) == (200, f"from {router.url}")
        assert len(router.offered) == 2


async def test_a_request_that_a_draining_router_refuses_goes_to_its_successor(
    run: RunDir, start: Starter, connect: Connect
) -> None:
    old, new, connected = await start(drains), await start(), await connect()
    enter(run, record_of(old.url))
    asked = asyncio.create_task(connected.chat())
    await connected.one_held()
    enter(run, record_of(old.url, state=State.DRAINING), record_of(new.url, generation=2))
    connected.go_on.set()
    assert await asked == (200, f"from {new.url}")
    assert old.bodies == new.bodies


@pytest.mark.parametrize("stream", [False, True])
async def test_requests_are_held_while_no_router_leads(
    run: RunDir, start: Starter, connect: Connect, stream: bool
) -> None:
    router, connected = await start(), await connect()
    asked = [asyncio.create_task(connected.chat(stream=stream)) for _ in range(20)]
    await connected.one_held()
    enter(run, record_of(router.url))
    connected.go_on.set()
    assert await asyncio.gather(*asked) == [(200, f"from {router.url}")] * 20


async def test_a_router_dies_and_leaves_its_record(run: RunDir, start: Starter, connect: Connect) -> None:
    """The connections that were kept for further requests break, too."""
    old, new, connected = await start(), await start(), await connect()
    enter(run, record_of(old.url))
    assert await asyncio.gather(*(connected.chat() for _ in range(8))) == [(200, f"from {old.url}")] * 8
    await old.die()
    asked = [asyncio.create_task(connected.chat()) for _ in range(8)]
    await connected.one_held()
    enter(run, record_of(new.url, generation=2))
    connected.go_on.set()
    assert await asyncio.gather(*asked) == [(200, f"from {new.url}")] * 8


async def test_a_stream_in_flight_stays_on_the_old_router(run: RunDir, start: Starter, connect: Connect) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(router: FakeRouter, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for word in ("from ", router.url):
            choice = {"index": 0, "delta": {"content": word}}
            await response.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
            begun.set()
            await go_on.wait()
        await response.write(b"data: [DONE]\n\n")
        return response

    old, new, connected = await start(slowly), await start(), await connect()
    enter(run, record_of(old.url))
    streaming = asyncio.create_task(connected.chat(stream=True))
    async with asyncio.timeout(GUARD_S):
        await begun.wait()
    enter(run, record_of(old.url, state=State.DRAINING), record_of(new.url, generation=2))
    assert await connected.chat() == (200, f"from {new.url}")
    go_on.set()
    assert await streaming == (200, f"from {old.url}")


async def test_a_connection_that_ends_without_a_response_is_tried_once_more(
    run: RunDir, start: Starter, connect: Connect
) -> None:
    """A new connection and a used one behave alike, as in `hpc_router.client`."""
    router, connected = await start(hangs_up, answers, hangs_up, answers), await connect(hold_s=0)
    enter(run, record_of(router.url))
    for _ in range(2):
        assert await connected.chat() == (200, f"from {router.url}")
    assert len(router.bodies) == 4


async def test_a_lost_request_is_resent_only_once(run: RunDir, start: Starter, connect: Connect) -> None:
    """Also on a kept connection. The response tells official clients not to repeat the request."""
    router, connected = await start(answers, hangs_up), await connect()
    enter(run, record_of(router.url))
    await connected.chat()
    async with connected.session.post(f"http://localhost{CHAT}", json={}) as response:
        assert (response.status, response.headers["x-should-retry"]) == (502, "false")
        assert "ended without a response; the router may have processed the request" in await response.text()
    assert len(router.bodies) == 3


async def test_a_response_that_breaks_off_is_neither_repeated_nor_complete(
    run: RunDir, start: Starter, connect: Connect
) -> None:
    router, connected = await start(breaks_off), await connect()
    enter(run, record_of(router.url))
    with pytest.raises(aiohttp.ClientError):
        await connected.chat(stream=True)
    assert len(router.bodies) == 1


async def test_other_refusals_go_to_the_client(run: RunDir, start: Starter, connect: Connect) -> None:
    router, connected = await start(overloaded), await connect()
    enter(run, record_of(router.url))
    assert await connected.chat() == (503, "full")
    assert len(router.bodies) == 1


async def test_without_a_router_a_request_is_refused_after_the_hold(run: RunDir, connect: Connect) -> None:
    connected = await connect(hold_s=0)
    async with connected.session.get("http://localhost/v1/models") as response:
        assert (response.status, response.headers["retry-after"]) == (503, "5")
        error = (await response.json())["error"]
    assert (error["code"], error["message"].partition(";")[0]) == ("no_router", f"no router serves {run.path}")


async def test_the_number_of_held_requests_is_bounded(
    run: RunDir, start: Starter, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly `MAX_HELD` requests wait; the next one is refused at once."""
    monkeypatch.setattr(forwarder_module, "MAX_HELD", 3)
    connected, router = await connect(), await start()
    asked = [asyncio.create_task(connected.chat()) for _ in range(3)]
    await eventually(lambda: connected.forwarder.held == 3)
    status, message = await connected.chat()
    assert status == 503
    assert "3 requests wait" in message
    enter(run, record_of(router.url))
    connected.go_on.set()
    assert [status for status, _ in await asyncio.gather(*asked)] == [200] * 3
    assert connected.forwarder.held == 0


async def test_a_client_that_leaves_is_held_no_longer(run: RunDir, connect: Connect) -> None:
    connected = await connect()
    asked = asyncio.create_task(connected.chat())
    await connected.one_held()
    assert connected.forwarder.held == 1
    asked.cancel()
    await eventually(lambda: connected.forwarder.held == 0)


async def test_a_client_that_leaves_cancels_its_request(run: RunDir, start: Starter, connect: Connect) -> None:
    begun, gone = asyncio.Event(), asyncio.Event()

    async def waits(router: FakeRouter, request: web.BaseRequest) -> web.StreamResponse:
        begun.set()
        transport = request.transport
        assert transport is not None
        await eventually(transport.is_closing)
        gone.set()
        return web.Response()

    router, connected = await start(waits), await connect()
    enter(run, record_of(router.url))
    asked = asyncio.create_task(connected.chat())
    async with asyncio.timeout(GUARD_S):
        await begun.wait()
        asked.cancel()
        await gone.wait()


async def test_a_new_token_is_used(run: RunDir, start: Starter, connect: Connect) -> None:
    router, connected = await start(), await connect()
    enter(run, record_of(router.url))
    await connected.chat()
    (run.path / "token").write_text("another\n")
    assert await connected.chat() == (200, f"from {router.url}")
    assert router.offered[-1] == "Bearer another"


@pytest.mark.parametrize("adds_tokens", [True, False])
async def test_a_clients_own_token_is_passed_on(
    run: RunDir, start: Starter, connect: Connect, adds_tokens: bool
) -> None:
    """The router checks it. A wrong token is refused once; it is not replaced by the owner's."""
    router, connected = await start(), await connect(adds_tokens=adds_tokens)
    enter(run, record_of(router.url))
    assert (await connected.chat(authorization=f"Bearer {run.token()}"))[0] == 200
    assert (await connected.chat(authorization="Bearer guessed"))[0] == 401
    assert router.offered == [f"Bearer {run.token()}", "Bearer guessed"]
    assert router.asked == 1, "a wrong token ends no proof"


async def test_on_a_port_no_token_is_added(run: RunDir, start: Starter, connect: Connect) -> None:
    router, connected = await start(), await connect(adds_tokens=False)
    enter(run, record_of(router.url))
    assert (await connected.chat())[0] == 401
    assert router.offered == [None]


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({}, True),
        ({"host": "localhost"}, True),
        ({"host": "LocalHost:8000"}, True),
        ({"host": "127.0.0.1:8000"}, True),
        ({"host": "[::1]:8000"}, True),
        ({"host": "localhost.evil.example"}, False),
        ({"host": "evil.example:8000"}, False),
        ({"host": "localhost", "authorization": "Bearer x"}, False),
        ({"host": "localhost", "x-api-key": "x"}, False),
        ({"host": "localhost:8000", "origin": "https://evil.example"}, False),
        ({"host": "localhost:8000", "sec-fetch-site": "cross-site"}, False),
    ],
)
def test_which_requests_get_the_token(fields: dict[str, str], needs: bool) -> None:
    """Programs without credentials get it; web pages in a browser behind `ssh -L` do not."""
    assert needs_token(Headers([(name.encode(), value.encode()) for name, value in fields.items()])) is needs


async def test_another_process_at_the_routers_address_gets_nothing(
    run: RunDir, start: Starter, connect: Connect
) -> None:
    stranger, connected = await start(), await connect(hold_s=0)
    stranger.stranger = True
    enter(run, record_of(stranger.url))
    status, message = await connected.chat(authorization=f"Bearer {run.token()}")
    assert status == 503
    assert "something else answers there" in message
    assert stranger.offered == []


async def test_the_router_sees_the_request_as_the_client_sent_it(run: RunDir, start: Starter, connect: Connect) -> None:
    """Path, query, method and headers are unchanged, except headers of the connection. The client sees the router's
    headers."""
    seen: list[web.BaseRequest] = []

    async def records(router: FakeRouter, request: web.BaseRequest) -> web.StreamResponse:
        seen.append(request)
        return web.Response(status=418, body=b"\x00\xff", headers={"x-expert": "math", "content-type": "a/b"})

    router, connected = await start(records), await connect()
    enter(run, record_of(router.url))
    async with connected.session.request(
        "DELETE",
        URL("http://localhost/v1/x%20y?a=1&b=%2F", encoded=True),
        headers={
            "x-session-id": "s",
            "x-request-id": "r-1",
            "x-api-key": "k",
            "authorization": f"Bearer {run.token()}",
        },
    ) as response:
        assert (response.status, await response.read()) == (418, b"\x00\xff")
        assert (response.headers["x-expert"], response.headers["content-type"]) == ("math", "a/b")
    (request,) = seen
    assert (request.method, request.raw_path) == ("DELETE", "/v1/x%20y?a=1&b=%2F")
    names = ("x-session-id", "x-request-id", "x-api-key", "authorization")
    assert [request.headers.getall(name) for name in names] == [["s"], ["r-1"], ["k"], [f"Bearer {run.token()}"]]


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [({"content-encoding": "gzip"}, b"x", 415), ({}, b"x" * (2**16 + 1), 413)],
)
async def test_bodies_that_cannot_be_forwarded(
    connect: Connect, headers: dict[str, str], body: bytes, status: int
) -> None:
    connected = await connect()
    async with connected.session.post(f"http://localhost{CHAT}", data=body, headers=headers) as response:
        assert response.status == status


async def test_a_stalled_file_system_delays_no_request(
    run: RunDir, start: Starter, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last result is used, and nothing more is read until the file system responds."""
    router, connected = await start(), await connect()
    enter(run, record_of(router.url))
    await connected.chat()
    monkeypatch.setattr(forwarder_module, "REGISTRY_TIMEOUT_S", 0.01)
    actions = []

    async def never(action: Any) -> Any:
        actions.append(action)
        await asyncio.Event().wait()

    monkeypatch.setattr(connected.forwarder.files, "run", never)
    for _ in range(3):
        connected.forwarder.invalidate()
        assert await connected.chat() == (200, f"from {router.url}")
    assert (len(actions), router.asked) == (1, 4)


async def test_a_router_that_leaves_after_it_answered(run: RunDir, start: Starter, connect: Connect) -> None:
    old, new, connected = await start(leaves_after(answers)), await start(), await connect()
    enter(run, record_of(old.url))
    assert await connected.chat() == (200, f"from {old.url}")
    asked = asyncio.create_task(connected.chat())
    await connected.one_held()
    enter(run, record_of(new.url, generation=2))
    connected.go_on.set()
    assert await asked == (200, f"from {new.url}")
