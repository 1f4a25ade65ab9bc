"""The deployment as a prediction sees it: experts with their engines and limits, and the router's rules.

Every value comes from the config, from measured times of the run's jobs, or is an assumption that the result states.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from hpc_router.cluster.control_loop.desired_state import handover_policies
from hpc_router.cluster.control_loop.elastic_states import elastic_policies
from hpc_router.cluster.control_loop.elasticity import ElasticPolicy
from hpc_router.cluster.control_loop.handover import Durations, before_drain_s
from hpc_router.cluster.planning.config_faults import build_engines
from hpc_router.config.adapters import host_of
from hpc_router.config.schema import ColdStart, Deployment, ExpertConfig, SimulatedGpu
from hpc_router.config.walltime import walltime_s
from hpc_router.errors import ConfigError, suggest
from hpc_router.expert.engines import Place
from hpc_router.expert.engines.sim import SimEngine
from hpc_router.sim.command_line import settings_of
from hpc_router.sim.config import SimConfig

QUEUE_S: Final = 60.0
"""Seconds from the submission of a job to its start, for runs without measured times. ASSUMED."""
LOAD_S: Final = 120.0
"""Seconds from the start of a job until its replica is ready, for runs without measured times. ASSUMED."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertService:
    """One expert with jobs of its own. `gpus`: GPUs of one replica. `elastic`: None for a fixed number of replicas.
    `queue_s`, `load_s`: seconds from submission to start of a job, and from there until it is ready. `handover_share`:
    GPU time of the jobs that overlap at handovers, as a share of the replica's time."""

    config: SimConfig
    replicas: int
    gpus: int
    capacity: int
    max_in_flight: int | None
    elastic: ElasticPolicy | None
    queue_s: float
    load_s: float
    handover_share: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """The whole deployment. `hosts`: for each expert, the expert whose engine serves it: itself, or the host of an
    adapter. `assumptions`: sentences about what the prediction takes for granted."""

    experts: Mapping[str, ExpertService]
    hosts: Mapping[str, str]
    policy: str
    fallback: str | None
    cold_start: ColdStart
    pin_bound: float | None
    max_waiting: int
    max_in_flight: int
    queue_timeout_s: float
    reconcile_s: float
    max_gpus: int | None
    assumptions: tuple[str, ...]


def service_of(
    deployment: Deployment,
    durations: Mapping[str, Durations],
    *,
    queue_s: float | None = None,
    load_s: float | None = None,
) -> Service:
    """Returns what a prediction needs to know of the deployment. `durations`: measured times of jobs by expert.
    `queue_s`, `load_s`: times to use instead. Raises ConfigError for an engine that cannot be predicted."""
    engines, faults = build_engines(deployment.experts)
    if faults:
        raise ConfigError("\n".join(faults.values()))
    configs = {name: _settings(name, deployment.experts[name], engine) for name, engine in engines.items()}
    if not configs:
        raise ConfigError("experts: there is none, so nothing can be predicted")
    gpus = {name: _gpus(deployment.experts[name], config) for name, config in configs.items()}
    elastic = {name: replace(policy, gpus=gpus[name]) for name, policy in elastic_policies(deployment, {}).items()}
    experts = {}
    for name, config in configs.items():
        expert, known = deployment.experts[name], durations.get(name, Durations())
        own_queue_s = max(known.queue_s, default=QUEUE_S) if queue_s is None else queue_s
        own_load_s = max(known.load_s, default=config.load_s or LOAD_S) if load_s is None else load_s
        experts[name] = ExpertService(
            config=config,
            replicas=elastic[name].first if name in elastic else expert.replicas,
            gpus=gpus[name],
            capacity=expert.capacity,
            max_in_flight=expert.max_in_flight,
            elastic=elastic.get(name),
            queue_s=own_queue_s,
            load_s=own_load_s,
            handover_share=_handover_share(deployment, name, own_load_s),
        )
    router, cluster = deployment.router, deployment.cluster
    return Service(
        experts=experts,
        hosts={name: host_of(deployment.experts, name) for name in deployment.experts},
        policy=deployment.policy.kind,
        fallback=deployment.policy.fallback,
        cold_start=router.cold_start,
        pin_bound=router.pin_bound,
        max_waiting=router.max_waiting,
        max_in_flight=router.max_in_flight,
        queue_timeout_s=router.queue_timeout_s,
        reconcile_s=cluster.reconcile_s,
        max_gpus=cluster.max_gpus,
        assumptions=tuple(_assumptions(experts, durations, measured_times=queue_s is None or load_s is None)),
    )


