"""Somebody else's server as a replica: it is probed no more strictly than it is used."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

from hpc_router.net import protocol
from hpc_router.router.control import discovery
from hpc_router.router.ipc.messages import REPORT_S
from hpc_router.router.replicas.health import MAX_LATE_PROBES
from hpc_router.router.replicas.replica import RoutingState
from hpc_router.state import registry
from hpc_router.state.registry import Record, RecordKind, State
from hpc_router.state.run_directory import RunDir
from tests.router.fakes import RunningRouter, a_deployment, a_router, a_run, completion, fake_replica
from tests.router.support import chat, client_of, post, ready
from tests.support.waiting import eventually

NAME = "math-x0.g1"
LIMIT_S = 0.3
"""Time limit of a probe. It is long enough for a busy machine, where an answer may be this much later."""


@dataclass
class Endpoint:
    """Answers requests with `chat_status`, and probes with `status` and `body` after `delay_s`; to None it gives no
    answer, and 0 breaks the connection."""

    status: int | None = 200
    body: bytes = b"{}"
    chat_status: int = 200
    delay_s: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    probed: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""
    base: str = ""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.method == "POST":
            await request.content.read()
            self.asked.append(request.path)
            return web.json_response(completion(), status=self.chat_status, headers=self.headers)
        self.probed.append(request.path)
        await asyncio.sleep(self.delay_s)
        if self.status is None:
            await self.go_on.wait()
        if self.status == 0 and request.transport is not None:
            request.transport.abort()
        return web.Response(status=self.status or 404, body=self.body, headers=self.headers)


@asynccontextmanager
async def registered(
    run: RunDir, endpoint: Endpoint, *, probe: str | None = protocol.MODELS, model: str | None = "theirs"
) -> AsyncIterator[None]:
    """At the same port again, where it had one."""
    runner = web.ServerRunner(web.Server(endpoint.handle, handler_cancellation=True), shutdown_timeout=0.1)
    await runner.setup()
    port = int(endpoint.url.rpartition(":")[2] or 0)
    await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
    endpoint.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    url = endpoint.url + endpoint.base
    registry.publish(run.registry, Record(RecordKind.EXTERNAL, NAME, url, State.READY, {"math": model}, probe=probe))
    try:
        yield
    finally:
        endpoint.go_on.set()
        await runner.cleanup()


def standing(router: RunningRouter) -> RoutingState | None:
    replica = router.control.table.get(NAME)
    return None if replica is None else replica.state


async def ask(router: RunningRouter) -> int:
    status: int = (await post(router, chat("math")))[0]
    return status


@pytest.mark.parametrize(
    ("status", "body", "models"),
    [
        (404, b"", ()),
        (401, b'{"error": {}}', ()),
        (429, b"", ()),
        (500, b"<html>", ()),
        (200, b"<html>", ()),
        (200, b'{"data": 1}', ()),
        (200, b'[{"id": "a"}, "b", 1]', ("a", "b")),
        (200, b'{"data": [{"id": "a"}]}', ("a",)),
        (302, b"", ()),
    ],
)
async def test_whatever_it_answers_it_lives(tmp_path: Path, status: int, body: bytes, models: tuple[str, ...]) -> None:
    run = a_run(tmp_path)
    async with registered(run, Endpoint(status, body)), a_router(run, a_deployment()) as router:
        await ready(router)
        assert await ask(router) == 200
        (replica,) = router.control.table.all()
        assert (replica.models, replica.trouble) == (models, None)


@pytest.mark.parametrize(
    ("model", "cards", "expected"),
    [
        ("theirs", [{"id": "theirs", "max_model_len": 8192}, {"id": "other", "max_model_len": 512}], 8192),
        (None, [{"id": "only", "max_model_len": 4096}], 4096),
        (None, [{"id": "one", "max_model_len": 4096}, {"id": "two", "max_model_len": 512}], None),
        ("theirs", [{"id": "theirs"}], None),
        ("theirs", [{"id": "theirs", "max_model_len": None}], None),
        ("theirs", [{"id": "theirs", "max_model_len": "8192"}], None),
        ("theirs", [{"id": "theirs", "max_model_len": True}], None),
        ("theirs", [{"id": "theirs", "max_model_len": -1}], None),
        ("theirs", [{"id": ["x"], "max_model_len": 1}, 7, "theirs"], None),
    ],
)
async def test_its_context_is_what_it_lists(
    tmp_path: Path, model: str | None, cards: list[object], expected: int | None
) -> None:
    run = a_run(tmp_path)
    async with (
        registered(run, Endpoint(body=json.dumps({"data": cards}).encode()), model=model),
        a_router(run, a_deployment()) as router,
        client_of(router) as client,
    ):
        await ready(router)
        [known] = router.gateway.table.all()
        await eventually(lambda: known.models)
        card = (await client.models.retrieve("math")).model_dump()
        assert (card["max_model_len"], card["ready_replicas"]) == (expected, 1)


async def test_a_late_answer_is_one_too(tmp_path: Path) -> None:
    """Agents have `router.probe_timeout_s`; others have that for the connection alone."""
    run, endpoint = a_run(tmp_path), Endpoint(status=None)
    async with registered(run, endpoint), a_router(run, a_deployment(probe_timeout_s=0.05)) as router:
        await eventually(lambda: endpoint.probed)
        await asyncio.wait({asyncio.create_task(endpoint.go_on.wait())}, timeout=4 * 0.05)
        assert len(endpoint.probed) == 1
        endpoint.go_on.set()
        await ready(router)


async def test_probes_without_an_answer_leave_the_only_replica_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that answers one request at a time answers no probe during a long one."""
    monkeypatch.setattr(discovery, "EXTERNAL_PROBE_S", LIMIT_S)
    run, endpoint = a_run(tmp_path), Endpoint(status=None)
    async with registered(run, endpoint), a_router(run, a_deployment()) as router:
        await ready(router)
        await eventually(lambda: len(endpoint.probed) > 2 * MAX_LATE_PROBES)
        (replica,) = router.control.table.all()
        assert (standing(router), replica.trouble) == (
            RoutingState.READY, f"GET {endpoint.url}/v1/models: no answer within {LIMIT_S:g} s",
        )  # fmt: skip
        assert await ask(router) == 200


