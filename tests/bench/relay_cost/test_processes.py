"""Processes are weighed with all that they started, stay where they were put, and end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_router.bench.load.native.engine import MockEngine
from hpc_router.bench.relay_cost.cpu_time import Cost, Reading
from hpc_router.bench.relay_cost.interface import (
    RelayPlacement,
    StartedRelay,
    answers,
    await_answer,
    free_port,
    last_words,
)
from hpc_router.bench.relay_cost.processes import ProcessGroup, busy_ns, cpu_ns, group, on, private_mb
from hpc_router.errors import LaunchError
from tests.support.processes import with_word
from tests.support.waiting import eventually_sync

PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)', sys.argv[1]])"


def test_a_group_ends_with_its_children(tmp_path: Path) -> None:
    with group() as started:
        started.start([sys.executable, "-c", PARENT, str(tmp_path)], log=tmp_path / "log")
        eventually_sync(lambda: len(with_word(str(tmp_path))) == 2)
        assert started.cpu_ns() > cpu_ns(started.roots[0].pid) > 0
        assert started.private_mb() > private_mb(started.roots[0].pid) > 0
        assert not started.died()
    assert with_word(str(tmp_path)) == []


def test_one_that_takes_no_hint_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpc_router.bench.relay_cost.processes.STOP_S", 0.1)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    with group() as started:
        started.start([sys.executable, "-c", deaf, str(tmp_path)], log=tmp_path / "log")
        eventually_sync(lambda: (tmp_path / "log").read_text())
    assert with_word(str(tmp_path)) == []


def test_what_is_started_stays_on_its_cores() -> None:
    mine = os.sched_getaffinity(0)
    core = frozenset({max(mine)})
    told = "import os; print(os.sched_getaffinity(0))"
    with on(core):
        said = subprocess.check_output([sys.executable, "-c", told], text=True)
    assert said.strip() == str(set(core))
    assert os.sched_getaffinity(0) == mine


def test_one_that_is_gone_weighs_nothing() -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    assert cpu_ns(process.pid) == 0
    assert private_mb(process.pid) == 0.0
    assert busy_ns(frozenset({9999})) == 0


def test_cost_is_shared_by_what_was_done() -> None:
    cost = Cost(Reading(0, 100, 200, 300, 1_000, 0), Reading(1_000_000, 400_100, 100_200, 50_300, 601_000, 250_000))
    found = cost.shares(10)
    assert (found["us"], found["engine_us"], found["load_us"]) == (40.0, 10.0, 5.0)
    assert (found["per_s"], found["relay_share"]) == (10_000.0, 0.4)
    assert found["others_share"] == pytest.approx(0.2)
    assert found["load_others_share"] == pytest.approx(0.1)
    assert cost.shares(0)["us"] == 400.0


def test_a_relay_that_ends_while_starting_is_quoted(tmp_path: Path) -> None:
    site = RelayPlacement(MockEngine(0, 1, None, tmp_path / "leaves"), tmp_path, frozenset(os.sched_getaffinity(0)))
    with group() as started:
        started.start([sys.executable, "-c", "import sys; sys.exit('no such option')"], log=site.log)
        with pytest.raises(LaunchError, match="ended while starting: no such option"):
            await_answer(StartedRelay(free_port(), started), site)


def test_nobody_answers_at_a_free_port(tmp_path: Path) -> None:
    assert not answers(StartedRelay(free_port(), ProcessGroup()), "math")
    assert last_words(tmp_path / "nothing") == "no log"
