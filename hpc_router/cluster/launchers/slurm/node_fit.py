"""Whether a deployment fits a site: which of its wishes no node can fulfil, before anything is submitted.

Each fault is a line with the key at which the value stands: an expert's own, or the cluster's. What `sinfo` does not
show (accounts, limits of a qos, a site's own rules) only a trial tells: `cluster.trial`. Pure.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hpc_router.cluster.launchers.interface import ROUTER
from hpc_router.cluster.launchers.slurm.sinfo import NodeKind, Partition, SlurmSite
from hpc_router.config.adapters import hosts
from hpc_router.config.schema import ClusterConfig, Deployment, ResourceConfig
from hpc_router.config.walltime import clock, walltime_s
from hpc_router.errors import suggest


def configured_at(at: str, resources: ResourceConfig, cluster: ClusterConfig, name: str) -> tuple[str, str | None]:
    own, general = getattr(resources, name), getattr(cluster, name)
    if own is not None:
        return f"{at}.{name}", str(own)
    return f"cluster.{name}", None if general is None else str(general)


def resources_of(deployment: Deployment, expert: str) -> tuple[str, ResourceConfig]:
    """Where they stand in the config, and they themselves; `expert` may be the router."""
    if expert == ROUTER:
        return "router.resources", deployment.router.resources
    return f"experts.{expert}.resources", deployment.experts[expert].resources


def site_faults(deployment: Deployment, site: SlurmSite) -> list[str]:
    """One line for each wish that no node can fulfil; equal ones, where the value is the cluster's, once."""
    faults = [fault for wish in _requests(deployment) for fault in _faults(wish, site)]
    return list(dict.fromkeys(faults))


def site_warnings(deployment: Deployment, site: SlurmSite) -> list[str]:
    """What would be taken and then waits."""
    told = []
    for wish in _requests(deployment):
        for partition in _partitions(wish, site):
            if partition.state != "up":
                told.append(f"partition {partition.name} is {partition.state}: its jobs wait until it is up again")
            elif not any(kind.usable for kind in partition.kinds):
                states = ", ".join(sorted({kind.state for kind in partition.kinds})) or "it has none"
                told.append(f"no node of partition {partition.name} can run jobs now ({states})")
    return [*dict.fromkeys(told), *capacity_warnings(deployment, site)]


def capacity_warnings(deployment: Deployment, site: SlurmSite) -> list[str]:
    """Experts whose replicas need more GPUs than their partitions have, however long they wait."""
    told = []
    for name, expert in hosts(deployment.experts).items():
        wish = _Request(*resources_of(deployment, name), deployment.cluster, 1)
        each = wish.resources.gpus * wish.resources.nodes
        partitions = _partitions(wish, site)
        gpu_type = wish.option("gpu_type")[1]
        have = sum(kind.nodes * kind.gpus_of(gpu_type) for p in partitions for kind in p.kinds if _fits(wish, kind))
        if partitions and have < each * expert.replicas:
            called = " or ".join(partition.name for partition in partitions)
            told.append(
                f"{name}: {expert.replicas} replicas need {each * expert.replicas} GPUs, partition {called} has {have} "
                f"that fit: {expert.replicas - have // each} of them can never run beside the others"
            )
    return told


@dataclass(frozen=True, slots=True)
class _Request:
    """What the router or one replica asks for; `together`: so many replicas share a node."""

    at: str
    resources: ResourceConfig
    cluster: ClusterConfig
    together: int

    def option(self, name: str) -> tuple[str, str | None]:
        """The key at which the value stands, and the value."""
        return configured_at(self.at, self.resources, self.cluster, name)

    def size(self, name: str, unit: str) -> str:
        """A size as it was written, with what a shared job makes of it."""
        key, value = f"{self.at}.{name}", getattr(self.resources, name)
        if self.together == 1:
            return f"{key}={value:g}"
        return f"{key}={value:g}: {self.together} replicas in one job need {value * self.together:g} {unit} per node"


def _requests(deployment: Deployment) -> Iterator[_Request]:
    if deployment.router.place == "job":
        yield _Request(*resources_of(deployment, ROUTER), deployment.cluster, 1)
    for name, expert in hosts(deployment.experts).items():
        together = min(deployment.cluster.replicas_per_job, max(1, expert.replicas))
        yield _Request(*resources_of(deployment, name), deployment.cluster, together)


def _partition_names(wish: _Request, site: SlurmSite) -> list[str]:
    """The partitions that it names, or the default one."""
    _, value = wish.option("partition")
    return value.split(",") if value is not None else [site.default] if site.default is not None else []


def _partitions(wish: _Request, site: SlurmSite) -> list[Partition]:
    return [site.partitions[name] for name in _partition_names(wish, site) if name in site.partitions]


