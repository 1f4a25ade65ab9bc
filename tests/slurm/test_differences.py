"""What differs between releases of Slurm: each row of the table in docs/slurm.md, as this cluster's release shows it.

The values that are expected follow from the version that the cluster says it has. Rows without a test here have one
elsewhere, which the table names.
"""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster, lacking
from tests.slurm.configuration import SLURMD_TIMEOUT_S
from tests.slurm.host import SlurmClusterError
from tests.support.needs import need
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.slurm

FORGOTTEN = "4000000"
"""The id of a job that Slurm does not know, as after MinJobAge."""


def submit(cluster: SlurmCluster, *lines: str, options: tuple[str, ...] = ()) -> tuple[str, Path]:
    """Submits a script of these lines. Returns the id of the job, and its output."""
    output = cluster.shared / f"differences-{time.monotonic_ns()}"
    argv = ["sbatch", "--parsable", "--no-requeue", f"--output={output}", *options, f"--wrap={chr(10).join(lines)}"]
    return cluster.run(argv).strip(), output


def state(cluster: SlurmCluster, job_id: str) -> str:
    words = cluster.run(["scontrol", "--oneliner", "show", "job", job_id]).split()
    return next(word.partition("=")[2] for word in words if word.startswith("JobState="))


def ended(cluster: SlurmCluster, job_id: str, *, within_s: float = 30) -> str:
    """Waits until the job has ended, and returns its state."""
    going = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")
    eventually_sync(lambda: state(cluster, job_id) not in going, within_s=within_s, every_s=0.2)
    return state(cluster, job_id)


@pytest.mark.newest
def test_the_end_time_is_in_the_environment(cluster: SlurmCluster) -> None:
    job_id, output = submit(cluster, "env")
    assert ended(cluster, job_id) == "COMPLETED"
    named = {line.partition("=")[0] for line in output.read_text().splitlines()}
    assert ("SLURM_JOB_END_TIME" in named) is (cluster.version >= (24, 11))
    assert ("SLURM_STEP_ID" in named) is (cluster.version >= (26, 5)), "-5 in the batch script itself"


def test_a_changed_limit_is_seen_by_later_steps(cluster: SlurmCluster) -> None:
    """`squeue` shows it at once. A process that runs already keeps the end time of its start."""
    lines = ["srun env", "touch $0.started", "until [ -e {go} ]; do sleep 0.1; done", "srun env", "env"]
    go = cluster.shared / "changed-limit"
    job_id, output = submit(cluster, *(line.format(go=go) for line in lines[:1]), "echo started",
                            f"until [ -e {go} ]; do sleep 0.1; done", "srun env", "echo script", "env",
                            options=("--time=10",))  # fmt: skip
    eventually_sync(lambda: output.exists() and "started\n" in output.read_text())
    shown = ["squeue", "--noheader", "--format=%l", f"--jobs={job_id}"]
    assert cluster.run(shown).strip() == "10:00"
    cluster.run(["scontrol", "update", f"JobId={job_id}", "TimeLimit=5"])
    assert cluster.run(shown).strip() == "5:00"
    go.touch()
    assert ended(cluster, job_id) == "COMPLETED"
    found = [int(end) for end in re.findall(r"^SLURM_JOB_END_TIME=(\d+)", output.read_text(), re.MULTILINE)]
    if cluster.version < (24, 11):
        assert found == []
    else:
        before, after, script = found
        assert (before - after, before - script) == (300, 0)


def test_the_cpus_of_a_step(cluster: SlurmCluster) -> None:
    """Of a job of two tasks a step takes one, without SRUN_CPUS_PER_TASK, which our batch scripts set."""
    lines = ("unset SRUN_CPUS_PER_TASK", "srun --exact --ntasks=1 sleep 30 &", "wait")
    job_id, _ = submit(cluster, *lines, options=("--nodes=1", "--ntasks=2", "--cpus-per-task=3"))
    try:
        steps = ["scontrol", "show", "step", f"{job_id}.0"]
        told = eventually_sync(lambda: told if "CPUs=" in (told := maybe(cluster, steps)) else "")
        assert f"CPUs={3 if cluster.version >= (24, 11) else 1} " in told
    finally:
        cluster.run(["scancel", job_id])


def maybe(cluster: SlurmCluster, argv: list[str]) -> str:
    try:
        return cluster.run(argv)
    except SlurmClusterError:
        return ""


@pytest.mark.newest
def test_dependencies_on_forgotten_jobs(cluster: SlurmCluster) -> None:
    for kind in ("afterok", "afternotok"):
        argv = ["sbatch", "--parsable", f"--dependency={kind}:{FORGOTTEN}", "--output=/dev/null", "--wrap=true"]
        if cluster.version >= (24, 11):
            with pytest.raises(SlurmClusterError, match="Job dependency problem"):
                cluster.run(argv)
        else:
            cluster.run(["scancel", cluster.run(argv).strip()])
    argv = ["sbatch", "--parsable", f"--dependency=afterany:{FORGOTTEN}", "--output=/dev/null", "--wrap=true"]
    assert ended(cluster, cluster.run(argv).strip()) == "COMPLETED"


def test_a_step_that_must_wait_says_so_on_old_releases_only(cluster: SlurmCluster) -> None:
    job_id, output = submit(cluster, "srun sleep 3 &", "sleep 1", "srun echo second", "wait")
    assert ended(cluster, job_id) == "COMPLETED"
    lines = [line for line in output.read_text().splitlines() if line != "second"]
    assert any("step creation temporarily disabled" in line for line in lines) is (cluster.version < (24, 11)), lines


