"""Checks of a whole deployment that need neither the machine nor the cluster."""

from dataclasses import replace
from typing import Any

import pytest

from hpc_router.config.schema import (
    ClusterConfig,
    ClusterKind,
    Deployment,
    EngineConfig,
    ExpertConfig,
    PolicyConfig,
    ResourceConfig,
    RouterConfig,
)
from hpc_router.config.validation import check, check_fabric
from hpc_router.errors import ConfigError


def deployment(cluster: ClusterConfig | None = None, **resources: Any) -> Deployment:
    """Returns a deployment with one expert, by default on the simulated engine and Slurm."""
    kind, options = resources.pop("kind", "sim"), resources.pop("options", {})
    expert = ExpertConfig(model="m", engine=EngineConfig(kind=kind, options=options))
    made = Deployment(experts={"math": replace(expert, resources=ResourceConfig(**resources))})
    made.cluster = cluster or ClusterConfig(kind="slurm")
    made.policy.kind = "model_field"
    return made


def refused(wrong: Deployment) -> str:
    with pytest.raises(ConfigError) as caught:
        check(wrong)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["local", "slurm", "allocation"])
def test_every_kind_of_cluster_is_valid(kind: ClusterKind) -> None:
    check(deployment(ClusterConfig(kind=kind)))


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (ClusterConfig(kind="slrum"), "cluster.kind=slrum: not known; did you mean 'slurm'?"),  # type: ignore[arg-type]
        (ClusterConfig(gpu_request="gpu"), "cluster.gpu_request=gpu: not known"),  # type: ignore[arg-type]
        (ClusterConfig(replicas_per_job=0), "cluster.replicas_per_job=0: out of range (valid: 1 to 1024)"),
        (ClusterConfig(ask_s=0), "cluster.ask_s=0: out of range (valid: 0.001 to 3600)"),
        (ClusterConfig(warn_s=-1), "cluster.warn_s=-1: out of range (valid: 0 to 604800)"),
        (ClusterConfig(walltime="2", warn_s=61), "cluster.walltime=2: "),
        (ClusterConfig(walltime="2", warn_s=61), "cluster.warn_s=61"),
        (ClusterConfig(sbatch={"dependency": "a?b"}), "cluster.sbatch.dependency=a?b: "),
        (ClusterConfig(gpus=-1), "cluster.gpus=-1: out of range (valid: 0 to 1024)"),
        (ClusterConfig(partition="a b"), "cluster.partition=a b"),
        (ClusterConfig(setup=["a\nb"]), "cluster.setup[0]"),
    ],
)
def test_a_cluster_is_refused(cluster: ClusterConfig, message: str) -> None:
    assert message in refused(deployment(cluster))


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"walltime": "soon"}, "experts.math.resources.walltime=soon"),
        (
            {"sbatch": {"time": "1"}},
            "experts.math.resources.sbatch.time: is not to be set here; use resources.walltime",
        ),
        ({"memory_gb": 0}, "experts.math.resources.memory_gb=0: out of range (valid: 0.001 to 1000000)"),
        ({"cpus": 0}, "experts.math.resources.cpus=0"),
        ({"nodes": 0}, "experts.math.resources.nodes=0"),
        ({"gpus": -1}, "experts.math.resources.gpus=-1"),
    ],
)
def test_an_experts_resources_are_refused(resources: dict[str, Any], message: str) -> None:
    assert message in refused(deployment(**resources))


def test_the_router_asks_for_one_node() -> None:
    wrong = deployment()
    wrong.router.resources = ResourceConfig(nodes=2)
    assert "router.resources.nodes=2" in refused(wrong)
    wrong.router.resources = ResourceConfig(partition="")
    assert "router.resources.partition is empty" in refused(wrong)
    wrong.router.resources = ResourceConfig()
    wrong.router.place = "there"  # type: ignore[assignment]
    assert "router.place=there: not known" in refused(wrong)


def test_gpus_of_a_node() -> None:
    """On Slurm the number is not known at this point; on the local machine it is 0 unless the config sets it."""
    check(deployment(gpus=8))
    check(deployment(ClusterConfig(kind="slurm", gpus=8), gpus=8))
    assert "a node has cluster.gpus=4" in refused(deployment(ClusterConfig(kind="slurm", gpus=4), gpus=8))
    assert "a node has cluster.gpus=0" in refused(deployment(ClusterConfig(), gpus=1))


SLURM = ClusterConfig(kind="slurm")


@pytest.mark.parametrize(
    ("cluster", "own", "valid"),
    [
        (SLURM, None, False),
        (SLURM, True, True),
        (replace(SLURM, exclusive=True), None, True),
        (replace(SLURM, exclusive=True), False, False),
        (replace(SLURM, trusted_network=True), None, True),
    ],
)
def test_several_nodes_need_exclusive_nodes_or_a_trusted_network(
    cluster: ClusterConfig, own: bool | None, valid: bool
) -> None:
    made = deployment(cluster, nodes=2, exclusive=own)
    if valid:
        check(made)
        return
    message = refused(made)
    assert "without authentication" in message
    assert "experts.math.resources.exclusive=true" in message
    assert "cluster.trusted_network=true" in message


def test_several_nodes_need_an_engine_that_spans_them() -> None:
    cluster = replace(SLURM, exclusive=True)
    assert "cluster=local is one node" in refused(deployment(ClusterConfig(), nodes=2))
    assert "'transformers' does not span nodes" in refused(deployment(cluster, nodes=2, kind="transformers"))
    shared = replace(cluster, replicas_per_job=2)
    assert "cluster.replicas_per_job=2" in refused(deployment(shared, nodes=2))
    check(deployment(shared, nodes=1))


