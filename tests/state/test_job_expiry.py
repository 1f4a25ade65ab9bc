"""When the job of a service ends: from its environment, corrected by the queue's last answer."""

import json
from pathlib import Path

import pytest

from hpc_router.state.job_expiry import JobExpiry
from hpc_router.state.run_directory import RunDir, make_run

ENVIRONMENT = {"HPC_ROUTER_JOB_ID": "17", "HPC_ROUTER_JOB_END": "1000"}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run")


def answer(run: RunDir, ends_at: object, job_id: str = "17") -> None:
    run.squeue_json.write_text(
        json.dumps({"asked_at": 1.0, "jobs": {job_id: {"state": "RUNNING", "ends_at": ends_at}}})
    )


def test_slurms_variable_is_used_before_the_first_answer(run: RunDir) -> None:
    assert JobExpiry(run, ENVIRONMENT).read() == 1000


@pytest.mark.parametrize("value", ["", "soon", "1e3s"])
def test_a_variable_that_is_no_number_is_ignored(run: RunDir, value: str) -> None:
    assert JobExpiry(run, ENVIRONMENT | {"HPC_ROUTER_JOB_END": value}).read() is None


def test_the_queue_corrects_it_after_the_limit_was_changed(run: RunDir) -> None:
    expiry = JobExpiry(run, ENVIRONMENT)
    answer(run, 700.0)
    assert expiry.read() == 700
    answer(run, 900.0)
    assert expiry.read() == 900


def test_the_last_value_stays_while_the_queue_does_not_list_the_job(run: RunDir) -> None:
    expiry = JobExpiry(run, ENVIRONMENT)
    answer(run, 700.0)
    assert expiry.read() == 700
    for content in ('{"jobs": []}', "{", '{"asked_at": 2, "jobs": {"17": {"ends_at": null}}}'):
        run.squeue_json.write_text(content)
        assert expiry.read() == 700
    answer(run, 100.0, job_id="18")
    assert expiry.read() == 700


def test_outside_of_a_job_nothing_ends(run: RunDir) -> None:
    answer(run, 700.0)
    assert JobExpiry(run, {}).read() is None
