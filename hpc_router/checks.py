"""What can be refused before anything starts, and no single dataclass can see.

Every refusal names its key and what would have been valid. Nothing here looks at the machine: `cluster.plan` does.
"""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Final

from hpc_router.adapters import check_adapter
from hpc_router.config import (
    CLUSTERS,
    EXPERT_NAME,
    GPU_REQUESTS,
    PLACES,
    POLICIES,
    RESERVED_NAMES,
    ClusterConfig,
    Deployment,
    ExpertConfig,
    ResourceConfig,
    RouterConfig,
    VllmOptions,
    options_of,
)
from hpc_router.errors import ConfigError, suggest
from hpc_router.job_options import check_environment, check_options, check_script, filled

MOST_WORKERS: Final = 256
_RUN_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_INTERFACE: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.:@-]{0,14}")
_COUNTS: Final = ("max_in_flight", "max_waiting", "eject_connect_errors", "eject_errors")
_SPANS_NODES: Final = ("vllm", "sim")
"""Engines that one replica can run on several nodes."""


def check(deployment: Deployment) -> None:
    """Raises ConfigError."""
    if not _RUN_NAME.fullmatch(deployment.name):
        valid = "letters, digits, '.', '-' and '_', at most 63"
        raise ConfigError(f"name={deployment.name}: cannot name a run directory (valid: {valid})", key="name")
    filled("runs", deployment.runs)
    _one_of("policy.kind", deployment.policy.kind, POLICIES)
    _check_cluster(deployment.cluster)
    check_router(deployment.router)
    _check_router_job(deployment.router.resources, deployment.cluster)
    _positive("policy.window", deployment.policy.window)
    if deployment.policy.spill_per_s is not None:
        _positive("policy.spill_per_s", deployment.policy.spill_per_s)
    for name, expert in deployment.experts.items():
        if expert.adapter_of is not None:
            check_adapter(name, deployment.experts)
        _check_expert(name, expert, deployment.cluster)
    if deployment.experts:
        check_fallback(deployment.policy.fallback, deployment.experts)
        _check_classifier(deployment)


def check_router(router: RouterConfig) -> None:
    _one_of("router.place", router.place, PLACES)
    if router.host is not None:
        filled("router.host", router.host)
    if router.workers is not None and not 1 <= router.workers <= MOST_WORKERS:
        key = "router.workers"
        raise ConfigError(f"{key}={router.workers}: valid are 1 to {MOST_WORKERS}", key=key)
    if not 0 <= router.port <= 65535:
        key = "router.port"
        raise ConfigError(f"{key}={router.port}: not a port (valid: 0 to 65535; 0 takes a free one)", key=key)
    for item in fields(router):
        if item.name.endswith(("_s", "_mb")) or item.name in _COUNTS:
            _positive(f"router.{item.name}", getattr(router, item.name))
    for name in ("eject_share", "retry_share"):
        if not 0 <= getattr(router, name) <= 1:
            key = f"router.{name}"
            raise ConfigError(f"{key}={getattr(router, name):g}: not a share (valid: 0 to 1)", key=key)
    if router.eject_most_s < router.eject_s:
        key = "router.eject_most_s"
        valid = f"router.eject_s={router.eject_s:g} or more"
        raise ConfigError(f"{key}={router.eject_most_s:g}: less than the first time (valid: {valid})", key=key)
    if router.pin_bound is not None and not router.pin_bound >= 1:
        key = "router.pin_bound"
        valid = "1 or more, times the average load of an expert's replicas; null pins nothing"
        raise ConfigError(f"{key}={router.pin_bound:g}: out of range (valid: {valid})", key=key)


def check_fallback(fallback: str | None, experts: Iterable[str]) -> None:
    names = list(experts)
    if fallback is not None and fallback not in names:
        key = "policy.fallback"
        raise ConfigError(f"{key}: no expert is named '{fallback}'{suggest(fallback, names)}", key=key)


