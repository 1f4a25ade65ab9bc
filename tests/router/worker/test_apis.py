"""Every API path alike: it streams, fails over, cancels, and fails in the words of its own clients."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from hpc_router.net import protocol
from tests.router.fakes import (
    RunningRouter,
    a_deployment,
    a_router,
    a_run,
    fake_replica,
    hang,
    refuse,
    reset,
    stream,
)
from tests.router.support import GUARD_S, all_gauges_zero, client_of, post, ready, session, sim_replica
from tests.support.relays import RELAYS, WARM
from tests.support.waiting import eventually

TURNS = [{"role": "user", "content": "2+2?"}]
BODIES: dict[str, dict[str, Any]] = {
    protocol.CHAT: {"messages": TURNS},
    protocol.COMPLETIONS: {"prompt": "2+2?"},
    protocol.EMBEDDINGS: {"input": "2+2?"},
    protocol.RESPONSES: {"input": TURNS},
    protocol.MESSAGES: {"messages": TURNS, "max_tokens": 5},
}
EVENTS = [b"event: one\ndata: {}\n\n", b"data: two\n\n"]
every_path = pytest.mark.parametrize("path", protocol.GENERATE_PATHS)


def body(path: str, **fields: Any) -> dict[str, Any]:
    return {"model": "math", **BODIES[path], **fields}


@pytest.fixture(params=[*RELAYS, "warm"], autouse=True)
def relay(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test holds over the reference as well."""
    monkeypatch.setattr("tests.router.fakes.RELAY", {**RELAYS, "warm": WARM}[request.param])


@asynccontextmanager
async def anthropic_client_of(router: RunningRouter) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(
        base_url=router.url, api_key=router.token, max_retries=0, timeout=GUARD_S
    ) as made:
        yield made


async def collect(events: AsyncIterator[Any], into: list[str]) -> None:
    """The types of events, as far as they come."""
    async for event in events:
        into.append(event.type)


@every_path
async def test_it_streams_byte_for_byte(tmp_path: Path, path: str) -> None:
    run = a_run(tmp_path)
    raw = json.dumps(body(path, stream=True)).encode()
    async with (
        fake_replica(run, "math-0.g1", stream(EVENTS)) as fake,
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router)
        status, got, headers = await post(router, raw, path=path)
        assert (status, got, headers["x-replica"]) == (200, b"".join(EVENTS), "math-0.g1")
        assert fake.bodies == [raw]
        await eventually(lambda: all_gauges_zero(router))


@every_path
async def test_a_failure_before_the_first_byte_goes_elsewhere(tmp_path: Path, path: str) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", reset) as sick,
        fake_replica(run, "math-1.g1", stream(EVENTS)),
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router, 2)
        for _ in range(2):
            status, got, _ = await post(router, body(path, stream=True), path=path)
            assert (status, got) == (200, b"".join(EVENTS))
        assert sick.bodies
        await eventually(lambda: all_gauges_zero(router))


@every_path
@pytest.mark.parametrize("act", [hang, stream(EVENTS, then="hang")], ids=["before the first byte", "mid-stream"])
async def test_a_client_that_leaves_cancels_upstream(tmp_path: Path, path: str, act: Any) -> None:
    run = a_run(tmp_path)
    async with fake_replica(run, "math-0.g1", act) as fake, a_router(run, a_deployment("math")) as router:
        await ready(router)
        call = asyncio.create_task(post(router, body(path, stream=True), path=path))
        await fake.arrived.wait()
        call.cancel()
        await eventually(lambda: fake.cancelled == 1)
        await eventually(lambda: all_gauges_zero(router))


@every_path
async def test_a_stream_that_breaks_ends_with_the_error_event_of_its_api(tmp_path: Path, path: str) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", stream([*EVENTS, b"data: unfinished"], then="reset")),
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router)
        _, got, _ = await post(router, body(path, stream=True), path=f"{path}?beta=true")
        last = got.removeprefix(b"".join(EVENTS))
        assert last.endswith(b"\n\n")
        name, _, data = last.decode().rpartition("data: ")
        assert name == ("event: error\n" if path in (protocol.RESPONSES, protocol.MESSAGES) else "")
        said = json.loads(data)
        assert "failed before it had finished" in said["error"]["message"]
        assert said["error"]["type"] == ("api_error" if path == protocol.MESSAGES else "upstream_error")
        assert said.get("type") == ("error" if name else None)
        await eventually(lambda: all_gauges_zero(router))


