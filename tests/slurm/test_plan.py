"""Faults that `plan` finds with a real Slurm: exit status 2, and a message that names the key to edit."""

import re
from collections.abc import Iterator

import pytest

from hpc_router.cli.main import main
from hpc_router.cluster.launchers.slurm.pending_reasons import explain_pending
from hpc_router.cluster.launchers.slurm.sinfo import ask_site
from hpc_router.cluster.launchers.slurm.submit_errors import find, is_temporary
from tests.slurm.cluster import SlurmCluster
from tests.slurm.configuration import GPUS, MIB_PER_CPU
from tests.slurm.host import SlurmClusterError
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.slurm
MATH = "experts.math.resources"


@pytest.fixture(autouse=True)
def _on_the_cluster(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)


def plan(*overrides: str) -> int:
    return main(["plan", "topology=sim", "cluster=slurm", *overrides])


def test_the_site_as_it_is(cluster: SlurmCluster) -> None:
    site = ask_site()
    assert list(site.partitions) == ["batch", "urgent"]
    assert site.default == "batch"
    for partition in site.partitions.values():
        assert partition.limit_s == 86400
        assert sorted((kind.nodes, kind.gpus_of(None)) for kind in partition.kinds) == [(1, 0), (3, GPUS)]
        assert {(kind.cpus, kind.memory_mb) for kind in partition.kinds} == {(8, 8 * MIB_PER_CPU)}
        assert all(kind.usable for kind in partition.kinds)


