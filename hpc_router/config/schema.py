"""The deployment's configuration: dataclasses as the only schema and the only home of defaults.

`conf/` holds values, `compose` turns files and overrides into a `Deployment`; each component then gets its own slice.
What one dataclass cannot check alone (TP x PP against GPUs, a fallback that is no expert), `validation` checks.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from hpc_router.config.as_written import TYPED_BY, WORDS
from hpc_router.config.parsing import REQUIRED, bounded, parse
from hpc_router.errors import ConfigError, suggest

EXPERT_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
RESERVED_NAMES: Final = frozenset({"auto", "router"})
MAX_REPLICAS: Final = 1024
"""Of one expert."""
MAX_WORKERS: Final = 256
SHORTEST_S: Final = 1e-3
HOUR_S: Final = 3600.0
DAY_S: Final = 24 * HOUR_S


@dataclass
class VllmOptions:
    """`vllm serve`; `extra` takes any further flag, `{"enable-prefix-caching": true}` or `{"seed": 1}`."""

    tensor_parallel_size: int = bounded(1, 1, 1024)
    pipeline_parallel_size: int = bounded(1, 1, 1024)
    dtype: str = "auto"
    quantization: str | None = None
    max_model_len: int | None = bounded(None, -1, 10**8)
    max_loras: int | None = bounded(None, 1, 4096)  # adapters in one batch; null: all that the expert has
    # Null: the largest of the adapters' own; 16 counts for one on the hub.
    max_lora_rank: int | None = bounded(None, 1, 8192)
    device: str = "cuda"  # cuda | cpu: the build of vLLM that the interpreter has
    kv_cache_gb: int = bounded(1, 1, 16384)  # cpu only
    extra: dict[str, Any] = field(default_factory=dict, metadata={WORDS: True})


@dataclass
class TransformersOptions:
    """`transformers serve`."""

    device: str = "auto"
    dtype: str = "auto"
    extra: dict[str, Any] = field(default_factory=dict, metadata={WORDS: True})


@dataclass
class Roofline:
    """The engine that a simulated one stands for: its latencies are then a prediction for that model on those GPUs."""

    model: str = "llama3-8b"  # or llama3-70b, or a model folder
    gpu: str = "h100-sxm"
    tensor_parallel_size: int = bounded(1, 1, 1024)
    pipeline_parallel_size: int = bounded(1, 1, 1024)
    quantization: str = "bf16"  # bf16 | fp8 | awq
    gpus_per_node: int = bounded(8, 1, 1024)  # more ranks than that talk over the network
    max_num_seqs: int | None = bounded(None, 1, 10**6)  # null: vLLM's default on such a GPU
    max_num_batched_tokens: int | None = bounded(None, 1, 10**8)  # the same
    slowdown: float = bounded(1.0, 1e-3, 1e6)  # wall seconds per simulated second, for machines that cannot keep up


@dataclass
class SimOptions:
    """The simulated engine: latencies in milliseconds, faults as its own `--faults` takes them. With `roofline` they
    come from a model of an engine on GPUs, and `ttft_ms` and `itl_ms` mean nothing."""

    seed: int = bounded(0, 0, 2**63 - 1)
    ttft_ms: float = bounded(20.0, 0, HOUR_S * 1e3)
    itl_ms: float = bounded(5.0, 0, HOUR_S * 1e3)
    roofline: Roofline | None = None
    load_s: float = bounded(0.0, 0, DAY_S)
    faults: list[Any] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict, metadata={WORDS: True})


EngineOptions = VllmOptions | TransformersOptions | SimOptions
OPTIONS: Final[dict[str, type[EngineOptions]]] = {
    "vllm": VllmOptions,
    "transformers": TransformersOptions,
    "sim": SimOptions,
}


def _options_schema(engine: Mapping[str, Any]) -> type[EngineOptions] | None:
    return OPTIONS.get(engine.get("kind", "vllm"))


@dataclass
class EngineConfig:
    """The program that computes. `python` is its interpreter, ours when null; `options` are parsed by kind."""

    kind: str = "vllm"
    python: str | None = None
    options: dict[str, Any] = field(default_factory=dict, metadata={TYPED_BY: _options_schema})
    env: dict[str, str] = field(default_factory=dict)
    threads: int | None = bounded(None, 1, 4096)  # CPU threads of the engine; its own choice when null
    startup_timeout_s: float = bounded(1800.0, SHORTEST_S, 7 * DAY_S)
    max_restarts: int = bounded(3, 0, 1000)  # before the job gives its resources back


@dataclass
class JobOptions:
    """What Slurm is asked beside sizes. Null: the cluster's value for an expert, the site's default for the cluster.

    `sbatch` and `srun` take any further option by its long name: `{"mail-type": "FAIL", "contiguous": true}`; an
    expert's are added to the cluster's, and null takes one away.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclude: str | None = None  # nodes, as Slurm lists them: n[1-3],n7
    walltime: str | None = None  # as Slurm writes it: D-HH:MM:SS, HH:MM:SS, or minutes
    exclusive: bool | None = None  # whole nodes
    gpu_type: str | None = None
    sbatch: dict[str, Any] = field(default_factory=dict, metadata={WORDS: True})
    srun: dict[str, Any] = field(default_factory=dict, metadata={WORDS: True})


