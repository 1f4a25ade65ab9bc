"""The notes of `plan` and `why` on a Slurm that sends a job's signals to engines, too."""

from pathlib import Path

import pytest

from hpc_router.cluster.commands import why
from hpc_router.cluster.commands.replica_view import DisplayedState, ReplicaView
from hpc_router.cluster.commands.why import RECENT_S, Cause
from hpc_router.cluster.control_loop.slots import Attempt, Observed, Slot
from hpc_router.cluster.launchers.interface import JobReport, JobState
from hpc_router.cluster.launchers.slurm.process_tracking import process_tracking, signals_note
from hpc_router.state.job_records import Exit, FailureReason
from hpc_router.state.run_directory import RunDir
from tests.cluster.programs import Programs

CONFIG = """\
Configuration data as of 2026-03-01T12:00:00
ProctrackType           = {}
PrologFlags             = (null)
"""
NOON = 1_772_366_400.0


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    return Programs(tmp_path / "bin", monkeypatch)


@pytest.mark.parametrize(
    ("plugin", "reached"),
    [("proctrack/linuxproc", True), ("proctrack/cgroup", False), ("proctrack/pgid", False)],
)
def test_the_plugin_decides(programs: Programs, plugin: str, reached: bool) -> None:
    programs.add("scontrol", f"cat <<'END'\n{CONFIG.format(plugin)}END")
    assert process_tracking() == plugin
    assert programs.calls("scontrol") == ["show config"]
    note = signals_note()
    assert (note is not None) is reached
    assert note is None or "this Slurm (proctrack/linuxproc) sends a job's SIGTERM to the engine too" in note


@pytest.mark.parametrize("script", ["exit 1", "echo nothing of the kind"])
def test_a_slurm_that_does_not_say(programs: Programs, script: str) -> None:
    programs.add("scontrol", script)
    assert process_tracking() is None
    assert signals_note() is None


MATH = Slot("math", "0")
READY = ReplicaView("math", "math-0.g2", DisplayedState.READY)


def ended(*, cut: int, at: float = NOON) -> Observed:
    """The predecessor of `READY`, which has drained and cut off `cut` answers."""
    end = Exit(True, FailureReason.DRAINED, f"drained after SIGTERM; {cut} answers were cut off", at=at, cut=cut)
    attempts = [
        Attempt(MATH, 1, report=JobReport(JobState.ENDED), claimed_at=NOON - 60, exit=end),
        Attempt(MATH, 2, report=JobReport(JobState.RUNNING), claimed_at=NOON),
    ]
    return {MATH: tuple(attempts)}


def last_ends(run: RunDir, observed: Observed, *, now: float = NOON) -> list[Cause]:
    return why._last_ends(run, [READY], observed, forgiven={}, now=now)


def test_a_drain_that_cut_answers_is_reported_for_an_hour(run: RunDir) -> None:
    (cause,) = last_ends(run, ended(cut=3), now=NOON + RECENT_S)
    assert cause.view is READY
    assert cause.what == "math-0.g1 drained after SIGTERM; 3 answers were cut off"
    assert cause.advice is not None
    assert cause.advice.startswith("a longer cluster.drain_s (`hpc-router apply`) ")
    assert last_ends(run, ended(cut=3), now=NOON + RECENT_S + 1) == []
    assert last_ends(run, ended(cut=0)) == []


def test_slurm_is_queried_only_if_a_job_was_signalled(programs: Programs, run: RunDir) -> None:
    programs.add("scontrol", f"cat <<'END'\n{CONFIG.format('proctrack/linuxproc')}END")
    loads = Cause(ReplicaView("code", "code-0.g1", DisplayedState.LOADING), "its engine is loading the model", None, ())
    assert why._with_signals_note([loads]) == [loads]
    assert programs.calls("scontrol") == []
    cut = last_ends(run, ended(cut=1))
    cancelled = Cause(
        ReplicaView("law", "law-0.g1", DisplayedState.WAITING, reason=FailureReason.CANCELLED), "it failed", "look", ()
    )
    told = why._with_signals_note([loads, *cut, cancelled])
    assert told[0] == loads
    assert all("sends a job's SIGTERM to the engine too" in (cause.advice or "") for cause in told[1:])
    assert programs.calls("scontrol") == ["show config"]
