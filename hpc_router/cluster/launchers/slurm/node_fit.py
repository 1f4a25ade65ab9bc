"""Checks whether the nodes of a site can run a deployment, before anything is submitted. Pure.

Each fault is a line that starts with the config key of the value: the expert's key, or the cluster's. `sbatch_test`
tests what `sinfo` does not show: accounts, limits of a qos, rules of the site.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hpc_router.cluster.launchers.interface import ROUTER
from hpc_router.cluster.launchers.slurm.sbatch import effective_options
from hpc_router.cluster.launchers.slurm.sinfo import NodeKind, Partition, SlurmSite
from hpc_router.config.adapters import hosts
from hpc_router.config.schema import ClusterConfig, Deployment, ResourceConfig
from hpc_router.config.walltime import walltime_s, walltime_text
from hpc_router.errors import suggest


def configured_at(at: str, resources: ResourceConfig, cluster: ClusterConfig, name: str) -> tuple[str, str | None]:
    """Returns the config key that sets the option `name` of a job, and its value, None if it is not set. A value in
    `resources`, whose key is `at`, takes precedence over one in `cluster`."""
    own, general = getattr(resources, name), getattr(cluster, name)
    if own is not None:
        return f"{at}.{name}", str(own)
    return f"cluster.{name}", None if general is None else str(general)


def resources_of(deployment: Deployment, expert: str) -> tuple[str, ResourceConfig]:
    """Returns the config key of the resources of an expert or the router, and these resources."""
    if expert == ROUTER:
        return "router.resources", deployment.router.resources
    return f"experts.{expert}.resources", deployment.experts[expert].resources


def partition_of(deployment: Deployment, expert: str) -> str:
    """Returns the value of `--partition` for the jobs of an expert; empty for the cluster's default partition."""
    return effective_options(deployment.cluster, resources_of(deployment, expert)[1]).partition or ""


def site_faults(deployment: Deployment, site: SlurmSite) -> list[str]:
    """Returns a fault for each value that no node of the requested partitions can satisfy, and for each unknown
    partition."""
    faults = [fault for request in _requests(deployment) for fault in _faults(request, site)]
    return list(dict.fromkeys(faults))


def site_warnings(deployment: Deployment, site: SlurmSite) -> list[str]:
    """Returns warnings about jobs that Slurm would accept, but that must wait for nodes or cannot all run at once."""
    warnings = []
    for request in _requests(deployment):
        for partition in _partitions(request, site):
            if partition.state != "up":
                warnings.append(f"partition {partition.name} is {partition.state}: its jobs wait until it is up again")
            elif not any(kind.usable for kind in partition.kinds):
                states = ", ".join(sorted({kind.state for kind in partition.kinds})) or "it has none"
                warnings.append(f"no node of partition {partition.name} can run jobs now ({states})")
    return [*dict.fromkeys(warnings), *capacity_warnings(deployment, site)]


def capacity_warnings(deployment: Deployment, site: SlurmSite) -> list[str]:
    """Returns a warning for each expert whose replicas together need more GPUs than its partitions have."""
    warnings = []
    for name, expert in hosts(deployment.experts).items():
        each = expert.resources.total_gpus
        partitions, available = _gpus_that_fit(deployment, site, name)
        if not available and expert.resources.partition is None and deployment.cluster.partition is None:
            continue  # not the default partition, so the site's submit plugin chooses another one
        if partitions and available < each * expert.replicas:
            names = " or ".join(partition.name for partition in partitions)
            warnings.append(
                f"{name}: {expert.replicas} replicas need {each * expert.replicas} GPUs, partition {names} has "
                f"{available} that fit: {expert.replicas - available // each} of them can never run beside the others"
            )
    return warnings


def can_overlap(deployment: Deployment, site: SlurmSite, expert: str) -> bool:
    """Returns whether the expert's partitions have enough GPUs for one replica more than configured."""
    config = deployment.experts[expert]
    partitions, available = _gpus_that_fit(deployment, site, expert)
    return not partitions or available >= config.resources.total_gpus * (config.replicas + 1)


