"""A replica without its engine: what was not begun waits for the engine or goes elsewhere."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from hpc_router.expert.agent.http_api import RETRY_AFTER_S
from hpc_router.net import protocol
from hpc_router.router.replicas.replica import RoutingState
from hpc_router.state.registry import State
from hpc_router.state.run_directory import RunDir
from tests.expert.replicas import deployment, replica
from tests.router.fakes import Act, FakeReplica, a_deployment, a_router, a_run, answer, fake_replica
from tests.router.support import all_gauges_zero, chat, post, ready, standing, statuses
from tests.support.scratch import scratch as scratch  # the agent's fixture
from tests.support.waiting import eventually

CLIENTS = 16


def starting(status: int) -> Act:
    """As an agent without an engine answers; its probes say so until it is told to go on."""

    async def act(fake: FakeReplica, request: web.BaseRequest) -> web.StreamResponse:
        fake.state = "starting"
        headers = {protocol.STARTING_HEADER: "1", "retry-after": str(RETRY_AFTER_S[State.STARTING])}
        return web.json_response({"error": {"message": "no engine"}}, status=status, headers=headers)

    return act


@pytest.mark.parametrize("status", [502, 503])
async def test_a_request_waits_for_the_only_replica_to_have_its_engine_again(tmp_path: Path, status: int) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", starting(status), answer) as fake,
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router)
        waits = asyncio.create_task(post(router, chat()))
        await eventually(lambda: router.gateway.table.waiting("math") == 1)
        assert standing(router, "math-0.g1") is RoutingState.STARTING
        fake.state = "ready"
        assert (await waits)[0] == 200
        assert len(fake.bodies) == 2
        await eventually(lambda: all_gauges_zero(router))


@pytest.mark.parametrize("status", [502, 503])
async def test_or_goes_elsewhere_at_once_and_is_no_mark_on_the_replica(tmp_path: Path, status: int) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", starting(status)) as fake,
        fake_replica(run, "math-1.g1"),
        a_router(run, a_deployment("math", eject_errors=1, pin_bound=None)) as router,
    ):
        await ready(router, 2)
        while not fake.bodies:
            assert await statuses(router, 1) == [200]
        assert standing(router, "math-0.g1") is RoutingState.STARTING
        fake.state = "ready"
        await eventually(lambda: standing(router, "math-0.g1") is RoutingState.READY)
        told = await router.control.status()
        assert all(one["error_share"] is None for one in told["experts"]["math"]["replicas"])


async def test_a_request_that_loses_its_engine_twice_is_not_sent_to_a_third(tmp_path: Path) -> None:
    """It may be what ends them."""
    run = a_run(tmp_path)
    config: dict[str, Any] = {"pin_bound": None}
    async with (
        fake_replica(run, "math-0.g1", starting(502)) as first,
        fake_replica(run, "math-1.g1", starting(502)) as second,
        fake_replica(run, "math-2.g1", starting(502)) as third,
        a_router(run, a_deployment("math", **config)) as router,
    ):
        await ready(router, 3)
        assert await statuses(router, 1) == [502]
        assert sorted(len(fake.bodies) for fake in (first, second, third)) == [0, 1, 1]


async def test_the_kill_of_the_only_engine_fails_no_request(tmp_path: Path, scratch: Path) -> None:
    """Real agent, real engine, requests without a pause: each of them waits until the engine is there again."""
    run: RunDir = a_run(tmp_path)
    async with replica(run, deployment(scratch, options={"ttft_ms": 2.0})) as agent:
        progress, _ = await agent.ready()
        async with a_router(run, a_deployment("math")) as router:
            await ready(router)
            seen: list[int] = []
            over = asyncio.Event()

            async def ask(number: int) -> None:
                while not over.is_set():
                    seen.append((await post(router, chat(user=str(number))))[0])

            clients = [asyncio.create_task(ask(number)) for number in range(CLIENTS)]
            await eventually(lambda: len(seen) >= 2 * CLIENTS)
            assert progress.engine_pid is not None
            os.kill(progress.engine_pid, signal.SIGKILL)
            await agent.ready(after=progress)
            count = len(seen)
            await eventually(lambda: len(seen) >= count + 2 * CLIENTS)
            over.set()
            await asyncio.gather(*clients)
            assert seen == [200] * len(seen)
