"""Requests for an expert without a ready replica: they wait and are told why, fail, or go to another expert."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from aiohttp import web

from hpc_router.state.atomic_files import replace_json
from hpc_router.state.run_directory import RunDir
from tests.router.classifying import deployed, trained
from tests.router.fakes import (
    FakeReplica,
    RunningRouter,
    a_deployment,
    a_router,
    a_run,
    event,
    fake_replica,
    hang,
    refuse,
    stream,
)
from tests.router.support import CHAT, GUARD_S, all_gauges_zero, chat, client_of, post, ready, session
from tests.router.support import relay as relay
from tests.support.waiting import eventually

DONE = b"data: [DONE]\n\n"
SOON_S = 45.0


def forecast(run: RunDir, **experts: dict[str, Any]) -> None:
    replace_json(run.forecast_json, {"at": time.time(), "experts": experts, "handovers": []})


def queued() -> dict[str, Any]:
    return {"ready_at": time.time() + SOON_S, "replica": "math-0.g1", "reason": "Resources"}


@asynccontextmanager
async def cold_router(folder: Path, *experts: str, **router: Any) -> AsyncIterator[tuple[RunDir, RunningRouter]]:
    """A router that knows that a replica of math waits in Slurm's queue. Requests that are not held get 0.1 s."""
    run = a_run(folder)
    forecast(run, math=queued())
    limits = {"queue_timeout_s": 0.1} | router
    async with a_router(run, a_deployment("math", *experts, **limits)) as made:
        await eventually(lambda: "math" in made.gateway.table.forecasts)
        yield run, made


def cold_starts(router: RunningRouter) -> dict[tuple[str, ...], int]:
    return dict(router.gateway.metrics.cold_starts.items())


async def held(router: RunningRouter, expert: str = "math", count: int = 1) -> None:
    """Until requests have waited for longer than they would without a start, and are still waiting."""
    await eventually(lambda: router.gateway.table.waiting(expert) == count)
    before = router.gateway.table.clock()
    await eventually(lambda: router.gateway.table.clock() - before > 0.3)
    assert router.gateway.table.waiting(expert) == count


async def test_a_stream_gets_the_state_and_then_its_events(tmp_path: Path) -> None:
    async with cold_router(tmp_path) as (run, router), session() as s:
        sent = json.dumps(chat(stream=True))
        async with s.post(router.url + CHAT, data=sent, headers=router.headers | {"x-request-id": "r7"}) as response:
            expected = time.strftime(
                "%H:%M", time.localtime(json.loads(run.forecast_json.read_text())["experts"]["math"]["ready_at"])
            )
            assert response.status == 200
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert (response.headers["x-request-id"], response.headers["x-expert"]) == ("r7", "math")
            first = await response.content.readuntil(b"\n\n")
            assert first == f": queued in Slurm (Resources), expected at {expected}\n\n".encode()
            await held(router)
            forecast(run, math={"ready_at": None, "replica": "math-0.g1", "reason": "loading"})
            assert await response.content.readuntil(b"\n\n") == b": starting (loading)\n\n"
            async with fake_replica(run, "math-0.g1", stream([event("a"), DONE])):
                assert await response.content.read() == event("a") + DONE
        assert all_gauges_zero(router)
        assert cold_starts(router) == {("math", "waited"): 1}
        router.gateway.metrics.settle()
        assert dict(router.gateway.metrics.requests.items()) == {("math", "named", "200"): 1}


async def test_the_openai_client_reads_a_stream_that_was_held(tmp_path: Path) -> None:
    async with cold_router(tmp_path, ping_s=0.02) as (run, router), client_of(router) as client:
        messages: Any = chat()["messages"]
        events = await client.chat.completions.create(model="math", messages=messages, stream=True)
        await held(router)
        async with fake_replica(run, "math-0.g1", stream([event("a"), event("b"), DONE])):
            assert [e.choices[0].delta.content async for e in events] == ["a", "b"]


