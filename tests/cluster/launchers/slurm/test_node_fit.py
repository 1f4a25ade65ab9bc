"""Requests that a site's nodes cannot satisfy, reported with the config key of the value."""

from dataclasses import replace
from typing import Any

import pytest

from hpc_router.cluster.launchers.slurm.node_fit import site_faults, site_warnings
from hpc_router.cluster.launchers.slurm.sinfo import parse_site
from hpc_router.config.schema import ClusterConfig, Deployment, EngineConfig, ExpertConfig, ResourceConfig

SITE = parse_site(
    """\
batch|batch*|up|1-00:00:00|3|8|16000|idle|fast,ib|gpu:4
batch|batch*|up|1-00:00:00|1|8|16000|idle|(null)|(null)
big|big|up|7-00:00:00|2|64|512000|idle|a100,ib|gpu:a100:4(S:0-1)
big|big|up|7-00:00:00|1|128|1024000|idle|v100|gpu:v100:2(S:0-1)
unsaid|unsaid|up|infinite|4|16|1|idle|(null)|gpu:2
closed|closed|inact|1:00:00|4|16|64000|idle|(null)|(null)
broken|broken|up|1:00:00|4|16|64000|drain|(null)|(null)
"""
)
AT = "experts.math.resources"
SIM = ExpertConfig(model="m", engine=EngineConfig(kind="sim"))


def deployment(*, replicas: int = 1, cluster: dict[str, Any] | None = None, **resources: Any) -> Deployment:
    made = Deployment(experts={"math": replace(SIM, replicas=replicas, resources=ResourceConfig(**resources))})
    made.cluster = ClusterConfig(kind="slurm", **(cluster or {}))
    return made


@pytest.mark.parametrize(
    ("replicas", "resources", "said"),
    [
        (12, {"gpus": 1}, None),
        (
            20,
            {"gpus": 1},
            "math: 20 replicas need 20 GPUs, partition batch has 12 that fit: 8 of them can never run",
        ),
        (
            5,
            {"gpus": 4, "nodes": 1, "gpu_type": "a100", "partition": "big"},
            "math: 5 replicas need 20 GPUs, partition big has 8 that fit: 3 of them can never run beside the others",
        ),
        (3, {"gpus": 4, "nodes": 2, "partition": "batch"}, "2 of them can never run beside the others"),
        (99999, {}, None),
    ],
)
def test_replicas_that_never_fit_at_once_are_a_warning(
    replicas: int, resources: dict[str, Any], said: str | None
) -> None:
    told = site_warnings(deployment(replicas=replicas, **resources), SITE)
    assert len(told) == (said is not None)
    assert said is None or said in told[0]


@pytest.mark.parametrize(
    "resources",
    [
        {},
        {"gpus": 4, "cpus": 8, "memory_gb": 15.625},
        {"gpus": 4, "nodes": 3, "constraint": "fast&ib"},
        {"gpus": 4, "gpu_type": "a100", "partition": "big", "cpus": 64, "memory_gb": 500, "nodes": 2},
        {"cpus": 128, "partition": "batch,big"},
        {"walltime": "7-00:00:00", "partition": "batch,big"},
        {"walltime": "1-00:00:00"},
        {"constraint": "[a100*2|v100]", "partition": "big"},
        {"memory_gb": 4000, "partition": "unsaid", "walltime": "UNLIMITED"},
    ],
)
def test_requests_that_fit(resources: dict[str, Any]) -> None:
    assert site_faults(deployment(**resources), SITE) == []


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ({"partition": "bath"}, ".partition=bath: no partition is named 'bath'; did you mean 'batch'? (valid: batch, "),
        ({"partition": "big,nope"}, ".partition=big,nope: no partition is named 'nope'"),
        ({"gpus": 8}, ".gpus=8: partition batch has at most 4 per node"),
        ({"gpus": 8, "partition": "batch,big"}, ".gpus=8: partition batch or big has at most 4 per node"),
        ({"gpus": 3, "gpu_type": "v100", "partition": "big"}, ".gpus=3: partition big has at most 2 per node"),
        ({"gpus": 1, "gpu_type": "v10", "partition": "big"}, ".gpu_type=v10: no node of partition big has such GPUs"),
        ({"gpus": 1, "partition": "closed"}, ".gpus=1: partition closed has at most 0 per node"),
        ({"cpus": 9}, ".cpus=9: partition batch has at most 8 per node"),
        ({"memory_gb": 15.7}, ".memory_gb=15.7: partition batch has at most 15.62 GB per node"),
        ({"nodes": 5}, ".nodes=5: partition batch has 4"),
        ({"nodes": 4, "gpus": 1}, ".nodes=4: partition batch has 3 with all requested resources"),
        ({"walltime": "1-00:01:00"}, ".walltime=1-00:01:00: partition batch allows at most 1-00:00:00"),
        (
            {"constraint": "fats"},
            ".constraint=fats: no node of partition batch has the feature 'fats'; did you mean 'fa",
        ),
        ({"constraint": "fast&(ib|old)"}, "has the feature 'old'"),
        (
            {"cpus": 128, "gpus": 4, "partition": "big"},
            ": no node of partition big has all requested resources at once",
        ),
        (
            {"constraint": "a100&v100", "partition": "big"},
            ": no node of partition big has all requested resources at once",
        ),
    ],
)
def test_requests_that_do_not_fit(resources: dict[str, Any], said: str) -> None:
    (fault,) = site_faults(deployment(**resources), SITE)
    assert fault.startswith("experts.math.resources")
    assert said in fault


