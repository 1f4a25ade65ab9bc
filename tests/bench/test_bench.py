"""`python -m launch.bench` as a user runs it: table, records, exit statuses; and the content of a record."""

import asyncio
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hpc_router.bench.figures import MeasurementPart, Observation, Window, figures
from hpc_router.bench.load.generator import LoadResult
from hpc_router.bench.point import MeasuredPoint
from hpc_router.bench.provenance import provenance
from hpc_router.bench.table import table
from hpc_router.bench.workload import Point
from hpc_router.config import frozen
from hpc_router.config.compose import load_deployment
from hpc_router.net.auth import replica_key
from hpc_router.state import registry
from hpc_router.state.job_records import JobDir, JobInfo, start_ticks
from hpc_router.state.registry import EngineInfo, Record, RecordKind, State
from hpc_router.state.run_directory import RunDir, make_run
from launch.bench import resolved
from tests.bench.fakes import WHOLE, FakeRouter, fake_router, piece, resets_after, responds
from tests.support.needs import ROOT


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run")


def serves(run: RunDir, fake: FakeRouter) -> None:
    """Registers the fake router and a simulated expert in the run."""
    job = JobDir(run, "router-0.g1")
    job.claim()
    job.write(JobInfo(str(os.getpid()), socket.gethostname(), start_ticks(os.getpid())))
    fake.key = replica_key(run.secret(), "nonce")
    registry.publish(run.registry, Record(RecordKind.ROUTER, "router-0.g1", fake.url, State.READY, {}, nonce="nonce"))
    engine = EngineInfo(kind="sim", model="sim-math")
    publish = Record(RecordKind.EXPERT, "math-0.g1", "http://127.0.0.1:1", State.READY, {"math": "math"}, engine=engine)
    registry.publish(run.registry, publish)


async def bench(run: RunDir, *arguments: str, folder: Path = ROOT) -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "launch.bench", f"run={run.path}", *arguments),
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_points_records_and_raw_requests(run: RunDir, tmp_path: Path) -> None:
    """Two points. The connection of the first response breaks, so that response is an error without a latency."""
    folder = tmp_path / "results"
    async with fake_router(resets_after(piece("a")), responds(*WHOLE)) as fake:
        serves(run, fake)
        status, out, err = await bench(
            *(run, "bench.users=[1,2]", "bench.requests=5", "bench.warmup_s=0", "bench.seed=7"),
            *(f"bench.output={folder}", "bench.raw=true"),
        )
    assert status == 0, err
    assert "1 disconnected" in out
    assert "simulated engine" in out
    (path,) = [path for path in folder.iterdir() if not path.name.endswith(".requests.jsonl")]
    assert str(path) in out
    one, two = lines(path)
    assert [(r["users"], r["requests"], r["failed"]) for r in (one, two)] == [(1, 5, 1), (2, 5, 0)]
    assert one["errors"] == {"disconnected": 1}
    assert (one["ttft_s"]["count"], two["ttft_s"]["count"]) == (4, 5)
    assert two["experts"] == {"math": 1.0}
    assert (one["seed"], one["simulated"], one["bench"]["raw"]) == (7, True, True)
    origin = one["provenance"]
    assert "launch.bench" in origin["command"]
    assert origin["endpoints"][0]["engine"]["model"] == "sim-math"
    assert {"python", "hpc-router", "aiohttp"} <= set(origin["versions"])
    assert (one["valid"], one["evidence"]) == (False, "simulated")
    assert any("requests failed" in reason for reason in one["invalid"])
    requests = lines(path.with_suffix(".requests.jsonl"))
    measured = [r for r in requests if r["part"] == "measured"]
    assert [sum(r["users"] == users for r in measured) for users in (1, 2)] == [5, 5]
    assert {r["domain"] for r in measured} <= {"code", "math", "medicine", "law", "general"}
    assert run.token() not in path.read_text() + path.with_suffix(".requests.jsonl").read_text() + out + err


async def test_every_job_of_a_sweep_writes_a_file(run: RunDir, tmp_path: Path) -> None:
    """`-m` is Hydra's multirun flag."""
    async with fake_router(responds(*WHOLE)) as fake:
        serves(run, fake)
        words = ("-m", "bench=smoke", "bench.users=[1],[2]", "bench.requests=2", "bench.warmup_s=0")
        status, _, err = await bench(run, *words, folder=tmp_path)
    assert status == 0, err
    found = [lines(path)[0] for path in (run.path / "bench").iterdir()]
    assert sorted(record["users"] for record in found) == [1, 2]
    assert {record["bench"]["max_tokens"] for record in found} == {16}


