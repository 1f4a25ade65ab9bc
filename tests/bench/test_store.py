"""The results of a sweep: finished points are found again; one call at a time measures a deployment."""

import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_router.bench.config import read_config
from hpc_router.bench.prompts import built_in
from hpc_router.bench.store import Store
from hpc_router.bench.sweep import DeploymentSweep
from hpc_router.bench.workload import Point
from hpc_router.config.compose import load_deployment
from hpc_router.errors import LaunchError
from hpc_router.state.job_records import start_ticks

SIM = load_deployment(["topology=sim"])


def sweep(folder: Path, *overrides: str, **values: object) -> DeploymentSweep:
    deployment = load_deployment(["topology=sim", *overrides])
    return DeploymentSweep(Store(folder), deployment, read_config({"users": [1, 4], **values}), built_in())


def test_a_finished_point_is_not_missing(tmp_path: Path) -> None:
    one = sweep(tmp_path)
    (first, _), second = one.missing()
    one.store.add(first, {"a": 1}, None)
    assert one.missing() == [second]
    more = sweep(tmp_path, users=[1, 4, 16])
    assert [point.users for _, point in more.missing()] == [4, 16]
    assert json.loads((tmp_path / f"{first}.jsonl").read_text()) == {"a": 1}


def test_invalid_points_are_measured_again_with_retry(tmp_path: Path) -> None:
    one = sweep(tmp_path)
    (first, _), (second, _) = one.points()
    one.store.add(first, {"valid": False}, None)
    one.store.add(second, {"valid": True}, None)
    assert one.missing() == []
    assert [key for key, _ in sweep(tmp_path, retry=True).missing()] == [first]


def test_a_search_continues_from_its_stored_rates(tmp_path: Path) -> None:
    """Whether the target holds depends on the stored share alone, so a stricter target reads the same points."""
    searching = {"rates": [1], "search": "goodput", "search_step": 1.5}
    one = sweep(tmp_path, **searching)
    shares = {1.0: 1.0, 2.0: 0.97, 4.0: 0.5, 2.828: 0.96}
    while missing := one.missing():
        [(key, point)] = missing
        assert point.rate_per_s is not None
        record = {"valid": True, "exceeded": point.rate_per_s == 4.0, "good_share": shares.pop(point.rate_per_s)}
        one.store.add(key, record, None)
    assert not shares
    again = sweep(tmp_path, **searching)
    assert again.measured_rates() == {1.0: True, 2.0: True, 4.0: False, 2.828: True}
    assert [point.rate_per_s for _, point in again.points()] == [1.0, 2.0, 4.0, 2.828]
    stricter = sweep(tmp_path, **searching, search_share=0.99)
    assert stricter.measured_rates() == {1.0: True, 2.0: False}
    assert [point.rate_per_s for _, point in stricter.missing()] == [1.414]


def test_the_key_depends_on_everything_that_changes_the_measurement(tmp_path: Path) -> None:
    base = {key for key, _ in sweep(tmp_path).points()}
    others = [
        sweep(tmp_path, "experts.math.replicas=2"),
        sweep(tmp_path, "policy=round_robin"),
        sweep(tmp_path, max_tokens=8),
        sweep(tmp_path, seed=3),
        sweep(tmp_path, duration_s=5.0),
    ]
    for other in others:
        assert base.isdisjoint(key for key, _ in other.points())
    same = [sweep(tmp_path, "name=another"), sweep(tmp_path, repeats=2), sweep(tmp_path, output="x")]
    for other in same:
        assert base <= {key for key, _ in other.points()}


def test_raw_requests_are_written_before_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is killed between the two files has not finished the point."""
    store = Store(tmp_path)
    key = store.key(SIM, read_config({}), Point(users=1))
    store.add(key, {}, [{"user": 0}])
    found = sorted(tmp_path.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    assert [path.name for path in found] == [f"{key}.requests.jsonl", f"{key}.jsonl"]


def test_a_second_call_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    parent = {"host": socket.gethostname(), "pid": os.getppid(), "ticks": start_ticks(os.getppid())}
    with store.claim(SIM):
        (claim,) = store.runs.glob("*.claim")
    assert not claim.exists()
    claim.write_text(json.dumps(parent))
    with pytest.raises(LaunchError, match=f"process {os.getppid()} on .* measures this deployment"), store.claim(SIM):
        pass
    assert claim.exists()


def test_the_claim_of_a_dead_call_is_taken_over(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.claim(SIM):
        (claim,) = store.runs.glob("*.claim")
    dead = {"host": socket.gethostname(), "pid": os.getppid(), "ticks": 1}
    claim.write_text(json.dumps(dead))
    with store.claim(SIM):
        assert json.loads(claim.read_text())["pid"] == os.getpid()
    claim.write_text(json.dumps({**dead, "host": "elsewhere"}))
    with pytest.raises(LaunchError, match="on elsewhere"), store.claim(SIM):
        pass
    os.utime(claim, (1.0, 1.0))
    with store.claim(replace(SIM, name="renamed")):
        pass
