"""The test cluster itself: it behaves as a site's Slurm does, and nothing of it is left afterwards."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import submitit

from tests.slurm import claim
from tests.slurm.cluster import SlurmCluster, lacking
from tests.slurm.configuration import GRACE_S, NODES, PROCTRACKS, SLURMD_TIMEOUT_S, Proctrack
from tests.slurm.host import SlurmClusterError, booted
from tests.support.needs import ROOT, need
from tests.support.processes import with_word
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.slurm
CLI = [sys.executable, "-m", "tests.slurm.cluster"]


def srun(cluster: SlurmCluster, node: str, *argv: str, options: tuple[str, ...] = ()) -> str:
    return cluster.run(["srun", "--quiet", f"--nodelist={node}", "--ntasks=1", *options, *argv]).strip()


def sbatch(cluster: SlurmCluster, node: str, partition: str, *options: str) -> str:
    # fmt: off
    return cluster.run(["sbatch", "--parsable", f"--nodelist={node}", f"--partition={partition}", "--gres=gpu:4",
                        *options, "--wrap=exec sleep 300"]).strip()
    # fmt: on


def job(cluster: SlurmCluster, number: str) -> dict[str, str]:
    words = cluster.run(["scontrol", "--oneliner", "show", "job", number]).split()
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def running(cluster: SlurmCluster, *numbers: str, within_s: float = 15) -> None:
    eventually_sync(lambda: {job(cluster, number)["JobState"] for number in numbers} == {"RUNNING"}, within_s=within_s)


def processes_on(cluster: SlurmCluster) -> set[int]:
    """The process ids of everything that runs on any host, as this machine numbers them."""
    spaces = {Path(f"/proc/{pid}/ns/pid").readlink() for pid in booted(cluster.folder).values()}
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "ns" / "pid").readlink() in spaces:
                found.add(int(process.name))
        except OSError:
            continue
    return found


def traces(folder: Path, number: int, processes: set[int]) -> list[str]:
    """What is left of a cluster on this machine."""
    left = [f"process {pid}" for pid in processes if Path(f"/proc/{pid}").exists()]
    left += [name for _, name in socket.if_nameindex() if re.fullmatch(rf"hpcr{number}([a-z]\w*)?", name)]
    left += [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(folder) in line]
    left += [line for line in Path("/etc/passwd").read_text().splitlines() if line.startswith(f"hpcr-user{number}:")]
    ours = [folder, claim.CLAIMS / str(number), *filter(None, [claim.freezer_of(folder)])]
    left += [str(path) for path in ours if path.exists() or path.is_symlink()]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(folder) in (process / "cmdline").read_bytes() and int(process.name) != os.getpid():
                left.append(f"{process.name} {(process / 'cmdline').read_bytes()!r}")
        except OSError:
            continue
    return left


def test_every_node_is_a_host_of_its_own(cluster: SlurmCluster) -> None:
    assert set(cluster.states()) == set(NODES)
    for node in NODES:
        cluster.node(node).enter(["touch", f"/tmp/of-{node}", f"/dev/shm/of-{node}"])
        said = srun(cluster, node, "sh", "-c", "hostname; ls -d /tmp/of-* /dev/shm/of-*; getent hosts n2 ctl | wc -l")
        assert said.split() == [node, f"/dev/shm/of-{node}", f"/tmp/of-{node}", "2"]
    assert not list(Path("/tmp").glob("of-*"))


def test_a_gres_becomes_devices(cluster: SlurmCluster) -> None:
    shown = ("printenv", "CUDA_VISIBLE_DEVICES")
    assert srun(cluster, "n3", *shown, options=("--gres=gpu:2",)) == "0,1"
    assert srun(cluster, "n1", *shown, options=("--gpus-per-node=4",)) == "0,1,2,3"
    with pytest.raises(SlurmClusterError, match="Requested node configuration is not available"):
        srun(cluster, "c1", "true", options=("--gres=gpu:1",))


def test_nodes_reach_each_other_and_this_machine_by_name(cluster: SlurmCluster) -> None:
    script = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).close()"
    with socket.create_server(("", 0)) as server:
        cluster.node("c1").enter([sys.executable, "-c", script, socket.gethostname(), str(server.getsockname()[1])])
    cluster.node("c1").enter([sys.executable, "-c", script, "ctl", "6817"])


def test_a_second_user_submits_too(cluster: SlurmCluster) -> None:
    run = ["srun", "--quiet", "--account=test", "id", "--user", "--name"]
    assert cluster.run(run, user=cluster.user).strip() == cluster.user


def test_submitit_from_this_process(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job and an array are submitted here, run with this interpreter on the nodes, and return their results through
    `shared`."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    executor = submitit.AutoExecutor(folder=cluster.shared / "submitit", cluster="slurm")
    executor.update_parameters(timeout_min=5, slurm_additional_parameters={"nodelist": "n2"})
    one = executor.submit(socket.gethostname)
    array = executor.map_array(divmod, [7, 8, 9], [2, 2, 2])
    for submitted in (one, *array):
        eventually_sync(submitted.done)
    assert one.result() == "n2"
    assert [submitted.result() for submitted in array] == [(3, 1), (4, 0), (4, 1)]
    assert len({submitted.job_id.partition("_")[0] for submitted in array}) == 1


@pytest.mark.newest
def test_accounting_knows_how_a_job_ended(cluster: SlurmCluster) -> None:
    number = cluster.run(["sbatch", "--parsable", "--account=test", "--wrap=exit 3"]).strip()
    asked = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=State,ExitCode,Account", "--jobs", number]
    eventually_sync(lambda: cluster.run(asked).strip() == "FAILED|3:0|test")
    with pytest.raises(SlurmClusterError, match="Invalid account"):
        cluster.run(["sbatch", "--account=nobodys", "--wrap=true"])


def test_urgent_jobs_preempt(cluster: SlurmCluster) -> None:
    """After the grace time a job that may be requeued waits again, and one that forbids it is cancelled."""
    requeued = sbatch(cluster, "n1", "batch", "--requeue")
    cancelled = sbatch(cluster, "n2", "batch", "--no-requeue")
    running(cluster, requeued, cancelled)
    urgent = [sbatch(cluster, node, "urgent") for node in ("n1", "n2")]
    running(cluster, *urgent, within_s=GRACE_S + 15)
    assert job(cluster, requeued)["Restarts"] == "1"
    assert job(cluster, cancelled)["JobState"] == "PREEMPTED"
    cluster.run(["scancel", requeued, *urgent])
    cluster.wait_idle()


def test_nodes_lost_by_power_cut_or_network_come_back(cluster: SlurmCluster) -> None:
    """Slurm marks both nodes down, requeues their jobs, and accepts both nodes again. Processes on the node without
    network continue."""
    dead, deaf = cluster.node("n1"), cluster.node("n2")
    deaf.daemon(["sleep", "300"])
    number = sbatch(cluster, "n1", "batch", "--requeue")
    running(cluster, number)
    dead.kill()
    deaf.cut_off()
    with pytest.raises(SlurmClusterError, match="n1 is down"):
        dead.enter(["true"])
    assert deaf.enter(["pgrep", "sleep"])
    eventually_sync(
        lambda: {name for name, state in cluster.states().items() if state.startswith("down")} == {"n1", "n2"},
        within_s=4 * SLURMD_TIMEOUT_S,
    )
    assert job(cluster, number)["Restarts"] == "1"
    cluster.run(["scancel", number])
    dead.restart()
    deaf.reconnect()
    cluster.wait_idle(within_s=4 * SLURMD_TIMEOUT_S)
    assert deaf.enter(["pgrep", "sleep"])
    deaf.restart()
    cluster.wait_idle()
    assert [srun(cluster, node.name, "hostname") for node in (dead, deaf)] == ["n1", "n2"]


@pytest.mark.parametrize("proctrack", PROCTRACKS)
def test_down_leaves_nothing_and_clusters_do_not_meet(cluster: SlurmCluster, proctrack: Proctrack) -> None:
    """A second cluster runs beside the first, without accounting. A job runs on it, and `down` removes all its
    traces."""
    lack = lacking(proctrack)
    need(not lack, lack)
    with SlurmCluster(accounting=False, proctrack=proctrack) as second:
        config = second.run(["scontrol", "show", "config"])
        assert re.search(rf"^ProctrackType +=+ proctrack/{proctrack}$", config, re.MULTILINE)
        assert srun(second, "n1", "hostname") == "n1"
        number = second.run(["sbatch", "--parsable", "--wrap=setsid sleep 300"]).strip()
        running(second, number)
        processes = processes_on(second)
        assert len(processes) >= len(NODES) + 1
        assert traces(second.folder, second.number, processes)
    assert traces(second.folder, second.number, processes) == []
    second.down()
    assert set(cluster.states().values()) == {"idle"}


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("stage", ["gpus", "log/ctl-init.log", "log/n1.log", "log/slurmctld.log"])
def test_a_killed_starter_is_swept(stage: str) -> None:
    """A starter killed by SIGKILL at any stage leaves a cluster that the next sweep removes. Every `up` begins with a
    sweep."""
    script = "from tests.slurm.cluster import SlurmCluster; SlurmCluster(accounting=False).up(owned=True)"
    before = set(claim.claims().values())
    starter = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    folder = eventually_sync(lambda: next(iter(set(claim.claims().values()) - before), None))
    number = next(number for number, claimed in claim.claims().items() if claimed == folder)
    eventually_sync(lambda: (folder / stage).exists())
    starter.send_signal(signal.SIGKILL)
    starter.wait(10)
    eventually_sync(lambda: not with_word(script))  # a child that was just forked still has its name
    assert folder in claim.sweep()
    eventually_sync(lambda: traces(folder, number, set()) == [])  # a host that was just booting ends a moment later


@pytest.mark.usefixtures("machine")
def test_by_hand() -> None:
    """`up`, `status` and `down`, each in a process of its own. A shell needs only what `up` prints. Each may be
    repeated."""
    folder = Path("/var/tmp") / f"hpcr-by-hand-{os.getpid()}"
    place = ["--dir", str(folder)]

    def say(*argv: str, code: int = 0) -> str:
        done = subprocess.run([*CLI, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    try:
        exports = say("up", "--no-accounting", "--node-cpus", "32", *place)
        assert "already" in say("up", *place, code=1)
        assert str(folder) in say("status")
        typed = f"{exports}\nsinfo --noheader --format=%c --partition=urgent\nsrun -w c1 hostname"
        used = subprocess.run(["bash"], input=typed, text=True, capture_output=True, timeout=30)
        assert used.stdout.split() == ["32", "c1"], used.stderr
    finally:
        assert "gone" in say("down", *place)
    assert "nothing" in say("down", *place)
    assert str(folder) not in say("status")
    assert not folder.exists()
