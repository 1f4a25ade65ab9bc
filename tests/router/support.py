"""What tests of the router share: a client, a replica, and what they check of both."""

import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import openai
import pytest

from hpc_router.router.replicas.replica import Event, Replica, RoutingState
from hpc_router.router.replicas.table import ReplicaTable
from hpc_router.sim.config import SimConfig
from hpc_router.sim.server import SimServer
from hpc_router.state import registry
from hpc_router.state.registry import EngineInfo, Record, RecordKind, State
from hpc_router.state.run_directory import RunDir
from tests.router import fakes
from tests.router.fakes import RunningRouter
from tests.sim.calls import INSTANT
from tests.support.relays import RELAYS, WARM
from tests.support.waiting import eventually

GUARD_S = 20.0
CHAT = "/v1/chat/completions"


def chat(model: str = "math", *, stream: bool = False, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "2+2?"}], "stream": stream, **fields}


@pytest.fixture(params=[*RELAYS, "warm"], autouse=True)
def relay(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test holds over the reference as well."""
    monkeypatch.setattr("tests.router.fakes.RELAY", {**RELAYS, "warm": WARM}[request.param])


@asynccontextmanager
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=GUARD_S)) as made:
        yield made


@asynccontextmanager
async def client_of(router: RunningRouter) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{router.url}/v1", api_key=router.token, max_retries=0, timeout=GUARD_S
    ) as made:
        yield made


async def post(router: RunningRouter, body: Any, *, path: str = CHAT, **headers: str) -> tuple[int, Any, Any]:
    data = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
    async with session() as s, s.post(router.url + path, data=data, headers=router.headers | headers) as response:
        raw = await response.read()
        return (
            response.status,
            (json.loads(raw) if response.content_type == "application/json" else raw),
            response.headers,
        )


async def ready(router: RunningRouter, count: int = 1) -> None:
    await eventually(lambda: sum(r.state is RoutingState.READY for r in router.gateway.table.all()) >= count)
    if fakes.RELAY.warm:
        await router.warm()


def all_gauges_zero(router: RunningRouter) -> bool:
    table = router.gateway.table
    return (
        router.gateway.in_flight.count == 0
        and all(r.in_flight == 0 for r in table.all())
        and all(table.waiting(e) == 0 for e in table.experts())
    )


@asynccontextmanager
async def sim_replica(run: RunDir, replica: str, config: SimConfig = INSTANT) -> AsyncIterator[SimServer]:
    """The simulated engine as an endpoint that runs elsewhere."""
    expert = registry.split_replica(replica)[0]
    async with SimServer(config) as engine:
        info = EngineInfo(kind="sim")
        record = Record(RecordKind.EXTERNAL, replica, engine.url, State.READY, {expert: config.model}, engine=info)
        registry.publish(run.registry, record)
        yield engine


def standing(router: RunningRouter, name: str) -> RoutingState:
    replica = router.gateway.table.get(name)
    assert replica is not None
    return replica.state


async def statuses(router: RunningRouter, count: int) -> list[int]:
    return [(await post(router, chat(user=str(n))))[0] for n in range(count)]


def replica(name: str, *, experts: tuple[str, ...] = ("math",), capacity: int = 2, ready: bool = True) -> Replica:
    record = Record(
        kind=RecordKind.EXPERT,
        replica=name,
        url="http://127.0.0.1:1",
        state=State.READY,
        serves=dict.fromkeys(experts, "m"),
        capacity=capacity,
    )
    made = Replica(record, key="k")
    if ready:
        made.apply(Event.SAYS_READY)
    return made


def table_of(*replicas: Replica) -> ReplicaTable:
    table = ReplicaTable()
    for one in replicas:
        table.put(one)
    return table
