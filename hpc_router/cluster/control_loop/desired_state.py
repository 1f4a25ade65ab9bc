"""The desired state of a run: its frozen `config.yaml`, overridden by `desired.json`.

Commands change `desired.json`, and so does the leading control loop when it excludes a node. A lock lets one process at
a time change the file. If the file lacks a key, the value of the config applies.
"""

import getpass
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hpc_router import __version__
from hpc_router.cluster.control_loop.elastic_states import elastic_policies, read_states
from hpc_router.cluster.control_loop.handover import HandoverPolicy
from hpc_router.cluster.control_loop.reconcile import Desired
from hpc_router.cluster.control_loop.slots import Observed
from hpc_router.cluster.launchers.interface import ROUTER
from hpc_router.config import frozen
from hpc_router.config.adapters import host_of, hosts
from hpc_router.config.elastic import replica_limits
from hpc_router.config.parsing import bounds_of, check_values
from hpc_router.config.revision import revisions
from hpc_router.config.schema import Deployment, ExpertConfig
from hpc_router.errors import ConfigError, suggest
from hpc_router.router.settings import KEY, settings_in
from hpc_router.state.run_directory import RunDir


def deployment_of(run: RunDir) -> Deployment:
    """Returns the run's frozen config; an empty deployment for a run that has external endpoints only."""
    return frozen.read(run.config) if run.config.exists() else Deployment()


def readable_deployment(run: RunDir) -> Deployment:
    """Returns the run's frozen config. If the config is damaged or of another version of this package, returns a
    deployment with default values only, because the run's router may serve nevertheless."""
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
    """Returns the desired state of a run: the config in `deployment`, with the overrides in `desired.json`."""
    desired = run.read_desired()
    replicas = {name: expert.replicas for name, expert in hosts(deployment.experts).items()}
    bounds = bounds_of(ExpertConfig, "replicas")
    assert bounds is not None
    replicas |= {n: c for n, c in _counts(desired.get("replicas")).items() if n in replicas and bounds.contains(c)}
    policies = elastic_policies(deployment, replicas)
    states = {} if not policies else read_states(run, policies, scaled_times(desired))
    replicas |= {name: state.replicas for name, state in states.items()}
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
        excluded=tuple(sorted(_exclusions(desired))),
        elastic=states,
        gpus=gpus_by_expert(deployment),
        max_gpus=deployment.cluster.max_gpus,
        down_when_idle_s=_number(desired.get("down_when_idle_s")),
        idle_from=_number(desired.get("idle_from")) or 0.0,
    )


def gpus_by_expert(deployment: Deployment) -> dict[str, int]:
    """Returns, for each expert with jobs of its own and for the router, the number of GPUs of one replica."""
    resources = {name: expert.resources for name, expert in hosts(deployment.experts).items()}
    return {name: own.total_gpus for name, own in {**resources, ROUTER: deployment.router.resources}.items()}


def scaled_times(desired: Mapping[str, Any]) -> dict[str, float]:
    """Returns for each expert when `scale`, or `up` after `down`, last set its number of replicas (Unix seconds).
    `desired`: the content of `desired.json`."""
    value = desired.get("scaled_at")
    items = value.items() if isinstance(value, dict) else ()
    return {str(name): float(at) for name, at in items if isinstance(at, int | float)}


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
    """Yields the experts, and the router, whose old job can run at the same time as a new one when the config
    changes."""
    cluster, router = deployment.cluster, deployment.router
    if cluster.kind == "slurm":
        yield from (name for name, policy in handover_policies(deployment).items() if policy.mode == "overlap")
        return
    if not router.port:
        yield ROUTER
    if cluster.kind == "local":
        yield from (name for name, expert in hosts(deployment.experts).items() if not expert.resources.gpus)


