"""The verbs that read the records of requests: `usage`, `trace`."""

import json
from pathlib import Path
from typing import Any

import pytest

from hpc_router.cli.main import main
from hpc_router.cluster.commands.usage import gpu_hours, parse_since, summed
from hpc_router.config import frozen
from hpc_router.config.schema import Deployment, EngineConfig, ExpertConfig, ResourceConfig
from hpc_router.errors import ConfigError
from hpc_router.state.job_records import Exit, FailureReason, JobDir, Process
from hpc_router.state.request_records import LineFile
from hpc_router.state.run_directory import RunDir, make_run

HOUR_S = 3600.0
NOW = 1_700_000_000.0


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = make_run(tmp_path / "run")
    experts = {
        "math": ExpertConfig(model="m", engine=EngineConfig(kind="sim"), resources=ResourceConfig(gpus=8)),
        "style": ExpertConfig(model="s", adapter_of="math"),
        "code": ExpertConfig(model="m", engine=EngineConfig(kind="sim")),
    }
    deployment = Deployment(experts=experts)
    deployment.policy.kind, deployment.cluster.gpus = "model_field", 8
    made.config.write_text(frozen.to_yaml(deployment))
    return made


def request(request_id: str, **more: Any) -> dict[str, Any]:
    return {
        "kind": "request", "id": request_id, "at": NOW, "user": None, "class": None, "expert": "math", "model": "auto",
        "path": "/v1/chat/completions", "status": 200, "outcome": "answered", "prompt_tokens": 10,
        "cached_tokens": None, "generated_tokens": 5, "token_source": "usage", "queue_s": 0.25, "total_s": 1.0,
        "first_byte_s": 0.5, "reason": "classified", "attempts": 1, "failed": [],
    } | more  # fmt: skip


def write(run: RunDir, *records: dict[str, Any]) -> None:
    file = LineFile(run.records, "router-0.g1.worker0")
    lines = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records)
    file.write(lines.encode(), at=NOW, max_bytes=2**20)
    file.close()


def test_requests_are_summed_by_group() -> None:
    records = [
        request("a", cached_tokens=4),
        request("b", user="alice", status=503, outcome="refused", prompt_tokens=None, generated_tokens=None),
        request("c", user="alice", outcome="broken", expert=None),
        request("d", user="alice", status=404),
    ]
    assert summed(records, ("user", "expert")) == [
        {
            "user": "alice", "expert": "math", "requests": 2, "failed": 1, "prompt_tokens": 10, "cached_tokens": 0,
            "generated_tokens": 5, "queue_s": 0.5, "total_s": 2.0,
        },
        {
            "user": "(owner)", "expert": "math", "requests": 1, "failed": 0, "prompt_tokens": 10, "cached_tokens": 4,
            "generated_tokens": 5, "queue_s": 0.25, "total_s": 1.0,
        },
        {
            "user": "alice", "expert": "", "requests": 1, "failed": 1, "prompt_tokens": 10, "cached_tokens": 0,
            "generated_tokens": 5, "queue_s": 0.25, "total_s": 1.0,
        },
    ]  # fmt: skip
    [all_of_them] = summed(records, ())
    assert all_of_them["requests"] == 4
    assert [group["day"] for group in summed(records, ("day",))] == ["2023-11-14"]


def job(run: RunDir, replica: str, *, start: float, end: float | None) -> None:
    made = JobDir(run, replica)
    made.claim()
    made.write(Process(1, 1, "n", started_at=start))
    if end is not None:
        made.write(Exit(True, FailureReason.DRAINED, "", at=end))


