"""Doctor's job, run by stand-ins for Slurm's commands on this machine: what is found, and that nothing is left.

tests/slurm/test_doctor.py does the same on a real Slurm.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpc_router.cli.main import main
from hpc_router.cluster.doctor import job
from tests.cluster.programs import Programs
from tests.support.waiting import eventually_sync

CONFIG = """\
SLURM_VERSION           = 24.11.5
AccountingStorageType   = (null)
MinJobAge               = 300 sec
ProctrackType           = proctrack/cgroup
"""
SITE = "batch|batch*|up|1-00:00:00|3|8|16000|idle|(null)|(null)"
SBATCH = """\
case "$*" in *--test-only*) exit 0;; esac
cat >{folder}/script
SLURM_JOB_ID=7 setsid bash {folder}/script >{folder}/log 2>&1 &
echo $! >{folder}/pid
echo 7
"""
SRUN = """\
while [ "${1#--}" != "$1" ]; do case "$1" in --error=*) exec 2>"${1#--error=}";; esac; shift; done
for folder; do :; done
(while [ -d "$folder" ] && [ ! -e "$folder/started.json" ]; do :; done; kill -USR2 $$) >/dev/null 2>&1 &
exec "$@"
"""
SQUEUE = "printf '7\\t%s\\tn1\\t2030-01-01T00:00:00\\t2030-01-01T00:02:00\\tx\\t/\\tbatch\\t%s\\n' {state} {reason}"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    programs = Programs(tmp_path / "bin", monkeypatch)
    programs.add("sinfo", f"echo '{SITE}'")
    programs.add("scontrol", f"cat <<'END'\n{CONFIG}END")
    programs.add("sbatch", SBATCH.format(folder=programs.folder))
    programs.add("srun", SRUN)
    programs.add("squeue", SQUEUE.format(state="RUNNING", reason="None"))
    programs.add("scancel", "true")
    monkeypatch.setattr(job, "END_S", 0.5)  # squeue never says that the job has ended
    return programs


def words(tmp_path: Path, *overrides: str) -> list[str]:
    return ["doctor", "--json", "topology=sim", "cluster=slurm", f"runs={tmp_path}/runs", *overrides]


def report(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, *overrides: str
) -> tuple[int, dict[tuple[str, str], dict[str, Any]]]:
    status = main(words(tmp_path, *overrides))
    findings = json.loads(capsys.readouterr().out)["findings"]
    return status, {(f["check"], f["state"]): f for f in findings if f["where"] != "login" or f["check"] == "job"}


def test_a_job_that_runs(slurm: Programs, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A slow squeue on the node does not count as a slow file system."""
    slurm.add("squeue", f'[ "$*" != "--me --noheader" ] || sleep 3\n{SQUEUE.format(state="RUNNING", reason="None")}')
    status, found = report(capsys, tmp_path)
    assert {check for check, state in found if state == "fault"} == set()
    assert status == 0
    delay_ms = re.search(r"is seen both ways; a rename is seen after (\d+) ms", found["shared folder", "ok"]["what"])
    assert delay_ms is not None
    assert int(delay_ms[1]) < 1500  # half of the time that squeue takes on the node
    assert found["signals", "ok"]["what"].endswith("at the task alone")
    assert "differ by" in found["clock", "ok"]["what"]
    assert "hard links work" in found["file operations", "ok"]["what"]
    assert found["Slurm's commands", "ok"]["what"].startswith("sbatch and squeue work on ")
    script = (slurm.folder / "script").read_text()
    assert "#SBATCH --time=2\n" in script
    assert "#SBATCH --signal=USR2@60\n" in script
    assert not (tmp_path / "runs").exists()
    [cancel] = slurm.calls("scancel")
    assert f"#SBATCH --job-name={cancel.partition('--name=')[2]}\n" in script


def test_an_interpreter_without_hpc_router(slurm: Programs, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ends = "echo 'srun: launch/slurm: _step_signal: Terminating StepId=7.0' >&2; exit 1"
    slurm.add("python-of-others", f"echo \"$0: No module named 'hpc_router'\" >&2; {ends}")
    status, found = report(capsys, tmp_path, f"cluster.python={slurm.folder}/python-of-others")
    assert status == 1
    assert found["python", "fault"]["what"].endswith("No module named 'hpc_router'")
    assert found["python", "fault"]["key"] == "cluster.python"


def test_a_setup_line_that_fails(slurm: Programs, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, found = report(capsys, tmp_path, "cluster.setup=['true', 'false']")
    assert status == 1
    assert found["python", "fault"]["key"] == "cluster.setup[1]"


def test_a_node_that_does_not_see_the_folder(
    slurm: Programs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(job, "UNSEEN_S", 0.5)
    slurm.add("sbatch", "cat >/dev/null; echo 7")
    slurm.add("squeue", SQUEUE.format(state="FAILED", reason="None"))
    status, found = report(capsys, tmp_path)
    assert status == 1
    assert found["shared folder", "fault"]["what"].startswith(f"{tmp_path}/runs: n1 does not see this folder")


@pytest.mark.parametrize(
    ("reason", "state", "text"),
    [
        ("Resources", "note", "it is next in line and waits for nodes to become free"),
        ("InvalidQOS", "fault", "its qos is not valid"),
        ("NewReasonOfSlurm99", "note", "Slurm says: NewReasonOfSlurm99"),
    ],
)
def test_a_job_that_does_not_start(
    slurm: Programs,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    reason: str,
    state: str,
    text: str,
) -> None:
    monkeypatch.setattr(job, "START_S", 0.2)
    slurm.add("sbatch", "cat >/dev/null; echo 7")
    slurm.add("squeue", SQUEUE.format(state="PENDING", reason=reason))
    status, found = report(capsys, tmp_path)
    assert status == (1 if state == "fault" else 0)
    assert found["job", state]["what"] == f"job 7 did not start in time: {text}"
    assert len(slurm.calls("scancel")) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(slurm: Programs, tmp_path: Path, number: signal.Signals) -> None:
    slurm.add("sbatch", "cat >/dev/null; echo 7")
    pending, ended = (SQUEUE.format(state=state, reason="Resources") for state in ("PENDING", "CANCELLED"))
    slurm.add("squeue", f"if [ -e {slurm.folder}/scancel.calls ]; then {ended}; else {pending}; fi")
    argv = [sys.executable, "-m", "hpc_router.cli", *words(tmp_path)]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env={**os.environ}) as verb:
        assert verb.stderr is not None
        assert "job 7 is submitted" in verb.stderr.readline()
        eventually_sync(lambda: slurm.calls("squeue"))
        verb.send_signal(number)
        assert verb.wait(30) == 130
        assert "interrupted" in verb.stderr.read()
    assert len(slurm.calls("scancel")) == 1
    assert not (tmp_path / "runs").exists()
