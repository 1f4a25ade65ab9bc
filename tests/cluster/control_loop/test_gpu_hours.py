"""GPU time by what it was held for, and the tokens that came out of it."""

import json
from dataclasses import replace

import pytest

from hpc_router.cluster.control_loop.gpu_hours import MAX_GAP_S, GpuHours, held_now, with_tokens
from hpc_router.cluster.control_loop.slots import ROUTER_SLOT, Slot
from hpc_router.cluster.launchers.interface import JobReport, JobState
from hpc_router.errors import RegistryError
from hpc_router.router.metrics import Metrics, usage_metrics
from hpc_router.router.replicas.engine_load import EngineLoad
from hpc_router.state.atomic_files import replace_json, replace_text
from hpc_router.state.demand import ExpertDemand, RouterDemand, demand_path, read_demand
from hpc_router.state.gpu_hours import ExpertUsage, GpuState, Usage, parse_usage
from hpc_router.state.job_records import FailureReason, JobPhase, JobProgress, Stop
from hpc_router.state.run_directory import RunDir
from tests.cluster.control_loop.support import MATH, ended, serving, waiting

GPUS = {"math": 2, "router": 1}
BUSY = {"math-0.g1": 3}


def test_each_state_of_a_replica() -> None:
    one = serving()
    loading = replace(one, registered=None, progress=JobProgress(JobPhase.LOADING))
    draining = replace(one, progress=JobProgress(JobPhase.DRAINING, at=5.0))
    asked = replace(one, stop=Stop(drain_at=5.0))
    ending = replace(one, report=JobReport(JobState.ENDING))

    def state(attempt: object, in_flight: dict[str, int] = BUSY) -> dict[str, dict[GpuState, int]]:
        return held_now({MATH: (attempt,)}, GPUS, in_flight)  # type: ignore[dict-item]

    assert state(one) == {"math": {GpuState.BUSY: 2}}
    assert state(one, {}) == {"math": {GpuState.IDLE: 2}}
    assert state(loading) == {"math": {GpuState.STARTING: 2}}
    assert state(draining) == state(asked) == state(ending) == {"math": {GpuState.DRAINING: 2}}
    assert state(waiting(1)) == state(ended(1, FailureReason.DRAINED, at=5.0)) == {}
    assert held_now({ROUTER_SLOT: (replace(one, slot=ROUTER_SLOT),)}, GPUS, {}) == {}
    assert held_now({Slot("code", "0"): (one,)}, {}, {}) == {}, "without GPUs"


def test_time_adds_up_over_loops_and_gaps(run: RunDir) -> None:
    demand = RouterDemand({"math": ExpertDemand(3, last_request_at=990.0)}, BUSY)
    first = GpuHours(run)
    for now in (1000.0, 1010.0, 1025.0):
        first.update({MATH: (serving(),)}, GPUS, demand, now)
    second = GpuHours(run)
    second.update({MATH: (serving(),)}, GPUS, None, 1030.0)
    second.update({MATH: (serving(),)}, GPUS, None, 1030.0 + 5 * MAX_GAP_S)
    usage = parse_usage(json.loads(run.gpu_hours_json.read_text())).experts["math"]
    assert usage.gpu_s == {"busy": 50.0, "idle": 2 * (5 + MAX_GAP_S)}
    assert usage.last_request_at == 990.0
    assert usage.hours(GpuState.BUSY) == 50 / 3600


def test_a_damaged_file_is_begun_anew(run: RunDir) -> None:
    replace_text(run.gpu_hours_json, '{"at": "noon", "experts": []}')
    with pytest.raises(RegistryError):
        parse_usage(json.loads(run.gpu_hours_json.read_text()))
    GpuHours(run).update({}, GPUS, None, 1000.0)
    assert parse_usage(json.loads(run.gpu_hours_json.read_text())) == Usage(1000.0)


def test_tokens_of_restarted_engines_and_of_successors_add_up() -> None:
    usage = Usage(0.0)
    for counted in ({"math-0.g1": 100}, {"math-0.g1": 130, "math-1.g1": 5}, {"math-0.g1": 10}, {"math-0.g2": 7}):
        usage = with_tokens(usage, counted)
    assert usage.experts["math"].tokens == 130 + 5 + 10 + 7
    assert usage.seen == {"math-1.g1": 5, "math-0.g2": 7}
    assert ExpertUsage({"busy": 1800.0, "idle": 1800.0}, tokens=50).tokens_per_gpu_hour == 50
    assert ExpertUsage({"busy": 1800.0}).tokens_per_gpu_hour is None
    assert ExpertUsage(tokens=50).tokens_per_gpu_hour is None


def test_tokens_in_the_metrics_of_engines() -> None:
    def tokens_in(text: str) -> float | None:
        load = EngineLoad.read(text.encode())
        return None if load is None else load.generated_tokens

    labels = 'vllm:generation_tokens_total{engine="%d",model_name="m"} %s'
    assert tokens_in("\n".join(["# HELP", labels % (0, "12.0"), labels % (1, "3e2"), "vllm:x 5"])) == 312
    assert tokens_in("vllm:generation_tokens_total 4.0\n") == 4
    assert tokens_in("nothing") is None
    assert tokens_in("vllm:generation_tokens_total much") is None


def test_tokens_come_with_the_demand_of_the_routers(run: RunDir) -> None:
    """Two routers read the same engine, one of them later."""
    for router, count in (("router-0.g1", 40), ("router-0.g2", 55)):
        demand = RouterDemand({"math": ExpertDemand()}, {"math-0.g1": 0}, {"math-0.g1": count})
        replace_json(demand_path(run, router), demand.to_json())
    GpuHours(run).update({}, GPUS, read_demand(run, ["router-0.g1", "router-0.g2"]), 1000.0)
    usage = parse_usage(json.loads(run.gpu_hours_json.read_text()))
    assert (usage.experts["math"].tokens, usage.seen) == (55, {"math-0.g1": 55})


def test_the_router_shows_the_usage() -> None:
    usage = Usage(0.0, {"math": ExpertUsage({"busy": 7.0}, last_request_at=5.0), "code": ExpertUsage()})
    shown = Metrics().exposition(usage_metrics(usage)).decode()
    assert 'hpc_router_gpu_seconds_total{expert="math",state="busy"} 7.0' in shown
    assert 'hpc_router_gpu_seconds_total{expert="code",state="idle"} 0.0' in shown
    assert 'hpc_router_last_request_timestamp_seconds{expert="math"} 5.0' in shown
    assert 'last_request_timestamp_seconds{expert="code"}' not in shown
    assert "math" not in Metrics().exposition(usage_metrics(None)).decode()
