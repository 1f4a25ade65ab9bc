"""The deployment's configuration: dataclasses as the only schema and the only home of defaults.

`conf/` holds values, `hpc_router.compose` turns files and overrides into a `Deployment`; each component then gets its
own slice. What one dataclass cannot see (TP x PP against GPUs, a fallback that is no expert) `hpc_router.checks` sees.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Final

from omegaconf import MISSING

from hpc_router.errors import ConfigError, suggest
from hpc_router.schema import parse

EXPERT_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
RESERVED_NAMES: Final = frozenset({"auto", "router"})


@dataclass
class VllmOptions:
    """`vllm serve`; `extra` takes any further flag, `{"enable-prefix-caching": true}` or `{"seed": 1}`."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    dtype: str = "auto"
    quantization: str | None = None
    max_model_len: int | None = None
    max_loras: int | None = None  # adapters in one batch; null: all that the expert has
    max_lora_rank: int | None = None  # null: the largest of the adapters' own; 16 counts for one on the hub
    device: str = "cuda"  # cuda | cpu: the build of vLLM that the interpreter has
    kv_cache_gb: int = 1  # cpu only
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class TransformersOptions:
    """`transformers serve`."""

    device: str = "auto"
    dtype: str = "auto"
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Roofline:
    """The engine that a simulated one stands for: its latencies are then a prediction for that model on those GPUs."""

    model: str = "llama3-8b"  # or llama3-70b, or a model folder
    gpu: str = "h100-sxm"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    quantization: str = "bf16"  # bf16 | fp8 | awq
    gpus_per_node: int = 8  # more ranks than that talk over the network
    max_num_seqs: int | None = None  # null: vLLM's default on such a GPU
    max_num_batched_tokens: int | None = None  # the same
    slowdown: float = 1.0  # wall seconds per simulated second, for machines that cannot keep up


@dataclass
class SimOptions:
    """The simulated engine: latencies in milliseconds, faults as its own `--faults` takes them. With `roofline` they
    come from a model of an engine on GPUs, and `ttft_ms` and `itl_ms` mean nothing."""

    seed: int = 0
    ttft_ms: float = 20.0
    itl_ms: float = 5.0
    roofline: Roofline | None = None
    load_s: float = 0.0
    faults: list[Any] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


EngineOptions = VllmOptions | TransformersOptions | SimOptions
OPTIONS: Final[dict[str, type[EngineOptions]]] = {
    "vllm": VllmOptions,
    "transformers": TransformersOptions,
    "sim": SimOptions,
}


@dataclass
class EngineConfig:
    """The program that computes. `python` is its interpreter, ours when null; `options` are parsed by kind."""

    kind: str = "vllm"
    python: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    threads: int | None = None  # CPU threads of the engine; its own choice when null
    startup_timeout_s: float = 1800.0
    max_restarts: int = 3  # before the job gives its resources back


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
    sbatch: dict[str, Any] = field(default_factory=dict)
    srun: dict[str, Any] = field(default_factory=dict)


@dataclass
class ResourceConfig(JobOptions):
    """What one replica asks for, per node."""

    nodes: int = 1
    gpus: int = 0
    cpus: int = 1
    memory_gb: float | None = None


@dataclass
class ExpertConfig:
    """A named specialised model. `exemplars`: a few prompts of its domain; none: reachable by name or as fallback.

    `adapter_of`: `model` is a LoRA adapter, which the engine of that expert serves as well; it has no jobs of its own.
    """

    model: str = MISSING
    adapter_of: str | None = None
    revision: str | None = None
    description: str = ""
    replicas: int = 1
    capacity: int = 256  # requests in flight per replica
    max_in_flight: int | None = None  # on all its replicas; null: what they take. More wait
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
    gpus: int | None = None  # GPUs per node; null: none on this machine, on Slurm what the partition has
    gpu_request: str = "gres"  # gres: --gres=gpu:N | gpus_per_node: --gpus-per-node=N
    replicas_per_job: int = 1  # more for sites that give whole nodes: so many replicas of one shape share a job
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
    drain_s: float = 30.0  # in-flight requests may take this long after SIGTERM
    warn_s: float = 90.0  # jobs drain so long before their walltime ends
    beat_s: float = 2.0
    reconcile_s: float = 2.0
    ask_s: float = 30.0  # Slurm's controller is asked no more often, however many replicas and watchers there are
    max_failures: int = 3  # failed jobs of one replica in a row before it is left alone