@dataclass
class ResourceConfig(JobOptions):
    """What one replica asks for, per node."""

    nodes: int = bounded(1, 1, 4096)
    gpus: int = bounded(0, 0, 1024)
    cpus: int = bounded(1, 1, 65536)
    memory_gb: float | None = bounded(None, 1e-3, 1e6)


@dataclass
class ExpertConfig:
    """A named specialised model. `exemplars`: a few prompts of its domain; none: reachable by name or as fallback.

    `adapter_of`: `model` is a LoRA adapter, which the engine of that expert serves as well; it has no jobs of its own.
    """

    model: str = REQUIRED
    adapter_of: str | None = None
    revision: str | None = None
    description: str = ""
    replicas: int = bounded(1, 0, MAX_REPLICAS)
    capacity: int = bounded(256, 1, 10**6)  # requests in flight per replica
    max_in_flight: int | None = bounded(None, 1, 10**6)  # on all its replicas; null: what they take. More wait
    engine: EngineConfig = field(default_factory=EngineConfig)
    resources: ResourceConfig = field(default_factory=ResourceConfig)
    exemplars: list[str] = field(default_factory=list)


@dataclass
class ContainerConfig:
    """An Apptainer image that engines run in; agents and router stay outside."""

    image: str | None = None  # a .sif file, a folder, or an address such as docker://...
    program: str = "apptainer"  # or singularity
    binds: list[str] = field(default_factory=list)  # SOURCE[:TARGET[:ro]]
    options: list[str] = field(default_factory=list)  # further words for `apptainer exec`, such as --nv


CLUSTERS: Final = ("local", "slurm", "allocation")
GPU_REQUESTS: Final = ("gres", "gpus_per_node")


@dataclass
class ClusterConfig(JobOptions):
    """Where jobs run, and what they find there. The options are those of every job that does not say otherwise."""

    kind: str = "local"  # local | slurm: jobs of their own | allocation: steps inside the job that `up` runs in
    # GPUs per node; null: none on this machine, on Slurm what the partition has.
    gpus: int | None = bounded(None, 0, 1024)
    gpu_request: str = "gres"  # gres: --gres=gpu:N | gpus_per_node: --gpus-per-node=N
    # More for sites that give whole nodes: so many replicas of one shape share a job.
    replicas_per_job: int = bounded(1, 1, MAX_REPLICAS)
    python: str | None = None  # the jobs' interpreter, seen by every node; the one of `up` when null
    modules: list[str] = field(default_factory=list)  # `module load` these, in this order
    setup: list[str] = field(default_factory=list)  # lines of bash, run in each job before its service
    env: dict[str, str] = field(default_factory=dict)  # added to each job's environment
    container: ContainerConfig = field(default_factory=ContainerConfig)
    fabric: str | None = None  # what services bind and publish: an interface (ib0), a network (10.1.0.0/16), an address
    trusted_network: bool = False  # engines of several nodes talk without authentication; true: on shared nodes as well
    scratch: str = "/tmp"  # node-local folder for sockets and caches; $VARIABLES are the job's
    offline: bool | None = None  # engines ask no hub and get no proxies; null: where the model is a local folder
    login: str | None = None  # the host that `ssh` from outside reaches; this one when null
    drain_s: float = bounded(30.0, 0, 7 * DAY_S)  # in-flight requests may take this long after SIGTERM
    warn_s: float = bounded(90.0, 0, 7 * DAY_S)  # jobs drain so long before their walltime ends
    beat_s: float = bounded(2.0, SHORTEST_S, HOUR_S)
    reconcile_s: float = bounded(2.0, SHORTEST_S, HOUR_S)
    # Slurm's controller is asked no more often, however many replicas and watchers there are.
    ask_s: float = bounded(30.0, SHORTEST_S, HOUR_S)
    max_failures: int = bounded(3, 1, 1000)  # failed jobs of one replica in a row before it is left alone


@dataclass
class PolicyConfig:
    """prompt -> expert, for `model: auto` only."""

    kind: str = "classifier"  # classifier | model_field | round_robin | least_in_flight
    artefact: str | None = None  # null: trained at `up` from the experts' exemplars
    shadow: str | None = None  # another artefact, which decides beside it and is only counted: how often it disagrees
    fallback: str | None = None  # the expert for what nobody knows
    window: int = bounded(2048, 1, 10**7)  # characters of the user's messages that are looked at
    margin: float | None = bounded(None, 0, 2)  # null: the artefact's own threshold
    # What a second of waiting is worth, in score: a prompt whose expert is busy goes to the runner-up where that loses
    # less. Null: it waits.
    spill_per_s: float | None = bounded(None, 1e-9, 1e6)