def test_scancel_of_a_forgotten_job(cluster: SlurmCluster) -> None:
    """Without options it succeeds without a word. With a signal or a step it fails."""
    assert cluster.run(["scancel", FORGOTTEN]) == ""
    for argv in (["scancel", "--signal=TERM", FORGOTTEN], ["scancel", f"{FORGOTTEN}.0"]):
        with pytest.raises(SlurmClusterError, match=r"ended with 1: .*Invalid job id"):
            cluster.run(argv)


def test_a_script_that_fails_is_held_after_an_expedited_requeue(cluster: SlurmCluster) -> None:
    """Older releases do not know the option."""
    argv = ["sbatch", "--parsable", "--requeue=expedite", "--output=/dev/null", "--wrap=exit 3"]
    if cluster.version < (25, 11):
        with pytest.raises(SlurmClusterError, match="requeue"):
            cluster.run(argv)
        return
    config = cluster.folder / "etc" / "slurm.conf"
    before = config.read_text()
    config.write_text(f"{before}SlurmctldParameters=enable_expedited_requeue\n")
    cluster.run(["scontrol", "reconfigure"])
    eventually_sync(lambda: "enable_expedited_requeue" in cluster.run(["scontrol", "show", "config"]))
    try:
        job_id = cluster.run(argv).strip()
        later = cluster.run(
            ["sbatch", "--parsable", f"--dependency=afterany:{job_id}", "--output=/dev/null", "--wrap=true"]
        ).strip()
        asked = ["squeue", "--noheader", "--format=%T %r", f"--jobs={job_id}"]
        eventually_sync(lambda: cluster.run(asked).strip().startswith("REQUEUE_HOLD"), within_s=60, every_s=0.2)
        assert state(cluster, later) == "PENDING"
        cluster.run(["scancel", job_id, later])
    finally:
        config.write_text(before)
        cluster.run(["scontrol", "reconfigure"])


@pytest.fixture
def cgroup_cluster() -> Iterator[SlurmCluster]:
    lack = lacking("cgroup")
    need(not lack, lack)
    with SlurmCluster(accounting=False, proctrack="cgroup") as one:
        yield one


def test_cgroup_v1_is_deprecated_and_v2_needs_a_machine_without_v1(cgroup_cluster: SlurmCluster) -> None:
    """A machine that has both hierarchies is a hybrid one."""
    cluster = cgroup_cluster
    logs = "".join(path.read_text() for path in (cluster.folder / "log").glob("n1*"))
    assert ("deprecated" in logs) is (cluster.version >= (25, 5)), logs
    (cluster.folder / "etc" / "cgroup.conf").write_text("CgroupPlugin=cgroup/v2\n")
    with pytest.raises(SlurmClusterError, match=r"Hybrid mode is not supported|not a valid cgroup2 mountpoint"):
        cluster.node("n1").enter(["slurmd", "-D", "-N", "n1", "-L", str(cluster.shared / "v2.log")])


@pytest.mark.long
def test_a_job_whose_node_did_not_start_it_is_started_again(cluster: SlurmCluster) -> None:
    """Although it forbids a requeue. Until then it is COMPLETING, and a plain scancel ends it for good."""
    node = cluster.node("n3")
    node.enter(["pkill", "-KILL", "slurmd"])
    try:
        ids = [submit(cluster, "true", options=("--nodelist=n3",))[0] for _ in range(2)]
        eventually_sync(lambda: {state(cluster, i) for i in ids} == {"COMPLETING"}, within_s=60, every_s=0.2)
        cluster.run(["scancel", ids[0]])
    finally:
        node.restart()
    eventually_sync(lambda: state(cluster, ids[1]) in ("PENDING", "COMPLETED"), within_s=60, every_s=0.2)
    assert "Requeue=0 Restarts=1" in cluster.run(["scontrol", "--oneliner", "show", "job", ids[1]])
    assert ended(cluster, ids[0]) == "CANCELLED"
    cluster.run(["scancel", ids[1]])
    cluster.wait_idle(within_s=60)


@pytest.mark.long
def test_a_lost_node_and_a_limit_that_is_enforced_late(cluster: SlurmCluster) -> None:
    """srun in the batch script ends once Slurm gives the node up: with status 1 or by SIGPIPE, before 24.11 with 0.
    Another job runs beyond its limit of a minute, and is warned before its end."""
    lost, said = submit(
        cluster, "srun --quiet sleep 300", 'echo "status $?"', "sleep 300", options=("--nodelist=n3", "--time=10")
    )
    warned = ("trap 'echo warned' USR2", "sleep 200 &", "wait", "wait", "wait")
    late, output = submit(cluster, *warned, options=("--nodelist=n1", "--time=1", "--signal=B:USR2@30"))
    eventually_sync(lambda: {state(cluster, lost), state(cluster, late)} == {"RUNNING"}, within_s=30)
    began = time.monotonic()
    node = cluster.node("n3")
    eventually_sync(lambda: f"{lost}.0" in cluster.run(["squeue", "--noheader", "--steps", "--format=%i"]))
    node.enter(["pkill", "-KILL", "slurmd"])
    try:
        eventually_sync(lambda: cluster.states()["n3"].startswith("down"), within_s=6 * SLURMD_TIMEOUT_S)
        status = eventually_sync(lambda: re.search(r"status (\d+)", said.read_text()), within_s=60)
        assert status[1] in (("0",) if cluster.version < (24, 11) else ("1", "141"))
        assert state(cluster, lost) == "NODE_FAIL"
    finally:
        node.restart()
    assert ended(cluster, late, within_s=240) == "TIMEOUT"
    took_s = time.monotonic() - began
    print(f"the limit of 60 s was enforced after {took_s:.0f} s")
    assert "warned" in output.read_text()
    cluster.wait_idle(within_s=60)