@dataclass
class PolicyConfig:
    """prompt -> expert, for `model: auto` only."""

    kind: str = "classifier"  # classifier | model_field | round_robin | least_in_flight
    artefact: str | None = None  # null: trained at `up` from the experts' exemplars
    shadow: str | None = None  # another artefact, which decides beside it and is only counted: how often it disagrees
    fallback: str | None = None  # the expert for what nobody knows
    window: int = 2048  # characters of the user's messages that are looked at
    margin: float | None = None  # null: the artefact's own threshold
    # What a second of waiting is worth, in score: a prompt whose expert is busy goes to the runner-up where that loses
    # less. Null: it waits.
    spill_per_s: float | None = None


PLACES: Final = ("job", "here")
POLICIES: Final = ("classifier", "model_field", "round_robin", "least_in_flight")


@dataclass
class RouterConfig:
    """The router process."""

    place: str = "job"  # job: a job of its own | here: a process of the machine that runs `up`
    resources: ResourceConfig = field(default_factory=ResourceConfig)
    host: str | None = None  # null: the address that cluster.fabric means
    port: int = 0  # 0: the kernel gives a free one, the registry tells it
    workers: int | None = None  # data-plane processes; null: as many as the job has CPUs
    open: bool = False  # true: no token asked; anybody on the network may call
    reconcile: bool = True  # run the control loop beside the router
    standby: bool = True  # on Slurm, a successor's job waits for the end of the router's
    max_body_mb: float = 32.0
    hold_mb: float = 8.0  # a non-streaming answer up to this size is held until complete, so it can fail over
    max_in_flight: int = 4096  # requests, those that wait included; more get 429
    max_waiting: int = 1024  # requests that wait for a replica of one expert; more get 429
    # Times the average load of an expert's replicas, up to which a conversation stays on its own; null: it never does.
    # At 1.1 two replicas have a Jain index of 0.99, however conversations fall on them.
    pin_bound: float | None = 1.1
    eject_connect_errors: int = 1  # a replica is out of use after so many connections in a row that could not be made
    eject_errors: int = 5  # or so many answers in a row with 5xx, as long as its expert can spare it
    eject_share: float = 0.5  # of an expert's replicas may be out for errors, and never the last that is ready
    eject_s: float = 10.0  # so long, doubled each time
    eject_most_s: float = 300.0
    retry_share: float = 0.2  # failed attempts that may be made up for elsewhere, of all requests
    retry_least_per_s: float = 10.0  # and so many in any case
    queue_timeout_s: float = 30.0  # so long a request waits for a replica of its expert, then 503
    connect_timeout_s: float = 5.0
    first_byte_timeout_s: float = 600.0  # of a streamed answer
    answer_timeout_s: float = 3600.0  # of an answer that is not streamed, from the request to its first byte
    idle_timeout_s: float = 300.0
    ping_s: float = 15.0  # a stream that pauses for longer gets a comment, so that nobody takes it for dead
    discovery_s: float = 0.5
    probe_s: float = 2.0
    probe_timeout_s: float = 2.0
    drain_s: float = 10.0


@dataclass
class Simulate:
    """With a GPU's name, every vLLM engine is replaced by a simulated one that stands for it: a prediction."""

    gpu: str | None = None  # h100-sxm | h200-sxm | a100-sxm | l40s
    slowdown: float = 1.0  # wall seconds per simulated second, for machines that cannot keep up


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