def want_config(
    run: RunDir, before: Deployment, after: Deployment, observed: Observed, *, changed: Collection[str]
) -> None:
    """Records in `desired.json` that `apply` replaces the config `before` by `after`. Jobs of another revision are then
    outdated, and earlier failures no longer count. A replica count set by `scale` stays unless the new config changes
    that count, and a value set by `set` stays unless its key is in `changed`."""
    unchanged = {
        name
        for name in before.experts.keys() & after.experts.keys()
        if before.experts[name].replicas == after.experts[name].replicas
    }

    def changes(desired: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: count for name, count in _counts(desired.get("replicas")).items() if name in unchanged}
        settings = {key: value for key, value in settings_in(desired).items() if key not in changed}
        wanted = {"revisions": revisions(after), "version": __version__}
        return {**wanted, "replicas": kept, KEY: settings, "forgiven": _newest_ended(observed)}

    run.change_desired(changes)


def version_of(run: RunDir) -> str | None:
    """Returns the version of this package to which the last `apply` moved the run; None if there was no `apply`."""
    version = run.read_desired().get("version")
    return version if isinstance(version, str) else None


def _standby(deployment: Deployment) -> bool:
    """Returns whether the router gets a standby. Only Slurm can start a job when another job ends, and only a router
    whose job runs the control loop needs a standby."""
    router = deployment.router
    return deployment.cluster.kind == "slurm" and router.place == "job" and router.standby and router.reconcile


def want_up(run: RunDir, observed: Observed) -> None:
    """Records in `desired.json` that the run must have a router, and that earlier failures no longer count."""
    forgiven, now = _newest_ended(observed), round(time.time(), 3)

    def changes(desired: Mapping[str, Any]) -> dict[str, Any]:
        wanted = {"router": True, "down": False, "forgiven": forgiven, "down_when_idle_s": None}
        if desired.get("down") is True:  # elastic experts start again with their configured replicas
            wanted["scaled_at"] = dict.fromkeys({slot.expert for slot in observed}, now)
        return wanted

    run.change_desired(changes)


def want_down(run: RunDir) -> None:
    """Records in `desired.json` that the run must have no jobs."""
    run.change_desired(lambda _: {"down": True})


def want_down_when_idle(run: RunDir, idle_s: float) -> None:
    """Records in `desired.json` that the leading control loop must take the run down after `idle_s` seconds without a
    request. The time before this call does not count. `up` removes this entry."""
    now = round(time.time(), 3)
    run.change_desired(lambda _: {"down_when_idle_s": idle_s, "idle_from": now})


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def scale(run: RunDir, deployment: Deployment, counts: Mapping[str, int], observed: Observed) -> None:
    """Writes the replica counts of the experts in `counts` to `desired.json`. Earlier failures then no longer count.
    Raises ConfigError for an unknown expert, an adapter, or an invalid count."""
    check_counts(deployment, counts)
    forgiven = _newest_ended(observed)
    now = round(time.time(), 3)
    run.change_desired(
        lambda desired: {
            "replicas": _counts(desired.get("replicas")) | dict(counts),
            "scaled_at": scaled_times(desired) | dict.fromkeys(counts, now),
            "forgiven": forgiven,
        }
    )


def check_counts(deployment: Deployment, counts: Mapping[str, int]) -> None:
    """Raises ConfigError if `counts` has an unknown expert, an adapter, or an invalid count."""
    for name, count in counts.items():
        if name not in deployment.experts:
            raise ConfigError(f"scale: no expert is named '{name}'{suggest(name, deployment.experts)}")
        host = host_of(deployment.experts, name)
        if host != name:
            raise ConfigError(f"scale: {name} is an adapter on the engine of {host}; scale that: {host}={count}")
        expert = deployment.experts[name]
        check_values(replace(expert, replicas=count), at=f"experts.{name}")
        low, high = replica_limits(expert)
        if low < high and not low <= count <= high:
            raise ConfigError(
                f"scale: {name}={count} is outside of experts.{name}.min_replicas={low} and max_replicas={high}: the "
                "number of its replicas follows the demand between them; `hpc-router apply` changes these keys"
            )


