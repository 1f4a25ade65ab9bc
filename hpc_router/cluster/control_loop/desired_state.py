"""The desired state of a run: its frozen `config.yaml`, overridden by `desired.json`.

Commands write `desired.json`, and so does the leading loop when it excludes a node. Each write is one atomic replace,
and the last writer wins. If the file lacks a key, the value of the config applies.
"""

import getpass
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hpc_router import __version__
from hpc_router.cluster.control_loop.handover import HandoverPolicy
from hpc_router.cluster.control_loop.reconcile import Desired
from hpc_router.cluster.control_loop.slots import Observed
from hpc_router.cluster.launchers.interface import ROUTER
from hpc_router.config import frozen
from hpc_router.config.adapters import host_of, hosts
from hpc_router.config.parsing import bounds_of, check_values
from hpc_router.config.revision import revisions
from hpc_router.config.schema import Deployment, ExpertConfig
from hpc_router.errors import ConfigError, suggest
from hpc_router.state.run_directory import RunDir


def deployment_of(run: RunDir) -> Deployment:
    """Returns the run's frozen config; an empty deployment for a run that has external endpoints only."""
    return frozen.read(run.config) if run.config.exists() else Deployment()


def readable_deployment(run: RunDir) -> Deployment:
    """Returns the run's frozen config, or the defaults if the config is damaged or of another version, because the
    run's router may serve nevertheless."""
    try:
        return deployment_of(run)
    except ConfigError:
        return Deployment()


def host_expert(run: RunDir, name: str) -> str:
    """Returns the expert whose engine serves the adapter `name`. Returns `name` itself if it is not an adapter, or if
    the config cannot be read."""
    try:
        experts = deployment_of(run).experts
    except ConfigError:
        return name
    return host_of(experts, name) if name in experts else name


def desired_of(run: RunDir, deployment: Deployment) -> Desired:
    """Returns the desired state: the config with the overrides in `desired.json`."""
    desired = run.read_desired()
    replicas = {name: expert.replicas for name, expert in hosts(deployment.experts).items()}
    bounds = bounds_of(ExpertConfig, "replicas")
    assert bounds is not None
    replicas |= {n: c for n, c in _counts(desired.get("replicas")).items() if n in replicas and bounds.contains(c)}
    return Desired(
        replicas=replicas,
        router=desired.get("router") is True,
        standby=_standby(deployment),
        down=desired.get("down") is True,
        forgiven=_counts(desired.get("forgiven")),
        max_failures=deployment.cluster.max_failures,
        drain_s=deployment.cluster.drain_s,
        router_drain_s=deployment.router.drain_s,
        handovers=handover_policies(deployment),
        revisions=_texts(desired.get("revisions")),
        overlapping=frozenset(_overlapping(deployment)),
    )


def handover_policies(deployment: Deployment) -> dict[str, HandoverPolicy]:
    """Returns the handover policy of each expert, and of the router if its job runs the control loop. Empty if the jobs
    are not Slurm jobs, because only Slurm jobs have a walltime."""
    cluster, router = deployment.cluster, deployment.router
    if cluster.kind != "slurm":
        return {}
    common = HandoverPolicy(cluster.handover, cluster.handover_margin_s, cluster.warn_s, cluster.drain_s)
    policies = {
        name: replace(common, mode=expert.handover or cluster.handover)
        for name, expert in hosts(deployment.experts).items()
    }
    if router.place == "job" and router.reconcile and not router.port:  # two routers cannot have the same port
        policies[ROUTER] = replace(common, drain_s=router.drain_s)
    return policies


def _overlapping(deployment: Deployment) -> Iterator[str]:
    """Yields the experts, and the router, for which an old and a new job can run at the same time when the config
    changes."""
    cluster, router = deployment.cluster, deployment.router
    if cluster.kind == "slurm":
        yield from (name for name, policy in handover_policies(deployment).items() if policy.mode == "overlap")
        return
    if not router.port:
        yield ROUTER
    if cluster.kind == "local":
        yield from (name for name, expert in hosts(deployment.experts).items() if not expert.resources.gpus)


def want_config(run: RunDir, before: Deployment, after: Deployment, observed: Observed) -> None:
    """Records that `apply` has replaced the config `before` by `after`. Jobs of another revision are then outdated, and
    earlier failures no longer count. A replica count set by `scale` stays unless the new config changes that count."""
    scaled = _counts(run.read_desired().get("replicas"))
    kept = {
        name: count
        for name, count in scaled.items()
        if name in before.experts
        and name in after.experts
        and before.experts[name].replicas == after.experts[name].replicas
    }
    _update(run, revisions=revisions(after), version=__version__, replicas=kept, forgiven=_newest_ended(observed))


def version_of(run: RunDir) -> str | None:
    """Returns the version of this package that `apply` moved the run to; None if it was never applied."""
    version = run.read_desired().get("version")
    return version if isinstance(version, str) else None


