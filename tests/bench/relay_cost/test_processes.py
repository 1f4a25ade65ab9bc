"""CPU time and memory include descendants; processes stay on their cores and are ended."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_router.bench.load.native.engine import MockEngine
from hpc_router.bench.relay_cost.cpu_time import CpuCost, CpuReading
from hpc_router.bench.relay_cost.interface import (
    RelayPlacement,
    StartedRelay,
    log_tail,
    serves,
    wait_until_serving,
)
from hpc_router.bench.relay_cost.processes import ProcessGroup, busy_ns, cpu_ns, pinned_to, private_mb, process_group
from hpc_router.errors import LaunchError
from hpc_router.net.addresses import free_port
from tests.support.processes import with_word
from tests.support.waiting import eventually_sync

PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)', sys.argv[1]])"


def test_a_group_ends_with_its_children(tmp_path: Path) -> None:
    with process_group() as started:
        started.start([sys.executable, "-c", PARENT, str(tmp_path)], log=tmp_path / "log")
        eventually_sync(lambda: len(with_word(str(tmp_path))) == 2)
        assert started.cpu_ns() > cpu_ns(started.roots[0].pid) > 0
        assert started.private_mb() > private_mb(started.roots[0].pid) > 0
        assert not started.died()
    assert with_word(str(tmp_path)) == []


def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpc_router.bench.relay_cost.processes.STOP_TIMEOUT_S", 0.1)
    program = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    )
    with process_group() as started:
        started.start([sys.executable, "-c", program, str(tmp_path)], log=tmp_path / "log")
        eventually_sync(lambda: (tmp_path / "log").read_text())
    assert with_word(str(tmp_path)) == []


def test_processes_stay_on_their_cores() -> None:
    mine = os.sched_getaffinity(0)
    core = frozenset({max(mine)})
    program = "import os; print(os.sched_getaffinity(0))"
    with pinned_to(core):
        output = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert output.strip() == str(set(core))
    assert os.sched_getaffinity(0) == mine


def test_an_ended_process_has_no_cpu_time_or_memory() -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    assert cpu_ns(process.pid) == 0
    assert private_mb(process.pid) == 0.0
    assert busy_ns(frozenset({9999})) == 0


def test_cost_per_request() -> None:
    cost = CpuCost(
        CpuReading(0, 100, 200, 300, 1_000, 0), CpuReading(1_000_000, 400_100, 100_200, 50_300, 601_000, 250_000)
    )
    found = cost.shares(10)
    assert (found["us"], found["engine_us"], found["load_us"]) == (40.0, 10.0, 5.0)
    assert (found["per_s"], found["relay_share"]) == (10_000.0, 0.4)
    assert found["others_share"] == pytest.approx(0.2)
    assert found["load_others_share"] == pytest.approx(0.1)
    assert cost.shares(0)["us"] == 400.0


def test_the_error_quotes_the_log_of_a_relay_that_ends_while_starting(tmp_path: Path) -> None:
    placement = RelayPlacement(
        MockEngine(0, 1, None, tmp_path / "leaves"), tmp_path, frozenset(os.sched_getaffinity(0))
    )
    with process_group() as started:
        started.start([sys.executable, "-c", "import sys; sys.exit('no such option')"], log=placement.log)
        with pytest.raises(LaunchError, match="ended while starting: no such option"):
            wait_until_serving(StartedRelay(free_port(), started), placement.log)


def test_nothing_serves_at_a_free_port(tmp_path: Path) -> None:
    assert not serves(StartedRelay(free_port(), ProcessGroup()), "math")
    assert log_tail(tmp_path / "nothing") == "no log"
