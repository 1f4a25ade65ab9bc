"""An experiment as a user runs it: a sweep over two topologies that is killed, continued, and ends with a report."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.needs import ROOT
from tests.support.processes import with_word
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.e2e

SWEEP = ("-m", "bench=small", "topology=sim,sim_2replicas", "bench.duration_s=1.5", "bench.warmup_s=0.3",
         "bench.max_tokens=4")  # fmt: skip


def command(folder: Path, *overrides: str) -> list[str]:
    own = (f"bench.output={folder}", f"cluster.scratch={folder}/s", "hydra.sweep.dir=" + str(folder / "hydra"))
    return [sys.executable, "-m", "launch.bench", *SWEEP, *own, *overrides]


def records(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.jsonl")}


def test_a_killed_sweep_continues_with_the_missing_points() -> None:
    """SIGKILL ends it after two points. Started again, it repeats no point and leaves no process."""
    folder = Path("/tmp") / f"hpcr-sweep-{os.getpid()}"  # short: a socket's path has 107 bytes
    (folder / "s").mkdir(parents=True)
    first = subprocess.Popen(command(folder), cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        eventually_sync(lambda: len(records(folder)) >= 2, within_s=90, every_s=0.05)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.jsonl")}
    assert 2 <= len(kept) < 6
    done = subprocess.run(command(folder), cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    found = records(folder)
    assert len(found) == 6
    seen = sorted((r["topology"], r["users"]) for r in found.values())
    assert seen == [(topology, users) for topology in ("sim", "sim_2replicas") for users in (1, 4, 16)]
    assert {r["evidence"] for r in found.values()} == {"simulated"}
    assert all(r["router"]["ttft_s"]["added_s"] is not None and r["direct"]["succeeded"] for r in found.values())
    assert all(r["provenance"]["config"]["experts"] and r["provenance"]["git"] for r in found.values())
    assert found.keys() == {r["point"] for r in found.values()}
    eventually_sync(lambda: not with_word(str(folder)))
    page = folder / "report.html"
    text = page.read_text()
    assert all(name in text for name in ("sim_2replicas", "System throughput", "added by the router"))
    page.unlink()
    again = subprocess.run(command(folder), cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert again.stdout.count("all 3 points are in") == 2
    assert page.read_text() == text
    subprocess.run(["rm", "-r", str(folder)], check=True)