def _faults(wish: _Request, site: SlurmSite) -> Iterator[str]:
    key, value = wish.option("partition")
    unknown = [name for name in _partition_names(wish, site) if name not in site.partitions]
    for name in unknown:
        yield f"{key}={value}: no partition is named '{name}'{suggest(name, site.partitions)}"
    if unknown:
        return
    # where there is no default partition a submit plugin may choose one: only what none of them has is a fault
    yield from _request_faults(wish, _partitions(wish, site) or list(site.partitions.values()))


def _request_faults(wish: _Request, partitions: Sequence[Partition]) -> Iterator[str]:
    """What none of these partitions can fulfil."""
    called = f"partition {' or '.join(partition.name for partition in partitions)}"
    kinds = [kind for partition in partitions for kind in partition.kinds]
    alone = [*_size_faults(wish, kinds, called), *_constraint_faults(wish, kinds, called)]
    yield from alone
    yield from _walltime_faults(wish, partitions, called)
    if not alone:
        yield from _together_faults(wish, partitions, called)


def _size_faults(wish: _Request, kinds: Sequence[NodeKind], called: str) -> Iterator[str]:
    """Each size by itself."""
    asked = wish.resources
    type_key, gpu_type = wish.option("gpu_type")
    most = max((kind.gpus_of(gpu_type) for kind in kinds), default=0)
    if asked.gpus and gpu_type is not None and most == 0:
        types = {kind for node in kinds for kind in node.gpus if kind}
        yield f"{type_key}={gpu_type}: no node of {called} has such GPUs{suggest(gpu_type, types)}"
    elif asked.gpus * wish.together > most:
        yield f"{wish.size('gpus', 'GPUs')}: {called} has at most {most} per node"
    cpus = max((kind.cpus for kind in kinds), default=0)
    if asked.cpus * wish.together > cpus:
        yield f"{wish.size('cpus', 'CPUs')}: {called} has at most {cpus} per node"
    known = [kind.memory_mb for kind in kinds if kind.memory_mb is not None]
    if asked.memory_gb is not None and known and _memory_mb(wish) > max(known):
        yield f"{wish.size('memory_gb', 'GB')}: {called} has at most {max(known) / 1024:.4g} GB per node"


def _constraint_faults(wish: _Request, kinds: Sequence[NodeKind], called: str) -> Iterator[str]:
    key, value = wish.option("constraint")
    known = {feature for kind in kinds for feature in kind.features}
    for feature in _features(value):
        if feature not in known:
            yield f"{key}={value}: no node of {called} has the feature '{feature}'{suggest(feature, known)}"


def _walltime_faults(wish: _Request, partitions: Sequence[Partition], called: str) -> Iterator[str]:
    key, value = wish.option("walltime")
    limit = max((partition.limit_s for partition in partitions), default=math.inf)
    if value is not None and (walltime_s(value) or 0) > limit:
        yield f"{key}={value}: {called} allows at most {clock(limit)}"


def _together_faults(wish: _Request, partitions: Sequence[Partition], called: str) -> Iterator[str]:
    """All of it on one node, and enough such nodes in one partition."""
    asked = wish.resources
    fitting = max((sum(k.nodes for k in p.kinds if _fits(wish, k)) for p in partitions), default=0)
    total = max((sum(k.nodes for k in p.kinds) for p in partitions), default=0)
    if asked.nodes > total:
        yield f"{wish.at}.nodes={asked.nodes}: {called} has {total}"
    elif fitting == 0:
        yield f"{wish.at}: no node of {called} has all that is asked for at once"
    elif asked.nodes > fitting:
        yield f"{wish.at}.nodes={asked.nodes}: {called} has {fitting} with all that is asked for"


def _fits(wish: _Request, kind: NodeKind) -> bool:
    _, constraint = wish.option("constraint")
    every = _features(constraint) if constraint is not None and re.fullmatch(r"[^|\[\]()*!]+", constraint) else []
    enough = kind.memory_mb is None or wish.resources.memory_gb is None or kind.memory_mb >= _memory_mb(wish)
    return (
        enough
        and kind.gpus_of(wish.option("gpu_type")[1]) >= wish.resources.gpus * wish.together
        and kind.cpus >= wish.resources.cpus * wish.together
        and kind.features.issuperset(every)
    )


def _memory_mb(wish: _Request) -> int:
    return math.ceil((wish.resources.memory_gb or 0) * wish.together * 1024)


def _features(constraint: str | None) -> list[str]:
    """The names in `a&b`, `[x*2&y*2]`, `a|(b&!c)`."""
    words = re.split(r"[&|,\[\]()]+", constraint or "")
    return [name for word in words if (name := re.sub(r"^!|\*\d+$", "", word))]
