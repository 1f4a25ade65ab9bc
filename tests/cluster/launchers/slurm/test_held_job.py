"""The job that `cluster=allocation` uses: what Slurm prints about it, and whether steps fit."""

from datetime import datetime

import pytest

from hpc_router.cluster.launchers.slurm.held_job import count_hosts, current_step_id, parse_held_job
from hpc_router.cluster.launchers.slurm.node_fit import allocation_faults
from hpc_router.cluster.launchers.slurm.sinfo import NodeKind
from hpc_router.config.schema import Deployment, EngineConfig, ExpertConfig, ResourceConfig

JOB = """\
JobId=1 JobName=j.sh UserId=root(0) StartTime=2026-11-29T17:23:55 EndTime=2026-11-29T17:25:55 Deadline=N/A \
NodeList=n[1-3] NumNodes=3 NumCPUs=12 TRES=cpu=12,mem=12000M,node=3,billing=12 JOB_GRES=gpu:4 \
Nodes=n[1-2] CPU_IDs=4-7 Mem=4000 GRES=gpu:a100:1(IDX:0) Nodes=n3 CPU_IDs=0,2-4 Mem=0 GRES= MinCPUsNode=4"""


def test_the_nodes_and_the_end_of_a_job() -> None:
    """The text is that of Slurm 22.05 with --details --oneliner. Without a memory limit, Mem is 0."""
    held = parse_held_job(JOB)
    assert [(k.nodes, k.cpus, k.memory_mb, dict(k.gpus)) for k in held.kinds] == [
        (2, 4, 4000, {"a100": 1}),
        (1, 4, None, {}),
    ]
    assert held.ends_at == datetime(2026, 11, 29, 17, 25, 55).timestamp()
    assert parse_held_job("EndTime=Unknown").ends_at is None
    assert parse_held_job("").kinds == ()


@pytest.mark.parametrize(
    ("hosts", "count"), [("n1", 1), ("n[1-3,7]", 4), ("n[1-2],m1", 3), ("r[1-2]n[01-10]", 20), ("a-1,b-[2-3]", 3)]
)
def test_hosts_are_counted(hosts: str, count: int) -> None:
    assert count_hosts(hosts) == count


@pytest.mark.parametrize(
    ("value", "step"),
    [("0", "0"), ("12", "12"), ("-5", None), ("4294967290", None), ("4294967291", None), ("", None)],
)
def test_only_a_step_of_srun_counts(value: str, step: str | None) -> None:
    """Slurm 26.05 sets -5 in the batch script; 4294967290 is the shell of salloc."""
    assert current_step_id({"SLURM_STEP_ID": value}) == step
    assert current_step_id({}) is None


def held(*, nodes: int = 2, cpus: int = 4, memory_mb: int | None = 4096, gpus: int = 2) -> list[NodeKind]:
    return [NodeKind(nodes, cpus, memory_mb, {"": gpus}, frozenset(), "alloc")]


def deployment(replicas: int = 1, **sizes: float) -> Deployment:
    resources = ResourceConfig(**sizes)  # type: ignore[arg-type]
    math = ExpertConfig(model="m", engine=EngineConfig(kind="sim"), replicas=replicas, resources=resources)
    return Deployment(experts={"math": math})


@pytest.mark.parametrize(
    ("wanted", "faults"),
    [
        (deployment(2, gpus=2), []),
        (deployment(4, gpus=1, cpus=2, memory_gb=2), []),
        (deployment(0, gpus=9), []),
        (deployment(gpus=3), ["experts.math.resources.gpus=3: job 7 has at most 2 per node"]),
        (deployment(cpus=5), ["experts.math.resources.cpus=5: job 7 has at most 4 per node"]),
        (deployment(memory_gb=5), ["experts.math.resources.memory_gb=5: job 7 has at most 4 GB per node"]),
        (deployment(nodes=3), ["experts.math.resources.nodes=3: job 7 has 2"]),
        (deployment(5, gpus=1), ["resources.gpus: job 7 has 4, all replicas need 5 (math 5)"]),
        (deployment(3, cpus=3), ["resources.cpus: job 7 has 8, all replicas need 9 (math 9)"]),
        (deployment(3, memory_gb=3), ["resources.memory_gb: job 7 has 8, all replicas need 9 (math 9)"]),
    ],
)
def test_what_a_job_cannot_hold_is_a_fault(wanted: Deployment, faults: list[str]) -> None:
    assert allocation_faults(wanted, held(), "job 7") == faults


def test_steps_that_overlap_share_the_job() -> None:
    wanted = deployment(5, gpus=1)
    wanted.cluster.srun = {"overlap": True}
    assert allocation_faults(wanted, held(), "job 7") == []


def test_memory_without_a_limit_fits() -> None:
    assert allocation_faults(deployment(3, memory_gb=900), held(memory_mb=None), "job 7") == []
