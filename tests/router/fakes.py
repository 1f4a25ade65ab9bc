"""A replica that does what its script says: a real server on port 0 with a real record, and a router in front."""

import asyncio
import json
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from hpc_router.config.schema import Deployment, EngineConfig, ExpertConfig, PolicyConfig, PolicyKind, RouterConfig
from hpc_router.net import protocol
from hpc_router.net.auth import bearer_token, challenge_answer, new_token, replica_key
from hpc_router.relay.upstream.client import UpstreamClient
from hpc_router.router.control.process import ControlProcess
from hpc_router.router.ipc.shared_counters import Counters
from hpc_router.router.policies import load_policy
from hpc_router.router.replicas.replica import RoutingState
from hpc_router.router.worker.gateway import Gateway
from hpc_router.router.worker.process import Identity, control_client, serving
from hpc_router.routing.policy import versions
from hpc_router.state import registry
from hpc_router.state.io_thread import FileThread
from hpc_router.state.registry import EngineInfo, Record, RecordKind, State
from hpc_router.state.run_directory import RunDir, make_run
from tests.support.relays import OWN

NONCE: Final = "the router's"
RELAY = OWN
"""Between the clients and the replicas of these tests: what serves, or the reference."""
Act = Callable[["FakeReplica", web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass
class FakeReplica:
    """Plays its acts one per request, the last one for ever. `bodies`: what it was sent; `lines`: method and path."""

    run: RunDir
    replica: str
    acts: deque[Act]
    models: tuple[str, ...]
    state: str = "ready"
    key: str = ""
    url: str = ""
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    silent: bool = False
    cancelled: int = 0
    probes: int = 0
    health: dict[str, Any] = field(default_factory=dict)
    metrics: str | None = None
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if self.silent:
            await self.go_on.wait()
        if request.path == protocol.HEALTH:
            answer = challenge_answer(self.key, request.query["challenge"])
            health = {"replica": self.replica, "state": self.state, "in_flight": 0, "models": self.models}
            self.probes += 1
            return web.json_response(health | {"answer": answer} | self.health)
        if request.path == protocol.METRICS:
            assert bearer_token(request.headers.get("authorization")) == self.key
            return web.Response(status=404) if self.metrics is None else web.Response(text=self.metrics)
        if request.path == protocol.MODELS:
            assert bearer_token(request.headers.get("authorization")) == self.key
            return web.json_response({"object": "list", "data": [{"id": m, "object": "model"} for m in self.models]})
        assert bearer_token(request.headers.get("authorization")) == self.key
        self.bodies.append(await request.content.read())
        self.queries.append(request.rel_url.raw_query_string)
        self.lines.append(f"{request.method} {request.rel_url.raw_path}")
        self.headers.append({k.lower(): v for k, v in request.headers.items()})
        act = self.acts[0] if len(self.acts) == 1 else self.acts.popleft()
        self.arrived.set()
        try:
            return await act(self, request)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def completion(text: str = "hello") -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "id": "c", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }  # fmt: skip


def event(text: str) -> bytes:
    delta = {"role": "assistant", "content": text}
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return b"data: " + json.dumps(chunk | {"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n"


async def answer(fake: FakeReplica, request: web.BaseRequest) -> web.StreamResponse:
    return web.json_response(completion(fake.replica), headers={"x-engine": "fake"})


def refuse(status: int, *, headers: dict[str, str] | None = None) -> Act:
    async def act(fake: FakeReplica, request: web.BaseRequest) -> web.StreamResponse:
        error = {"message": f"scripted {status}", "type": "scripted", "param": None, "code": None}
        return web.json_response({"error": error}, status=status, headers=headers)

    return act


async def hang(fake: FakeReplica, request: web.BaseRequest) -> web.StreamResponse:
    """Until `go_on` is set."""
    await fake.go_on.wait()
    return await answer(fake, request)


async def reset(fake: FakeReplica, request: web.BaseRequest) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


def stream(pieces: Sequence[bytes], *, then: str = "end", content_type: str = "text/event-stream") -> Act:
    """Write the pieces, then `end` properly, `reset` the connection, or `hang`."""

    async def act(fake: FakeReplica, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": content_type})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        if then == "reset":
            return await reset(fake, request)
        if then == "hang":
            await fake.go_on.wait()
        return response

    return act


@asynccontextmanager
async def fake_replica(
    run: RunDir, replica: str, *acts: Act, models: tuple[str, ...] | None = None, capacity: int = 8, **fields: Any
) -> AsyncIterator[FakeReplica]:
    expert = registry.split_replica(replica)[0]
    names = models if models is not None else (expert, "auto")
    fake = FakeReplica(run, replica, deque(acts or (answer,)), names)
    nonce = new_token()
    fake.key = replica_key(run.secret(), nonce)
    runner = web.ServerRunner(web.Server(fake.handle, handler_cancellation=True, access_log=None), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    record = Record(
        kind=RecordKind.EXPERT, replica=replica, url=fake.url, state=State.READY, serves={expert: names[0]},
        nonce=nonce, capacity=capacity, engine=EngineInfo(kind="fake"),
    )  # fmt: skip
    record = replace(record, **fields)
    registry.publish(run.registry, record)
    try:
        yield fake
    finally:
        registry.withdraw(run.registry, replica)
        await runner.cleanup()


def a_run(folder: Path) -> RunDir:
    return make_run(folder / "run")


def a_deployment(
    *experts: str, policy: PolicyKind = "model_field", fallback: str | None = None, **router: Any
) -> Deployment:
    """Quick clocks: a test never waits for a default."""
    quick: dict[str, Any] = {"discovery_s": 0.02, "probe_s": 0.05, "probe_timeout_s": 2.0, "drain_s": 1.0}
    return Deployment(
        experts={name: ExpertConfig(model="m", engine=EngineConfig(kind="sim")) for name in experts},
        policy=PolicyConfig(kind=policy, fallback=fallback),
        router=RouterConfig(**(quick | router)),
    )


@dataclass
class RunningRouter:
    gateway: Gateway
    control: ControlProcess
    url: str
    token: str

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token}", "content-type": "application/json"}

    async def warm(self, connections: int = 3) -> None:
        """Connect to every replica that is ready, as earlier requests would have."""
        client = self.gateway.dispatcher.client
        assert isinstance(client, UpstreamClient)
        for replica in self.gateway.table.all():
            if replica.state is RoutingState.READY:
                for _ in range(connections):
                    client.put(await client.connect(replica.address))


@asynccontextmanager
async def a_router(
    run: RunDir, deployment: Deployment, *, replica: str = "router-0.g1"
) -> AsyncIterator[RunningRouter]:
    """A control process and a worker, in this process."""
    sock = socket.create_server(("127.0.0.1", 0))
    files = FileThread("test")
    counters = Counters(workers=1)
    policy = load_policy(run, deployment)
    identity = Identity(
        replica=replica, key=replica_key(run.secret(), NONCE), nonce=NONCE, started_at=time.time(),
        token=None if deployment.router.open else run.token(),
    )  # fmt: skip
    artefact, shadow = versions(policy)
    control = ControlProcess(
        run, deployment, deployment, counters, files, replica,
        started_at=identity.started_at, artefact=artefact, shadow=shadow,
    )  # fmt: skip
    here, there = socket.socketpair()
    async with control_client(deployment, counters, 0) as link:
        await link.attach(there)
        async with control.watching({0: here}):
            worker = serving(
                run, deployment, policy, link, identity=identity, sock=sock, files=files,
                make_client=RELAY.make_client, listen=RELAY.listen,
            )  # fmt: skip
            async with worker as gateway:
                yield RunningRouter(gateway, control, f"http://127.0.0.1:{sock.getsockname()[1]}", run.token())
    files.close(timeout_s=5)
