"""A scripted router: a real server on port 0 that responds with the event streams of the API."""

import asyncio
import json
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from hpc_router.bench.load.generator import LoadTarget
from hpc_router.net import protocol
from hpc_router.net.auth import challenge_answer

Handler = Callable[["FakeRouter", web.BaseRequest], Awaitable[web.StreamResponse]]
HEADERS = {"x-expert": "math", "x-replica": "math-0.g1", "x-route-reason": "classified"}
TOKEN = "the-owner's"


@dataclass
class FakeRouter:
    """Answers each request with the next handler; the last handler repeats. `key`: its replica key, for challenges."""

    handlers: deque[Handler]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    max_running: int = 0
    cookies: list[str] = field(default_factory=list)
    tokens: Counter[str] = field(default_factory=Counter)
    url: str = ""
    key: str = ""
    left: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def target(self) -> LoadTarget:
        return LoadTarget(self.url, TOKEN)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == protocol.HEALTH:
            answer = challenge_answer(self.key, request.query["challenge"])
            return web.json_response({"replica": "router-0.g1", "answer": answer})
        self.tokens[request.headers.get("authorization", "")] += 1
        self.cookies += [request.headers[name] for name in request.headers if name.lower() == "cookie"]
        self.bodies.append(json.loads(await request.content.read()))
        handler = self.handlers[0] if len(self.handlers) == 1 else self.handlers.popleft()
        self.running += 1
        self.max_running = max(self.max_running, self.running)
        try:
            return await handler(self, request)
        except asyncio.CancelledError:
            self.left.set()
            raise
        finally:
            self.running -= 1


@asynccontextmanager
async def fake_router(*handlers: Handler) -> AsyncIterator[FakeRouter]:
    fake = FakeRouter(deque(handlers))
    server = web.Server(fake.handle, handler_cancellation=True)
    runner = web.ServerRunner(server)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    fake.url = f"http://{host}:{port}"
    try:
        yield fake
    finally:
        await runner.cleanup()


def piece(content: str | None, *, finish: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish}]})


def usage(tokens: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": tokens}})


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
ROLE = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
WHOLE = (ROLE, piece("a"), piece(" b"), piece(" c"), piece(None, finish="stop"), DONE)


def responds(*chunks: bytes, content_type: str = "text/event-stream", status: int = 200) -> Handler:
    async def handler(_fake: FakeRouter, request: web.BaseRequest) -> web.StreamResponse:
        response = await _begin(request, content_type, status)
        for chunk in chunks:
            await response.write(chunk)
        await response.write_eof()
        return response

    return handler


def resets_after(*chunks: bytes) -> Handler:
    """Returns a handler that sends these chunks and then resets the connection."""

    async def handler(_fake: FakeRouter, request: web.BaseRequest) -> web.StreamResponse:
        response = await _begin(request, "text/event-stream", 200)
        for chunk in chunks:
            await response.write(chunk)
        assert request.transport is not None
        request.transport.abort()
        return response

    return handler


def waits_after(*chunks: bytes, until: asyncio.Event, then: Sequence[bytes] = ()) -> Handler:
    """Returns a handler that sends these chunks, waits for the event, and sends `then`."""

    async def handler(_fake: FakeRouter, request: web.BaseRequest) -> web.StreamResponse:
        response = await _begin(request, "text/event-stream", 200)
        for chunk in chunks:
            await response.write(chunk)
        await until.wait()
        for chunk in then:
            await response.write(chunk)
        await response.write_eof()
        return response

    return handler


async def _begin(request: web.BaseRequest, content_type: str, status: int) -> web.StreamResponse:
    response = web.StreamResponse(status=status, headers={**HEADERS, "content-type": content_type, "set-cookie": "a=b"})
    response.enable_chunked_encoding()
    await response.prepare(request)
    return response
