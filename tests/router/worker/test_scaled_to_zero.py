"""An expert that was scaled to 0 says so at once; it does not keep requests until their deadline."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

from hpc_router.router.replicas.replica import Event, RoutingState
from hpc_router.state.run_directory import RunDir
from tests.router.fakes import RunningRouter, a_deployment, a_router, a_run, fake_replica, hang
from tests.router.support import GUARD_S, all_gauges_zero, chat, post, ready, sim_replica
from tests.router.support import relay as relay
from tests.support.waiting import eventually

MESSAGE = "math is scaled to 0 replicas: `hpc-router scale math=1` starts one"


def scale(run: RunDir, router: RunningRouter, **counts: int) -> None:
    run.desired.write_text(json.dumps({"replicas": counts}))
    router.control.config_watcher.check_now()


async def knows(router: RunningRouter, experts: dict[str, str]) -> None:
    await eventually(lambda: router.gateway.table._scaled_to_zero == experts)


async def test_a_named_request_is_refused_at_once(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math", queue_timeout_s=4 * GUARD_S)) as router:
        scale(run, router, math=0)
        await knows(router, {"math": "math"})
        status, body, headers = await post(router, chat())
        assert (status, body["error"]["message"], body["error"]["code"]) == (503, MESSAGE, "scaled_to_zero")
        assert headers["x-should-retry"] == "false"
        assert "retry-after" not in headers
        assert all_gauges_zero(router)


async def test_requests_that_wait_already_are_refused_too(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math", queue_timeout_s=4 * GUARD_S)) as router:
        call = asyncio.create_task(post(router, chat()))
        await eventually(lambda: router.gateway.table.waiting("math") == 1)
        scale(run, router, math=0)
        status, body, _ = await call
        assert (status, body["error"]["message"]) == (503, MESSAGE)
        assert all_gauges_zero(router)


async def test_requests_that_wait_for_a_place_are_refused_when_the_last_replica_drains(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", hang, capacity=1) as fake,
        a_router(run, a_deployment("math", queue_timeout_s=4 * GUARD_S)) as router,
    ):
        await ready(router)
        running = asyncio.create_task(post(router, chat()))
        await fake.arrived.wait()
        waiting = asyncio.create_task(post(router, chat()))
        await eventually(lambda: router.gateway.table.waiting("math") == 1)
        scale(run, router, math=0)
        await knows(router, {"math": "math"})
        assert not waiting.done(), "the replica still serves"
        fake.state = "draining"
        status, body, _ = await waiting
        assert (status, body["error"]["message"]) == (503, MESSAGE)
        fake.go_on.set()
        assert (await running)[0] == 200


async def test_a_replica_that_has_not_drained_yet_serves(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with fake_replica(run, "math-0.g1"), a_router(run, a_deployment("math")) as router:
        await ready(router)
        scale(run, router, math=0)
        await knows(router, {"math": "math"})
        assert (await post(router, chat()))[0] == 200


async def test_auto_goes_to_the_next_expert(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    deployment = a_deployment("math", "code", policy="round_robin", fallback="math", queue_timeout_s=4 * GUARD_S)
    async with fake_replica(run, "code-0.g1"), a_router(run, deployment) as router:
        await ready(router)
        scale(run, router, math=0)
        await knows(router, {"math": "math"})
        status, _, headers = await post(router, chat("auto"))
        assert (status, headers["x-expert"]) == (200, "code")


async def test_auto_without_another_expert_is_refused_at_once(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    deployment = a_deployment("math", "code", fallback="math", queue_timeout_s=4 * GUARD_S)
    async with a_router(run, deployment) as router:
        scale(run, router, math=0)
        await knows(router, {"math": "math"})
        status, body, _ = await post(router, chat("auto"))
        assert (status, body["error"]["message"]) == (503, MESSAGE)


async def test_an_external_endpoint_of_the_expert_serves(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with sim_replica(run, "math-x0.g1"), a_router(run, a_deployment("math")) as router:
        scale(run, router, math=0)
        await knows(router, {"math": "math"})
        await ready(router)
        assert (await post(router, chat()))[0] == 200


async def test_an_external_endpoint_that_is_away_is_waited_for(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with sim_replica(run, "math-x0.g1"), a_router(run, a_deployment("math", queue_timeout_s=GUARD_S)) as router:
        scale(run, router, math=0)
        await knows(router, {"math": "math"})
        await ready(router)
        [replica] = router.gateway.table.all()
        router.gateway.table.apply(replica, Event.FAILED)
        assert replica.state is RoutingState.EJECTED
        assert not router.gateway.table._is_absent("math")


async def test_scaled_up_again_it_waits_for_the_new_replica(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math", queue_timeout_s=GUARD_S)) as router:
        scale(run, router, math=0)
        await knows(router, {"math": "math"})
        scale(run, router, math=1)
        await knows(router, {})
        call = asyncio.create_task(post(router, chat()))
        await eventually(lambda: router.gateway.table.waiting("math") == 1)
        async with fake_replica(run, "math-0.g2"):
            assert (await call)[0] == 200


async def test_a_count_of_0_in_the_config_is_the_same(tmp_path: Path) -> None:
    """A router that starts, or restarts, knows it from its first request on."""
    run = a_run(tmp_path)
    deployment = a_deployment("math", queue_timeout_s=4 * GUARD_S)
    deployment.experts["math"] = replace(deployment.experts["math"], replicas=0)
    async with a_router(run, deployment) as router:
        assert (await post(router, chat()))[1]["error"]["message"] == MESSAGE