def _settings(name: str, expert: ExpertConfig, engine: object) -> SimConfig:
    """Returns the settings of the simulated engine of one expert."""
    if not isinstance(engine, SimEngine):
        kind = expert.engine.kind
        valid = "no engine but vllm and sim can be predicted"
        if kind == "vllm":
            gpus = ", ".join(SimulatedGpu.__args__)  # type: ignore[attr-defined]
            valid = f"a prediction needs the GPU: simulate.gpu=GPU (valid: {gpus})"
        raise ConfigError(f"experts.{name}.engine.kind={kind}: {valid}", key=f"experts.{name}.engine.kind")
    try:
        return settings_of(engine.argv(Place(Path())))
    except ConfigError as error:
        raise ConfigError(f"experts.{name}.engine.options: {error}", key=f"experts.{name}.engine.options") from error


def _gpus(expert: ExpertConfig, config: SimConfig) -> int:
    """Returns the number of GPUs of one replica: those that it requests, or those that its simulated engine stands
    for."""
    requested = expert.resources.total_gpus
    if requested or config.roofline is None:
        return requested
    return config.roofline.tensor_parallel_size * config.roofline.pipeline_parallel_size


def _handover_share(deployment: Deployment, name: str, load_s: float) -> float:
    """Returns the time in which two jobs of a replica have GPUs at a handover, as a share of the replica's time."""
    policy = handover_policies(deployment).get(name)
    walltime = deployment.experts[name].resources.walltime or deployment.cluster.walltime
    life_s = None if walltime is None else walltime_s(walltime)
    if policy is None or policy.mode != "overlap" or life_s is None:
        return 0.0
    overlap_s = load_s + policy.margin_s + before_drain_s(policy)
    return overlap_s / max(life_s - overlap_s, life_s / 2)


def check_shares(shares: Mapping[str, float], service: Service) -> None:
    """Raises ConfigError if a share is given for an unknown expert, or if all are zero."""
    for name in shares:
        if name not in service.hosts:
            raise ConfigError(f"--share {name}: no such expert{suggest(name, service.hosts)}")
    if shares and not any(shares.values()):
        raise ConfigError("--share: all are 0 (valid: EXPERT=NUMBER,... with a number above 0)")


def _assumptions(
    experts: Mapping[str, ExpertService], durations: Mapping[str, Durations], *, measured_times: bool
) -> Iterator[str]:
    yield (
        "The time in the router and in the network is left out, about a millisecond per request, and so are prefix "
        "caches: every prompt is new."
    )
    yield "All replicas are ready at the beginning, and none fails."
    for name, expert in experts.items():
        if expert.elastic is None:
            continue
        times = f"{expert.queue_s:g} s in Slurm's queue, {expert.load_s:g} s to load"
        if not measured_times:
            source = "as given"
        elif name in durations:
            source = "the longest measured in this run"
        else:
            source = "assumed; --queue and --load set other values"
        yield f"A further replica of {name} needs {times} ({source})."
    if any(expert.handover_share for expert in experts.values()):
        yield "GPU hours include the overlap of jobs at handovers; a handover delays no request."
    faulty = sorted(name for name, expert in experts.items() if expert.config.faults)
    if faulty:
        yield f"Configured faults are ignored ({', '.join(faulty)})."