def _standby(deployment: Deployment) -> bool:
    """Returns whether the router gets a standby. Only Slurm can start a job when another job ends, and only a router
    whose job runs the control loop needs a standby."""
    router = deployment.router
    return deployment.cluster.kind == "slurm" and router.place == "job" and router.standby and router.reconcile


def want_up(run: RunDir, observed: Observed) -> None:
    """Records that `up` wants the router, and that earlier failures no longer count."""
    _update(run, router=True, down=False, forgiven=_newest_ended(observed))


def want_down(run: RunDir) -> None:
    """Records that the run must have no jobs."""
    _update(run, down=True)


def scale(run: RunDir, deployment: Deployment, counts: Mapping[str, int], observed: Observed) -> None:
    """Sets these replica counts. Raises ConfigError for an expert that the run does not have."""
    check_counts(deployment, counts)
    before = _counts(run.read_desired().get("replicas"))
    _update(run, replicas=before | dict(counts), forgiven=_newest_ended(observed))


def check_counts(deployment: Deployment, counts: Mapping[str, int]) -> None:
    """Raises ConfigError for an unknown expert, an adapter, or an invalid count."""
    for name, count in counts.items():
        if name not in deployment.experts:
            raise ConfigError(f"scale: no expert is named '{name}'{suggest(name, deployment.experts)}")
        host = host_of(deployment.experts, name)
        if host != name:
            raise ConfigError(f"scale: {name} is an adapter on the engine of {host}; scale that: {host}={count}")
        check_values(replace(deployment.experts[name], replicas=count), at=f"experts.{name}")


def with_desired_counts(deployment: Deployment, desired: Desired) -> Deployment:
    """Returns the deployment with the desired replica counts."""
    return with_counts(deployment, desired.replicas)


def with_counts(deployment: Deployment, counts: Mapping[str, int]) -> Deployment:
    """Returns the deployment with these replica counts."""
    experts = {name: replace(e, replicas=counts.get(name, e.replicas)) for name, e in deployment.experts.items()}
    return replace(deployment, experts=experts)


def excluded_nodes(run: RunDir) -> tuple[str, ...]:
    """Returns the names of the nodes on which no new job may start."""
    return tuple(sorted(node_exclusions(run)))


def node_exclusions(run: RunDir) -> dict[str, Any]:
    """Returns the excluded nodes, each with `reason`, `by` and `at`."""
    value = run.read_desired().get("excluded_nodes")
    return {str(node): facts for node, facts in value.items()} if isinstance(value, dict) else {}


def forgotten_nodes(run: RunDir) -> dict[str, float]:
    """Returns for each node the Unix time up to which its failures no longer count, because it was then allowed
    again."""
    value = run.read_desired().get("forgotten_nodes")
    items = value.items() if isinstance(value, dict) else ()
    return {str(node): float(at) for node, at in items if isinstance(at, int | float)}


def exclude_nodes(run: RunDir, nodes: Sequence[str], *, reason: str, by: str | None = None) -> None:
    """Excludes the nodes from new jobs. `by`: the user or program that excludes them (default: this user)."""
    facts = {"reason": reason, "by": by or getpass.getuser(), "at": round(time.time(), 3)}
    known = node_exclusions(run)
    _update(run, excluded_nodes={**dict.fromkeys(nodes, facts), **known})
    for node in nodes:
        if node not in known:
            run.event("node_excluded", node=node, reason=reason, by=facts["by"])


def include_nodes(run: RunDir, nodes: Sequence[str]) -> None:
    """Lets jobs start on these nodes again. Raises ConfigError for a node that is not excluded."""
    known = excluded_nodes(run)
    for node in nodes:
        if node not in known:
            raise ConfigError(f"node {node} is not excluded{suggest(node, known)}")
    left = {node: facts for node, facts in node_exclusions(run).items() if node not in nodes}
    forgotten = {**forgotten_nodes(run), **dict.fromkeys(nodes, round(time.time(), 3))}
    _update(run, excluded_nodes=left, forgotten_nodes=forgotten)


def _update(run: RunDir, **desired: Any) -> None:
    run.write_desired({**run.read_desired(), **desired})


def _newest_ended(observed: Observed) -> dict[str, int]:
    """Returns for each slot its newest generation that is not live."""
    over = {str(slot): [a.generation for a in attempts if not a.live] for slot, attempts in observed.items()}
    return {slot: max(generations) for slot, generations in over.items() if generations}


def _texts(value: object) -> dict[str, str]:
    """Returns the entries of a JSON object that are texts."""
    return {str(k): v for k, v in value.items() if isinstance(v, str)} if isinstance(value, dict) else {}


def _counts(value: object) -> dict[str, int]:
    """Returns the entries of a JSON object that are whole numbers. Skips others, so that a mistake in a hand-edited
    file does not end the loop."""
    if not isinstance(value, dict):
        return {}
    return {str(k): v for k, v in value.items() if isinstance(v, int) and not isinstance(v, bool) and v >= 0}