def check_fabric(fabric: str) -> None:
    """An interface, a network or an address, whether a node has it or not."""
    key, valid = "cluster.fabric", "an interface such as ib0, a network such as 10.1.0.0/16, an address"
    filled(key, fabric)
    try:
        nearest = str(ipaddress.ip_network(fabric, strict=False))
    except ValueError as error:
        if _INTERFACE.fullmatch(fabric):
            return
        raise ConfigError(f"{key}={fabric}: {error} (valid: {valid})", key=key) from error
    if "/" in fabric and nearest.partition("/")[0] != str(ipaddress.ip_interface(fabric).ip):
        said = f"has bits beyond its mask; did you mean '{nearest}'? (valid: {valid})"
        raise ConfigError(f"{key}={fabric}: {said}", key=key)


def _check_cluster(cluster: ClusterConfig) -> None:
    _one_of("cluster.kind", cluster.kind, CLUSTERS)
    _one_of("cluster.gpu_request", cluster.gpu_request, GPU_REQUESTS)
    for name in ("beat_s", "reconcile_s", "ask_s", "max_failures", "replicas_per_job"):
        _positive(f"cluster.{name}", getattr(cluster, name))
    for name in ("gpus", "drain_s", "warn_s"):
        _not_negative(f"cluster.{name}", getattr(cluster, name))
    if cluster.fabric is not None:
        check_fabric(cluster.fabric)
    if cluster.kind == "local":
        _check_no_slurm(cluster)
    check_options("cluster", cluster, warn_s=cluster.warn_s)
    check_script(cluster)


def _check_no_slurm(cluster: ClusterConfig) -> None:
    """A site's file that forgets `kind: slurm` would start its engines on the login node."""
    for name in ("partition", "account", "qos", "reservation"):
        if getattr(cluster, name) is not None:
            key = f"cluster.{name}"
            raise ConfigError(
                f"{key}={getattr(cluster, name)}: this is a key of Slurm, and cluster.kind is local; set `kind: slurm`",
                key=key,
            )


def _check_router_job(resources: ResourceConfig, cluster: ClusterConfig) -> None:
    _check_resources("router.resources", resources, cluster)
    if resources.nodes != 1:
        key = "router.resources.nodes"
        raise ConfigError(f"{key}={resources.nodes}: a router runs on one node (valid: 1)", key=key)


def _check_resources(at: str, resources: ResourceConfig, cluster: ClusterConfig) -> None:
    """What each of router and experts asks for, by itself."""
    _not_negative(f"{at}.gpus", resources.gpus)
    for name in ("nodes", "cpus"):
        _positive(f"{at}.{name}", getattr(resources, name))
    if resources.memory_gb is not None:
        _positive(f"{at}.memory_gb", resources.memory_gb)
    check_options(at, resources, warn_s=cluster.warn_s)
    have = 0 if cluster.gpus is None and cluster.kind == "local" else cluster.gpus
    if have is not None and resources.gpus > have:
        raise ConfigError(f"{at}.gpus={resources.gpus}: a node has cluster.gpus={have}", key=f"{at}.gpus")


def _check_classifier(deployment: Deployment) -> None:
    if deployment.policy.kind != "classifier" or deployment.policy.artefact is not None:
        return
    taught = [name for name, expert in deployment.experts.items() if expert.exemplars]
    if len(taught) < 2:
        raise ConfigError(
            "policy=classifier needs policy.artefact=DIR or exemplars of at least two experts; "
            f"exemplars were given for: {', '.join(taught) or 'none'} (policy=model_field needs neither)"
        )


