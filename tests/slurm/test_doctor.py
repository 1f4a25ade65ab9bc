"""`doctor` on a real Slurm: a site without faults, and sites made wrong on purpose.

A node has no clock of its own (time namespaces do not cover CLOCK_REALTIME), so the skew is made in the job's clock
source: a `sitecustomize` moves `time.time` of the job's Python.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from hpc_router.cli.main import main
from hpc_router.cluster.doctor import job
from tests.slurm.cluster import SlurmCluster, lacking
from tests.slurm.node import Node
from tests.support.needs import need
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.slurm
NODE = "n1"
SKEW_S = 40.0
SUBMIT_PLUGIN = """\
function slurm_job_submit(job, partitions, uid)
    if job.partition == "batch" then job.partition = "urgent" end
    return slurm.SUCCESS
end
function slurm_job_modify(job, record, partitions, uid) return slurm.SUCCESS end
"""


class Doctor:
    """Runs the verb in this process and keeps what it printed."""

    def __init__(self, cluster: SlurmCluster, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.cluster, self.folder, self._capsys = cluster, folder, capsys
        folder.mkdir()

    def arguments(self, *overrides: str) -> list[str]:
        site = ["topology=sim", "cluster=slurm", f"runs={self.folder}/runs", f"cluster.sbatch={{nodelist: {NODE}}}"]
        return ["doctor", "--json", *site, *overrides]

    def run(self, *overrides: str) -> tuple[int, list[dict[str, Any]]]:
        status = main(self.arguments(*overrides))
        return status, json.loads(self._capsys.readouterr().out)["findings"]

    def nothing_left(self) -> None:
        assert list(self.folder.iterdir()) == []
        assert "doctor" not in self.cluster.run(["squeue", "--noheader", "--format=%j"])


@pytest.fixture
def make_doctor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> Callable[[SlurmCluster], Doctor]:
    def make(cluster: SlurmCluster) -> Doctor:
        for name, value in cluster.environment.items():
            monkeypatch.setenv(name, value)
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        name = re.sub(r"\W+", "-", request.node.name).strip("-")  # brackets have a meaning in overrides
        return Doctor(cluster, cluster.shared / name, capsys)

    return make


@pytest.fixture
def doctor(cluster: SlurmCluster, make_doctor: Callable[[SlurmCluster], Doctor]) -> Iterator[Doctor]:
    one = make_doctor(cluster)
    yield one
    one.nothing_left()


@pytest.fixture
def mounts(cluster: SlurmCluster) -> Iterator[list[str]]:
    """Mounts in the node's namespace; the last one goes first."""
    made: list[str] = []
    yield made
    for place in reversed(made):
        cluster.node(NODE).enter(["umount", place])


def mount(node: Node, made: list[str], *arguments: str) -> None:
    node.enter(["mount", *arguments])
    made.append(arguments[-1])


def of(findings: Sequence[dict[str, Any]], *states: str) -> list[dict[str, Any]]:
    return [finding for finding in findings if finding["state"] in states]


@pytest.mark.newest
def test_a_healthy_site(doctor: Doctor) -> None:
    """The test cluster has proctrack/linuxproc, which is the one note: from the configuration and as measured."""
    status, findings = doctor.run("experts.math.resources.gpus=1")
    assert of(findings, "fault") == []
    assert status == 0
    assert [(f["check"], f["where"]) for f in of(findings, "note")] == [("Slurm", "login"), ("signals", NODE)]
    assert all("SIGTERM to the engine too" in f["what"] for f in of(findings, "note"))
    good = {f["check"]: f["what"] for f in of(findings, "ok") if f["where"] == NODE}
    assert good.keys() == {
        *("python", "shared folder", "run directory", "clock", "ports", "scratch", "home", "proxies", "hub cache"),
        *("Slurm's commands", "GPUs", "job", "file operations"),
    }
    assert "is seen both ways" in good["shared folder"]
    assert good["GPUs"] == f"CUDA_VISIBLE_DEVICES=0 on {NODE} (indices)"
    assert good["job"] == "the job got what it asked for, and is never requeued"


@pytest.fixture
def wrong_settings(cluster: SlurmCluster) -> Iterator[None]:
    """Slurm forgets jobs after 20 s, and a submit plugin moves jobs to another partition."""
    etc = cluster.folder / "etc"
    before = (etc / "slurm.conf").read_text()
    (etc / "job_submit.lua").write_text(SUBMIT_PLUGIN)
    (etc / "slurm.conf").write_text(f"{before}MinJobAge=20\nJobSubmitPlugins=lua\n")
    cluster.run(["scontrol", "reconfigure"])
    eventually_sync(lambda: "= lua" in cluster.run(["scontrol", "show", "config"]))
    yield
    (etc / "slurm.conf").write_text(before)
    cluster.run(["scontrol", "reconfigure"])
    eventually_sync(lambda: "= lua" not in cluster.run(["scontrol", "show", "config"]))


@pytest.fixture
def blocked(cluster: SlurmCluster) -> Iterator[None]:
    """The node sends no packet to this machine, as behind a firewall. The controller is another host."""
    here = f"{cluster.node(NODE).address.rpartition('.')[0]}.254"
    cluster.node(NODE).enter(["ip", "route", "add", "blackhole", f"{here}/32"])
    yield
    cluster.node(NODE).enter(["ip", "route", "delete", "blackhole", f"{here}/32"])


