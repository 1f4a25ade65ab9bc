"""One list of checks finds missing prerequisites of jobs before they run."""

import json
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from hpc_router.cli.main import main
from hpc_router.cluster.planning import prerequisites
from hpc_router.cluster.planning.finding import CheckResult
from hpc_router.cluster.planning.plan import make_plan
from hpc_router.cluster.planning.prerequisites import BLOCKING, CHECKS, Check, CheckedHost, file_system
from hpc_router.cluster.planning.share_claim import claim_share
from hpc_router.config.compose import load_deployment
from hpc_router.config.schema import ClusterConfig, Deployment
from hpc_router.errors import ConfigError, LaunchError
from hpc_router.expert.engine_process.scratch_dir import MAX_FOLDER_BYTES, path_error, scratch_folder
from hpc_router.net.auth import challenge_answer, replica_key
from hpc_router.net.protocol import challenge_in
from hpc_router.state.registry import Record, RecordKind, State, publish
from hpc_router.state.run_directory import RunDir, make_run
from hpc_router.state.share_dir import open_share, sharing_run
from tests.support.users import OUTSIDER, as_user, needs_root

RUNS = Path("runs")


def of_cluster(check: Check) -> Callable[[ClusterConfig, Path], CheckResult]:
    return lambda cluster, runs: check(CheckedHost(Deployment(cluster=cluster), runs))


scratch = of_cluster(prerequisites.scratch)
staging = of_cluster(prerequisites.staging)
run_directory = of_cluster(prerequisites.run_directory)


def longest() -> int:
    """The number of bytes that `cluster.scratch` may have."""
    return MAX_FOLDER_BYTES - len(f"/hpc-router-{os.getuid()}/12345678")


def test_a_scratch_path_has_room_for_a_socket(tmp_path: Path) -> None:
    """The limit is exact. `plan` also checks it for Slurm, where the folder is on the nodes."""
    fits = Path("/" + "a" * (longest() - 1))
    assert path_error(fits) is None
    assert path_error(Path(f"{fits}b")) == f"too long for a socket's path (valid: at most {longest()} bytes, as /tmp)"
    for kind in ("local", "slurm", "allocation"):
        [fault] = scratch(ClusterConfig(kind=kind, scratch=f"{fits}b"), RUNS).faults
        assert fault.startswith(f"cluster.scratch={fits}b: too long")
    with pytest.raises(ConfigError, match=r"cluster\.scratch=.*too long for a socket's path"):
        make_plan(load_deployment(["topology=sim", f"cluster.scratch={fits}b"]), ask_engines=False)


def test_a_missing_scratch_folder_on_this_machine_is_a_fault(tmp_path: Path) -> None:
    nope = f"/{'n' * 5}"
    assert scratch(ClusterConfig(kind="slurm", scratch=nope), RUNS).faults == []
    [fault] = scratch(ClusterConfig(scratch=nope), RUNS).faults
    assert fault.startswith(f"cluster.scratch={nope}: no such folder on ")
    with pytest.raises(ConfigError, match="no such folder on"), scratch_folder(nope):
        pass
    [fault] = scratch(ClusterConfig(scratch="tmp"), RUNS).faults
    assert "not an absolute path" in fault
    [fault] = scratch(ClusterConfig(scratch="/$HPC_ROUTER_NOPE"), RUNS).faults
    assert "$HPC_ROUTER_NOPE is not set" in fault
    assert scratch(ClusterConfig(scratch="/$X", env={"X": "tmp"}), RUNS).faults == []
    assert scratch(ClusterConfig(kind="slurm", scratch="/$HPC_ROUTER_NOPE"), RUNS).faults == []


def test_a_scratch_folder_must_allow_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs("/tmp")
    flags = os.statvfs_result((*tuple(real)[:8], real.f_flag | os.ST_NOEXEC, real.f_namemax))
    monkeypatch.setattr(os, "statvfs", lambda _path: flags)
    [fault] = scratch(ClusterConfig(), RUNS).faults
    assert fault.startswith("cluster.scratch=/tmp: its file system is mounted noexec on ")
    with pytest.raises(ConfigError, match="mounted noexec on"), scratch_folder("/tmp"):
        pass


