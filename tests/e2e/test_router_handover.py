"""Routers replace each other under continuous calls and streams; clients that follow them see no failure."""

import asyncio
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import openai
import pytest

from hpc_router.client import async_openai_client, openai_client
from hpc_router.connect.forwarder import Forwarder
from hpc_router.relay.downstream.server import listening
from hpc_router.state.registry import RegistryReader, State
from hpc_router.state.run_directory import RunDir, open_run
from tests.e2e.deployment import cli
from tests.e2e.support import engine
from tests.support.certificates import make_certificate
from tests.support.needs import ROOT
from tests.support.waiting import eventually

pytestmark = pytest.mark.e2e

TOKENS: Final = 40
QUICK: Final = ("router.discovery_s=0.1", "router.probe_s=0.5", "router.reconcile=false", "router.workers=2")
Call = Callable[[bool], Awaitable[None]]
"""Sends one request, for a stream or a whole answer, and raises unless the answer is complete."""


@dataclass
class Callers:
    """Callers that send one request after another until `over`. `complete`: complete answers by caller and router
    generation."""

    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    generation: int = 0
    complete: Counter[tuple[str, int]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def start(self, name: str, call: Call, *, stream: bool) -> None:
        self.tasks.append(asyncio.create_task(self._repeat(f"{name} {'stream' if stream else 'whole'}", call, stream)))

    async def _repeat(self, name: str, call: Call, stream: bool) -> None:
        while not self.over.is_set():
            generation = self.generation
            try:
                await call(stream)
            except Exception as error:  # noqa: BLE001 - each is a failed call
                self.failures.append(f"{name}: {error!r} {error.__cause__!r}")
            else:
                self.complete[name, generation] += 1

    async def ended(self) -> None:
        self.over.set()
        await asyncio.gather(*self.tasks)

    def all_have(self, generation: int) -> bool:
        """Whether every kind of caller got an answer to a request that it sent after this generation was started."""
        names = {name for name, _ in self.complete}
        return len(names) == 6 and all(self.complete[name, generation] for name in names)


def _request(stream: bool) -> dict[str, Any]:
    return {
        "model": "math", "messages": [{"role": "user", "content": "hi"}], "stream": stream,
        "max_tokens": TOKENS if stream else 2, "extra_body": {"ignore_eos": True},
    }  # fmt: skip


def blocking(client: openai.OpenAI, threads: Executor) -> Call:
    """A call of the synchronous client. It has threads of its own, because those of `asyncio.to_thread` start the
    routers."""

    def one(stream: bool) -> None:
        answer: Any = client.chat.completions.create(**_request(stream))
        choices = [chunk.choices[0] for chunk in (answer if stream else [answer])]
        assert choices[-1].finish_reason == "length"

    return lambda stream: asyncio.get_running_loop().run_in_executor(threads, one, stream)


def asynchronous(client: openai.AsyncOpenAI) -> Call:
    async def one(stream: bool) -> None:
        answer: Any = await client.chat.completions.create(**_request(stream))
        choices = [chunk.choices[0] async for chunk in answer] if stream else [answer.choices[0]]
        assert choices[-1].finish_reason == "length"

    return one


@asynccontextmanager
async def a_router(path: Path, generation: int, *overrides: str) -> AsyncIterator["subprocess.Popen[str]"]:
    """A router in a process of its own, once its record is ready and it has a replica."""
    argv = [sys.executable, "-m", "launch.router", f"run={path}", *QUICK, *overrides]
    process = await asyncio.to_thread(partial(subprocess.Popen, argv, cwd=ROOT, text=True))
    try:
        await eventually(lambda: state_of(open_run(path), generation) is State.READY)
        yield process
    finally:
        if process.poll() is None:
            await ended_in_order(process)


async def ended_in_order(process: "subprocess.Popen[str]") -> None:
    process.terminate()
    assert await asyncio.to_thread(process.wait, 60) == 0


def state_of(run: RunDir, generation: int) -> State | None:
    record = RegistryReader(run.registry).snapshot().get(f"router-0.g{generation}")
    return record.state if record is not None else None


@asynccontextmanager
async def forwarded(run: RunDir) -> AsyncIterator[str]:
    """The address of a `connect` with a port."""
    sock = socket.create_server(("127.0.0.1", 0))
    with closing(Forwarder(run, hold_s=60, adds_tokens=False)) as forwarder:
        async with listening(forwarder.handle, sock, max_body=2**20):
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"


@asynccontextmanager
async def under_load(
    folder: Path, *overrides: str
) -> AsyncIterator[tuple[Callers, Callable[[], Awaitable["subprocess.Popen[str]"]]]]:
    """18 callers without retries of their own, and the function that starts the next router. Fails if a caller has not
    got a complete answer by the end of the block."""
    path = folder / "run"
    async with AsyncExitStack() as stack:
        url = stack.enter_context(engine("m", options=["--itl-ms", "20", "--ttft-ms", "5"]))
        await asyncio.to_thread(cli, "register", "--run", str(path), "--expert", "math", "--url", f"{url}/v1")
        run = open_run(path)
        plain = openai.AsyncOpenAI(
            base_url=f"{await stack.enter_async_context(forwarded(run))}/v1", api_key=run.token(), max_retries=0
        )
        follower = async_openai_client(path, max_retries=0)
        sync = stack.enter_context(openai_client(path, max_retries=0))
        callers = Callers()
        for client in (plain, follower):
            await stack.enter_async_context(client)
        for name, call in (
            ("connect", asynchronous(plain)),
            ("async", asynchronous(follower)),
            ("sync", blocking(sync, stack.enter_context(ThreadPoolExecutor(6)))),
        ):
            for _ in range(3):
                callers.start(name, call, stream=True)
                callers.start(name, call, stream=False)

        async def start_next() -> "subprocess.Popen[str]":
            callers.generation += 1
            return await stack.enter_async_context(a_router(path, callers.generation, *overrides))

        try:
            yield callers, start_next
        finally:
            await callers.ended()


@pytest.mark.parametrize(("overlap", "tls"), [(True, False), (False, False), (True, True)])
async def test_two_handovers_fail_no_call(tmp_path: Path, overlap: bool, tls: bool) -> None:
    """Over HTTP and HTTPS. Each drain begins while all callers have requests in flight, and ends when these are
    answered. With `overlap` the successor is ready before. Without it, the successor starts on the same port after the
    end, and requests wait for it."""
    cert, key = make_certificate(tmp_path) if tls else (None, None)
    overrides = (f"router.tls_cert={cert}", f"router.tls_key={key}") if tls else ()
    async with under_load(tmp_path, *overrides) as (callers, start_next):
        router = await start_next()
        await eventually(lambda: callers.all_have(1))
        for generation in (2, 3):
            if overlap:
                old, router = router, await start_next()
                await ended_in_order(old)
            else:
                await ended_in_order(router)
                router = await start_next()
            await eventually(partial(callers.all_have, generation))
    assert callers.failures == []


async def test_a_killed_router_fails_only_the_streams_in_flight(tmp_path: Path) -> None:
    """All other requests wait for the next router."""
    async with under_load(tmp_path) as (callers, start_next):
        killed = await start_next()
        await eventually(lambda: callers.all_have(1))
        killed.kill()
        await asyncio.to_thread(killed.wait)
        await start_next()
        await eventually(lambda: callers.all_have(2))
    assert [failure for failure in callers.failures if " stream: " not in failure] == []
    assert len(callers.failures) <= 9, "one of each caller of streams"
