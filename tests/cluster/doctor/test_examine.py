"""`doctor` without a job: what the verb prints, and its exit status."""

import json
from pathlib import Path
from typing import Any

import pytest

from hpc_router.cli.main import main
from tests.cluster.programs import Programs

CONFIG = """\
SLURM_VERSION           = 24.11.5
AccountingStorageType   = (null)
MinJobAge               = {age} sec
ProctrackType           = proctrack/cgroup
"""
SITE = "batch|batch*|up|1-00:00:00|3|8|16000|idle|(null)|(null)"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    programs = Programs(tmp_path / "bin", monkeypatch)
    programs.add("sinfo", f"echo '{SITE}'")
    return programs


def report(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[dict[str, Any]]]:
    status = main(["doctor", "--json", "topology=sim", *words])
    return status, json.loads(capsys.readouterr().out)["findings"]


def test_this_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """cluster=local: no Slurm is asked, and no job is submitted."""
    status, findings = report(capsys, f"runs={tmp_path}/runs")
    assert status == 0
    assert {f["where"] for f in findings} == {"login"}
    assert "Slurm" not in {f["check"] for f in findings}
    assert not (tmp_path / "runs").exists()


def test_a_fault_is_exit_status_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, findings = report(capsys, "cluster.scratch=/no/such/folder")
    assert status == 1
    [fault] = [f for f in findings if f["state"] == "fault"]
    assert fault["key"] == "cluster.scratch"


def test_a_wrong_argument_is_exit_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "topology=sim", "cluster.scratchh=/tmp"]) == 2
    assert "scratchh" in capsys.readouterr().err


def test_the_login_node_of_a_slurm(slurm: Programs, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    slurm.add("scontrol", f"cat <<'END'\n{CONFIG.format(age=20)}END")
    assert main(["doctor", "--no-job", "topology=sim", "cluster=slurm", f"runs={tmp_path}/runs"]) == 1
    out = capsys.readouterr().out
    assert "fault  login     Slurm: MinJobAge=20: " in out
    assert "fix: cluster.ask_s=6, or MinJobAge=90 in the site's slurm.conf" in out
    assert "note   login     Slurm: accounting is off" in out
    assert out.splitlines()[-1].startswith("1 faults, ")
    assert slurm.calls("scontrol") == ["show config"]


def test_a_refused_job_is_told_with_its_key(
    slurm: Programs, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    slurm.add("scontrol", f"cat <<'END'\n{CONFIG.format(age=300)}END")
    slurm.add("sbatch", "echo 'sbatch: error: Batch job submission failed: Invalid account' >&2; exit 1")
    slurm.add("scancel", "true")
    status, findings = report(capsys, "cluster=slurm", f"runs={tmp_path}/runs", "cluster.account=nope")
    assert status == 1
    [fault] = [f for f in findings if f["state"] == "fault"]
    assert fault["check"] == "job"
    assert "cluster.account=nope: Slurm refuses it: " in fault["what"]
    assert not (tmp_path / "runs").exists()


def test_a_machine_without_slurm(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    status, findings = report(capsys, "cluster=slurm", "--no-job")
    assert status == 1
    assert [f["what"] for f in findings if f["state"] == "fault"] == [
        "Slurm does not answer: sinfo is not installed here"
    ]
