"""What can be refused before anything starts, and no single dataclass can see.

Every refusal names its key and what would have been valid. Nothing here looks at the machine: `cluster.plan` does.
"""

import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Final

from hpc_router.config import (
    EXPERT_NAME,
    POLICIES,
    RESERVED_NAMES,
    ClusterConfig,
    Deployment,
    ExpertConfig,
    RouterConfig,
    VllmOptions,
    options_of,
)
from hpc_router.errors import ConfigError, suggest

_RUN_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def check(deployment: Deployment) -> None:
    """Raises ConfigError."""
    if not _RUN_NAME.fullmatch(deployment.name):
        valid = "letters, digits, '.', '-' and '_', at most 63"
        raise ConfigError(f"name={deployment.name}: cannot name a run directory (valid: {valid})", key="name")
    _one_of("cluster.kind", deployment.cluster.kind, ("local",))
    _one_of("policy.kind", deployment.policy.kind, POLICIES)
    _check_cluster(deployment.cluster)
    check_router(deployment.router)
    _positive("policy.window", deployment.policy.window)
    for name, expert in deployment.experts.items():
        _check_expert(name, expert, deployment.cluster)
    if deployment.experts:
        check_fallback(deployment.policy.fallback, deployment.experts)
        _check_classifier(deployment)


def check_router(router: RouterConfig) -> None:
    if router.workers != 1:
        key = "router.workers"
        raise ConfigError(f"{key}={router.workers}: this version runs one worker (valid: 1)", key=key)
    if not 0 <= router.port <= 65535:
        key = "router.port"
        raise ConfigError(f"{key}={router.port}: not a port (valid: 0 to 65535; 0 takes a free one)", key=key)
    for item in fields(router):
        if item.name.endswith(("_s", "_mb")) or item.name == "max_in_flight":
            _positive(f"router.{item.name}", getattr(router, item.name))


def check_fallback(fallback: str | None, experts: Iterable[str]) -> None:
    names = list(experts)
    if fallback is not None and fallback not in names:
        key = "policy.fallback"
        raise ConfigError(f"{key}: no expert is named '{fallback}'{suggest(fallback, names)}", key=key)


def _check_cluster(cluster: ClusterConfig) -> None:
    for name in ("beat_s", "reconcile_s", "max_failures"):
        _positive(f"cluster.{name}", getattr(cluster, name))
    for name in ("gpus", "drain_s"):
        _not_negative(f"cluster.{name}", getattr(cluster, name))


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
    for key, whole in {"replicas": expert.replicas, "resources.gpus": expert.resources.gpus}.items():
        _not_negative(f"{at}.{key}", whole)
    for key, value in {
        "capacity": expert.capacity,
        "resources.nodes": expert.resources.nodes,
        "resources.cpus": expert.resources.cpus,
        "engine.startup_timeout_s": expert.engine.startup_timeout_s,
    }.items():
        _positive(f"{at}.{key}", value)
    options = options_of(name, expert.engine)
    if cluster.kind == "local" and expert.resources.nodes > 1:
        key = f"{at}.resources.nodes"
        raise ConfigError(f"{key}={expert.resources.nodes}: cluster=local is one node", key=key)
    if expert.resources.gpus > cluster.gpus:
        key = f"{at}.resources.gpus"
        raise ConfigError(f"{key}={expert.resources.gpus}: a node has cluster.gpus={cluster.gpus}", key=key)
    if isinstance(options, VllmOptions):
        _check_vllm(at, expert, options)


def _check_vllm(at: str, expert: ExpertConfig, options: VllmOptions) -> None:
    _one_of(f"{at}.engine.options.device", options.device, ("cuda", "cpu"))
    tensor, pipeline = options.tensor_parallel_size, options.pipeline_parallel_size
    _positive(f"{at}.engine.options.tensor_parallel_size", tensor)
    _positive(f"{at}.engine.options.pipeline_parallel_size", pipeline)
    nodes, gpus = expert.resources.nodes, expert.resources.gpus
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


def _not_negative(key: str, value: float) -> None:
    if value < 0:
        raise ConfigError(f"{key}={value}: cannot be negative", key=key)