async def test_a_whole_response_is_held(tmp_path: Path) -> None:
    async with cold_router(tmp_path) as (run, router):
        call = asyncio.create_task(post(router, chat()))
        await held(router)
        async with fake_replica(run, "math-0.g1"):
            status, _, headers = await call
        assert (status, headers["x-replica"]) == (200, "math-0.g1")
        assert cold_starts(router) == {("math", "waited"): 1}


async def test_a_whole_response_is_held_up_to_the_deadline_that_the_client_states(tmp_path: Path) -> None:
    """It gets the expected time before it gives up."""
    async with cold_router(tmp_path) as (_, router):
        for header in ("x-stainless-read-timeout", "x-stainless-timeout"):
            status, body, headers = await post(router, chat(), **{header: "0.6"})
            assert status == 503
            assert "within 0.3 s: queued in Slurm (Resources), expected at" in body["error"]["message"]
            assert SOON_S - GUARD_S < int(headers["retry-after"]) <= SOON_S
        assert all_gauges_zero(router)


@pytest.mark.parametrize("stated", ["", "nonsense", "inf", "-1", "nan"])
async def test_a_deadline_that_is_no_time_does_not_count(tmp_path: Path, stated: str) -> None:
    async with cold_router(tmp_path, answer_timeout_s=0.4) as (_, router):
        status, body, _ = await post(router, chat(), **{"x-stainless-read-timeout": stated})
        assert (status, "within 0.4 s" in body["error"]["message"]) == (503, True)


async def test_a_held_stream_ends_with_an_error_event_after_the_longest_wait(tmp_path: Path) -> None:
    async with cold_router(tmp_path, answer_timeout_s=0.4) as (_, router), client_of(router) as client:
        messages: Any = chat()["messages"]
        events = await client.chat.completions.create(model="math", messages=messages, stream=True)
        with pytest.raises(openai.APIError, match=r"within 0\.4 s: queued in Slurm") as raised:
            async for _ in events:
                pass
        assert raised.value.code == "unavailable"
        assert all_gauges_zero(router)
        assert dict(router.gateway.metrics.broken.items()) == {("math",): 1}


async def test_the_anthropic_client_gets_the_error_of_a_held_stream(tmp_path: Path) -> None:
    async with (
        cold_router(tmp_path, answer_timeout_s=0.4) as (_, router),
        anthropic.AsyncAnthropic(base_url=router.url, api_key=router.token, max_retries=0) as client,
    ):
        events = await client.messages.create(
            model="math", max_tokens=4, messages=[{"role": "user", "content": "2+2?"}], stream=True
        )
        with pytest.raises(anthropic.APIStatusError, match="queued in Slurm"):
            async for _ in events:
                pass


async def test_a_request_is_refused_at_once_with_the_expected_time(tmp_path: Path) -> None:
    async with cold_router(tmp_path, queue_timeout_s=GUARD_S) as (_, router):
        status, body, headers = await post(router, chat(stream=True), **{"x-wait": "fail"})
        assert (status, body["error"]["code"]) == (503, "cold_start")
        assert "math has no ready replica: queued in Slurm (Resources), expected at" in body["error"]["message"]
        assert SOON_S - GUARD_S < int(headers["retry-after"]) <= SOON_S
        assert cold_starts(router) == {("math", "failed"): 1}


async def test_the_config_decides_without_the_header(tmp_path: Path) -> None:
    async with cold_router(tmp_path, queue_timeout_s=GUARD_S, cold_start="fail") as (run, router):
        assert (await post(router, chat()))[1]["error"]["code"] == "cold_start"
        call = asyncio.create_task(post(router, chat(), **{"x-wait": "wait"}))
        await held(router)
        async with fake_replica(run, "math-0.g1"):
            assert (await call)[0] == 200
            await ready(router)
            assert (await post(router, chat()))[0] == 200, "a ready expert serves"


def for_math(**fields: Any) -> dict[str, Any]:
    """A request for which the classifier chooses math."""
    return {"model": "auto", "messages": [{"role": "user", "content": "solve the polynomial"}], **fields}


