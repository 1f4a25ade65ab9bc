"""The agent's HTTP API in front of a real (simulated) engine: access, error responses, and bytes relayed unchanged."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from hpc_router.expert.agent.agent import bind
from hpc_router.expert.agent.engine_relay import ENGINE_LIMITS
from hpc_router.expert.agent.http_api import HEADROOM, AgentHttpApi
from hpc_router.net import protocol
from hpc_router.net.auth import challenge_answer
from hpc_router.sim.server import SimServer
from hpc_router.state.registry import State
from tests.sim.calls import GUARD_S, INSTANT, JsonObject, chat, faulty
from tests.support.relays import OWN, RELAYS
from tests.support.waiting import eventually

KEY = "k" * 64
BODY_LIMIT = 2**16


RELAY = OWN


@pytest.fixture(params=list(RELAYS), autouse=True)
def relay(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs every test with the aiohttp reference as well."""
    monkeypatch.setattr("tests.expert.agent.test_http_api.RELAY", RELAYS[request.param])


@dataclass
class Running:
    engine: SimServer
    http_api: AgentHttpApi
    session: aiohttp.ClientSession
    drains: list[tuple[str, float | None]] = field(default_factory=list)

    async def post(self, path: str = protocol.CHAT, body: JsonObject | bytes | None = None) -> tuple[int, Any, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body or chat()).encode()
        async with self.session.post(path, data=data, headers={"content-type": "application/json"}) as response:
            return response.status, response.headers, await response.json()


@asynccontextmanager
async def running(
    scratch: Path, *, key: str | None = KEY, capacity: int = 4, lists: bool = True
) -> AsyncIterator[Running]:
    uds = scratch / "e.sock"
    drains: list[tuple[str, float | None]] = []
    sock = bind("127.0.0.1")
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    async with (
        SimServer(replace(INSTANT, served_model_names=("sim", "auto")), uds=uds) as engine,
        RELAY.make_client(ENGINE_LIMITS, socket_path=str(uds)) as client,
        aiohttp.ClientSession(f"http://127.0.0.1:{sock.getsockname()[1]}", headers=headers) as session,
    ):
        http_api = AgentHttpApi(
            "math-0.g1", KEY, capacity, client, ("sim", "auto"), lists, lambda *call: drains.append(call),
            state=State.READY,
        )  # fmt: skip
        async with RELAY.listen(http_api.handle, sock, max_body=BODY_LIMIT):
            yield Running(engine, http_api, session, drains)
            await session.close()
        assert http_api.in_flight.count == 0


@pytest.mark.parametrize("key", [None, "", "x" * 64, "Ω", KEY + "x"])
async def test_every_path_but_health_needs_the_key(socket_folder: Path, key: str | None) -> None:
    async with running(socket_folder, key=key) as at:
        for method, path in [
            ("GET", protocol.MODELS),
            ("GET", protocol.METRICS),
            ("POST", protocol.CHAT),
            ("POST", protocol.DRAIN),
            ("POST", protocol.RANK),
            ("GET", "/x"),
        ]:
            async with at.session.request(method, path) as response:
                assert response.status == 401
                assert (await response.json())["error"]["type"] == "authentication_error"
                assert response.headers["www-authenticate"] == "Bearer"
        async with at.session.get(protocol.HEALTH) as response:
            assert response.status == 200
        assert at.drains == []
        assert at.engine.recent.last(1) == []