def test_gpu_hours_are_those_within_the_time(run: RunDir) -> None:
    """An expert with 8 GPUs per replica, one that has none, and an adapter on the first one's engine."""
    job(run, "math-0.g1", start=NOW - 10 * HOUR_S, end=NOW - 7 * HOUR_S)  # two of three hours before
    job(run, "math-0.g2", start=NOW - 4 * HOUR_S, end=NOW - 3.5 * HOUR_S)
    job(run, "math-1.g1", start=NOW - HOUR_S, end=None)
    job(run, "math-1.g2", start=NOW - 20 * HOUR_S, end=NOW - 19 * HOUR_S)
    job(run, "code-0.g1", start=NOW - HOUR_S, end=None)
    job(run, "router-0.g1", start=NOW - HOUR_S, end=None)
    JobDir(run, "math-2.g1").claim()
    assert gpu_hours(run, NOW - 8 * HOUR_S, NOW) == {"math": pytest.approx(8 * (1 + 0.5 + 1))}


@pytest.mark.parametrize(("text", "seconds"), [("90m", 5400), ("12h", 43200), ("7d", 604_800), ("1w", 604_800)])
def test_a_time_before_now(text: str, seconds: float) -> None:
    assert parse_since(text, now=NOW) == NOW - seconds
    assert parse_since("999999w", now=NOW) == 0.0


@pytest.mark.parametrize("text", ["", "7", "7 d", "-7d", "7y", "2026-01-01"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ConfigError, match="such as 12h or 7d"):
        parse_since(text, now=NOW)


def call(capsys: pytest.CaptureFixture[str], run: RunDir, *words: str) -> tuple[int, str, str]:
    status = main([words[0], "--run", str(run.path), *words[1:]])
    return status, *capsys.readouterr()


def test_usage(run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: NOW + 100)
    write(run, request("a"), request("b", user="alice"), request("old", at=NOW - 30 * 86_400),
          {"kind": "feedback", "id": "a", "at": NOW, "user": None, "score": 1})  # fmt: skip
    status, out, _ = call(capsys, run, "usage", "--json")
    value = json.loads(out)
    assert status == 0
    assert [(g["user"], g["expert"], g["requests"]) for g in value["groups"]] == [
        ("(owner)", "math", 1), ("alice", "math", 1),
    ]  # fmt: skip
    assert value["gpu_hours"] == {"math": 0.0}
    assert value["since"] == NOW + 100 - 7 * 86_400
    out = call(capsys, run, "usage", "--by", "expert", "--since", "9w")[1]
    assert next(line.split()[:3] for line in out.splitlines() if line.startswith("math")) == ["math", "3", "0"]
    status, _, err = call(capsys, run, "usage", "--by", "expret")
    assert status == 2
    assert "expert" in err


def test_trace(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    failed = [{"replica": "math-0.g1", "cause": 503}]
    more = {"score": 0.5, "margin": 0.25, "cluster": "7", "runner_up": "code", "replica": "math-1.g1", "node": "n7"}
    write(run, request("r-1", attempts=2, failed=failed, **more), request("r-2"),
          {"kind": "feedback", "id": "r-1", "at": NOW + 1, "user": "alice", "score": 0.5})  # fmt: skip
    status, out, _ = call(capsys, run, "trace", "r-1", "--json")
    assert status == 0
    assert [record["kind"] for record in json.loads(out)] == ["request", "feedback"]
    out = call(capsys, run, "trace", "r-1")[1]
    for text in (
        "answered, status 200", "math (classified), cluster 7, score 0.500, margin 0.250, runner-up code",
        "math-0.g1: 503", "math-1.g1, node n7", "10 prompt, 5 generated (from usage)",
        "queue 0.250 s, first byte 0.500 s, total 1.000 s", "score 0.5 by alice",
    ):  # fmt: skip
        assert text in out
    status, _, err = call(capsys, run, "trace", "r-3")
    assert (status, "no record of a request r-3" in err) == (1, True)
    assert call(capsys, run, "trace", "r 1")[0] == 2


def test_feedback_needs_a_router(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(capsys, run, "feedback", "r-1", "--score", "1")
    assert (status, "no router serves" in err) == (1, True)