def _gpus_that_fit(deployment: Deployment, site: SlurmSite, expert: str) -> tuple[list[Partition], int]:
    """Returns the expert's partitions, and the number of GPUs in them, counting only nodes that can run a replica."""
    request = _Request(*resources_of(deployment, expert), deployment.cluster, 1)
    partitions, gpu_type = _partitions(request, site), request.option("gpu_type")[1]
    kinds = [kind for partition in partitions for kind in partition.kinds if _fits(request, kind)]
    return partitions, sum(kind.nodes * kind.gpus_of(gpu_type) for kind in kinds)


def allocation_faults(deployment: Deployment, kinds: Sequence[NodeKind], name: str) -> list[str]:
    """Returns a fault for each resource size that is too large for a step of the Slurm job `name`, because such a step
    would wait for ever. `kinds`: the job's nodes. The router is left out, because its step overlaps with others."""
    cluster = replace(deployment.cluster, gpu_type=None, constraint=None)  # srun gets neither
    whole = Partition(name, math.inf, default=False, state="up", kinds=tuple(kinds))
    wanted = {expert: e.replicas for expert, e in hosts(deployment.experts).items() if e.replicas}
    faults: list[str] = []
    for expert in wanted:
        at, resources = resources_of(deployment, expert)
        request = _Request(at, replace(resources, gpu_type=None, constraint=None), cluster, 1)
        faults += list(_size_faults(request, kinds, name)) or list(_together_faults(request, [whole], name))
    if faults:
        return faults
    have = {
        "gpus": sum(kind.nodes * kind.gpus_of(None) for kind in kinds),
        "cpus": sum(kind.nodes * kind.cpus for kind in kinds),
        "memory_gb": sum(kind.nodes * (kind.memory_mb or math.inf) for kind in kinds) / 1024,
    }
    for size, available in have.items():
        needed = {
            expert: count * resources.nodes * (getattr(resources, size) or 0)
            for expert, count in wanted.items()
            if not effective_options(cluster, resources := resources_of(deployment, expert)[1]).srun.get("overlap")
        }
        if sum(needed.values()) > available:
            each = ", ".join(f"{expert} {number:g}" for expert, number in needed.items() if number)
            faults.append(
                f"resources.{size}: {name} has {available:g}, all replicas need {sum(needed.values()):g} ({each})"
            )
    return faults


@dataclass(frozen=True, slots=True)
class _Request:
    """The resources that the router or a replica requests. `at`: the config key of `resources`. `together`: number of
    replicas that share a job."""

    at: str
    resources: ResourceConfig
    cluster: ClusterConfig
    together: int

    def option(self, name: str) -> tuple[str, str | None]:
        """Returns the config key that sets the option `name`, and its value; None if it is not set."""
        return configured_at(self.at, self.resources, self.cluster, name)

    def size(self, name: str, unit: str) -> str:
        """Returns the resource `name` as text `key=value`. If replicas share a job, adds the size that the whole job
        needs, in `unit`."""
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


def _partition_names(request: _Request, site: SlurmSite) -> list[str]:
    """Returns the partitions that are requested, or else the site's default one; empty if there is neither."""
    _, value = request.option("partition")
    return value.split(",") if value is not None else [site.default] if site.default is not None else []


def _partitions(request: _Request, site: SlurmSite) -> list[Partition]:
    return [site.partitions[name] for name in _partition_names(request, site) if name in site.partitions]


def _faults(request: _Request, site: SlurmSite) -> Iterator[str]:
    key, value = request.option("partition")
    unknown = [name for name in _partition_names(request, site) if name not in site.partitions]
    for name in unknown:
        yield f"{key}={value}: no partition is named '{name}'{suggest(name, site.partitions)}"
    if unknown:
        return
    # Without a default partition, a submit plugin may choose one: a fault only if no partition can run it.
    yield from _request_faults(request, _partitions(request, site) or list(site.partitions.values()))