async def test_probes_without_an_answer_eject_it_while_another_replica_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "EXTERNAL_PROBE_S", 2 * REPORT_S)
    run, endpoint = a_run(tmp_path), Endpoint()
    async with registered(run, endpoint), a_router(run, a_deployment("math", pin_bound=None)) as router:
        async with fake_replica(run, "math-0.g1"):
            await ready(router, 2)
            endpoint.status = None
            before = len(endpoint.probed)
            while len(endpoint.probed) <= before + MAX_LATE_PROBES + 1:
                assert await ask(router) == 200
                await asyncio.sleep(0.05)
            assert standing(router) is RoutingState.READY, "it answers requests"
            await eventually(lambda: standing(router) is RoutingState.EJECTED)
            replica = router.control.table.get(NAME)
            assert replica is not None
            assert replica.trouble == f"GET {endpoint.url}/v1/models: no answer within {2 * REPORT_S:g} s"
        await eventually(lambda: standing(router) is RoutingState.READY)  # the other replica is gone
        assert await ask(router) == 200


async def test_a_slow_answer_to_a_probe_brings_it_back_and_is_waited_for_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "EXTERNAL_PROBE_S", LIMIT_S)
    run, endpoint = a_run(tmp_path), Endpoint(delay_s=2 * LIMIT_S)
    async with (
        fake_replica(run, "math-0.g1"),
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router)
        async with registered(run, endpoint):
            await ready(router, 2)
            before = len(endpoint.probed)
            await eventually(lambda: len(endpoint.probed) > before + MAX_LATE_PROBES)
            assert standing(router) is RoutingState.READY


async def test_connections_that_break_without_an_answer_eject_it(tmp_path: Path) -> None:
    """As those through a tunnel whose other end is gone."""
    run = a_run(tmp_path)
    async with registered(run, Endpoint(status=0)), a_router(run, a_deployment()) as router:
        await eventually(lambda: standing(router) is RoutingState.EJECTED)
        (replica,) = router.control.table.all()
        assert replica.health.late_probes >= MAX_LATE_PROBES
        assert replica.trouble is not None
        assert "Server disconnected" in replica.trouble


