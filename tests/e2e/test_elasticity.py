"""Replicas follow the demand on one machine: from none to one and back, and down with the whole run."""

import json
from pathlib import Path

import pytest

from hpc_router.state.job_records import JobDir
from hpc_router.state.run_directory import RunDir
from tests.e2e.cold_start import OVERRIDES, PROMPT, WITHIN_S, from_zero_to_one_and_back_in_each_mode
from tests.e2e.deployment import deployed
from tests.e2e.support import FAST
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.e2e


def test_from_zero_to_one_and_back_in_each_mode(tmp_path: Path) -> None:
    with deployed(tmp_path, *OVERRIDES, FAST, "experts.math.idle_s=6", wait_all=False) as one:
        from_zero_to_one_and_back_in_each_mode(one)


def test_an_unused_run_goes_down_by_itself(tmp_path: Path) -> None:
    with deployed(tmp_path, *OVERRIDES, FAST) as one:
        with one.client() as client:
            client.chat.completions.create(model="generalist", messages=PROMPT, max_tokens=4)
        assert "ends after 5 s without a request" in one.verb("down", "--when-idle", "5s").stdout
        eventually_sync(lambda: not one.processes(), within_s=WITHIN_S)
        ends = [JobDir(RunDir(one.run), folder.name).exit() for folder in (one.run / "jobs").iterdir()]
        assert all(end is not None and end.ok for end in ends)
        events = [json.loads(line) for line in (one.run / "events.jsonl").read_text().splitlines()]
        assert [e["reason"] for e in events if e["kind"] == "down"] == ["no request for 5 s"]
        assert one.status()["down"] is True