def _request_faults(request: _Request, partitions: Sequence[Partition]) -> Iterator[str]:
    """Yields a fault for each value, and for each combination of values, that none of these partitions can satisfy."""
    name = f"partition {' or '.join(partition.name for partition in partitions)}"
    kinds = [kind for partition in partitions for kind in partition.kinds]
    alone = [*_size_faults(request, kinds, name), *_constraint_faults(request, kinds, name)]
    yield from alone
    yield from _walltime_faults(request, partitions, name)
    if not alone:
        yield from _together_faults(request, partitions, name)


def _size_faults(request: _Request, kinds: Sequence[NodeKind], name: str) -> Iterator[str]:
    """Yields a fault for each resource size that is too large for every kind of node. Does not combine sizes. `name`:
    the partitions' names, for the text."""
    resources = request.resources
    type_key, gpu_type = request.option("gpu_type")
    most = max((kind.gpus_of(gpu_type) for kind in kinds), default=0)
    if resources.gpus and gpu_type is not None and most == 0:
        types = {kind for node in kinds for kind in node.gpus if kind}
        yield f"{type_key}={gpu_type}: no node of {name} has such GPUs{suggest(gpu_type, types)}"
    elif resources.gpus * request.together > most:
        yield f"{request.size('gpus', 'GPUs')}: {name} has at most {most} per node"
    cpus = max((kind.cpus for kind in kinds), default=0)
    if resources.cpus * request.together > cpus:
        yield f"{request.size('cpus', 'CPUs')}: {name} has at most {cpus} per node"
    known = [kind.memory_mb for kind in kinds if kind.memory_mb is not None]
    if resources.memory_gb is not None and known and _memory_mb(request) > max(known):
        yield f"{request.size('memory_gb', 'GB')}: {name} has at most {max(known) / 1024:.4g} GB per node"


def _constraint_faults(request: _Request, kinds: Sequence[NodeKind], name: str) -> Iterator[str]:
    key, value = request.option("constraint")
    known = {feature for kind in kinds for feature in kind.features}
    for feature in _features(value):
        if feature not in known:
            yield f"{key}={value}: no node of {name} has the feature '{feature}'{suggest(feature, known)}"


def _walltime_faults(request: _Request, partitions: Sequence[Partition], name: str) -> Iterator[str]:
    key, value = request.option("walltime")
    limit = max((partition.limit_s for partition in partitions), default=math.inf)
    if value is not None and (walltime_s(value) or 0) > limit:
        yield f"{key}={value}: {name} allows at most {walltime_text(limit)}"


def _together_faults(request: _Request, partitions: Sequence[Partition], name: str) -> Iterator[str]:
    """Yields a fault if no node has all requested resources at once, or no partition has enough such nodes. `name`: the
    partitions' names, for the text."""
    resources = request.resources
    fitting = max((sum(k.nodes for k in p.kinds if _fits(request, k)) for p in partitions), default=0)
    total = max((sum(k.nodes for k in p.kinds) for p in partitions), default=0)
    if resources.nodes > total:
        yield f"{request.at}.nodes={resources.nodes}: {name} has {total}"
    elif fitting == 0:
        yield f"{request.at}: no node of {name} has all requested resources at once"
    elif resources.nodes > fitting:
        yield f"{request.at}.nodes={resources.nodes}: {name} has {fitting} with all requested resources"


def _fits(request: _Request, kind: NodeKind) -> bool:
    _, constraint = request.option("constraint")
    every = _features(constraint) if constraint is not None and re.fullmatch(r"[^|\[\]()*!]+", constraint) else []
    enough = kind.memory_mb is None or request.resources.memory_gb is None or kind.memory_mb >= _memory_mb(request)
    return (
        enough
        and kind.gpus_of(request.option("gpu_type")[1]) >= request.resources.gpus * request.together
        and kind.cpus >= request.resources.cpus * request.together
        and kind.features.issuperset(every)
    )


def _memory_mb(request: _Request) -> int:
    return math.ceil((request.resources.memory_gb or 0) * request.together * 1024)


def _features(constraint: str | None) -> list[str]:
    """Returns the feature names in a constraint such as `a&b`, `[x*2&y*2]` or `a|(b&!c)`."""
    words = re.split(r"[&|,\[\]()]+", constraint or "")
    return [name for word in words if (name := re.sub(r"^!|\*\d+$", "", word))]
