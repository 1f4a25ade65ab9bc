"""The engines' own metrics: read once, summed per expert, and known to the workers."""

from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from hpc_router.net.http_client import session
from hpc_router.router.control import engine_metrics
from hpc_router.router.control.engine_metrics import EngineLoads
from hpc_router.router.replicas.engine_load import EngineLoad
from hpc_router.sim.config import SimConfig
from hpc_router.sim.server import SimServer
from tests.router.fakes import RunningRouter, a_deployment, a_router, a_run, fake_replica
from tests.router.support import ready, replica, table_of
from tests.support.waiting import eventually

VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m"} 77.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 1.5e+06
vllm:prefix_cache_queries_created{engine="0",model_name="m"} 1.7e+09
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 1000.0"""


def test_the_load_in_the_text_of_vllm() -> None:
    expected = EngineLoad(running=7.0, waiting=2.0, kv_use=0.5, prefix_queries=1.5e6, prefix_hits=1000.0)
    assert EngineLoad.read(VLLM.encode()) == expected
    assert EngineLoad.read(VLLM.encode() + b"\n") == expected
    older = VLLM.replace("vllm:kv_", "vllm:gpu_").replace("vllm:prefix_", "vllm:gpu_prefix_")
    assert EngineLoad.read(older.encode()) == expected


@pytest.mark.parametrize(
    "text", ["", "\n", "<html>", "vllm:num_requests_running", "vllm:num_requests_running{} x", "other 1\n"]
)
def test_what_is_no_load(text: str) -> None:
    assert EngineLoad.read(text.encode()) is None


def test_the_first_line_counts_as_well() -> None:
    assert EngineLoad.read(b'vllm:num_requests_running 3\nx 1\nvllm:num_requests_running{a="b"} 4\n') == EngineLoad(
        running=7.0
    )


async def test_the_simulated_engine_tells_its_load() -> None:
    async with (
        SimServer(SimConfig()) as engine,
        aiohttp.ClientSession() as client,
        client.get(f"{engine.url}/metrics") as response,
    ):
        load = EngineLoad.read(await response.read())
    assert load == EngineLoad(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_prefix_hits_are_counted_from_the_first_reading() -> None:
    """Across a restart of the engine, whose counter begins again, and a reading that failed."""
    first, second = replica("math-0.g1"), replica("math-1.g1")
    engines = EngineLoads(table_of(first, second), lambda: None)
    for one, hits in ((first, 500.0), (first, 800.0), (second, 0.0), (first, 100.0), (second, 30.0)):
        engines.learn(one, EngineLoad(prefix_hits=hits, prefix_queries=2 * hits))
    assert engines.prefix_hits == {"math": 300.0 + 100.0 + 30.0}
    assert engines.prefix_queries == {"math": 860.0}
    engines.learn(first, None)
    engines.learn(first, EngineLoad(prefix_hits=150.0))
    assert first.engine_load == EngineLoad(prefix_hits=150.0)
    assert engines.prefix_hits["math"] == 480.0


async def exposed(router: RunningRouter) -> dict[str, float]:
    """The series of the experts' engines, by name and expert."""
    async with session() as client, client.get(f"{router.url}/metrics", headers=router.headers) as response:
        families = text_string_to_metric_families(await response.text())
        return {
            f"{sample.name.removeprefix('hpc_router_')} {sample.labels['expert']}": sample.value
            for family in families
            for sample in family.samples
            if "engine" in sample.name or "prefix" in sample.name
        }


async def test_they_are_summed_per_expert_and_reach_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_metrics, "READ_S", 0.05)
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1") as first,
        fake_replica(run, "math-1.g1") as second,
        fake_replica(run, "law-0.g1"),
        a_router(run, a_deployment("math", "law")) as router,
    ):
        first.metrics = second.metrics = VLLM
        await ready(router, 3)

        async def read() -> bool:
            return (await exposed(router)).get("engine_requests_running math") == 14.0

        await eventually(read)
        first.metrics = VLLM.replace("} 1000.0", "} 1600.0").replace("} 2.0", "} 9.0")
        await eventually(lambda: router.control.engines.prefix_hits == {"math": 600.0})
        assert await exposed(router) == {
            "engine_requests_running math": 14.0, "engine_requests_waiting math": 11.0,
            "engine_kv_cache_usage_ratio math": 0.5,
            "prefix_hit_tokens_total math": 600.0, "prefix_query_tokens_total math": 0.0,
        }  # fmt: skip
        told = router.gateway.table.get("math-0.g1")
        assert told is not None
        await eventually(lambda: told.engine_load is not None and told.engine_load.waiting == 9.0)
        other = router.gateway.table.get("law-0.g1")
        assert other is not None
        assert other.engine_load is None
        first.metrics = None  # its engine is being restarted
        await eventually(lambda: told.engine_load is None)
