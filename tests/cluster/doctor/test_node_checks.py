"""What `doctor` says of each fault, from the facts that a site shows: the right fix and key, and nothing where all is
well."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc_router.cluster.doctor import node_checks
from hpc_router.cluster.doctor.exchange import ClockReading, clock_server, read_clock
from hpc_router.cluster.doctor.node_checks import SignalRecord
from hpc_router.cluster.planning import host_checks, prerequisites, slurm_checks
from hpc_router.cluster.planning.finding import Finding, Severity
from hpc_router.cluster.planning.prerequisites import CheckedHost
from hpc_router.config.schema import ClusterConfig, Deployment, EngineConfig, ExpertConfig

STARTED = {"host": "n1", "address": "10.1.0.11", "port": 4000, "hpc_router": "1.0", "python": "3.11.2"}
HEALTHY = {
    "SLURM_VERSION": "24.11.5",
    "AccountingStorageType": "accounting_storage/slurmdbd",
    "MinJobAge": "300 sec",
    "ProctrackType": "proctrack/cgroup",
}
WORKING = {"sbatch": None, "squeue": None}


def config(**changed: str | None) -> list[Finding]:
    settings = {name: value for name, value in {**HEALTHY, **changed}.items() if value is not None}
    return list(slurm_checks.config_findings(settings, Deployment(cluster=ClusterConfig(kind="slurm"))))


def noexec(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    real = os.statvfs("/tmp")
    flags = os.statvfs_result((*tuple(real)[:8], real.f_flag | os.ST_NOEXEC, real.f_namemax))
    monkeypatch.setattr(os, "statvfs", lambda _path: flags)
    host = CheckedHost(Deployment(cluster=ClusterConfig(kind="slurm")), Path("runs"), on_node=True)
    return prerequisites.scratch(host).findings


def full_home(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    def refuse(_descriptor: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", refuse)
    return host_checks.home().findings


def proxied(_monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    cluster, environment = ClusterConfig(kind="slurm"), {"HTTPS_PROXY": "http://proxy:3128"}
    return host_checks.proxies(cluster, on_node=True, environment=environment, own="10.1.0.11").findings


def no_sbatch(_monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    return [node_checks.slurm_commands({**WORKING, "sbatch": "sbatch is not installed here"}, Deployment(), "n1")]


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], list[Finding]], Severity, str, str, str | None]] = {
    "clock skew": (
        lambda _: [node_checks.clock(ClockReading(40.0, 0.01), "n1")],
        *(Severity.FAULT, "the clock of n1 is 40.0 s ahead of this machine's", "chrony or NTP", None),
    ),
    "noexec scratch": (noexec, Severity.FAULT, "mounted noexec", "programs may run from", "cluster.scratch"),
    "unshared run directory": (
        lambda _: [node_checks.unshared("/home/me/runs", "n1")],
        *(Severity.FAULT, "/home/me/runs: n1 does not see this folder", "`runs=DIR`", "runs"),
    ),
    "no sbatch from nodes": (
        no_sbatch,
        *(Severity.FAULT, "sbatch is not installed here", "router.place=here", "router.place"),
    ),
    "blocked ports": (
        lambda _: list(node_checks.ports("timed out", STARTED, None)),
        *(Severity.FAULT, "cannot connect to n1 (10.1.0.11:4000): timed out", "cluster.fabric", "cluster.fabric"),
    ),
    "proxies set": (
        proxied,
        *(Severity.NOTE, "https_proxy set", "cluster.env={no_proxy: '10.1.0.0/24'", "cluster.env"),
    ),
    "short MinJobAge": (
        lambda _: config(MinJobAge="30 sec"),
        *(Severity.FAULT, "MinJobAge=30", "cluster.ask_s=10", "cluster.ask_s"),
    ),
    "no accounting": (
        lambda _: config(AccountingStorageType=None),
        *(Severity.NOTE, "accounting is off", "slurmdbd", None),
    ),
    "submit plugin": (
        lambda _: config(JobSubmitPlugins="lua"),
        *(Severity.NOTE, "JobSubmitPlugins=lua", "cluster.partition", "cluster.partition"),
    ),
    "linuxproc": (
        lambda _: config(ProctrackType="proctrack/linuxproc"),
        *(Severity.NOTE, "SIGTERM to the engine too", "`hpc-router drain`", None),
    ),
    "full home": (full_home, Severity.FAULT, "is full on", "HF_HOME", "cluster.env"),
    "wrong Python": (
        lambda _: [node_checks.no_report("No module named 'hpc_router'", key=None, python="/usr/bin/python3")],
        *(Severity.FAULT, "/usr/bin/python3: No module named 'hpc_router'", "cluster.python=PATH", "cluster.python"),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_twelve_faults(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, severity, what, fix, key = FAULTS[name]
    [finding] = [finding for finding in make(monkeypatch) if finding.severity is not Severity.OK]
    assert finding.severity is severity
    assert what in finding.what
    assert fix in str(finding)
    assert finding.advice is not None
    assert finding.key == key


def test_nothing_is_wrong_with_a_healthy_site() -> None:
    slurm = Deployment(cluster=ClusterConfig(kind="slurm"))
    record = SignalRecord(at=1000.0, descendants=False)
    findings = [
        *config(),
        node_checks.shared_folder([0.01, 0.4], sees_login=True, beat_s=2.0, runs="/r"),
        node_checks.interpreter(STARTED, "1.0", "python3"),
        node_checks.clock(ClockReading(-0.3, 0.01), "n1"),
        *node_checks.ports(None, STARTED, None),
        node_checks.slurm_commands(WORKING, slurm, "n1"),
        node_checks.signals(record, ends_at=1070.0, waited_s=100, cluster=slurm.cluster),
        node_checks.gpus(1, "0", ["GPU 0: NVIDIA H200 (UUID: GPU-1)"], "n1"),
        *node_checks.changed_by_site({"Partition": "a,b", "QOS": None}, {"Partition": "b", "Requeue": "0"}),
        *slurm_checks.limit_findings({"account test: maxsubmit": 7}, 7),
    ]
    assert [f for f in findings if f is not None and f.severity is not Severity.OK] == []
    assert "SIGUSR2 arrived 70 s before the end (asked: 60 s), at the task alone" in {f.what for f in findings if f}


@pytest.mark.parametrize("version", ["22.05.8", "24.11.5", "26.05.5", "99.1", "unknown", None])
def test_a_release_is_never_a_fault(version: str | None) -> None:
    assert all(finding.severity is Severity.OK for finding in config(SLURM_VERSION=version))


def test_the_traps_of_a_release_are_told() -> None:
    assert "SLURM_JOB_END_TIME" in config(SLURM_VERSION="22.05.8")[0].what
    assert "SLURM_JOB_END_TIME" not in config(SLURM_VERSION="24.11.5")[0].what
    assert "cgroup/v1 is deprecated" in config(SLURM_VERSION="26.05.5")[0].what


def test_slurm_may_keep_jobs_for_ever() -> None:
    assert all(finding.severity is Severity.OK for finding in config(MinJobAge="0 sec"))


def test_a_slow_network_is_no_skew() -> None:
    """A reading by files may be wrong by half of its round trip."""
    assert node_checks.clock(ClockReading(12.0, 15.0), "n1").severity is Severity.OK
    assert node_checks.clock(ClockReading(-3.0, 0.1), "n1").severity is Severity.NOTE
    assert node_checks.clock(None, "n1").severity is Severity.NOTE


def test_a_shared_folder_is_seen_both_ways_and_soon() -> None:
    def found(*delays: float, sees: bool = True) -> Finding:
        return node_checks.shared_folder(delays, sees_login=sees, beat_s=2.0, runs="/r")

    assert found(0.1, 5.0).severity is Severity.NOTE
    assert found(0.1, 5.0).key == "cluster.beat_s"
    assert found().what.startswith("/r: this machine does not see")
    assert found(sees=False).what.startswith("/r: a node does not see")


def test_files_of_a_run_need_hard_links_but_no_flock() -> None:
    facts = {"file_system": "beegfs", "creates_files": None, "flock": "Function not implemented"}
    finding = node_checks.file_operations(facts, "/r")
    assert finding.severity is Severity.OK
    assert finding.what == (
        "/r is on beegfs; hard links work; flock does not work (Function not implemented), and is not used"
    )
    finding = node_checks.file_operations({**facts, "creates_files": "Operation not permitted"}, "/r")
    assert finding.severity is Severity.FAULT
    assert finding.key == "runs"


def test_no_job_needs_sbatch_when_the_router_is_here() -> None:
    deployment = Deployment()
    deployment.router.place = "here"
    broken = {"sbatch": "sbatch: Permission denied", "squeue": None}
    assert node_checks.slurm_commands(broken, deployment, "n1").severity is Severity.OK


def test_a_signal_that_never_comes() -> None:
    finding = node_checks.signals(None, ends_at=None, waited_s=100, cluster=ClusterConfig())
    assert finding.severity is Severity.FAULT


def test_a_signal_for_every_process() -> None:
    finding = node_checks.signals(SignalRecord(0.0, True), ends_at=60.0, waited_s=100, cluster=ClusterConfig())
    assert finding.severity is Severity.NOTE
    assert "60 s before the end" in finding.what
    assert "SIGTERM to the engine too" in finding.what


@pytest.mark.parametrize(
    ("visible", "listed", "severity", "word"),
    [
        ("0", None, Severity.OK, "indices"),
        ("GPU-12ab", None, Severity.OK, "UUIDs"),
        (None, None, Severity.FAULT, "CUDA_VISIBLE_DEVICES="),
        ("NoDevFiles", None, Severity.FAULT, "NoDevFiles"),
        (None, ["GPU 0: H200 (UUID: GPU-12ab)"], Severity.OK, "UUIDs"),
        ("0", ["No devices found"], Severity.FAULT, "lists no GPU"),
        ("MIG-12ab", ["GPU 0: H200 (UUID: GPU-1)", "  MIG 1g.18gb Device 0"], Severity.NOTE, "MIG instances"),
    ],
)
def test_gpus(visible: str | None, listed: list[str] | None, severity: Severity, word: str) -> None:
    finding = node_checks.gpus(1, visible, listed, "n1")
    assert finding is not None
    assert finding.severity is severity
    assert word in finding.what
    assert node_checks.gpus(0, visible, listed, "n1") is None


def test_what_the_site_changes() -> None:
    job = {"Partition": "urgent", "Account": "a", "Requeue": "1"}
    requeue, partition = node_checks.changed_by_site({"Partition": "batch", "Account": "a"}, job)
    assert requeue.severity is Severity.FAULT
    assert partition.what == "the site changed cluster.partition=batch to urgent"


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("/usr/bin/python3: No module named hpc_router", "cluster.python"),
        ("slurmstepd: error: execve(): /no/python: No such file or directory", "cluster.python"),
        ("SyntaxError: invalid syntax", "cluster.python"),
        ("MemoryError", None),
    ],
)
def test_a_job_without_a_report(line: str, key: str | None) -> None:
    finding = node_checks.no_report(line, key=None, python="/usr/bin/python3")
    assert finding.severity is Severity.FAULT
    assert finding.key == key
    assert finding.what.endswith(line)


def test_another_version_in_the_jobs() -> None:
    finding = node_checks.interpreter(STARTED, "2.0", "/env/bin/python")
    assert finding.severity is Severity.FAULT
    assert finding.what == "/env/bin/python on n1 has hpc_router 1.0, but this is 2.0"
    assert finding.key == "cluster.python"


def test_limits_of_jobs() -> None:
    text = "test|4||6|\nother||||\n"
    limits = slurm_checks.parse_limits(text, ("account", "maxsubmit", "maxjobs", "grpsubmit", "grpjobs"), "account")
    assert limits == {"account test: maxsubmit": 4, "account test: grpsubmit": 6}
    [finding] = slurm_checks.limit_findings(limits, 5)
    assert finding.severity is Severity.FAULT
    assert "needs 5 jobs in the queue, but account test: maxsubmit=4" in finding.what


def test_jobs_that_a_deployment_needs() -> None:
    deployment = Deployment(experts={"math": ExpertConfig(model="m", replicas=5)})
    assert slurm_checks.needed_jobs(deployment) == 7
    deployment.cluster.replicas_per_job = 4
    deployment.router.place = "here"
    assert slurm_checks.needed_jobs(deployment) == 2


@pytest.mark.parametrize(
    ("no_proxy", "covered"),
    [
        ("10.1.0.11", True),
        ("localhost,10.1.0.0/16", True),
        ("*", True),
        ("", False),
        ("localhost,10.2.0.0/16,.example.org", False),
    ],
)
def test_proxies_that_exempt_the_nodes(no_proxy: str, covered: bool) -> None:
    cluster = ClusterConfig(kind="slurm", env={"no_proxy": no_proxy})
    environment = {"http_proxy": "http://proxy:3128"}
    found = host_checks.proxies(cluster, on_node=True, environment=environment, own="10.1.0.11").findings
    assert [f.severity for f in found] == [Severity.OK if covered else Severity.NOTE]


def test_offline_engines_need_their_models_in_the_cache(tmp_path: Path) -> None:
    def found(**environment: str) -> list[Finding]:
        experts = {"math": ExpertConfig(model="org/name", engine=EngineConfig(kind="vllm"))}
        return host_checks.hub_cache(Deployment(experts=experts), {"HF_HOME": str(tmp_path), **environment}).findings

    assert found()[0].what == f"engines will download org/name to {tmp_path}/hub"
    [missing] = found(HF_HUB_OFFLINE="1")
    assert missing.severity is Severity.FAULT
    assert missing.key == "experts.math.model"
    (tmp_path / "hub" / "models--org--name" / "snapshots" / "abc").mkdir(parents=True)
    assert found(HF_HUB_OFFLINE="1")[0].severity is Severity.OK


def test_copies_of_models_need_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_descriptor: int, _kind: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    cluster = ClusterConfig(kind="slurm", stage_to=str(tmp_path / "models"))
    host = CheckedHost(Deployment(cluster=cluster), Path("runs"), on_node=True)
    assert prerequisites.staging(host).faults == []
    monkeypatch.setattr("fcntl.flock", refuse)
    [finding] = prerequisites.staging(host).findings
    assert "flock does not work there, which protects copies in use: Function not implemented" in finding.what
    assert finding.key == "cluster.stage_to"


def test_a_home_folder_with_room(tmp_path: Path) -> None:
    [finding] = host_checks.home(tmp_path).findings
    assert finding.severity in (Severity.OK, Severity.NOTE)  # a note where this machine itself is nearly full
    assert list(tmp_path.iterdir()) == []
    assert host_checks.home(tmp_path / "none").findings[0].severity is Severity.NOTE


def test_clocks_are_read_over_a_port() -> None:
    with clock_server("127.0.0.1") as port:
        reading = read_clock("127.0.0.1", port)
        assert abs(reading.offset_s) < 1.0
    with pytest.raises(OSError, match="refused"):
        read_clock("127.0.0.1", port)


def test_findings_travel_as_json() -> None:
    finding = Finding(Severity.FAULT, "what", "fix", "cluster.key")
    value: dict[str, Any] = finding.to_json()
    assert node_checks.of_json(value) == finding
    assert Finding(Severity.FAULT, "cluster.key=1: wrong (valid: 2)", key="cluster.key").to_json()["fix"] == (
        "edit cluster.key"
    )
