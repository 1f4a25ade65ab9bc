"""`hpc-router bench router --quick` with all installed relays, and `bench pages`: no failures, and no processes or
files left.

No assertion on speed: the machine may run other work at the same time.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_router.bench.load.native.build import compiler
from tests.support.needs import ROOT, need
from tests.support.processes import with_word
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.e2e

TINY = ["--quick", "--streams", "12", "--seconds", "0.2", "--connections", "2"]


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a short path for sockets. Asserts that nothing is left in it afterwards."""
    need(compiler() is not None, "a C compiler (gcc)")
    with tempfile.TemporaryDirectory(prefix="br-") as folder:
        yield Path(folder)
        eventually_sync(lambda: not with_word(folder), within_s=10)  # a killed process goes a moment later
        assert [path.name for path in Path(folder).iterdir()] in ([], ["out"])


def started(place: Path, *arguments: str) -> "subprocess.Popen[str]":
    return bench(place, "router", *TINY, "--out", str(place / "out"), *arguments)


def bench(place: Path, *arguments: str) -> "subprocess.Popen[str]":
    argv = [sys.executable, "-m", "hpc_router.cli", "bench", *arguments]
    environment = os.environ | {"TMPDIR": str(place), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(argv, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_everything_is_measured(place: Path) -> None:
    with started(place, "--soak", "300", "--json") as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    value = json.loads(out)
    assert set(value["relays"]) | set(value["absent"]) == {
        *("direct", "nginx", "haproxy", "vllm-router", "sglang-router", "router", "router-user"),
        *("router-2-workers", "router+agent"),
    }
    assert {"direct", "router", "router-user", "router-2-workers", "router+agent"} <= set(value["relays"])
    for name in ("direct", "router", "router-user", "router-2-workers", "router+agent"):
        relay = value["relays"][name]
        assert relay["broken"] == []
        assert relay["rounds"]["0"]["failed"] == {}
        figures = {key: found["median"] for key, found in relay["figures"].items()}
        assert {"short_200B_us", "ttft_ms_p50", "leave_mid_ms_p50", "leave_before_ms_p50"} <= set(figures)
        assert all(found >= 0 for found in figures.values())
        open_streams = {key: found for key, found in figures.items() if key.endswith("_complete")}
        wanted = {"stream_complete": 12, "stream_half_complete": 6, "stream_lower_complete": 3}
        assert open_streams
        assert all(count == wanted[key] for key, count in open_streams.items())
    assert value["relays"]["router"]["figures"]["short_200KB_auto_us"]["median"] > 0
    assert [count for count, _ in value["relays"]["router"]["soak"]] == [0, 300]
    assert {check["met"] for check in value["checks"]} <= {True, False, None}
    (written,) = (place / "out").glob("router-*.json")
    assert json.loads(written.read_text()) == value
    table = written.with_suffix(".md").read_text()
    assert all(name in table for name in value["relays"])
    assert all(f"{name}: not measured, {why}" in table for name, why in value["absent"].items())


def test_an_interrupt_keeps_the_rounds_that_were_measured(place: Path) -> None:
    with started(place, "--only", "direct", "--rounds", "100", "--json") as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "round 2 of 100" in line)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    value = json.loads(out)
    assert set(value["relays"]["direct"]["rounds"]) == {"0"}
    assert "interrupted: every relay has 1 of 100 rounds" in value["notes"]
    (written,) = (place / "out").glob("router-*.json")
    assert json.loads(written.read_text()) == value


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_all_processes(place: Path, number: signal.Signals) -> None:
    with started(place, "--only", "router+agent") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "12 streams" in line or "3 streams" in line:
                break
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == 130


def test_open_pages_are_measured(place: Path) -> None:
    options = ("--streams", "12", "--seconds", "0.3", "--rounds", "2", "--pages", "3", "--json")
    with bench(place, "pages", *options) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    value = json.loads(out)
    assert value["failed"] == {}
    found = [(window["round"], window["pages"]) for window in value["windows"]]
    assert found == [(0, 0), (0, 1), (0, 3), (1, 1), (1, 3), (1, 0)]
    assert all(window["events"] > 0 and window["cpu"] > 0 for window in value["windows"])
    assert all(0 < window["hop_ms_p50"] <= window["hop_ms_p99"] for window in value["windows"])