async def test_progress_is_a_line_per_change_where_the_output_is_no_terminal(run: RunDir, tmp_path: Path) -> None:
    async with fake_router(responds(*WHOLE)) as fake:
        serves(run, fake)
        status, _, err = await bench(run, "bench=smoke", "bench.users=[1,2]", "bench.requests=2", folder=tmp_path)
    assert status == 0, err
    shown = [line.partition(", ") for line in err.splitlines()]
    assert [before for before, _, _ in shown] == [
        f"{users}: point {number} of 2" for number, users in ((1, "1 user"), (2, "2 users")) for _ in range(2)
    ]
    assert [after.partition(" in ")[0] for _, _, after in shown] == ["2 requests", "done"] * 2


async def test_json_events_of_a_sweep(run: RunDir, tmp_path: Path) -> None:
    """Two points with one request each; everything on stdout is an event."""
    async with fake_router(responds(*WHOLE)) as fake:
        serves(run, fake)
        words = ("-m", "bench=smoke", "bench.users=[1],[2]", "bench.requests=2", "bench.warmup_s=0", "--json")
        status, out, err = await bench(run, *words, folder=tmp_path)
    assert status == 0, err
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["event"] for event in events] == ["point", "point_done", "measured", "records"] * 2
    assert [event["point"] for event in events if "point" in event] == ["1 user"] * 3 + ["2 users"] * 3
    assert all(event["succeeded"] == 2 for event in events if event["event"] == "measured")
    paths = [Path(event["path"]) for event in events if event["event"] == "records"]
    assert all(path.parent == run.path / "bench" and path.is_file() for path in paths)


async def test_an_invalid_value_is_the_last_event(run: RunDir) -> None:
    status, out, err = await bench(run, "bench.user=3", "--json")
    assert status == 2
    (event,) = map(json.loads, out.splitlines())
    assert event["event"] == "failed"
    assert "did you mean 'users'" in event["error"]
    assert event["error"] in err


async def test_exit_status_1_without_a_successful_request(run: RunDir) -> None:
    async with fake_router(responds(b"{}", content_type="application/json", status=503)) as fake:
        serves(run, fake)
        status, out, err = await bench(run, "bench=smoke", "bench.requests=3")
    assert status == 1
    assert "3 http_503" in out
    assert "no request succeeded with 2 users" in err
    (path,) = (run.path / "bench").iterdir()
    assert lines(path)[0]["ttft_s"] is None


async def test_exit_status_2_for_an_invalid_value(run: RunDir) -> None:
    """One line on stderr, before any request is sent."""
    status, out, err = await bench(run, "bench.user=3")
    assert (status, out) == (2, "")
    assert "did you mean 'users'" in err
    assert len(err.splitlines()) == 1
    status, _, err = await bench(run, "bench.users=[1]")
    assert status == 1
    assert "no router serves" in err


def test_the_config_in_the_record_has_no_secrets(run: RunDir) -> None:
    assert resolved(run) is None
    deployment = load_deployment(["topology=sim", "experts.math.engine.env={HF_TOKEN: abc, A: b}"])
    run.config.write_text(frozen.to_yaml(deployment))
    config = resolved(run)
    assert config is not None
    assert config["experts"]["math"]["engine"]["env"] == {"HF_TOKEN": "***", "A": "b"}


def test_provenance_outside_a_clone(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    found = provenance(run, None, code=tmp_path)
    assert (found.git, found.job_id, found.config, found.simulated) == (None, "77", None, False)
    assert found.hardware["cpus"] >= 1


def test_an_invalid_point_is_marked_in_the_table() -> None:
    """The table also works for a point without a successful request."""
    failed = Observation(part=MeasurementPart.MEASURED, user=0, started_s=1.0, ended_s=2.0, error="connect")
    found = figures([failed], Window(0, 3))
    load = LoadResult(0.0, [failed], Window(0, 3), 0.2, 0.0)
    rows = [
        MeasuredPoint(Point(users=4), load, found, ()),
        MeasuredPoint(Point(users=1000), load, found, ("its reason",)),
    ]
    console = Console(file=io.StringIO(), width=132)
    console.print(table(rows, simulated=False))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "1000 users: INVALID: its reason" in text
    assert text.count("INVALID") == 1
    assert "4 users: answered by no expert" in text
    assert "simulated" not in text
