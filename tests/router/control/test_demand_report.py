"""The demand that a router writes for the control loop, with its control process and worker."""

import asyncio
from pathlib import Path

from hpc_router.state.demand import ExpertDemand, read_demand
from tests.router.fakes import a_deployment, a_router, a_run, fake_replica, hang
from tests.router.support import chat, post, ready
from tests.support.waiting import eventually

ROUTER = "router-0.g3"


async def test_requests_count_for_the_expert_that_they_are_meant_for(tmp_path: Path) -> None:
    run, deployment = a_run(tmp_path), a_deployment("math", "code", queue_timeout_s=30.0)
    deployment.cluster.reconcile_s = 0.02
    for generation in (1, 2, 3):
        (run.demand / f"router-0.g{generation}.json").write_text('{"experts": {}, "replicas": {}}')

    def known() -> dict[str, ExpertDemand]:
        demand = read_demand(run, [ROUTER])
        return {} if demand is None else dict(demand.experts)

    async with (
        fake_replica(run, "math-0.g1", hang, capacity=1) as fake,
        a_router(run, deployment, replica=ROUTER) as router,
    ):
        await ready(router)
        await eventually(lambda: known() == {"math": ExpertDemand(), "code": ExpertDemand()})
        tasks = [asyncio.create_task(post(router, chat())) for _ in range(3)]
        await eventually(lambda: (known()["math"].in_flight, known()["math"].waiting) == (1, 2))
        began = known()["math"].last_request_at
        assert began is not None
        demand = read_demand(run, [ROUTER])
        assert demand is not None
        assert demand.replicas == {"math-0.g1": 1}
        assert known()["code"] == ExpertDemand()
        assert (await post(router, chat("code"), **{"x-wait": "fail"}))[0] == 503
        await eventually(lambda: known()["code"].last_request_at is not None)
        assert (known()["code"].in_flight, known()["code"].waiting) == (0, 0)
        fake.go_on.set()
        await asyncio.gather(*tasks)
        await eventually(lambda: (known()["math"].in_flight, known()["math"].waiting) == (0, 0))
    assert sorted(path.stem for path in run.demand.iterdir()) == ["router-0.g2", ROUTER], "older ones are removed"


async def test_a_control_process_that_is_started_again_goes_on(tmp_path: Path) -> None:
    run, deployment = a_run(tmp_path), a_deployment("math")
    (run.demand / f"{ROUTER}.json").write_text('{"experts": {"math": {"last_request_at": 7.0}}, "replicas": {}}')
    async with a_router(run, deployment, replica=ROUTER):
        await eventually(
            lambda: (d := read_demand(run, [ROUTER])) is not None and d.experts["math"].last_request_at == 7
        )