@pytest.mark.parametrize("probe", ["/v1/models", "/health", None])
async def test_a_connection_that_fails_ejects_and_it_comes_back(tmp_path: Path, probe: str | None) -> None:
    run, endpoint = a_run(tmp_path), Endpoint()
    async with a_router(run, a_deployment()) as router:
        async with registered(run, endpoint, probe=probe):
            await ready(router)
            assert await ask(router) == 200
            assert set(endpoint.probed) == ({probe} if probe is not None else set())
        await eventually(lambda: standing(router) is RoutingState.EJECTED)
        (replica,) = router.control.table.all()
        assert replica.trouble is not None
        probed = f"connection to {endpoint.url}" if probe is None else f"GET {endpoint.url}{probe}"
        assert replica.trouble.startswith(f"{probed}: ")
        async with registered(run, endpoint, probe=probe):
            await ready(router)
            assert await ask(router) == 200


@pytest.mark.parametrize("header", [protocol.DRAINING_HEADER, protocol.STARTING_HEADER])
async def test_one_that_drained_comes_back_when_it_is_ready(tmp_path: Path, header: str) -> None:
    """A router of ours may be one: its successor answers at the same address."""
    run, endpoint = a_run(tmp_path), Endpoint()
    async with registered(run, endpoint), a_router(run, a_deployment()) as router:
        await ready(router)
        endpoint.status, endpoint.chat_status, endpoint.headers = 503, 503, {header: "1"}
        waits = asyncio.create_task(ask(router))
        await eventually(lambda: standing(router) is RoutingState.STARTING)
        await eventually(lambda: router.gateway.table.waiting("math") == 1)
        endpoint.status, endpoint.chat_status, endpoint.headers = 200, 200, {}
        assert await waits == 200


async def test_a_refused_token_is_reported_as_a_fault_of_the_configuration(tmp_path: Path) -> None:
    """The client's own was right."""
    run, endpoint = a_run(tmp_path), Endpoint(chat_status=401)
    async with registered(run, endpoint), a_router(run, a_deployment()) as router:
        await ready(router)
        status, body, _ = await post(router, chat("math"))
        assert (status, body["error"]["code"]) == (502, "endpoint_unauthorized")
        assert body["error"]["message"].startswith(f"{endpoint.url} answered 401")
        assert standing(router) is RoutingState.READY


@pytest.mark.parametrize(
    ("base", "api", "health"),
    [
        ("", "/v1", ""),
        ("/v1beta/openai", "/v1beta/openai", "/v1beta/openai"),
        ("/api/paas/v4", "/api/paas/v4", "/api/paas/v4"),
        ("/proxy/v1", "/proxy/v1", "/proxy"),
    ],
)
async def test_its_address_is_used_as_registered(tmp_path: Path, base: str, api: str, health: str) -> None:
    """For requests and probes; doubled slashes in the client's path do not reach it."""
    run, endpoint = a_run(tmp_path), Endpoint(body=b'["theirs"]', base=base)
    async with a_router(run, a_deployment()) as router, registered(run, endpoint):
        await ready(router)
        assert await ask(router) == 200
        assert (await post(router, chat("math"), path="/v1//chat/completions"))[0] == 200
        assert (await post(router, chat("math"), path="//v1/embeddings//?a=//b"))[0] == 200
        assert endpoint.asked == [f"{api}/chat/completions"] * 2 + [f"{api}/embeddings"]
        assert set(endpoint.probed) == {f"{api}/models"}
        (replica,) = router.control.table.all()
        assert replica.models == ("theirs",)
    endpoint = Endpoint(base=base)
    async with a_router(run, a_deployment()) as router, registered(run, endpoint, probe="/health"):
        await ready(router)
        assert set(endpoint.probed) == {f"{health}/health"}


async def test_an_answer_that_cannot_be_decompressed_proves_life(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    endpoint = Endpoint(200, b"not gzip", headers={"content-encoding": "gzip"})
    async with registered(run, endpoint), a_router(run, a_deployment()) as router:
        await ready(router)
