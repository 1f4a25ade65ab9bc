"""Requests to the simulated engine, a client, and a function that waits for a state without sleeping."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp

from hpc_router.sim.config import SimConfig
from hpc_router.sim.server import SimServer

INSTANT = SimConfig(ttft_s=0.0, itl_s=0.0, jitter=0.0)
GUARD_S = 60.0

JsonObject = dict[str, object]
DISCONNECTED = (aiohttp.ClientError, ConnectionError)


class SteppedClock:
    """A clock that advances only in sleeps, and when the test sets it."""

    def __init__(self) -> None:
        self.time_s = 100.0
        self.slept: list[float] = []

    def now_s(self) -> float:
        return self.time_s

    def unix_s(self) -> float:
        return 1_700_000_000.0

    async def sleep(self, delay_s: float) -> None:
        self.slept.append(delay_s)
        self.time_s += delay_s


def chat(prompt: str = "what is two and two", /, **more: object) -> JsonObject:
    return {"model": "sim", "messages": [{"role": "user", "content": prompt}], **more}


def faulty(**fault: object) -> JsonObject:
    """Returns the body of a streamed chat of ten tokens that carries its own fault."""
    return chat(stream=True, max_tokens=10, ignore_eos=True, sim_fault=fault)


@asynccontextmanager
async def client(engine: SimServer) -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=0) if engine.uds is None else aiohttp.UnixConnector(str(engine.uds), limit=0)
    async with aiohttp.ClientSession(base_url=engine.url, connector=connector) as session:
        yield session


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(GUARD_S):
        while not condition():
            await asyncio.sleep(0)


async def post(session: aiohttp.ClientSession, path: str, body: JsonObject) -> tuple[int, JsonObject]:
    async with session.post(path, json=body) as response:
        return response.status, decoded(await response.read())


async def stream(session: aiohttp.ClientSession, body: JsonObject, *, path: str = "/v1/chat/completions") -> list[str]:
    """Sends a request and returns the data of every event of its stream. The stream must end regularly."""
    async with session.post(path, json=body) as response:
        assert response.status == 200, await response.text()
        return events(await response.read())


async def stream_until_broken(session: aiohttp.ClientSession, body: JsonObject) -> bytes:
    """Returns the bytes received before the connection broke. Fails if it did not break."""
    received = bytearray()
    try:
        async with session.post("/v1/chat/completions", json=body) as response:
            async for chunk in response.content.iter_any():
                received += chunk
    except DISCONNECTED:
        return bytes(received)
    raise AssertionError(f"the stream ended properly: {bytes(received)!r}")


def events(raw: bytes) -> list[str]:
    assert raw.endswith(b"\n\n")
    return [event.removeprefix("data: ") for event in raw.decode().removesuffix("\n\n").split("\n\n")]


def decoded(raw: bytes | str) -> JsonObject:
    value = json.loads(raw)
    assert isinstance(value, dict)
    return value


def at(value: object, *path: str | int) -> object:
    """Returns the value at `path` inside a JSON body."""
    for step in path:
        if isinstance(step, int):
            assert isinstance(value, list | tuple), (value, step)
            value = value[step]
        else:
            assert isinstance(value, dict), (value, step)
            value = value[step]
    return value


def typed(raw: bytes) -> list[JsonObject]:
    """Returns the data of every event. Each must have its type as name and a label."""
    found = []
    for event in raw.decode().removesuffix("\n\n").split("\n\n"):
        name, _, data = event.partition("\ndata: ")
        found.append(decoded(data))
        assert name == f"event: {found[-1]['type']}"
        assert found[-1]["simulated"] is True
    return found
