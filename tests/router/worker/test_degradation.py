"""One replica hangs, one is slow, one errs one time in five: other experts feel nothing, and the sick are named."""

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from tests.router.fakes import FakeReplica, RunningRouter, a_deployment, a_router, a_run, answer, fake_replica, refuse
from tests.router.support import all_gauges_zero, chat, ready
from tests.support.waiting import eventually

SLOW_S = 0.4
ROUNDS = 150


async def late(fake: FakeReplica, request: web.BaseRequest) -> web.StreamResponse:
    await asyncio.sleep(SLOW_S)
    return await answer(fake, request)


async def stuck(fake: FakeReplica, request: web.BaseRequest) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


class OneInFive:
    def __init__(self) -> None:
        self.count = 0

    async def __call__(self, fake: FakeReplica, request: web.BaseRequest) -> web.StreamResponse:
        self.count += 1
        return await (refuse(500) if self.count % 5 == 0 else answer)(fake, request)


async def test_others_feel_nothing_of_the_sick_and_they_are_named(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", stuck, capacity=16) as hung,
        fake_replica(run, "math-1.g1", late, capacity=64),
        fake_replica(run, "math-2.g1", OneInFive(), capacity=64),
        fake_replica(run, "math-3.g1", answer, capacity=64),
        fake_replica(run, "code-0.g1", answer, capacity=64),
        a_router(run, a_deployment("math", "code", pin_bound=None, probe_timeout_s=0.2)) as router,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        await ready(router, 5)

        async def ask(model: str) -> None:
            body = chat(model)
            async with session.post(f"{router.url}/v1/chat/completions", json=body, headers=router.headers) as response:
                assert response.status == 200
                await response.read()

        crowd = [asyncio.create_task(ask("math")) for _ in range(8)]
        await asyncio.wait(crowd, timeout=1)
        for _ in range(ROUNDS):
            await ask("code")
            assert router.gateway.table.waiting("code") == 0
        assert not all(task.done() for task in crowd), "the hung replica still has requests"
        for _ in range(12):
            crowd += [asyncio.create_task(ask("math")) for _ in range(8)]
            await asyncio.wait(crowd[-8:], timeout=1)
        hung.silent = True  # now its agent hangs as well
        sick = await eventually_sick(router)
        assert "/health: no answer within 0.2 s" in str(sick["math-0.g1"]["trouble"])
        assert sick["math-1.g1"]["sick"].startswith("is slow")
        assert "errors" in sick["math-2.g1"]["sick"]
        assert sick["math-3.g1"]["sick"] is None
        for task in crowd:
            task.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
        await eventually(lambda: all_gauges_zero(router))


async def eventually_sick(router: RunningRouter) -> dict[str, Any]:
    async with asyncio.timeout(20):
        while True:
            status = await router.control.status()
            told = {one["replica"]: one for one in status["experts"]["math"]["replicas"]}
            if told["math-0.g1"]["state"] == "ejected" and told["math-1.g1"]["sick"] and told["math-2.g1"]["sick"]:
                return told
            await asyncio.sleep(0.05)
