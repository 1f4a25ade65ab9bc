"""A scripted router: a real server on port 0, with its records in a run directory."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

from hpc_router.net.auth import challenge_answer, replica_key
from hpc_router.net.protocol import DRAINING_HEADER, HEALTH
from hpc_router.state.atomic_files import replace_json
from hpc_router.state.registry import SCHEMA, Record, RecordKind, RegistryReader, State, publish, replica_name
from hpc_router.state.run_directory import RunDir

Act = Callable[["FakeRouter", web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass
class FakeRouter:
    """Requires the run directory's current token, then plays its acts; it repeats the last one.

    It proves its identity with the nonce and the name of the record that was published last. A `stranger` answers, but
    cannot prove it.
    """

    run: RunDir
    acts: deque[Act]
    url: str = ""
    stop_listening: Callable[[], Awaitable[None]] = field(default=lambda: asyncio.sleep(0))
    die: Callable[[], Awaitable[None]] = field(default=lambda: asyncio.sleep(0))
    offered: list[str | None] = field(default_factory=list)
    hosts: list[str | None] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    asked: int = 0
    dying: bool = False
    stranger: bool = False

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == HEALTH:
            self.asked += 1
            if self.dying:
                return await hangs_up(self, request)
            record = next(r for r in RegistryReader(self.run.registry).snapshot().values() if r.url == self.url)
            secret = "guessed" if self.stranger else self.run.secret()
            answer = challenge_answer(replica_key(secret, record.nonce or ""), request.query["challenge"])
            return web.json_response({"status": "ok", "replica": record.replica, "answer": answer})
        self.offered.append(request.headers.get("authorization"))
        self.hosts.append(request.headers.get("host"))
        self.bodies.append(await request.content.read())
        if self.offered[-1] != f"Bearer {self.run.token()}":
            return web.json_response({"error": {"message": "whose token is that?"}}, status=401)
        act = self.acts[0] if len(self.acts) == 1 else self.acts.popleft()
        return await act(self, request)


async def answers(router: FakeRouter, request: web.BaseRequest) -> web.StreamResponse:
    if not json.loads(router.bodies[-1] or b"{}").get("stream"):
        message = {"role": "assistant", "content": f"from {router.url}"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return web.json_response(
            {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        )
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for word in ("from", " ", router.url):
        await response.write(_event(word))
    await response.write(b"data: [DONE]\n\n")
    return response


async def drains(router: FakeRouter, request: web.BaseRequest) -> web.StreamResponse:
    return web.json_response({"error": {"message": "draining"}}, status=503, headers={DRAINING_HEADER: "1"})


async def overloaded(router: FakeRouter, request: web.BaseRequest) -> web.StreamResponse:
    return web.json_response({"error": {"message": "full"}}, status=503)


async def hangs_up(router: FakeRouter, request: web.BaseRequest) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def breaks_off(router: FakeRouter, request: web.BaseRequest) -> web.StreamResponse:
    """Closes the connection in the middle of a stream."""
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    await response.write(_event("from"))
    return await hangs_up(router, request)


def leaves_after(act: Act) -> Act:
    """Closes the router's socket and this connection after the response."""

    async def do(router: FakeRouter, request: web.BaseRequest) -> web.StreamResponse:
        response = await act(router, request)
        response.force_close()
        await router.stop_listening()
        return response

    return do


def _event(word: str) -> bytes:
    choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


@asynccontextmanager
async def fake_router(run: RunDir, *acts: Act) -> AsyncIterator[FakeRouter]:
    router = FakeRouter(run, deque(acts or (answers,)))
    server = web.Server(router.handle, access_log=None)
    runner = web.ServerRunner(server, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    router.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    router.stop_listening, router.die = site.stop, runner.cleanup
    try:
        yield router
    finally:
        await runner.cleanup()


Starter = Callable[..., Awaitable[FakeRouter]]


@asynccontextmanager
async def router_starter(run: RunDir) -> AsyncIterator[Starter]:
    """`await start(*acts)` starts a router on a free port that the registry does not list yet."""
    async with AsyncExitStack() as stack:

        async def start(*acts: Act) -> FakeRouter:
            return await stack.enter_async_context(fake_router(run, *acts))

        yield start


def record_of(
    url: str, *, generation: int = 1, kind: RecordKind = RecordKind.ROUTER, state: State = State.READY
) -> Record:
    name = "router" if kind is RecordKind.ROUTER else "math"
    replica = replica_name(name, 0, generation)
    return Record(kind, replica, url, state, {}, generation=generation, node="n1", nonce=f"{url} {generation}")


def enter(run: RunDir, *records: Record) -> None:
    """Writes the records into the registry folder and, as the leading router does, into `registry.json`."""
    for record in records:
        publish(run.registry, record)
    write_summary(run, *RegistryReader(run.registry).snapshot().values())


def write_summary(run: RunDir, *records: Record) -> None:
    replace_json(run.registry_json, {"schema": SCHEMA, "records": [record.to_json() for record in records]})