def test_a_fault_of_a_cluster_value_names_its_key_once() -> None:
    made = deployment(cluster={"partition": "nope"})
    made.experts["law"] = SIM
    assert site_faults(made, SITE) == [
        "cluster.partition=nope: no partition is named 'nope' (valid: batch, big, broken, closed, unsaid)"
    ]
    made = deployment(cluster={"walltime": "2-00:00:00"}, walltime="1:00:00")
    assert site_faults(made, SITE) == ["cluster.walltime=2-00:00:00: partition batch allows at most 1-00:00:00"]
    made.router.resources.walltime = "60"
    assert site_faults(made, SITE) == []


def test_a_router_in_a_job_is_checked() -> None:
    made = deployment()
    made.router.resources = ResourceConfig(cpus=99)
    assert site_faults(made, SITE) == ["router.resources.cpus=99: partition batch has at most 8 per node"]
    made.router.place = "here"
    assert site_faults(made, SITE) == []


def test_replicas_that_share_a_job() -> None:
    """The job needs the resources of all its replicas, but of no more replicas than exist."""
    shared = {"replicas_per_job": 4}
    assert site_faults(deployment(replicas=8, gpus=1, cpus=2, cluster=shared), SITE) == []
    assert site_faults(deployment(replicas=8, gpus=2, cpus=3, cluster=shared), SITE) == [
        f"{AT}.gpus=2: 4 replicas in one job need 8 GPUs per node: partition batch has at most 4 per node",
        f"{AT}.cpus=3: 4 replicas in one job need 12 CPUs per node: partition batch has at most 8 per node",
    ]
    assert site_faults(deployment(replicas=2, gpus=2, cpus=3, cluster=shared), SITE) == []


def test_without_a_named_partition_slurm_decides() -> None:
    """A submit plugin may choose the partition, so a fault is only what no partition can satisfy."""
    nowhere = parse_site("batch|batch|up|1:00:00|3|8|16000|idle|(null)|(null)")
    assert site_faults(deployment(), nowhere) == []
    assert site_faults(deployment(cpus=9), nowhere) == [f"{AT}.cpus=9: partition batch has at most 8 per node"]
    two = parse_site("cpu|cpu|up|1:00:00|3|8|16000|idle|(null)|(null)\ngpu|gpu|up|2:00:00|3|8|16000|idle|(null)|gpu:4")
    assert site_faults(deployment(gpus=4, walltime="1:30:00"), two) == []
    assert site_faults(deployment(gpus=5), two) == [f"{AT}.gpus=5: partition cpu or gpu has at most 4 per node"]


def test_a_job_that_would_wait_is_a_warning() -> None:
    assert site_warnings(deployment(), SITE) == []
    assert site_warnings(deployment(partition="closed"), SITE) == [
        "partition closed is inact: its jobs wait until it is up again"
    ]
    assert site_warnings(deployment(partition="broken"), SITE) == [
        "no node of partition broken can run jobs now (drain)"
    ]