def test_a_run_directory_of_one_host_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "2 1 0:5 / /home rw shared:1 - nfs4 server:/home rw\n"
        "3 1 0:6 / /tmp rw - tmpfs tmpfs rw\n"
        "4 1 0:7 / /my\\040disk rw - tmpfs tmpfs rw\n"
        "5 1 0:8 / /my\\040disk rw - lustre x rw\n"
    )
    monkeypatch.setattr(prerequisites, "MOUNTS", mounts)
    kinds = {"/home/me/runs": "nfs4", "/tmp/runs": "tmpfs", "/data": "ext4", "/my disk/x": "lustre", "/tmpx": "ext4"}
    assert {path: file_system(Path(path)) for path in kinds} == kinds
    slurm = ClusterConfig(kind="slurm")
    assert run_directory(slurm, Path("/home/me/runs")).warnings == []
    [warning] = run_directory(slurm, Path("/tmp/runs")).warnings
    assert "/tmp/runs, a tmpfs of this host: nodes may not see it" in warning
    assert run_directory(ClusterConfig(), Path("/tmp/runs")).warnings == []
    monkeypatch.setattr(prerequisites, "MOUNTS", tmp_path / "none")
    assert file_system(Path("/tmp")) is None


def test_checks_that_start_programs_can_be_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = ClusterConfig()
    cluster.container.image = "/no/such.sif"
    host = CheckedHost(Deployment(cluster=cluster), RUNS)
    assert prerequisites.prerequisites(host, ask=False).faults == []
    assert any("/no/such.sif" in fault for fault in prerequisites.prerequisites(host, ask=True).faults)
    assert CHECKS.keys() >= BLOCKING
    assert set(prerequisites.PROGRAM_CHECKS) <= CHECKS.keys()