@pytest.mark.parametrize(
    ("nodes", "gpus", "options", "valid"),
    [
        (2, 4, {"tensor_parallel_size": 8}, True),
        (2, 4, {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}, True),
        (2, 4, {"tensor_parallel_size": 4}, False),
        (2, 0, {"device": "cpu", "tensor_parallel_size": 2}, True),
        (2, 0, {"device": "cpu", "pipeline_parallel_size": 2}, True),
        (2, 0, {"device": "cpu"}, False),
        (1, 0, {"device": "cpu", "tensor_parallel_size": 2}, True),
    ],
)
def test_ranks_match_the_nodes_and_gpus(nodes: int, gpus: int, options: dict[str, Any], valid: bool) -> None:
    made = deployment(replace(SLURM, exclusive=True), nodes=nodes, gpus=gpus, kind="vllm", options=options)
    if valid:
        check(made)
    else:
        assert "experts.math: tensor_parallel_size" in refused(made)


@pytest.mark.parametrize("fabric", ["ib0", "eth0.100", "10.1.0.0/16", "10.1.2.3", "fd00::/8", "fd00::1", "10.0.0.0/8"])
def test_a_fabric_is_an_interface_a_network_or_an_address(fabric: str) -> None:
    check_fabric(fabric)


@pytest.mark.parametrize(
    ("fabric", "message"),
    [
        ("10.1.2.3/16", "did you mean '10.1.0.0/16'?"),
        ("10.1.0.0/33", "valid: an interface such as ib0"),
        ("10.1.0", "valid: an interface such as ib0"),
        ("10.1.0.300", "valid: an interface such as ib0"),
        ("ib0 eth0", "valid: an interface such as ib0"),
        ("a-name-too-long-for-linux", "valid: an interface such as ib0"),
        ("", "is empty"),
    ],
)
def test_any_other_fabric_is_refused(fabric: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"^cluster\.fabric") as caught:
        check_fabric(fabric)
    assert message in str(caught.value)


def test_environments_have_names() -> None:
    wrong = deployment()
    wrong.experts["math"].engine.env = {"A-B": "x"}
    assert "experts.math.engine.env.A-B: cannot name a variable" in refused(wrong)
    wrong.experts["math"].engine.env = {"A": "two\nlines"}
    check(wrong)


@pytest.mark.parametrize("key", ["partition", "account", "qos", "reservation"])
def test_slurm_keys_without_kind_slurm_are_refused(key: str) -> None:
    """Otherwise the engines would start on the login node."""
    with pytest.raises(ConfigError, match=f"cluster.{key}=x: this key is for Slurm"):
        check(Deployment(cluster=replace(ClusterConfig(), **{key: "x"})))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"tls_cert": "/c.pem"}, "router.tls_key=null: HTTPS needs both router.tls_cert and router.tls_key"),
        ({"tls_key": "/k.pem"}, "router.tls_cert=null: HTTPS needs both router.tls_cert and router.tls_key"),
        ({"tls_cert": "c.pem", "tls_key": "/k.pem"}, "router.tls_cert=c.pem: not an absolute path"),
    ],
)
def test_https_needs_a_certificate_and_its_key(router: dict[str, Any], message: str) -> None:
    assert message in refused(replace(deployment(), router=RouterConfig(**router)))
    check(replace(deployment(), router=RouterConfig(tls_cert="/c.pem", tls_key="/k.pem")))


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"share_dir": "/s"}, "router.share_group=null: sharing needs both router.share_dir and router.share_group"),
        ({"share_group": "g"}, "router.share_dir=null: sharing needs both router.share_dir and router.share_group"),
        ({"share_dir": "s", "share_group": "g"}, "router.share_dir=s: not an absolute path"),
        ({"share_dir": "/s", "share_group": ""}, "router.share_group"),
        ({"share_dir": "/s", "share_group": "g", "open": True}, "router.open=true: a shared router needs tokens"),
    ],
)
def test_sharing_needs_a_folder_and_a_group(router: dict[str, Any], message: str) -> None:
    assert message in refused(replace(deployment(), router=RouterConfig(**router)))
    check(replace(deployment(), router=RouterConfig(share_dir="/s", share_group="1000")))


def elastic(**expert: Any) -> Deployment:
    own = ExpertConfig(model="m", engine=EngineConfig(kind="sim"), **expert)
    return Deployment(experts={"math": own}, policy=PolicyConfig(kind="model_field"))


@pytest.mark.parametrize(
    ("expert", "key"),
    [
        ({"replicas": 1, "min_replicas": 2}, "experts.math.min_replicas"),
        ({"replicas": 3, "max_replicas": 2}, "experts.math.max_replicas"),
        ({"replicas": 3, "min_replicas": 0, "max_replicas": 2}, "experts.math.max_replicas"),
    ],
)
def test_replicas_lie_between_their_limits(expert: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match="is outside of it") as raised:
        check(elastic(**expert))
    assert raised.value.key == key
    check(elastic(replicas=2, min_replicas=0, max_replicas=2))


def test_replicas_of_one_job_cannot_follow_the_demand() -> None:
    deployment = elastic(min_replicas=0)
    deployment.cluster.replicas_per_job = 2
    with pytest.raises(ConfigError, match="end together"):
        check(deployment)


def test_the_first_replicas_fit_into_the_gpu_limit() -> None:
    deployment = elastic(replicas=2, resources=ResourceConfig(gpus=2))
    deployment.cluster.gpus, deployment.cluster.max_gpus = 4, 3
    with pytest.raises(ConfigError, match=r"the replicas have 4 GPUs \(math 4;"):
        check(deployment)
    deployment.cluster.max_gpus = 4
    check(deployment)
