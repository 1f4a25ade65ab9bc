"""Slow is not dead: a timeout is told to the client, is not tried elsewhere, and says nothing against the replica."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from hpc_router.net import protocol
from hpc_router.router.replicas.replica import RoutingState
from tests.router.fakes import (
    FakeReplica,
    a_deployment,
    a_router,
    a_run,
    answer,
    event,
    fake_replica,
    hang,
    stream,
)
from tests.router.support import all_gauges_zero, chat, post, ready
from tests.router.support import relay as relay  # over the reference as well
from tests.support.waiting import eventually

SHORT_S, LONG_S = 0.1, 30.0


async def late(fake: FakeReplica, request: web.BaseRequest) -> web.StreamResponse:
    await asyncio.sleep(3 * SHORT_S)
    return await answer(fake, request)


@pytest.mark.parametrize("model", ["math", "auto"])
@pytest.mark.parametrize(
    ("streamed", "path", "key"),
    [
        (False, protocol.CHAT, "router.answer_timeout_s=0.1"),
        (True, protocol.CHAT, "router.first_byte_timeout_s=0.1"),
        (False, protocol.MESSAGES, "router.answer_timeout_s=0.1"),
    ],
)
async def test_a_timeout_is_a_504_that_nobody_repeats(
    tmp_path: Path, model: str, streamed: bool, path: str, key: str
) -> None:
    run = a_run(tmp_path)
    limits: dict[str, Any] = {"answer_timeout_s": LONG_S, "first_byte_timeout_s": LONG_S}
    limits[key.partition("=")[0].removeprefix("router.")] = SHORT_S
    async with (
        fake_replica(run, "math-0.g1", hang) as first,
        fake_replica(run, "math-1.g1", hang) as second,
        fake_replica(run, "law-0.g1") as other,
        a_router(run, a_deployment("math", "law", fallback="math", eject_errors=1, **limits)) as router,
    ):
        await ready(router, 3)
        status, body, headers = await post(router, chat(model, stream=streamed), path=path)
        assert (status, headers["x-should-retry"]) == (504, "false")
        assert key in body["error"]["message"]
        assert path == protocol.MESSAGES or body["error"]["code"] == "answer_timeout"
        assert path == protocol.CHAT or body["error"]["type"] == "timeout_error"
        assert len(first.bodies) + len(second.bodies) == 1, "one request is one generation"
        assert other.bodies == []
        await eventually(lambda: first.cancelled + second.cancelled == 1)
        assert {(r.state, r.recent_error, r.trouble) for r in router.gateway.table.all()} == {
            (RoutingState.READY, False, None)
        }
        told = await router.control.status()
        assert [one["error_share"] for one in told["experts"]["math"]["replicas"]] == [None, None]
        await eventually(lambda: all_gauges_zero(router))


async def test_a_whole_answer_may_take_longer_than_a_streams_first_byte(tmp_path: Path) -> None:
    """Also as the second request over a connection, which needs no task."""
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", late) as fake,
        a_router(run, a_deployment("math", first_byte_timeout_s=SHORT_S, answer_timeout_s=LONG_S)) as router,
    ):
        await ready(router)
        for _ in range(2):
            assert (await post(router, chat()))[0] == 200
        assert len(fake.bodies) == 2


async def test_a_replica_that_is_lost_is_another_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not answer its probes either: the request goes elsewhere, long before its limit."""
    monkeypatch.setattr("hpc_router.router.replicas.replica.LOST_S", SHORT_S)
    run = a_run(tmp_path)
    limits: dict[str, Any] = {"answer_timeout_s": LONG_S, "first_byte_timeout_s": LONG_S, "probe_timeout_s": 0.1}
    async with (
        fake_replica(run, "math-0.g1", hang) as gone,
        fake_replica(run, "math-1.g1"),
        a_router(run, a_deployment("math", pin_bound=None, **limits)) as router,
    ):
        await ready(router, 2)
        calls = [asyncio.create_task(post(router, chat())) for _ in range(4)]
        await eventually(lambda: gone.bodies)
        gone.silent = True
        assert [status for status, _, _ in await asyncio.gather(*calls)] == [200] * 4


async def test_a_stream_that_pauses_too_long_names_the_key(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", stream([event("a")], then="hang")),
        a_router(run, a_deployment("math", idle_timeout_s=SHORT_S)) as router,
    ):
        await ready(router)
        _, raw, _ = await post(router, chat(stream=True))
        assert raw.startswith(event("a"))
        error = json.loads(raw.removeprefix(event("a")).removeprefix(b"data: "))["error"]
        assert (error["type"], error["code"]) == ("timeout_error", "answer_timeout")
        assert "router.idle_timeout_s=0.1" in error["message"]