async def test_auto_falls_back_waits_or_fails(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    trained(run.classifier)
    forecast(run, math=queued())
    async with fake_replica(run, "code-0.g1"), a_router(run, deployed(run)) as router:
        await ready(router)
        await eventually(lambda: "math" in router.gateway.table.forecasts)
        status, _, headers = await post(router, for_math())
        assert (status, headers["x-expert"], headers["x-route-reason"]) == (200, "code", "unavailable")
        assert (await post(router, for_math(), **{"x-wait": "fallback"}))[2]["x-expert"] == "code"
        assert (await post(router, for_math(), **{"x-wait": "fail"}))[1]["error"]["code"] == "cold_start"
        assert cold_starts(router) == {("math", "fell_back"): 2, ("math", "failed"): 1}
        call = asyncio.create_task(post(router, for_math(), **{"x-wait": "wait"}))
        await held(router)
        async with fake_replica(run, "math-0.g1"):
            assert (await call)[2]["x-expert"] == "math"


async def test_auto_waits_although_the_last_replica_seemed_ready(tmp_path: Path) -> None:
    """It has gone, and the router learns that from the request."""
    run = a_run(tmp_path)
    trained(run.classifier)
    draining = refuse(503, headers={"x-hpc-router-draining": "1"})
    async with fake_replica(run, "code-0.g1"), a_router(run, deployed(run)) as router:
        async with fake_replica(run, "math-0.g1", draining) as fake:
            await ready(router, 2)
            forecast(run, math=queued())
            await eventually(lambda: "math" in router.gateway.table.forecasts)
            call = asyncio.create_task(post(router, for_math(), **{"x-wait": "wait"}))
            await fake.arrived.wait()
            await eventually(lambda: router.gateway.table.waiting("math") == 1)
            fake.state = "draining"
        async with fake_replica(run, "math-0.g2"):
            assert (await call)[2]["x-replica"] == "math-0.g2"


async def test_auto_does_not_wait_for_an_expert_of_which_no_replica_starts(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    trained(run.classifier)
    async with fake_replica(run, "code-0.g1"), a_router(run, deployed(run)) as router:
        await ready(router)
        assert (await post(router, for_math(), **{"x-wait": "wait"}))[2]["x-expert"] == "code"


async def test_without_a_start_the_wait_is_that_of_the_queue(tmp_path: Path) -> None:
    async with cold_router(tmp_path, "code") as (_, router):
        status, body, _ = await post(router, chat("code", stream=True))
        assert (status, body["error"]["message"]) == (503, "no replica of code could take the request within 0.1 s")


async def test_a_wrong_value_of_the_header_is_refused(tmp_path: Path) -> None:
    async with cold_router(tmp_path) as (_, router):
        status, body, _ = await post(router, chat(), **{"x-wait": "maybe"})
        assert (status, body["error"]["param"]) == (400, "x-wait")
        assert body["error"]["message"] == "x-wait is 'maybe' (valid: wait, fail, fallback)"


async def test_the_header_is_not_sent_upstream(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with fake_replica(run, "math-0.g1") as fake, a_router(run, a_deployment("math")) as router:
        await ready(router)
        assert (await post(router, chat(), **{"x-wait": "fail"}))[0] == 200
        assert "x-wait" not in fake.headers[0]


async def test_a_held_stream_is_tried_on_another_replica(tmp_path: Path) -> None:
    """Comments are not a part of the response."""
    async with cold_router(tmp_path) as (run, router), client_of(router) as client:
        messages: Any = chat()["messages"]
        events = await client.chat.completions.create(model="math", messages=messages, stream=True)
        await held(router)

        async def refuse_later(fake: FakeReplica, request: web.BaseRequest) -> web.StreamResponse:
            await fake.go_on.wait()
            return await refuse(500)(fake, request)

        async with fake_replica(run, "math-0.g1", refuse_later) as first:
            await eventually(first.arrived.wait)
            async with fake_replica(run, "math-1.g1", stream([event("a"), DONE])) as second:
                await ready(router, count=2)
                first.go_on.set()
                assert [e.choices[0].delta.content async for e in events] == ["a"]
        assert (len(first.bodies), len(second.bodies)) == (1, 1)
        assert all_gauges_zero(router)


@pytest.mark.parametrize("status", [400, 500])
async def test_the_engines_error_ends_a_held_stream(tmp_path: Path, status: int) -> None:
    async with cold_router(tmp_path) as (run, router), client_of(router) as client:
        messages: Any = chat()["messages"]
        events = await client.chat.completions.create(model="math", messages=messages, stream=True)
        await held(router)
        async with fake_replica(run, "math-0.g1", refuse(status)):
            with pytest.raises(openai.APIError, match=f"scripted {status}"):
                async for _ in events:
                    pass
        assert all_gauges_zero(router)


async def test_a_whole_response_does_not_follow_comments(tmp_path: Path) -> None:
    async with cold_router(tmp_path) as (run, router), client_of(router) as client:
        messages: Any = chat()["messages"]
        events = await client.chat.completions.create(model="math", messages=messages, stream=True)
        await held(router)
        async with fake_replica(run, "math-0.g1"):
            with pytest.raises(openai.APIError, match="not a stream"):
                async for _ in events:
                    pass


async def test_a_client_that_leaves_while_it_is_held_is_forgotten(tmp_path: Path) -> None:
    async with cold_router(tmp_path, ping_s=0.02) as (_, router), session() as s:
        for streams in (True, False):
            call = asyncio.create_task(
                s.post(router.url + CHAT, data=json.dumps(chat(stream=streams)), headers=router.headers)
            )
            await eventually(lambda: router.gateway.table.waiting("math") == 1)
            if streams:
                (await call).close()
            else:
                call.cancel()
            await eventually(lambda: all_gauges_zero(router) and router.gateway.table.waiting("math") == 0)
        assert dict(router.gateway.metrics.cancelled.items()) == {("queued",): 2}


async def test_early_headers_come_before_a_long_prefill(tmp_path: Path) -> None:
    """On the path with a pooled connection, and on that with a new one."""
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", hang, stream([event("a"), DONE])) as fake,
        a_router(run, a_deployment("math", early_headers_s=0.05, ping_s=0.05)) as router,
        client_of(router) as client,
        session() as s,
    ):
        await ready(router)
        sent = json.dumps(chat(stream=True))
        async with s.post(router.url + CHAT, data=sent, headers=router.headers) as response:
            assert (response.status, response.headers["x-route-reason"]) == (200, "named")
            assert await response.content.readuntil(b"\n\n") == b": ping\n\n"
            assert await response.content.readuntil(b"\n\n") == b": ping\n\n"
            fake.go_on.set()
            assert b"not a stream" in await response.content.read()
        messages: Any = chat()["messages"]
        events = await client.chat.completions.create(model="math", messages=messages, stream=True)
        assert [e.choices[0].delta.content async for e in events] == ["a"]
        assert all_gauges_zero(router)


async def test_early_headers_come_between_the_engines_head_and_its_first_event(tmp_path: Path) -> None:
    """As with engines that send their head before they begin to compute."""
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", stream([], then="hang")) as fake,
        a_router(run, a_deployment("math", early_headers_s=0.05)) as router,
        session() as s,
    ):
        await ready(router)
        async with s.post(router.url + CHAT, data=json.dumps(chat(stream=True)), headers=router.headers) as response:
            assert await response.content.readuntil(b"\n\n") == b": ping\n\n"
            fake.go_on.set()
            await response.content.read()
        assert all_gauges_zero(router)


async def test_a_quick_stream_gets_no_early_headers(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", stream([event("a"), DONE])),
        a_router(run, a_deployment("math", early_headers_s=GUARD_S)) as router,
    ):
        await ready(router)
        for _ in range(2):
            status, body, headers = await post(router, chat(stream=True))
            assert (status, body, headers["x-replica"]) == (200, event("a") + DONE, "math-0.g1")