@pytest.mark.newest
def test_a_deployment_that_fits_has_no_faults(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = f"{{gpus: {GPUS}, cpus: 8, memory_gb: 15, walltime: 1-00:00:00, partition: urgent}}"
    assert plan(f"{MATH}={sizes}", "cluster.account=test", "cluster.qos=normal") == 0
    out, err = capsys.readouterr()
    assert err == ""
    notes = [line for line in out.splitlines() if "note:" in line]
    assert len(notes) == 1
    assert "(proctrack/linuxproc) sends a job's SIGTERM to the engine too" in " ".join(out.split())
    assert f"#SBATCH --gres=gpu:{GPUS}" in out


def notes(out: str) -> str:
    """The notes in one line, because the table wraps them."""
    return " ".join(out.partition("note: ")[2].split())


def test_what_sbatch_accepts_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    """A qos may allow more time than the partition does."""
    assert plan("cluster.walltime=1-00:00:01") == 0
    assert "cluster.walltime=1-00:00:01: partition batch allows at most 1-00:00:00; sbatch accepts it" in notes(
        capsys.readouterr().out
    )


SUBMIT_PLUGIN = """\
function slurm_job_submit(job, partitions, uid)
    if job.partition == nil or job.partition == "auto" then job.partition = "batch" end
    return slurm.SUCCESS
end
function slurm_job_modify(job, record, partitions, uid) return slurm.SUCCESS end
"""


@pytest.fixture
def submit_plugin(cluster: SlurmCluster) -> Iterator[None]:
    """A site whose plugin chooses the partition batch, although the default partition is a small one without GPUs."""
    etc = cluster.folder / "etc"
    before = (etc / "slurm.conf").read_text()
    small = "PartitionName=small Nodes=c1 Default=YES MaxTime=10:00\nJobSubmitPlugins=lua\n"
    (etc / "job_submit.lua").write_text(SUBMIT_PLUGIN)
    (etc / "slurm.conf").write_text(before.replace(" Default=YES", "") + small)
    cluster.run(["scontrol", "reconfigure"])
    eventually_sync(lambda: ask_site().default == "small")
    try:
        yield
    finally:
        (etc / "slurm.conf").write_text(before)
        cluster.run(["scontrol", "reconfigure"])
        eventually_sync(lambda: ask_site().default == "batch")


def test_a_submit_plugin_decides_beside_a_default_partition(
    submit_plugin: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """It also accepts names that are no partition. A job that it refuses is still a fault."""
    assert plan(f"{MATH}.gpus=1", "cluster.walltime=30") == 0
    assert f"{MATH}.gpus=1: partition small has at most 0 per node; sbatch accepts it" in notes(capsys.readouterr().out)
    assert plan("cluster.partition=auto") == 0
    assert "cluster.partition=auto: no partition is named 'auto'" in notes(capsys.readouterr().out)
    assert plan(f"{MATH}.gpus=8") == 2
    assert f"{MATH}.gpus=8: partition small has at most 0 per node" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("cluster.partition=bath", "cluster.partition=bath: no partition is named 'bath'; did you mean 'batch'?"),
        (f"{MATH}.partition=nope", f"{MATH}.partition=nope: no partition is named 'nope' (valid: batch, urgent)"),
        (f"{MATH}.gpus=8", f"{MATH}.gpus=8: partition batch has at most 4 per node"),
        (f"{MATH}.gpus=1 cluster.gpu_type=a100", "cluster.gpu_type=a100: no node of partition batch has such GPUs"),
        (f"{MATH}.cpus=9", f"{MATH}.cpus=9: partition batch has at most 8 per node"),
        (f"{MATH}.memory_gb=16", f"{MATH}.memory_gb=16: partition batch has at most 15.62 GB per node"),
        ("cluster.constraint=fast", "cluster.constraint=fast: no node of partition batch has the feature 'fast'"),
        ("cluster.account=nobodys", "cluster.account=nobodys: Slurm refuses it: Invalid account"),
        ("cluster.qos=best", "cluster.qos=best: Slurm refuses it: Invalid qos"),
        (f"{MATH}.reservation=ours", f"{MATH}.reservation=ours: Slurm refuses it: Requested reservation is invalid"),
        ("cluster.exclude=m1", "cluster.exclude=m1: Slurm refuses it: Invalid node name"),
        ("cluster.sbatch={licenses: x}", "cluster.sbatch.licenses=x: Slurm refuses it: Invalid license"),
        ("cluster.sbatch={bogus: 1}", "cluster.sbatch.bogus=1: Slurm refuses it: unrecognized option '--bogus=1'"),
        (
            f"{MATH}.gpus=2 experts.math.replicas=4 cluster.replicas_per_job=4",
            f"{MATH}.gpus=2: 4 replicas in one job need 8 GPUs per node: partition batch has at most 4 per node",
        ),
    ],
)
def test_a_deployment_that_does_not_fit_is_refused(
    overrides: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(*re.split(r" (?=\w+\.)", overrides)) == 2
    assert message in capsys.readouterr().err


def test_a_list_of_more_nodes_than_the_job_has(cluster: SlurmCluster, capsys: pytest.CaptureFixture[str]) -> None:
    """From 24.11 on, Slurm takes one node of the list."""
    refused = cluster.version < (24, 11)
    assert plan("cluster.sbatch.nodelist=n[1-2]") == (2 if refused else 0)
    message = "cluster.sbatch.nodelist=n[1-2], router.resources.nodes=1: Slurm refuses"
    assert (message in capsys.readouterr().err) is refused


SENTENCES = {
    "--partition=nope": "partition",
    "--account=nope": "account",
    "--qos=nope": "qos",
    "--gres=gpu:5": "gpus",
    "--gres=fpga:1": "gpus",
    "--constraint=nope": "constraint",
    "--time=soon": "walltime",
    "--time-min=2-0": "walltime",
    "--mem=90G": "gpus",
    "--mem=lots": "memory_gb",
    "--mem=1 --mem-per-cpu=1": "memory_gb",
    "--cpus-per-task=0": "cpus",
    "--reservation=nope": "reservation",
    "--exclude=nope": "exclude",
    "--licenses=nope": "sbatch",
    "--dependency=nope": "sbatch.dependency",
    "--bogus": "sbatch",
    "--begin=never": "sbatch",
    "--mail-type=x": "sbatch",
}
"""Options that this Slurm refuses, and the key that is to blame first."""


@pytest.mark.parametrize(("options", "key"), SENTENCES.items())
def test_error_texts_of_this_slurm_are_known(options: str, key: str, cluster: SlurmCluster) -> None:
    with pytest.raises(SlurmClusterError) as caught:
        cluster.run(["sbatch", "--test-only", *options.split(), "--wrap=true"])
    found = find(str(caught.value))
    assert found is not None
    assert found.keys[0] == key
    assert not is_temporary(str(caught.value))


@pytest.mark.newest
@pytest.mark.parametrize(
    ("options", "reason", "hopeless"),
    [
        ("--time=2-00:00:00", "PartitionTimeLimit", True),
        ("--hold", "JobHeldUser", False),
        ("--begin=now+1hour", "BeginTime", False),
    ],
)
def test_why_a_job_waits(options: str, reason: str, hopeless: bool, cluster: SlurmCluster) -> None:
    number = cluster.run(["sbatch", "--parsable", "--output=/dev/null", options, "--wrap=true"]).strip()
    try:
        asked = ["squeue", "--noheader", "--format=%r", f"--jobs={number}"]
        eventually_sync(lambda: cluster.run(asked).strip() == reason, every_s=0.1)
        assert explain_pending(reason).hopeless is hopeless
    finally:
        cluster.run(["scancel", number])
