"""`hpc-router bench soak`: faults explain every failure, and no process is left; one minute, and ten."""

import json
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc_router.bench.load.native.build import compiler
from tests.e2e.deployment import cli
from tests.support.needs import ROOT, need
from tests.support.processes import with_word
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.e2e


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    need(compiler() is not None, "a C compiler (gcc)")
    with tempfile.TemporaryDirectory(prefix="so-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)
        eventually_sync(lambda: not with_word(folder), within_s=10)  # a killed process goes a moment later


def soaked(place: Path, *arguments: str, timeout_s: float) -> dict[str, Any]:
    done = cli("bench", "soak", "--json", "--out", str(place / "out"), *arguments, timeout_s=timeout_s, check=False)
    assert done.returncode == 0, f"{done.stderr}\n{json.loads(done.stdout)['complaints'] if done.stdout else ''}"
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def killed(value: dict[str, Any], target: str) -> int:
    return sum(one["target"] == target for one in value["struck"])


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_minute_of_faults(place: Path) -> None:
    value = soaked(place, "--seconds", "60", timeout_s=380)
    assert value["passed"]
    assert (killed(value, "replica"), killed(value, "worker"), killed(value, "control")) == (11, 1, 1)
    assert value["loads"]["short"]["answered"] > 5000
    assert value["loads"]["streams"]["answered"] > 200
    assert all(one["allowed"] for one in value["failures"])
    assert not any(value["gauges_at_the_end"].values())
    assert value["gauges_at_the_end"]
    (written,) = (place / "out").glob("soak-*.json")
    assert json.loads(written.read_text()) == value
    assert "# Soak: passed" in written.with_suffix(".md").read_text()
    drawn = ET.parse(written.with_suffix(".svg")).getroot()
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}polyline"))) >= 10


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_ten_minutes_of_faults(place: Path) -> None:
    value = soaked(place, "--seconds", "600", timeout_s=1100)
    assert value["passed"]
    assert killed(value, "replica") >= 110
    assert killed(value, "worker") >= 9
    assert killed(value, "control") == 1


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_thousand_users_at_once(place: Path) -> None:
    """A thousand users with streams, two workers and no faults: no failure, an even load on the replicas of an expert,
    and conversations stay on their replica."""
    value = soaked(place, "--seconds", "40", "--streams", "1000", "--rate", "1", "--strike", "none", timeout_s=580)
    assert value["failures"] == []
    streams = value["loads"]["streams"]
    assert streams["answered"] >= 1000
    assert len(streams["fairness"]) == 4
    assert min(streams["fairness"].values()) >= 0.99
    assert streams["moved_share"] <= 0.2


def test_an_interrupt_takes_the_deployment_down(place: Path) -> None:
    argv = [sys.executable, "-m", "hpc_router.cli", "bench", "soak", "--out", str(place / "out")]
    with subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "bringing the deployment up" in line:
                break
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    assert process.returncode == 130