async def test_health_answers_the_challenge(socket_folder: Path) -> None:
    async with running(socket_folder, key=None) as at:
        at.http_api.models = ("math", "auto")
        async with at.session.get(protocol.HEALTH, params={"challenge": "abc"}) as response:
            health = protocol.ProbeResponse.from_json(await response.json())
        assert health == protocol.ProbeResponse("math-0.g1", "ready", 0, ("math", "auto"), challenge_answer(KEY, "abc"))
        at.http_api.failures.note("lease", "OSError: x")
        async with at.session.get(protocol.HEALTH) as response:
            health = protocol.ProbeResponse.from_json(await response.json())
        assert health is not None
        assert health.task_failures == {"lease": (1, "OSError: x")}
        async with at.session.get(protocol.HEALTH) as response:
            assert (await response.json())["answer"] is None


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/v1/models/math", "/reset", "/sim/faults", "/v1/chat/completions/", "/docs", "/v1/responses/resp_1"),
        *("/v1/responses/a/b", "/v1/responses/a%2Fb", "/v1/responses/..%2F..%2Fsim%2Ffaults", "/v1/load_lora_adapter"),
    ],
)
async def test_only_the_api_paths_reach_the_engine(socket_folder: Path, path: str) -> None:
    async with running(socket_folder) as at:
        status, _, body = await at.post(path)
        assert (status, body["error"]["code"]) == (404, "unknown_path")
        async with at.session.get(protocol.CHAT) as response:
            assert response.status == 404
        assert at.engine.recent.last(1) == []


OPTIONAL_BODIES: dict[str, JsonObject] = {
    protocol.COUNT_TOKENS: {"messages": [{"role": "user", "content": "hi"}]},
    protocol.EMBEDDINGS: {"input": "hi"},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1]},
    **{path: {"text_1": "a", "text_2": "b"} for path in ("/score", "/v1/score")},
    **{path: {"query": "a", "documents": ["b"]} for path in ("/rerank", "/v1/rerank", "/v2/rerank")},
}


@pytest.mark.parametrize("path", [*protocol.INCOMPARABLE_PATHS, protocol.COUNT_TOKENS])
async def test_every_path_that_the_router_relays_is_relayed(socket_folder: Path, path: str) -> None:
    async with running(socket_folder) as at:
        assert (await at.post(path, {"model": "sim", **OPTIONAL_BODIES[path]}))[0] == 200
        at.http_api.state = State.STARTING
        assert (await at.post(path, {"model": "sim", **OPTIONAL_BODIES[path]}))[0] == 503


async def test_a_stored_response_can_be_read_again(socket_folder: Path) -> None:
    async with running(socket_folder) as at:
        _, _, made = await at.post(protocol.RESPONSES, {"model": "sim", "input": "hi"})
        path = f"{protocol.RESPONSES}/{made['id']}"
        async with at.session.get(path) as response:
            assert (response.status, await response.json()) == (200, made)
        async with at.session.delete(path) as response:
            assert response.status == 405
        assert (await at.post(path + "/cancel"))[0] == 400
        async with at.session.get(path + "/cancel") as response:
            assert response.status == 404
        at.http_api.state = State.DRAINING
        async with at.session.get(path) as response:
            assert (response.status, response.headers[protocol.DRAINING_HEADER]) == (503, "1")
        assert [entry.path for entry in at.engine.recent.last(9)] == [protocol.RESPONSES, path, path, path + "/cancel"]


