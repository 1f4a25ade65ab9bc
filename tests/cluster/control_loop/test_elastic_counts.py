"""The decision on the number of replicas with its files: demand in, `elastic.json` and events out."""

import json
import time
from dataclasses import replace

import pytest

from hpc_router.cluster.control_loop import desired_state
from hpc_router.cluster.control_loop.desired_state import desired_of
from hpc_router.cluster.control_loop.elastic_counts import ElasticCounts, is_idle
from hpc_router.config.schema import Deployment, EngineConfig, ExpertConfig, PolicyConfig
from hpc_router.errors import ConfigError
from hpc_router.router.settings import scaled_to_zero, with_desired
from hpc_router.state.atomic_files import replace_json, replace_text
from hpc_router.state.demand import ExpertDemand, RouterDemand, demand_path, read_demand
from hpc_router.state.run_directory import RunDir
from tests.cluster.control_loop.support import MATH, serving

ROUTERS = ("router-0.g1", "router-0.g2")
SIM = EngineConfig(kind="sim")


@pytest.fixture
def deployment() -> Deployment:
    experts = {
        "math": ExpertConfig(model="m", engine=SIM, replicas=1, min_replicas=0, max_replicas=4, capacity=8),
        "code": ExpertConfig(model="m", engine=SIM, replicas=0),
    }
    return Deployment(experts=experts, policy=PolicyConfig(kind="model_field"))


def measured(run: RunDir, router: str = ROUTERS[0], **math: float | None) -> None:
    demand = ExpertDemand(**math)  # type: ignore[arg-type]
    replace_json(demand_path(run, router), RouterDemand({"math": demand}, {"math-0.g1": 1}).to_json())


def scaled(run: RunDir) -> list[tuple[int, int]]:
    lines = run.events.read_text().splitlines() if run.events.exists() else []
    return [(e["before"], e["replicas"]) for e in map(json.loads, lines) if e["kind"] == "scaled"]


def update(run: RunDir, deployment: Deployment, counts: ElasticCounts | None = None) -> int:
    one = counts or ElasticCounts(run, deployment)
    one.update(desired_of(run, deployment), {MATH: (serving(),)}, ROUTERS, {}, {})
    return desired_of(run, deployment).replicas["math"]


def test_the_demand_of_all_routers_counts(run: RunDir, deployment: Deployment) -> None:
    """One hands over to the other."""
    measured(run, ROUTERS[0], in_flight=8, last_request_at=5.0)
    measured(run, ROUTERS[1], in_flight=6, waiting=2, wait_s=3.0, last_request_at=7.0)
    total = read_demand(run, [*ROUTERS, "router-0.g9"])
    assert total == RouterDemand({"math": ExpertDemand(14, 2, 3.0, 7.0)}, {"math-0.g1": 2})
    assert update(run, deployment) == 3
    assert scaled(run) == [(1, 3)]


def test_another_loop_continues(run: RunDir, deployment: Deployment) -> None:
    measured(run, in_flight=16, last_request_at=time.time())
    assert update(run, deployment) == 3
    before = json.loads(run.elastic_json.read_text())["experts"]["math"]
    assert update(run, deployment) == 3
    after = json.loads(run.elastic_json.read_text())["experts"]["math"]
    assert (after["changed_at"], after["changes"]) == (before["changed_at"], before["changes"])
    assert after["history"][0] == before["history"][0]
    assert scaled(run) == [(1, 3)]


def test_without_a_measurement_nothing_changes(run: RunDir, deployment: Deployment) -> None:
    assert update(run, deployment) == 1
    replace_text(demand_path(run, ROUTERS[0]), '{"experts": {"math": {"in_flight": "many"}}}')
    replace_json(demand_path(run, ROUTERS[1]), {"experts": {"math": {"who": 1}}, "replicas": {}})
    assert update(run, deployment) == 1
    assert not run.elastic_json.exists()


@pytest.mark.parametrize("content", ["{}", '{"experts": {"math": {"replicas": "x"}}}', "[", '{"experts": 7}'])
def test_a_damaged_file_counts_as_missing(run: RunDir, deployment: Deployment, content: str) -> None:
    replace_text(run.elastic_json, content)
    assert desired_of(run, deployment).replicas["math"] == 1
    measured(run, in_flight=1)
    assert update(run, deployment) == 1


def test_scale_sets_the_number_from_which_it_goes_on(run: RunDir, deployment: Deployment) -> None:
    measured(run, in_flight=16, last_request_at=time.time())
    assert update(run, deployment) == 3
    desired_state.scale(run, deployment, {"math": 2}, {})
    assert desired_of(run, deployment).replicas["math"] == 2
    measured(run, in_flight=1, last_request_at=time.time())
    assert update(run, deployment) == 2
    for count in (5,):
        with pytest.raises(ConfigError, match=r"outside of experts\.math\.min_replicas=0 and max_replicas=4"):
            desired_state.scale(run, deployment, {"math": count}, {})


def test_up_after_down_begins_with_the_configured_replicas(run: RunDir, deployment: Deployment) -> None:
    measured(run, in_flight=16, last_request_at=time.time())
    assert update(run, deployment) == 3
    desired_state.want_up(run, {MATH: (serving(),)})
    assert desired_of(run, deployment).replicas["math"] == 3, "`up` completes a run that is not down"
    desired_state.want_down(run)
    desired_state.want_up(run, {MATH: (serving(),)})
    assert desired_of(run, deployment).replicas["math"] == 1


def test_changed_limits_hold_for_a_stored_number(run: RunDir, deployment: Deployment) -> None:
    measured(run, in_flight=30, last_request_at=time.time())
    assert update(run, deployment) == 4
    deployment.experts["math"] = replace(deployment.experts["math"], max_replicas=2)
    assert desired_of(run, deployment).replicas["math"] == 2


def test_the_router_does_not_take_an_elastic_expert_for_scaled_to_zero(deployment: Deployment) -> None:
    deployment.experts["math"] = replace(deployment.experts["math"], replicas=0)
    changed = with_desired(deployment, {"replicas": {"math": 0, "code": 0}})
    assert scaled_to_zero(changed) == {"code": "code"}


@pytest.mark.parametrize(
    ("demand", "idle"),
    [
        (None, False),
        (ExpertDemand(), True),
        (ExpertDemand(last_request_at=90.0), False),
        (ExpertDemand(last_request_at=40.0), True),
        (ExpertDemand(in_flight=1, last_request_at=40.0), False),
        (ExpertDemand(waiting=1), False),
    ],
)
def test_a_run_is_idle_without_requests_for_that_time(demand: ExpertDemand | None, idle: bool) -> None:
    known = None if demand is None else RouterDemand({"math": demand, "code": ExpertDemand()})
    assert is_idle(known, 50.0, since=50.0, now=100.0) is idle
    assert not is_idle(known, 50.0, since=51.0, now=100.0), "it counts from the command"
