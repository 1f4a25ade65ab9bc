"""Users in the queue of a real router with several workers: who starts before whom, counted without time."""

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from hpc_router.net.http_client import call_blocking
from hpc_router.net.protocol import CHAT
from hpc_router.state import registry
from hpc_router.state.registry import Record, RecordKind, RegistryReader, State, leading_router
from hpc_router.state.run_directory import RunDir, make_run
from hpc_router.state.user_tokens import create_token
from tests.e2e.support import are_known, running
from tests.router.fakes import completion
from tests.support.waiting import eventually

pytestmark = pytest.mark.e2e

PLACES = 4
WORKERS = 3
FLOOD = 2000
GUARD_S = 240.0  # 2,000 connections take a while where other tests run
QUICK = (
    "router.discovery_s=0.1",
    "router.reconcile=false",
    f"router.workers={WORKERS}",
    "router.max_waiting=4096",
    "router.queue_timeout_s=600",
)


@dataclass
class HeldEngine:
    """An engine that answers no request before `end`. `started`: the texts of the requests in order of arrival."""

    started: list[str] = field(default_factory=list)
    held: "list[asyncio.Future[None]]" = field(default_factory=list)
    open: bool = False

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        body = json.loads(await request.content.read())
        self.started.append(body["messages"][0]["content"])
        if not self.open:
            self.held.append(asyncio.get_running_loop().create_future())
            await self.held[-1]
        return web.json_response(completion("done"))

    async def end(self) -> None:
        """Answers the oldest request, and waits until another one has taken its place."""
        before = len(self.started)
        self.held.pop(0).set_result(None)
        await eventually(lambda: len(self.started) > before)

    def end_all(self) -> None:
        self.open = True
        while self.held:
            self.held.pop().set_result(None)


@asynccontextmanager
async def served(run: RunDir) -> AsyncIterator[tuple[HeldEngine, str]]:
    """A router with several workers and one engine with few places. Yields the engine and the router's address."""
    engine = HeldEngine()
    runner = web.ServerRunner(web.Server(engine.handle, access_log=None), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    record = Record(
        RecordKind.EXTERNAL, "math-x0.g1", url, State.READY, {"math": "m"}, capacity=PLACES, probe=None
    )  # fmt: skip
    registry.publish(run.registry, record)
    try:
        with running("-m", "launch.router", f"run={run.path}", *QUICK):
            await eventually(lambda: leading_router(RegistryReader(run.registry).snapshot()) is not None)
            router = leading_router(RegistryReader(run.registry).snapshot())
            assert router is not None
            await eventually(lambda: is_ready(router.url))
            yield engine, router.url
            engine.end_all()
    finally:
        await runner.cleanup()


async def is_ready(url: str) -> bool:
    def ask() -> bool:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5) as response:
                return bool(json.load(response)["ready"] == ["math"])
        except OSError:
            return False

    return await asyncio.to_thread(ask)


async def waiting(run: RunDir, url: str) -> int:
    response = await asyncio.to_thread(call_blocking, "GET", f"{url}/status", token=run.token(), timeout_s=30.0)
    return int(response.body["experts"]["math"]["waiting"])


async def send(session: aiohttp.ClientSession, url: str, token: str, text: str, **headers: str) -> int:
    """A request on a connection of its own, so that the kernel spreads the requests over the workers."""
    body: dict[str, Any] = {"model": "math", "messages": [{"role": "user", "content": text}]}
    headers |= {"authorization": f"Bearer {token}", "connection": "close"}
    async with session.post(url + CHAT, json=body, headers=headers) as response:
        return response.status


async def test_a_flood_delays_another_user_by_at_most_the_number_of_places_and_workers(tmp_path: Path) -> None:
    """User A has 2,000 requests in the router, user B sends one at a time. No place is free."""
    run = make_run(tmp_path / "run")
    a, b = (create_token(run, name)[1] for name in ("a", "b"))
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=GUARD_S)
    async with served(run) as (engine, url), aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        await eventually(lambda: are_known(url, a, b))
        flood = [asyncio.create_task(send(session, url, a, "a")) for _ in range(FLOOD)]

        async def waits(count: int) -> None:
            await eventually(lambda: _is(waiting(run, url), count), within_s=GUARD_S)

        await waits(FLOOD - PLACES)
        left = FLOOD - PLACES
        others = []
        for round_ in range(6):
            text = f"b{round_}"
            others.append(asyncio.create_task(send(session, url, b, text)))
            await waits(left + 1)
            before = len(engine.started)
            while text not in engine.started:
                await engine.end()
            overtakers = engine.started[before:].count("a")
            left -= overtakers
            assert overtakers <= WORKERS
        engine.end_all()
        assert set(await asyncio.gather(*flood, *others)) == {200}
        await waits(0)


async def _is(value: Any, expected: int) -> bool:
    return bool(await value == expected)