PLACES: Final = ("job", "here")
POLICIES: Final = ("classifier", "model_field", "round_robin", "least_in_flight")


@dataclass
class RouterConfig:
    """The router process."""

    place: str = "job"  # job: a job of its own | here: a process of the machine that runs `up`
    resources: ResourceConfig = field(default_factory=ResourceConfig)
    host: str | None = None  # null: the address that cluster.fabric means
    port: int = bounded(0, 0, 65535)  # 0: the kernel gives a free one, the registry tells it
    workers: int | None = bounded(None, 1, MAX_WORKERS)  # data-plane processes; null: as many as the job has CPUs
    open: bool = False  # true: no token asked; anybody on the network may call
    reconcile: bool = True  # run the control loop beside the router
    standby: bool = True  # on Slurm, a successor's job waits for the end of the router's
    max_body_mb: float = bounded(32.0, 1e-6, 4096)
    # A non-streaming answer up to this size is held until complete, so it can fail over.
    hold_mb: float = bounded(8.0, 1e-6, 4096)
    max_in_flight: int = bounded(4096, 1, 10**6)  # requests, those that wait included; more get 429
    max_waiting: int = bounded(1024, 1, 10**6)  # requests that wait for a replica of one expert; more get 429
    # Times the average load of an expert's replicas, up to which a conversation stays on its own; null: it never does.
    # At 1.1 two replicas have a Jain index of 0.99, however conversations fall on them.
    pin_bound: float | None = bounded(1.1, 1, 1000)
    # A replica is out of use after so many connections in a row that could not be made.
    eject_connect_errors: int = bounded(1, 1, 10**6)
    eject_errors: int = bounded(5, 1, 10**6)  # or so many answers in a row with 5xx, as long as its expert can spare it
    # Of an expert's replicas may be out for errors, and never the last that is ready.
    eject_share: float = bounded(0.5, 0, 1)
    eject_s: float = bounded(10.0, SHORTEST_S, DAY_S)  # so long, doubled each time
    eject_most_s: float = bounded(300.0, SHORTEST_S, 7 * DAY_S)
    retry_share: float = bounded(0.2, 0, 1)  # failed attempts that may be made up for elsewhere, of all requests
    retry_least_per_s: float = bounded(10.0, 1e-3, 1e6)  # and so many in any case
    # So long a request waits for a replica of its expert, then 503.
    queue_timeout_s: float = bounded(30.0, SHORTEST_S, DAY_S)
    connect_timeout_s: float = bounded(5.0, SHORTEST_S, HOUR_S)
    first_byte_timeout_s: float = bounded(600.0, SHORTEST_S, DAY_S)  # of a streamed answer
    # Of an answer that is not streamed, from the request to its first byte.
    answer_timeout_s: float = bounded(3600.0, SHORTEST_S, DAY_S)
    idle_timeout_s: float = bounded(300.0, SHORTEST_S, DAY_S)
    # A stream that pauses for longer gets a comment, so that nobody takes it for dead.
    ping_s: float = bounded(15.0, SHORTEST_S, DAY_S)
    discovery_s: float = bounded(0.5, SHORTEST_S, HOUR_S)
    probe_s: float = bounded(2.0, SHORTEST_S, HOUR_S)
    probe_timeout_s: float = bounded(2.0, SHORTEST_S, HOUR_S)
    drain_s: float = bounded(10.0, SHORTEST_S, DAY_S)


@dataclass
class Simulate:
    """With a GPU's name, every vLLM engine is replaced by a simulated one that stands for it: a prediction."""

    gpu: str | None = None  # h100-sxm | h200-sxm | a100-sxm | l40s
    slowdown: float = bounded(1.0, 1e-3, 1e6)  # wall seconds per simulated second, for machines that cannot keep up


@dataclass
class Deployment:
    """The config root: all that one launch creates."""

    name: str = "deployment"
    runs: str = "runs"
    experts: dict[str, ExpertConfig] = field(default_factory=dict)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    simulate: Simulate = field(default_factory=Simulate)


def options_of(expert: str, engine: EngineConfig) -> EngineOptions:
    """The engine's options, typed by its kind."""
    if engine.kind not in OPTIONS:
        key = f"experts.{expert}.engine.kind"
        raise ConfigError(f"{key}: unknown engine '{engine.kind}'{suggest(engine.kind, OPTIONS)}", key=key)
    return parse(OPTIONS[engine.kind], engine.options, at=f"experts.{expert}.engine.options")