def test_nine_faults_of_one_site(
    doctor: Doctor,
    mounts: list[str],
    wrong_settings: None,
    blocked: None,
    cluster: SlurmCluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Noexec scratch, full home, no sbatch on the node, proxies, blocked ports, clock skew, short MinJobAge, a submit
    plugin and linuxproc: each is named once, with its fix, and nothing else is."""
    node, tools = cluster.node(NODE), cluster.shared / "doctor-tools"
    for name in ("home", "skewed"):
        (tools / name).mkdir(parents=True)
    (tools / "skewed" / "sitecustomize.py").write_text(
        f"import time\n_real = time.time\ntime.time = lambda: _real() + {SKEW_S}\n"
    )
    node.enter(["mkdir", "-p", "/tmp/noexec"])  # /tmp is the node's own
    mount(node, mounts, "-t", "tmpfs", "-o", "noexec", "tmpfs", "/tmp/noexec")
    mount(node, mounts, "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tools / "home"))
    mount(node, mounts, "--bind", "/dev/null", "/usr/bin/sbatch")
    monkeypatch.setenv("HOME", str(tools / "home"))
    status, findings = doctor.run(
        "cluster.scratch=/tmp/noexec",
        f"cluster.env={{http_proxy: 'http://proxy:3128', PYTHONPATH: {tools}/skewed}}",
        "cluster.partition=batch",
    )
    assert status == 1
    faults = {(f["check"], f["where"]): f for f in of(findings, "fault")}
    told = {
        ("Slurm", "login"): ("MinJobAge=20", "cluster.ask_s=6", "cluster.ask_s"),
        ("scratch", NODE): ("mounted noexec", None, "cluster.scratch"),
        ("home", NODE): ("is full on n1", "remove files", "cluster.env"),
        ("Slurm's commands", NODE): ("sbatch: ", "router.place=here", "router.place"),
        ("ports", NODE): ("cannot connect to n1", "cluster.fabric", "cluster.fabric"),
        ("clock", NODE): (f"{SKEW_S:.1f} s ahead of", "chrony", None),
    }
    assert faults.keys() == told.keys()
    for place, (what, fix, key) in told.items():
        assert what in faults[place]["what"]
        assert fix is None or fix in faults[place]["fix"]
        assert faults[place]["key"] == key
    notes = [(f["check"], f["where"], f["key"]) for f in of(findings, "note")]
    assert sorted(notes, key=str) == [
        ("Slurm", "login", "cluster.partition"),
        ("Slurm", "login", None),
        ("job", NODE, "cluster.partition"),
        ("proxies", NODE, "cluster.env"),
        ("signals", NODE, None),
    ]
    changed = next(f for f in of(findings, "note") if f["check"] == "job")
    assert changed["what"] == "the site changed cluster.partition=batch to urgent"
    assert changed["fix"] == "cluster.partition=urgent"


def test_a_run_directory_that_nodes_do_not_see(doctor: Doctor, mounts: list[str], cluster: SlurmCluster) -> None:
    mount(cluster.node(NODE), mounts, "-t", "tmpfs", "tmpfs", str(doctor.folder))
    status, findings = doctor.run()
    assert status == 1
    (fault,) = of(findings, "fault")
    assert (fault["check"], fault["key"]) == ("shared folder", "runs")
    assert fault["what"] == f"{doctor.folder}/runs: n1 does not see this folder: the job left no log there"
    assert "`runs=DIR` or `--run DIR`" in fault["fix"]


def test_an_interpreter_without_hpc_router(doctor: Doctor) -> None:
    status, findings = doctor.run("cluster.python=/usr/bin/python3")
    assert status == 1
    (fault,) = of(findings, "fault")
    assert (fault["check"], fault["key"]) == ("python", "cluster.python")
    assert "No module named 'hpc_router'" in fault["what"]


def test_a_setup_line_that_fails(doctor: Doctor) -> None:
    status, findings = doctor.run("cluster.setup=['true', 'echo no such licence >&2; false']")
    assert status == 1
    (fault,) = of(findings, "fault")
    assert fault["key"] == "cluster.setup[1]"


def test_a_job_that_does_not_start(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The findings of this machine are shown, and Slurm's reason."""
    monkeypatch.setattr(job, "START_S", 4.0)
    status, findings = doctor.run("cluster.sbatch={hold: true}")
    assert status == 0
    assert "Slurm" in {f["check"] for f in findings if f["where"] == "login"}
    (note,) = [f for f in of(findings, "note") if f["check"] == "job"]
    assert note["what"].endswith("did not start in time: it is held by its owner")
    assert note["fix"].startswith("`scontrol release ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(doctor: Doctor, number: signal.Signals, cluster: SlurmCluster) -> None:
    argv = [sys.executable, "-m", "hpc_router.cli", *doctor.arguments("cluster.sbatch={hold: true}")]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env={**os.environ}) as verb:
        eventually_sync(lambda: "doctor" in cluster.run(["squeue", "--noheader", "--format=%j"]))
        assert verb.stderr is not None
        assert "is submitted" in verb.stderr.readline()
        verb.send_signal(number)
        assert verb.wait(60) == 130
        assert "interrupted" in verb.stderr.read()


@pytest.fixture(scope="module")
def plain_cluster() -> Iterator[SlurmCluster]:
    lack = lacking("cgroup")
    need(not lack, lack)
    with SlurmCluster(accounting=False, proctrack="cgroup") as cluster:
        yield cluster


def test_a_site_without_accounting_that_signals_the_task_alone(
    plain_cluster: SlurmCluster, make_doctor: Callable[[SlurmCluster], Doctor]
) -> None:
    doctor = make_doctor(plain_cluster)
    status, findings = doctor.run()
    assert status == 0
    (note,) = of(findings, "note", "fault")
    assert note["what"].startswith("accounting is off")
    assert "slurmdbd" in note["fix"]
    signals = next(f for f in findings if f["check"] == "signals")
    assert signals["what"].endswith("at the task alone")
    doctor.nothing_left()
