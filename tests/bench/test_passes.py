"""The benchmark of the control loop: what it measures is a pass that has nothing to do."""

import json
from pathlib import Path

import pytest

from hpc_router.bench import control_loop
from hpc_router.cli.main import main
from hpc_router.cluster.control_loop.loop import ControlLoop, LoopPass


def test_it_measures_passes_without_actions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[LoopPass] = []

    class Watched(ControlLoop):
        def publish(self, done: LoopPass) -> None:
            super().publish(done)
            seen.append(done)

    monkeypatch.setattr(control_loop, "ControlLoop", Watched)
    monkeypatch.setattr(control_loop, "SETTLED_S", 0.0)
    words = ["--replicas", "7", "--generations", "2", "--passes", "3", "--folder", str(tmp_path), "--json"]
    assert main(["bench", "passes", *words]) == 0
    cost = json.loads(capsys.readouterr().out)
    assert (cost["replicas"], cost["generations"], cost["passes"]) == (7, 2, 3)
    assert 0 < cost["median_ms"] <= cost["p90_ms"]
    assert len(seen) == 2 + 3
    for one in seen:
        assert (list(one.actions), list(one.submitted)) == ([], [])
        assert sum(attempt.ready for attempts in one.observed.values() for attempt in attempts) == 7 + 1
        assert sum(len(attempts) for attempts in one.observed.values()) == 8 * 3
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_measure_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "passes", "--replicas", "0"]) == 2
    assert "at least one replica" in capsys.readouterr().err
