"""The deployments that a prediction compares."""

from pathlib import Path

import pytest

from hpc_router.bench.what_if.cases import find_cases
from hpc_router.cluster.planning.run_target import find_target
from hpc_router.state.atomic_files import replace_json


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPC_ROUTER_RUN", raising=False)


def test_each_combination_of_values_is_a_case_with_the_values_as_its_name() -> None:
    cases = find_cases(None, ["topology=sim,sim_2replicas", "router.max_waiting=8,9", "cluster.gpus=3"])
    assert [one.name for one in cases] == [
        f"topology={topology} router.max_waiting={count}" for topology in ("sim", "sim_2replicas") for count in (8, 9)
    ]
    assert [len(one.deployment.experts) for one in cases] == [5, 5, 1, 1]
    assert [one.deployment.router.max_waiting for one in cases] == [8, 9, 8, 9]
    assert {one.deployment.cluster.gpus for one in cases} == {3}


def test_a_comma_in_a_text_is_part_of_it() -> None:
    (case,) = find_cases(None, ["topology=sim", "cluster=slurm", "cluster.partition=a,b"])
    assert (case.name, case.deployment.cluster.partition) == ("topology=sim", "a,b")


def test_of_a_run_its_config_its_replicas_and_its_measured_times_count(tmp_path: Path) -> None:
    target = find_target(tmp_path / "run", ["topology=sim", "experts.math.capacity=7"])
    run, _ = target.open()
    replace_json(run.estimates_json, {"experts": {"math": {"gpu": {"queue_s": [5], "load_s": [30], "drain_s": []}}}})
    run.write_desired({"replicas": {"law": 3}})
    plain, *changed = find_cases(run.path, []) + find_cases(run.path, ["experts.math.max_replicas=2,3"])
    assert plain.durations["math"].until_ready_s == 35
    assert plain.deployment.experts["law"].replicas == 3
    assert [one.deployment.experts["math"].max_replicas for one in changed] == [2, 3]
    assert {one.deployment.experts["math"].capacity for one in changed} == {7}
