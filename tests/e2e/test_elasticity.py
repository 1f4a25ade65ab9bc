"""Replicas follow the demand on one machine: from none to one and back, up to two, and down with the whole run."""

import json
from pathlib import Path
from typing import Any

import pytest

from hpc_router.state.job_records import JobDir
from hpc_router.state.run_directory import RunDir
from tests.e2e.cold_start import OVERRIDES, PROMPT, WITHIN_S, from_zero_to_one_and_back_in_each_mode, scalings
from tests.e2e.deployment import deployed
from tests.e2e.support import FAST, metrics
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.e2e


def test_from_zero_to_one_and_back_in_each_mode(tmp_path: Path) -> None:
    with deployed(tmp_path, *OVERRIDES, FAST, "experts.math.idle_s=6", wait_all=False) as one:
        from_zero_to_one_and_back_in_each_mode(one)


@pytest.mark.long
def test_two_streams_get_two_replicas_and_scaling_down_breaks_none(tmp_path: Path) -> None:
    """Within the limit of GPUs, which a third expert may not exceed."""
    limits = (
        *("experts.math.replicas=1", "experts.math.max_replicas=4", "experts.math.capacity=2", "experts.math.idle_s=4"),
        *("experts.math.resources.gpus=1", "cluster.gpus=8", "cluster.max_gpus=2", "cluster.drain_s=1"),
        "experts.math.engine.options={load_s: 1, ttft_ms: 5, itl_ms: 50}",
    )
    with deployed(tmp_path, *OVERRIDES, *limits, FAST) as one, one.client() as client:

        def stream(tokens: int) -> Any:
            extra = {"ignore_eos": True}
            return client.chat.completions.create(
                model="math", messages=PROMPT, max_tokens=tokens, stream=True, extra_body=extra
            )

        first = stream(5000)
        next(first)
        held = [stream(500), stream(500), stream(500), first]  # four in four places: a third replica would be needed
        eventually_sync(lambda: [e["replicas"] for e in scalings(one)] == [2], within_s=WITHIN_S)
        eventually_sync(lambda: "cluster.max_gpus has no room" in one.verb("why").stdout, within_s=WITHIN_S)
        eventually_sync(lambda: len(one.ready("math")) == 2, within_s=WITHIN_S)
        for other in held[1:]:
            other.close()
        eventually_sync(lambda: [e["replicas"] for e in scalings(one)] == [2, 1], within_s=WITHIN_S)
        assert sum(len(e.choices[0].delta.content or "") > 0 for e in held[0]) >= 499, "no event is lost"
        gone = JobDir(RunDir(one.run), "math-1.g1")
        eventually_sync(gone.exit, within_s=WITHIN_S)
        end = gone.exit()
        assert end is not None
        assert (end.ok, end.cut) == (True, 0)
        key = 'hpc_router_gpu_seconds_total{expert="math",state="%s"}'
        eventually_sync(
            lambda: all(metrics(one).get(key % state) for state in ("starting", "busy", "idle")),
            within_s=WITHIN_S, every_s=0.5,
        )  # fmt: skip
        eventually_sync(  # the engines' counts are read every quarter of a minute
            lambda: one.status()["experts"]["math"]["usage"]["tokens"], within_s=WITHIN_S, every_s=0.5
        )
        usage = one.status()["experts"]["math"]["usage"]
        assert usage["idle_s"] > 0
        assert usage["gpu_hours"]["busy"] > 0
        assert usage["tokens"] > 0
        assert usage["tokens_per_gpu_hour"] > 0
        assert "GPU" in one.verb("status").stdout, "the table of usage; a narrow screen folds its columns"


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