def _check_expert(name: str, expert: ExpertConfig, cluster: ClusterConfig) -> None:
    at = f"experts.{name}"
    if not EXPERT_NAME.fullmatch(name) or name in RESERVED_NAMES:
        raise ConfigError(
            f"{at}: '{name}' cannot name an expert (valid: lower-case letters, digits, '-' and '_', at most 63, "
            f"not {' or '.join(sorted(RESERVED_NAMES))})",
            key=at,
        )
    if not expert.model:
        raise ConfigError(f"{at}.model is empty (valid: a model folder or a hub id)", key=f"{at}.model")
    _not_negative(f"{at}.replicas", expert.replicas)
    _positive(f"{at}.capacity", expert.capacity)
    if expert.max_in_flight is not None:
        _positive(f"{at}.max_in_flight", expert.max_in_flight)
    _positive(f"{at}.engine.startup_timeout_s", expert.engine.startup_timeout_s)
    check_environment(f"{at}.engine.env", expert.engine.env)
    _check_resources(f"{at}.resources", expert.resources, cluster)
    if expert.adapter_of is not None:
        return
    options = options_of(name, expert.engine)
    if expert.resources.nodes > 1:
        _check_several_nodes(at, expert, cluster)
    if isinstance(options, VllmOptions):
        _check_vllm(at, expert, options)


def _check_several_nodes(at: str, expert: ExpertConfig, cluster: ClusterConfig) -> None:
    key, nodes, kind = f"{at}.resources.nodes", expert.resources.nodes, expert.engine.kind
    if cluster.kind == "local":
        raise ConfigError(f"{key}={nodes}: cluster=local is one node", key=key)
    if kind not in _SPANS_NODES:
        valid = f"1, or engine.kind {' or '.join(_SPANS_NODES)}"
        raise ConfigError(f"{key}={nodes}: the engine '{kind}' does not span nodes (valid: {valid})", key=key)
    if cluster.replicas_per_job > 1:
        said = f"cluster.replicas_per_job={cluster.replicas_per_job} puts several replicas on one node"
        raise ConfigError(f"{key}={nodes}: {said} (valid: one of the two is 1)", key=key)
    own = expert.resources.exclusive
    if not (cluster.exclusive if own is None else own) and not cluster.trusted_network:
        raise ConfigError(
            f"{key}={nodes}: an engine's ranks talk to each other without authentication, so on shared nodes any user "
            f"could join in (valid: {at}.resources.exclusive=true for whole nodes, or cluster.trusted_network=true "
            f"where everybody on the network is trusted)",
            key=key,
        )


def _check_vllm(at: str, expert: ExpertConfig, options: VllmOptions) -> None:
    _one_of(f"{at}.engine.options.device", options.device, ("cuda", "cpu"))
    tensor, pipeline = options.tensor_parallel_size, options.pipeline_parallel_size
    _positive(f"{at}.engine.options.tensor_parallel_size", tensor)
    _positive(f"{at}.engine.options.pipeline_parallel_size", pipeline)
    if options.max_loras is not None:
        _positive(f"{at}.engine.options.max_loras", options.max_loras)
    nodes, gpus = expert.resources.nodes, expert.resources.gpus
    if options.device == "cpu" and nodes > 1 and tensor * pipeline != nodes:
        raise ConfigError(
            f"{at}: tensor_parallel_size {tensor} x pipeline_parallel_size {pipeline} = {tensor * pipeline} ranks, but "
            f"{at}.resources.nodes={nodes}, and on CPUs each node runs one; make them equal",
            key=f"{at}.engine.options",
        )
    if options.device == "cuda" and tensor * pipeline != nodes * gpus:
        raise ConfigError(
            f"{at}: tensor_parallel_size {tensor} x pipeline_parallel_size {pipeline} = {tensor * pipeline} GPUs, but "
            f"{at}.resources ask for {nodes} node(s) x {gpus} GPUs = {nodes * gpus}; make them equal",
            key=f"{at}.engine.options",
        )


def _one_of(key: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigError(f"{key}={value}: not known{suggest(value, valid)}", key=key)


def _positive(key: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{key}={value}: must be above 0", key=key)


def _not_negative(key: str, value: float | None) -> None:
    if value is not None and value < 0:
        raise ConfigError(f"{key}={value}: cannot be negative", key=key)