async def test_each_api_is_served_and_refused_in_its_own_error_shape(socket_folder: Path) -> None:
    body: JsonObject = {"model": "sim", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    async with running(socket_folder) as at:
        assert (await at.post(protocol.MESSAGES, body))[2]["type"] == "message"
        assert (await at.post(protocol.RESPONSES, {"model": "sim", "input": "hi"}))[2]["object"] == "response"
        at.http_api.state = State.DRAINING
        status, headers, refusal = await at.post(protocol.MESSAGES, body)
        assert (status, headers[protocol.DRAINING_HEADER]) == (503, "1")
        message = "math-0.g1 is draining"
        assert refusal == {"type": "error", "error": {"type": "overloaded_error", "message": message}}
        assert (await at.post(protocol.RESPONSES, {"input": "hi"}))[2]["error"]["type"] == "service_unavailable"


async def test_bodies_are_relayed_unchanged_and_without_the_key(socket_folder: Path) -> None:
    raw = b'{ "model":"sim",\n "messages" :[{"role":"user","content":"\\u03c9"}], "future": [1,  2.50], "max_tokens":3}'
    async with running(socket_folder) as at:
        parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        headers = {"content-type": "application/json", "x-request-id": "r-1", "cookie": "a=b", "traceparent": parent}
        async with at.session.post(protocol.CHAT, data=raw, headers=headers) as response:
            assert response.status == 200
            assert response.headers["x-simulated"] == "true"
            assert (await response.json())["usage"]["completion_tokens"] == 3
        (seen,) = at.engine.recent.last(1)
        assert seen.body == raw
        names = {name.decode().lower(): value.decode() for name, value in seen.headers}
        assert names["x-request-id"] == "r-1"
        assert names["traceparent"] == parent
        assert not {"authorization", "cookie"} & set(names)
        assert names["accept-encoding"] == "identity"


@pytest.mark.parametrize("path", [protocol.CHAT, protocol.MESSAGES])
async def test_a_compressed_body_is_refused_with_the_valid_encoding(socket_folder: Path, path: str) -> None:
    async with (
        running(socket_folder) as at,
        at.session.post(path, data=b"abc", headers={"content-encoding": "gzip"}) as response,
    ):
        assert (response.status, response.headers["accept-encoding"]) == (415, "identity")
        error = (await response.json())["error"]
        assert error["message"] == "request bodies must not be compressed: send them without Content-Encoding"


async def test_a_stream_arrives_as_it_is_made(socket_folder: Path) -> None:
    async with running(socket_folder) as at:
        body = chat(stream=True, max_tokens=9, sim_fault={"kind": "hang", "at": 3})
        async with at.session.post(protocol.CHAT, json=body) as response:
            assert response.content_type == "text/event-stream"
            events = [await response.content.readuntil(b"\n\n") for _ in range(4)]  # the role and three tokens
            assert all(event.startswith(b"data: {") for event in events)
            assert at.http_api.in_flight.count == 1
        await asyncio.wait_for(at.http_api.in_flight.idle(), GUARD_S)


async def test_models_and_metrics_are_the_engines_own(socket_folder: Path) -> None:
    async with running(socket_folder) as at:
        async with at.session.get(protocol.MODELS) as response:
            assert [card["id"] for card in (await response.json())["data"]] == ["sim", "auto"]
        async with at.session.get(protocol.METRICS) as response:
            assert "vllm:" in await response.text()


async def test_an_engine_that_lists_other_models_is_not_asked(socket_folder: Path) -> None:
    async with running(socket_folder, lists=False) as at, at.session.get(protocol.MODELS) as response:
        assert [card["id"] for card in (await response.json())["data"]] == ["sim", "auto"]
        assert at.engine.recent.last(1) == []


@pytest.mark.parametrize(
    ("state", "header"), [(State.STARTING, protocol.STARTING_HEADER), (State.DRAINING, protocol.DRAINING_HEADER)]
)
async def test_a_replica_that_is_not_ready_says_its_state(socket_folder: Path, state: State, header: str) -> None:
    async with running(socket_folder) as at:
        at.http_api.state = state
        status, headers, body = await at.post()
        assert (status, body["error"]["code"]) == (503, state.value)
        assert header in headers
        assert int(headers["retry-after"]) >= 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_running_requests_are_aborted(socket_folder: Path, stream: bool) -> None:
    """Aborted connections get no further bytes. Later requests are told that the engine is not ready."""
    body = chat(stream=stream, max_tokens=10, sim_fault={"kind": "hang", "at": 4})
    async with running(socket_folder) as at:
        task = asyncio.create_task(at.post(body=body))
        await eventually(lambda: at.engine.counts.faults["hang"] == 1)
        at.http_api.break_off()
        with pytest.raises(aiohttp.ClientError):
            await task
        await asyncio.wait_for(at.http_api.in_flight.idle(), GUARD_S)
        async with asyncio.timeout(GUARD_S):
            await at.engine.idle()
        status, headers, _ = await at.post()
        assert (status, protocol.STARTING_HEADER in headers) == (503, True)


async def test_finished_requests_are_not_aborted(socket_folder: Path) -> None:
    """The connection is kept, and a draining replica stays a draining one."""
    async with running(socket_folder) as at:
        assert (await at.post())[0] == 200
        at.http_api.state = State.DRAINING
        at.http_api.break_off()
        assert at.http_api.state is State.DRAINING
        status, headers, _ = await at.post()
        assert (status, protocol.DRAINING_HEADER in headers) == (503, True)


async def test_a_drain_call_reaches_the_agent(socket_folder: Path) -> None:
    async with running(socket_folder) as at:
        status, _, body = await at.post(protocol.DRAIN)
        assert (status, body["state"], at.drains) == (202, "draining", [("a drain call", None)])
        await at.post(protocol.drain_target(1234.0))
        await at.post(f"{protocol.DRAIN}?until=-1e99")
        assert at.drains[1:] == [("a drain call", 1234), ("a drain call", None)]


async def test_far_beyond_the_capacity_requests_are_refused(socket_folder: Path) -> None:
    async with running(socket_folder, capacity=1) as at:
        held = [asyncio.create_task(at.post(body=faulty(kind="hang", at="headers"))) for _ in range(HEADROOM)]
        await eventually(lambda: at.engine.counts.faults["hang"] == HEADROOM)
        status, headers, body = await at.post()
        assert (status, body["error"]["code"], headers["retry-after"]) == (429, "overloaded", "1")
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        await asyncio.wait_for(at.http_api.in_flight.idle(), GUARD_S)
        assert (await at.post())[0] == 200


@pytest.mark.parametrize(("size", "status"), [(BODY_LIMIT, 200), (BODY_LIMIT + 1, 413)])
async def test_bodies_are_bounded(socket_folder: Path, size: int, status: int) -> None:
    body = json.dumps(chat()).encode()
    async with running(socket_folder) as at:
        assert (await at.post(body=body + b" " * (size - len(body))))[0] == status


@pytest.mark.parametrize(
    ("body", "phase"),
    [
        (faulty(kind="hang", at="headers"), "before_first_token"),
        (faulty(kind="hang", at="first_token"), "before_first_token"),
        (faulty(kind="hang", at=4), "streaming"),
        (chat(max_tokens=10, sim_fault={"kind": "hang", "at": 4}), "generating"),
    ],
)
async def test_a_client_that_leaves_frees_the_engine_at_once(socket_folder: Path, body: JsonObject, phase: str) -> None:
    async with running(socket_folder) as at:
        task = asyncio.create_task(at.session.post(protocol.CHAT, json=body))
        await eventually(lambda: at.engine.counts.faults["hang"] == 1)
        if task.done():
            task.result().close()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        async with asyncio.timeout(GUARD_S):
            await at.engine.idle()
            await at.http_api.in_flight.idle()
        assert at.engine.counts.aborted == {phase: 1}


@pytest.mark.parametrize("fault", [{"kind": "die", "at": 3}, {"kind": "cut", "at": 3}])
async def test_a_response_of_an_engine_that_dies_never_looks_complete(socket_folder: Path, fault: JsonObject) -> None:
    async with running(socket_folder) as at:
        async with at.session.post(protocol.CHAT, json=faulty(**fault)) as response:
            assert response.status == 200
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
        await asyncio.wait_for(at.http_api.in_flight.idle(), GUARD_S)


async def test_half_a_body_never_looks_complete(socket_folder: Path) -> None:
    async with running(socket_folder) as at:
        async with at.session.post(protocol.CHAT, json=chat(sim_fault={"kind": "partial_body"})) as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
        await asyncio.wait_for(at.http_api.in_flight.idle(), GUARD_S)


@pytest.mark.parametrize("kind", ["die", "reset", "garbage"])
async def test_an_engine_that_dies_before_its_answer(socket_folder: Path, kind: str) -> None:
    async with running(socket_folder) as at:
        status, headers, body = await at.post(body=chat(sim_fault={"kind": kind, "at": "headers"}))
        assert (status, body["error"]["code"]) == (502, "engine_unavailable")
        assert protocol.STARTING_HEADER in headers, (
            "the engine may have gone; its replica counts as starting until it answers"
        )


@pytest.mark.parametrize(
    ("method", "path"), [("POST", protocol.CHAT), ("GET", protocol.MODELS), ("GET", protocol.METRICS)]
)
async def test_a_connection_that_cannot_be_made_means_starting(socket_folder: Path, method: str, path: str) -> None:
    """The engine did not get the request, so the caller may retry. A draining replica still says that it drains."""
    async with running(socket_folder) as at:
        await at.post(body=chat(sim_fault={"kind": "die", "at": "headers"}))
        at.http_api.engine_lost.clear()
        for _ in range(2):
            async with at.session.request(
                method, path, data=json.dumps(chat()) if method == "POST" else None
            ) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (503, "starting")
                assert protocol.STARTING_HEADER in response.headers
                assert response.headers["retry-after"] == "5"
        async with at.session.get(protocol.HEALTH) as response:
            assert (await response.json())["state"] == "starting"
        at.http_api.state = State.DRAINING
        async with at.session.get(protocol.HEALTH) as response:
            assert (await response.json())["state"] == "draining"


async def test_the_engines_own_errors_pass_through(socket_folder: Path) -> None:
    async with running(socket_folder) as at:
        fault = {"kind": "status", "status": 429, "retry_after_s": 3}
        status, headers, _ = await at.post(body=chat(sim_fault=fault))
        assert (status, headers["retry-after"]) == (429, "3")
        assert (await at.post(body=b"{"))[0] == 400


REPORT = protocol.RankReport(1, "a", "c", "n2", 3, protocol.RankState.ENDED, "killed", "by hand", leaving=True)


async def test_another_rank_reports_and_is_answered(socket_folder: Path) -> None:
    async with running(socket_folder) as at:
        reports: list[protocol.RankReport] = []

        def hear(report: protocol.RankReport) -> protocol.RankOrder:
            reports.append(report)
            return protocol.RankOrder(protocol.Action.RUN, 4, "10.0.0.1", 4000, "p")

        at.http_api.on_rank = hear
        status, _, body = await at.post(protocol.RANK, asdict(REPORT))
        assert (status, reports) == (200, [REPORT])
        assert protocol.RankOrder.from_json(body) == protocol.RankOrder(protocol.Action.RUN, 4, "10.0.0.1", 4000, "p")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        {"rank": 1},
        asdict(REPORT) | {"rank": "1"},
        asdict(REPORT) | {"x": 1},
        asdict(REPORT) | {"state": "x"},
    ],
)
async def test_an_invalid_report_is_refused(socket_folder: Path, body: JsonObject | bytes) -> None:
    async with running(socket_folder) as at:
        at.http_api.on_rank = lambda _: protocol.RankOrder(protocol.Action.WAIT)
        status, _, response = await at.post(protocol.RANK, body)
        assert (status, response["error"]["code"]) == (400, "bad_report")


async def test_an_engine_on_one_node_has_no_other_ranks(socket_folder: Path) -> None:
    async with running(socket_folder) as at:
        status, _, response = await at.post(protocol.RANK, asdict(REPORT))
        assert (status, response["error"]["message"]) == (400, "this engine has one rank")


async def test_reports_have_a_token_of_their_own(socket_folder: Path) -> None:
    """The replica's key would give access to all other paths."""
    async with running(socket_folder) as at:
        at.http_api.on_rank, at.http_api.rank_token = lambda _: protocol.RankOrder(protocol.Action.WAIT), "t" * 64
        assert (await at.post(protocol.RANK, asdict(REPORT)))[0] == 401
        at.http_api.rank_token = KEY
        assert (await at.post(protocol.RANK, asdict(REPORT)))[0] == 200
