"""A client that leaves, in every phase: the engine's work ends at once, and nothing is counted any more.

Router, an agent's HTTP API and the simulated engine, each over real sockets. The engine's own counters show that it
noticed, and how far the request had come.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from yarl import URL

from hpc_router.expert.agent.agent import bind
from hpc_router.expert.agent.engine_relay import ENGINE_LIMITS
from hpc_router.expert.agent.http_api import AgentHttpApi
from hpc_router.net import protocol
from hpc_router.net.auth import new_token, replica_key
from hpc_router.sim.config import SimConfig
from hpc_router.sim.metrics import Outcome, RequestPhase
from hpc_router.sim.server import SimServer
from hpc_router.state import registry
from hpc_router.state.registry import EngineInfo, Record, RecordKind, State
from tests.router.fakes import RunningRouter, a_deployment, a_router, a_run
from tests.router.support import all_gauges_zero, ready
from tests.support.relays import RELAYS, WARM, Relay
from tests.support.waiting import GUARD_S, eventually

LEAVES_S = 5.0
NEVER_S = 1000.0


@pytest.fixture(params=[*RELAYS, "warm"], autouse=True)
def relay(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Relay:
    """Every test holds over the reference as well."""
    monkeypatch.setattr("tests.router.fakes.RELAY", {**RELAYS, "warm": WARM}[request.param])
    return {**RELAYS, "warm": WARM}[request.param]


@dataclass
class Chain:
    router: RunningRouter
    http_api: AgentHttpApi
    engine: SimServer

    @asynccontextmanager
    async def asking(self, *, stream: bool, tokens: int = 4, cut: int = 0) -> AsyncIterator[asyncio.StreamReader]:
        """A request; its connection is closed at the end of the block. `cut`: bytes of its body that never come."""
        body = json.dumps(
            {
                "model": "math",
                "messages": [{"role": "user", "content": "2+2?"}],
                "stream": stream,
                "max_tokens": tokens,
                "ignore_eos": True,
            }
        ).encode()
        url = URL(self.router.url)
        assert url.host is not None
        assert url.port is not None
        reader, writer = await asyncio.open_connection(url.host, url.port)
        fields = [f"POST {protocol.CHAT} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
        fields += [f"{name}: {value}" for name, value in self.router.headers.items()]
        writer.write("\r\n".join([*fields, "", ""]).encode() + body[: len(body) - cut])
        try:
            yield reader
        finally:
            writer.close()

    async def at_rest(self) -> None:
        counts = self.engine.counts
        async with asyncio.timeout(LEAVES_S):
            await eventually(lambda: not counts.running and not counts.waiting and not self.http_api.in_flight.count)
            await eventually(lambda: all_gauges_zero(self.router))


@asynccontextmanager
async def a_chain(folder: Path, relay: Relay, config: SimConfig) -> AsyncIterator[Chain]:
    run, uds, sock, nonce = a_run(folder), folder / "e.sock", bind("127.0.0.1"), new_token()
    key = replica_key(run.secret(), nonce)
    async with (
        SimServer(config, uds=uds) as engine,
        relay.make_client(ENGINE_LIMITS, socket_path=str(uds)) as client,
    ):
        http_api = AgentHttpApi(
            "math-0.g1", key, 8, client, ("math",), True, lambda why, until_at: None, state=State.READY
        )
        http_api.models = ("math",)
        record = Record(
            RecordKind.EXPERT, "math-0.g1", f"http://127.0.0.1:{sock.getsockname()[1]}", State.READY, {"math": "math"},
            nonce=nonce, engine=EngineInfo(kind="sim"),
        )  # fmt: skip
        registry.publish(run.registry, record)
        async with (
            relay.listen(http_api.handle, sock, max_body=2**20),
            a_router(run, a_deployment("math")) as router,
        ):
            await ready(router)
            yield Chain(router, http_api, engine)


def sim(*, ttft_s: float = 0.0, itl_s: float = 0.0, capacity: int | None = None) -> SimConfig:
    return SimConfig(served_model_names=("math",), jitter=0.0, ttft_s=ttft_s, itl_s=itl_s, capacity=capacity)


@pytest.mark.parametrize(
    ("config", "stream", "phase"),
    [
        (sim(ttft_s=NEVER_S), True, RequestPhase.BEFORE_FIRST_TOKEN),
        (sim(ttft_s=NEVER_S), False, RequestPhase.BEFORE_FIRST_TOKEN),
        (sim(itl_s=NEVER_S), False, RequestPhase.GENERATING),
    ],
    ids=["before the first event", "before the answer", "while the answer is made"],
)
async def test_before_the_first_byte(tmp_path: Path, relay: Relay, config: SimConfig, stream: bool, phase: str) -> None:
    async with a_chain(tmp_path, relay, config) as chain:
        async with chain.asking(stream=stream):
            await eventually(lambda: chain.engine.counts.running == 1)
            if phase == RequestPhase.GENERATING:
                await eventually(lambda: chain.engine.counts.generation_tokens > 0)
        await chain.at_rest()
        assert chain.engine.counts.aborted == {phase: 1}


async def test_in_the_engines_queue(tmp_path: Path, relay: Relay) -> None:
    async with a_chain(tmp_path, relay, sim(ttft_s=NEVER_S, capacity=1)) as chain, chain.asking(stream=True):
        await eventually(lambda: chain.engine.counts.running == 1)
        async with chain.asking(stream=True):
            await eventually(lambda: chain.engine.counts.waiting == 1)
        async with asyncio.timeout(LEAVES_S):
            await eventually(lambda: not chain.engine.counts.waiting)
        assert chain.engine.counts.aborted == {RequestPhase.QUEUED: 1}


async def test_in_mid_stream(tmp_path: Path, relay: Relay) -> None:
    async with a_chain(tmp_path, relay, sim(itl_s=NEVER_S)) as chain:
        async with chain.asking(stream=True) as reader, asyncio.timeout(GUARD_S):
            await reader.readuntil(b'"content"')
        await chain.at_rest()
        assert chain.engine.counts.aborted == {RequestPhase.STREAMING: 1}


async def test_at_the_end(tmp_path: Path, relay: Relay) -> None:
    """All of the answer was there: nothing was cancelled."""
    async with a_chain(tmp_path, relay, sim()) as chain:
        async with chain.asking(stream=True) as reader, asyncio.timeout(GUARD_S):
            await reader.readuntil(b"[DONE]")
        await chain.at_rest()
        assert not chain.engine.counts.aborted
        assert chain.engine.counts.finished[Outcome.LENGTH] + chain.engine.counts.finished[Outcome.STOP] == 1


async def test_while_its_body_is_being_sent(tmp_path: Path, relay: Relay) -> None:
    """The engine never hears of it."""
    async with a_chain(tmp_path, relay, sim()) as chain:
        async with chain.asking(stream=True, cut=1):
            await eventually(lambda: chain.router.gateway.in_flight.count == 1)
        await chain.at_rest()
        assert not chain.engine.counts.finished