@every_path
async def test_refusals_have_the_shape_of_their_api(tmp_path: Path, path: str) -> None:
    """Also what an agent or an engine refuses is passed on as it came, an unknown path among them."""
    run = a_run(tmp_path)
    cases: list[tuple[Any, dict[str, str], int, str, str]] = [
        (body(path, model="maths"), {}, 404, "invalid_request_error", "not_found_error"),
        (b"{", {}, 400, "invalid_request_error", "invalid_request_error"),
        (body(path), {"authorization": "Bearer no"}, 401, "authentication_error", "authentication_error"),
        (b"x" * 2**21, {}, 413, "invalid_request_error", "request_too_large"),
    ]
    async with (
        fake_replica(run, "math-0.g1", refuse(404)),
        a_router(run, a_deployment("math", max_body_mb=1)) as router,
    ):
        await ready(router)
        for sent, headers, expected, openai_kind, anthropic_kind in cases:
            status, value, told = await post(router, sent, path=path, **headers)
            assert status == expected
            assert "x-request-id" in told or status == 413
            if path == protocol.MESSAGES:
                assert (value["type"], value["error"]["type"]) == ("error", anthropic_kind)
                assert set(value["error"]) == {"type", "message"}
            else:
                assert set(value) == {"error"}
                assert value["error"]["type"] == openai_kind
        status, value, _ = await post(router, body(path), path=path)
        assert (status, value["error"]["message"]) == (404, "scripted 404")


@pytest.mark.parametrize("given", ["authorization", "x-api-key"])
@pytest.mark.parametrize("path", [protocol.MESSAGES, protocol.CHAT])
async def test_the_token_comes_either_way_and_goes_no_further(tmp_path: Path, path: str, given: str) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1") as fake,
        a_router(run, a_deployment("math")) as router,
        session() as s,
    ):
        await ready(router)
        for token, expected in ((router.token, 200), (router.token + "x", 401), ("", 401)):
            value = f"Bearer {token}" if given == "authorization" else token
            async with s.post(router.url + path, json=body(path), headers={given: value}) as response:
                assert response.status == expected
        assert len(fake.headers) == 1
        assert "x-api-key" not in fake.headers[0]
        assert fake.headers[0]["authorization"] == f"Bearer {fake.key}"


async def test_a_field_that_means_something_else_does_not_vote(tmp_path: Path) -> None:
    """A response may name a stored `prompt`; its conversation is the `input`."""
    run = a_run(tmp_path)
    async with fake_replica(run, "math-0.g1") as fake, a_router(run, a_deployment("math", fallback="math")) as router:
        await ready(router)
        sent = body(protocol.RESPONSES, model="auto", prompt={"id": "pmpt_1"}, messages=None)
        assert (await post(router, sent, path=protocol.RESPONSES))[0] == 200
        assert (await post(router, {"model": "auto", "prompt": {"id": "p"}}, path=protocol.RESPONSES))[0] == 200
        assert len(fake.bodies) == 2


async def test_the_openai_client_makes_responses(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        sim_replica(run, "math-0.g1"),
        a_router(run, a_deployment("math", fallback="math")) as router,
        client_of(router) as client,
    ):
        await ready(router)
        whole = await client.responses.create(model="auto", input="2+2?")
        assert whole.output_text.startswith("sim simulated answer")
        assert whole.usage is not None
        events = [e async for e in await client.responses.create(model="math", input="2+2?", stream=True)]
        text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
        assert text == whole.output_text
        assert events[-1].type == "response.completed"
        assert [e.sequence_number for e in events] == list(range(len(events)))
        fault = {"x-sim-fault": '{"kind": "cut", "at": 2}'}
        broken = await client.responses.create(model="math", input="x", stream=True, extra_headers=fault)
        seen: list[str] = []
        with pytest.raises(openai.APIError, match="failed before it had finished"):
            await collect(broken, seen)
        assert seen.count("response.output_text.delta") == 2
        with pytest.raises(openai.NotFoundError, match="did you mean 'math'"):
            await client.responses.create(model="maths", input="x")
        await eventually(lambda: all_gauges_zero(router))


async def test_the_anthropic_client_makes_messages(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    turns: Any = TURNS
    async with (
        sim_replica(run, "math-0.g1"),
        a_router(run, a_deployment("math", fallback="math")) as router,
        anthropic_client_of(router) as client,
    ):
        await ready(router)
        whole = await client.messages.create(model="auto", max_tokens=5, messages=turns, system="be brief")
        assert whole.content[0].type == "text"
        assert (whole.stop_reason, whole.usage.output_tokens) == ("max_tokens", 5)
        async with client.messages.stream(model="math", max_tokens=5, messages=turns, system="be brief") as told:
            assert "".join([text async for text in told.text_stream]) == whole.content[0].text
            assert (await told.get_final_message()).usage == whole.usage
        broken = await client.messages.create(
            model="math", max_tokens=5, messages=turns, stream=True,
            extra_headers={"x-sim-fault": '{"kind": "cut", "at": 2}'},
        )  # fmt: skip
        seen: list[str] = []
        with pytest.raises(anthropic.APIError, match="failed before it had finished"):
            await collect(broken, seen)
        assert seen.count("content_block_delta") == 2
        with pytest.raises(anthropic.NotFoundError, match="did you mean 'math'"):
            await client.messages.create(model="maths", max_tokens=5, messages=turns)
        with pytest.raises(anthropic.AuthenticationError):
            await client.with_options(api_key="wrong").messages.create(model="math", max_tokens=5, messages=turns)
        await eventually(lambda: all_gauges_zero(router))