def test_a_run_directory_with_a_percent_sign_is_refused_for_slurm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm expands % in the names of log files. `plan` refuses such a name even before the directory exists."""
    path = tmp_path / "50%"
    assert "has '%'" in run_directory(ClusterConfig(kind="slurm"), path).faults[0]
    assert run_directory(ClusterConfig(), path).faults == []
    words = ["plan", "--no-ask", "--run", str(path), "topology=sim"]
    assert main([*words, "cluster=slurm"]) == 2
    assert "has '%'" in capsys.readouterr().err
    assert main(words) == 0
    assert not path.exists()


def test_the_parent_of_the_staging_folder_must_exist(tmp_path: Path) -> None:
    """The first job on a node creates the folder, but not its parent."""
    for kind in ("local", "slurm"):
        assert staging(ClusterConfig(kind=kind), RUNS).faults == []
        assert staging(ClusterConfig(kind=kind, stage_to=str(tmp_path / "new")), RUNS).faults == []
        [fault] = staging(ClusterConfig(kind=kind, stage_to="local"), RUNS).faults
        assert fault == "cluster.stage_to=local: not an absolute path (valid: such as /local)"
    [fault] = staging(ClusterConfig(stage_to=f"{tmp_path}/no/new"), RUNS).faults
    assert fault == f"cluster.stage_to={tmp_path}/no/new: no such folder: {tmp_path}/no"
    [fault] = staging(ClusterConfig(stage_to="/$HPC_ROUTER_NOPE"), RUNS).faults
    assert fault == "cluster.stage_to=/$HPC_ROUTER_NOPE: $HPC_ROUTER_NOPE is not set in this job"
    assert staging(ClusterConfig(kind="slurm", stage_to=f"{tmp_path}/no/new"), RUNS).faults == []
    assert staging(ClusterConfig(kind="slurm", stage_to="/$HPC_ROUTER_NOPE"), RUNS).faults == []


def share_overrides(path: Path, group: str = str(os.getgid())) -> list[str]:
    return ["topology=sim", f"router.share_dir={path}", f"router.share_group={group}"]


def test_a_folder_that_cannot_be_shared_is_found_before_anything_starts(tmp_path: Path) -> None:
    make_plan(load_deployment(share_overrides(tmp_path / "share")), ask_engines=False)
    assert not (tmp_path / "share").exists(), "`plan` creates nothing"
    run = make_run(tmp_path / "run")
    for path, group, message in (
        (tmp_path / "share", "no-such-group", r"router\.share_group=no-such-group: there is no such group"),
        (run.path / "share", str(os.getgid()), r"router\.share_dir=.*is inside the run directory"),
        (tmp_path / "nope" / "share", str(os.getgid()), r"router\.share_dir=.*there is no folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_plan(load_deployment(share_overrides(path, group)), ask_engines=False)


def test_a_share_folder_goes_to_another_run_when_its_router_has_ended(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second")
    deployment = load_deployment(share_overrides(tmp_path / "share"))
    claim_share(first, deployment)
    share = open_share(tmp_path / "share")
    assert sharing_run(share) == first.path
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        publish(first.registry, Record(RecordKind.ROUTER, "router-0.g1", url, State.READY, {}, nonce="n"))
        with ThreadPoolExecutor(1) as pool:
            serving = pool.submit(answer_as, server, first)
            with pytest.raises(LaunchError, match=f"the router of {first.path} serves through it"):
                claim_share(second, deployment)
            serving.result()
            serving = pool.submit(answer_as, server, first)
            [fault] = CHECKS["sharing"](CheckedHost(deployment, second.path)).faults
            assert f"the router of {first.path} serves through it" in fault
            serving.result()
    assert CHECKS["sharing"](CheckedHost(deployment, second.path)).faults == []
    claim_share(second, deployment)
    assert sharing_run(share) == second.path


def answer_as(server: socket.socket, run: RunDir) -> None:
    """Answers one challenge as the router of `run`."""
    with server.accept()[0] as connection:
        target = connection.recv(4096).split()[1].decode()
        answer = challenge_answer(replica_key(run.secret(), "n"), challenge_in(urlsplit(target).query))
        body = json.dumps({"replica": "router-0.g1", "answer": answer})
        connection.sendall(f"HTTP/1.0 200 OK\r\n\r\n{body}".encode())


@pytest.mark.parametrize("kind", ["local", "slurm"])
@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_runs_that_cannot_be_a_folder(tmp_path: Path, kind: str, below: str) -> None:
    """A file is in the place of the folder of runs, or of a folder above it."""
    (tmp_path / "file").write_text("")
    runs = tmp_path / "file" / below
    [fault] = run_directory(ClusterConfig(kind=kind), runs).faults  # type: ignore[arg-type]
    assert fault == f"runs={runs}: {tmp_path / 'file'} is not a folder"
    with pytest.raises(ConfigError, match=r"^runs=.*is not a folder"):
        make_plan(load_deployment(["topology=sim", f"runs={runs}"]), ask_engines=False)


def test_a_folder_of_runs_that_cannot_be_created(tmp_path: Path) -> None:
    assert run_directory(ClusterConfig(), tmp_path / "new" / "deep").faults == []
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    [fault] = run_directory(ClusterConfig(), tmp_path / "dangling" / "runs").faults
    assert f"{tmp_path / 'dangling'} is not a folder" in fault


@pytest.mark.parametrize("verb", ["plan", "up"])
def test_a_run_that_names_a_file(tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    path.write_text("")
    for given in (path, path / "below"):
        assert main([verb, "--run", str(given), "topology=sim"]) == 2
        assert "is not a folder" in capsys.readouterr().err


@needs_root
def test_a_folder_of_runs_that_only_another_user_can_write_to(open_path: Path) -> None:
    def faults() -> list[str]:
        return run_directory(ClusterConfig(), open_path / "runs").faults

    [fault] = as_user(OUTSIDER, faults)
    assert fault == f"runs={open_path / 'runs'}: you cannot create a folder in {open_path}"
