"""Where a router listens, what it publishes, and what it leaves behind."""

import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_router.config.schema import ClusterConfig, Deployment, RouterConfig
from hpc_router.errors import ConfigError
from hpc_router.net import addresses
from hpc_router.net.addresses import free_port
from hpc_router.router import main
from hpc_router.router.control.registry_file import RegistryFile
from hpc_router.state.io_thread import FileThread
from hpc_router.state.job_records import JobDir, JobPhase, JobProgress
from hpc_router.state.registry import Record, RecordKind, RegistryReader, State, publish, replica_name, withdraw
from hpc_router.state.run_directory import RunDir, make_run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run")


def configured(host: str | None, *, on: str | None = "127.0.0.0/8") -> Deployment:
    return Deployment(router=RouterConfig(host=host), cluster=ClusterConfig(kind="slurm", fabric=on))


@pytest.mark.parametrize(
    ("host", "on", "bound", "published"),
    [
        (None, "127.0.0.0/8", "127.0.0.1", "http://127.0.0.1"),
        (None, "::1", "::1", "http://[::1]"),
        ("0.0.0.0", "127.0.0.0/8", "0.0.0.0", "http://127.0.0.1"),
        ("::", "127.0.0.0/8", "::", "http://127.0.0.1"),
        ("127.0.0.2", None, "127.0.0.2", "http://127.0.0.2"),
    ],
)
def test_it_listens_on_the_fabric_unless_a_host_is_configured(
    run: RunDir, host: str | None, on: str | None, bound: str, published: str
) -> None:
    if ":" in bound and addresses.interface_of("::1") is None:
        pytest.skip("this machine has no IPv6")
    deployment = configured(host, on=on)
    with main.bind(run, deployment, node="n1") as sock:
        name, port = sock.getsockname()[:2]
        assert name == bound
        assert main._record(deployment, "router-0.g1", sock, nonce="n").url == f"{published}:{port}"


def test_a_host_that_is_not_this_nodes_is_the_users_to_edit(run: RunDir) -> None:
    with pytest.raises(ConfigError, match=r"router\.host=192\.0\.2\.77"):
        main.bind(run, configured("192.0.2.77"), node="n1")


def served(run: RunDir, generation: int, url: str, *, node: str = "n1", phase: JobPhase = JobPhase.DRAINING) -> None:
    """A router that was ready there, by what its job left."""
    job = JobDir(run, replica_name("router", 0, generation))
    job.claim()
    job.write(JobProgress(phase, url=url, node=node))


def port_of(run: RunDir, *, node: str = "n1", configured_port: int = 0) -> int:
    deployment = Deployment(router=RouterConfig(host="127.0.0.1", port=configured_port))
    with main.bind(run, deployment, node=node) as sock:
        port: int = sock.getsockname()[1]
        return port


def test_the_port_of_the_last_router_of_this_node_is_taken_again(run: RunDir) -> None:
    """Of the newest generation, and not of one that ended before it served."""
    old, last = free_port(), free_port()
    served(run, 9, f"http://127.0.0.1:{old}")
    served(run, 10, f"http://[::1]:{last}")
    JobDir(run, "router-0.g11").claim()
    JobDir(run, "router-0.g12").claim()
    JobDir(run, "router-0.g12").write(JobProgress(JobPhase.STARTING))
    assert port_of(run) == last
    assert port_of(run, node="n2") not in (old, last)
    other = free_port()
    assert port_of(run, configured_port=other) == other


def test_a_port_that_another_process_has_is_left_to_it(run: RunDir) -> None:
    """A router that overlaps its predecessor cannot have its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        served(run, 1, f"http://127.0.0.1:{port}", phase=JobPhase.READY)
        assert port_of(run) != port


def a_record(generation: int, *, kind: RecordKind = RecordKind.ROUTER, state: State = State.READY) -> Record:
    name = "router" if kind is RecordKind.ROUTER else "math"
    return Record(kind, replica_name(name, 0, generation), "http://127.0.0.1:1", state, {}, generation=generation)


class TestRegistryFile:
    """Of router-0.g2."""

    @pytest.fixture
    def files(self) -> Iterator[FileThread]:
        files = FileThread("test")
        yield files
        files.close(timeout_s=5)

    @pytest.fixture
    def keeper(self, run: RunDir, files: FileThread) -> RegistryFile:
        publish(run.registry, a_record(2))
        publish(run.registry, a_record(1, kind=RecordKind.EXPERT))
        return RegistryFile(run, "router-0.g2", files)

    def named(self, run: RunDir, files: FileThread) -> list[str] | None:
        files.close(timeout_s=5)
        if not run.registry_json.exists():
            return None
        return [record["replica"] for record in json.loads(run.registry_json.read_text())["records"]]

    def targets(self, run: RunDir) -> list[str]:
        """The addresses that Prometheus finds."""
        listed = json.loads(run.prometheus_sd_json.read_text())
        assert all(entry["labels"]["__metrics_path__"] == "/metrics" for entry in listed)
        return [target for entry in listed for target in entry["targets"]]

    def leave(self, run: RunDir, keeper: RegistryFile) -> None:
        withdraw(run.registry, "router-0.g2")
        keeper.leave()

    def test_while_it_leads(self, run: RunDir, keeper: RegistryFile, files: FileThread) -> None:
        keeper.keep(RegistryReader(run.registry).snapshot())
        assert self.named(run, files) == ["math-0.g1", "router-0.g2"]
        assert self.targets(run) == ["127.0.0.1:1"]

    def test_when_it_leaves(self, run: RunDir, keeper: RegistryFile, files: FileThread) -> None:
        """An older registry snapshot that comes late does not restore it."""
        seen = RegistryReader(run.registry).snapshot()
        keeper.keep(seen)
        self.leave(run, keeper)
        keeper.keep(seen | {"math-0.g1": replace(seen["math-0.g1"], beat=1)})
        assert self.named(run, files) == ["math-0.g1"]
        assert self.targets(run) == []

    def test_its_successor_keeps_the_file(self, run: RunDir, keeper: RegistryFile, files: FileThread) -> None:
        keeper.keep(RegistryReader(run.registry).snapshot())
        publish(run.registry, a_record(3))
        self.leave(run, keeper)
        assert self.named(run, files) == ["math-0.g1", "router-0.g2"], "the successor writes what follows"

    @pytest.mark.parametrize("other", [a_record(1), a_record(3, state=State.STARTING)])
    def test_one_that_does_not_lead_by_then_keeps_nothing(
        self, run: RunDir, keeper: RegistryFile, files: FileThread, other: Record
    ) -> None:
        keeper.keep(RegistryReader(run.registry).snapshot())
        publish(run.registry, other)
        self.leave(run, keeper)
        assert self.named(run, files) == sorted(["math-0.g1", other.replica])

    def test_a_standby_that_leaves(self, run: RunDir, keeper: RegistryFile, files: FileThread) -> None:
        """It never led, so the file is another's."""
        self.leave(run, keeper)
        assert self.named(run, files) is None


@pytest.mark.parametrize(
    ("environment", "asked", "cpus"),
    [
        ({}, 1, 1),  # a machine that is shared: no more than was asked for
        ({}, 8, 4),
        ({"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "3"}, 1, 3),
        ({"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "64"}, 1, 4),  # more than the job's cgroup gives
        ({"SLURM_JOB_ID": "7"}, 2, 2),
        ({"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "many"}, 0, 1),
    ],
)
def test_workers_follow_the_jobs_cpus_and_not_the_machines(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], asked: int, cpus: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr("os.cpu_count", lambda: 128)
    assert main.usable_cpus(environment, asked=asked) == cpus