def with_desired_counts(deployment: Deployment, desired: Desired) -> Deployment:
    """Returns the deployment with the desired replica counts."""
    return with_counts(deployment, desired.replicas)


def with_counts(deployment: Deployment, counts: Mapping[str, int]) -> Deployment:
    """Returns the deployment with these replica counts by expert. Other experts keep their count."""
    experts = {name: replace(e, replicas=counts.get(name, e.replicas)) for name, e in deployment.experts.items()}
    return replace(deployment, experts=experts)


def excluded_nodes(run: RunDir) -> tuple[str, ...]:
    """Returns the names of the nodes on which no new job may start."""
    return tuple(sorted(node_exclusions(run)))


def node_exclusions(run: RunDir) -> dict[str, Any]:
    """Returns for each excluded node the `reason`, `by` (who excluded it) and `at` (Unix seconds)."""
    return _exclusions(run.read_desired())


def _exclusions(desired: Mapping[str, Any]) -> dict[str, Any]:
    value = desired.get("excluded_nodes")
    return {str(node): facts for node, facts in value.items()} if isinstance(value, dict) else {}


def forgotten_nodes(run: RunDir) -> dict[str, float]:
    """Returns node -> Unix time at which its exclusion was last ended. Failures of the node before that time no longer
    count."""
    return _forgotten(run.read_desired())


def _forgotten(desired: Mapping[str, Any]) -> dict[str, float]:
    value = desired.get("forgotten_nodes")
    items = value.items() if isinstance(value, dict) else ()
    return {str(node): float(at) for node, at in items if isinstance(at, int | float)}


def exclude_nodes(run: RunDir, nodes: Sequence[str], *, reason: str, by: str | None = None) -> None:
    """Keeps new jobs off these nodes. `by`: the user or program that excludes them (default: this user)."""
    facts = {"reason": reason, "by": by or getpass.getuser(), "at": round(time.time(), 3)}
    new: list[str] = []

    def changes(desired: Mapping[str, Any]) -> dict[str, Any]:
        known = _exclusions(desired)
        new.extend(node for node in nodes if node not in known)
        return {"excluded_nodes": {**dict.fromkeys(new, facts), **known}}

    run.change_desired(changes)
    for node in new:
        run.event("node_excluded", node=node, reason=reason, by=facts["by"])


def include_nodes(run: RunDir, nodes: Sequence[str]) -> None:
    """Lets jobs start on these nodes again. Raises ConfigError for a node that is not excluded."""

    def changes(desired: Mapping[str, Any]) -> dict[str, Any]:
        known = _exclusions(desired)
        for node in nodes:
            if node not in known:
                raise ConfigError(f"node {node} is not excluded{suggest(node, sorted(known))}")
        left = {node: facts for node, facts in known.items() if node not in nodes}
        return {"excluded_nodes": left, "forgotten_nodes": {**_forgotten(desired), **dict.fromkeys(nodes, now)}}

    now = round(time.time(), 3)
    run.change_desired(changes)


def _newest_ended(observed: Observed) -> dict[str, int]:
    """Returns for each slot the newest generation that is not live."""
    over = {str(slot): [a.generation for a in attempts if not a.live] for slot, attempts in observed.items()}
    return {slot: max(generations) for slot, generations in over.items() if generations}


def _texts(value: object) -> dict[str, str]:
    """Returns the entries of a JSON object whose values are texts; empty if `value` is not an object."""
    return {str(k): v for k, v in value.items() if isinstance(v, str)} if isinstance(value, dict) else {}


def _counts(value: object) -> dict[str, int]:
    """Returns the entries of a JSON object whose values are whole numbers of at least 0. Skips other entries, so that a
    mistake in a hand-edited file does not end the control loop."""
    if not isinstance(value, dict):
        return {}
    return {str(k): v for k, v in value.items() if isinstance(v, int) and not isinstance(v, bool) and v >= 0}
