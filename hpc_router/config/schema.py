"""The configuration of a deployment: these dataclasses are the only schema and hold every default.

Each component gets its own part of a `Deployment`. The comment at a field becomes its description in
docs/configuration.md. A fixed set of values is a `Literal`, and a range is in the field's metadata; `parsing` refuses
other values. `validation` checks conditions between several fields. This module does not know files, Hydra or the
machine.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from hpc_router.config.as_written import TYPED_BY, WORDS
from hpc_router.config.parsing import REQUIRED, bounded, check_values, parse

EXPERT_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
RESERVED_NAMES: Final = frozenset({"auto", "router"})
"""Names that no expert may have: requests use `auto` as a model, and the router's replica is named `router`."""
MAX_REPLICAS: Final = 1024
"""Maximum number of replicas of one expert."""
MAX_WORKERS: Final = 256
MIN_DURATION_S: Final = 1e-3
HOUR_S: Final = 3600.0
DAY_S: Final = 24 * HOUR_S

ColdStart = Literal["wait", "fail", "fallback"]
ClusterKind = Literal["local", "slurm", "allocation"]
HandoverMode = Literal["overlap", "drain_first", "none"]
EngineKind = Literal["vllm", "transformers", "sim"]
GpuRequest = Literal["gres", "gpus_per_node"]
PolicyKind = Literal["classifier", "model_field", "round_robin", "least_in_flight"]
Precision = Literal["bf16", "fp8", "awq"]
SimulatedGpu = Literal["h100-sxm", "h200-sxm", "a100-sxm", "l40s"]
RouterPlace = Literal["job", "here"]
VllmDevice = Literal["cuda", "cpu"]
VllmFrontend = Literal["python", "rust"]


@dataclass
class VllmOptions:
    """Options of `vllm serve`."""

    tensor_parallel_size: int = bounded(1, 1, 1024)  # GPUs that share each layer
    pipeline_parallel_size: int = bounded(1, 1, 1024)  # groups of GPUs that hold consecutive layers
    dtype: str = "auto"  # data type of weights and activations, such as bfloat16
    quantization: str | None = None  # quantization method, such as fp8 or awq; null: the one in the model's config
    max_model_len: int | None = bounded(None, -1, 10**8)  # tokens of prompt plus answer; null: the model's limit
    max_loras: int | None = bounded(None, 1, 4096)  # adapters in one batch; null: all adapters of the expert
    # Maximum rank of an adapter; null: the largest rank of the adapter folders, and 16 for an adapter on the hub.
    max_lora_rank: int | None = bounded(None, 1, 8192)
    device: VllmDevice = "cuda"  # device that the engine's vLLM was built for
    frontend: VllmFrontend = "python"  # the engine's HTTP server; rust needs less CPU and serves fewer paths
    kv_cache_gb: int = bounded(1, 1, 16384)  # size of the KV cache in GB; used only with device cpu
    # Further options by their long names, such as {"enable-prefix-caching": true, "seed": 1}.
    extra: dict[str, Any] = field(default_factory=dict, metadata={WORDS: True})


@dataclass
class TransformersOptions:
    """Options of `transformers serve`."""

    device: str = "auto"  # device of the model, such as cuda or cpu
    dtype: str = "auto"  # data type of weights and activations, such as bfloat16
    # Further options by their long names.
    extra: dict[str, Any] = field(default_factory=dict, metadata={WORDS: True})


@dataclass
class Roofline:
    """The model and GPUs that a simulated engine stands for, from which its latencies are predicted."""

    model: str = "llama3-8b"  # llama3-8b, llama3-70b, or a model folder
    gpu: SimulatedGpu = "h100-sxm"  # GPU to simulate
    tensor_parallel_size: int = bounded(1, 1, 1024)  # GPUs that share each layer
    pipeline_parallel_size: int = bounded(1, 1, 1024)  # groups of GPUs that hold consecutive layers
    quantization: Precision = "bf16"  # precision of the weights
    gpus_per_node: int = bounded(8, 1, 1024)  # beyond this number of GPUs, ranks communicate over the network
    max_num_seqs: int | None = bounded(None, 1, 10**6)  # sequences in one batch; null: vLLM's default on this GPU
    max_num_batched_tokens: int | None = bounded(None, 1, 10**8)  # tokens in one step; null: vLLM's default on this GPU
    slowdown: float = bounded(1.0, 1e-3, 1e6)  # wall seconds per simulated second, for machines that are too slow


@dataclass
class SimOptions:
    """Options of the simulated engine."""

    seed: int = bounded(0, 0, 2**63 - 1)  # seed of the generated tokens and of random faults
    ttft_ms: float = bounded(20.0, 0, HOUR_S * 1e3)  # time to the first token; not used with `roofline`
    itl_ms: float = bounded(5.0, 0, HOUR_S * 1e3)  # time between two tokens; not used with `roofline`
    roofline: Roofline | None = None  # predicts the latencies of an engine on GPUs; null: fixed latencies
    load_s: float = bounded(0.0, 0, DAY_S)  # duration of the simulated loading of weights
    faults: list[Any] = field(default_factory=list)  # faults to inject, in the form of the engine's `--faults`
    # Further options by their long names.
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
    """The program that runs the model."""

    kind: EngineKind = "vllm"  # vllm, transformers (`transformers serve`), or sim (simulated)
    python: str | None = None  # Python interpreter of the engine; null: the interpreter of the job
    # Options of the engine; the tables `engine.options` list the keys for each kind.
    options: dict[str, Any] = field(default_factory=dict, metadata={TYPED_BY: _options_schema})
    env: dict[str, str] = field(default_factory=dict)  # variables added to the engine's environment
    threads: int | None = bounded(None, 1, 4096)  # CPU threads of the engine; null: the engine decides
    startup_timeout_s: float = bounded(1800.0, MIN_DURATION_S, 7 * DAY_S)  # limit until the engine is ready
    max_restarts: int = bounded(3, 0, 1000)  # restarts of a failed engine before its job ends


@dataclass
class JobOptions:
    """Slurm options other than resource sizes. Null in an expert's resources takes the value of `cluster`; null in
    `cluster` takes the site's default."""

    partition: str | None = None  # partition, or several separated by commas
    account: str | None = None  # account that is charged
    qos: str | None = None  # quality of service
    constraint: str | None = None  # required node features
    reservation: str | None = None  # reservation to use
    exclude: str | None = None  # nodes not to use, in Slurm's form: n[1-3],n7
    walltime: str | None = None  # time limit in Slurm's form: D-HH:MM:SS, HH:MM:SS, or minutes
    exclusive: bool | None = None  # true: take whole nodes
    gpu_type: str | None = None  # type of GPU, as the site's Slurm names it
    # Further options of sbatch by their long names, such as {"mail-type": "FAIL", "contiguous": true}. The options of
    # an expert are added to those of the cluster; null removes one.
    sbatch: dict[str, Any] = field(default_factory=dict, metadata={WORDS: True})
    # Further options of srun, in the same form.
    srun: dict[str, Any] = field(default_factory=dict, metadata={WORDS: True})


@dataclass
class ResourceConfig(JobOptions):
    """Resources of the router or of one replica of an expert."""

    nodes: int = bounded(1, 1, 4096)  # nodes of one replica
    gpus: int = bounded(0, 0, 1024)  # GPUs per node
    cpus: int = bounded(1, 1, 65536)  # CPUs per node
    memory_gb: float | None = bounded(None, 1e-3, 1e6)  # memory per node in GB; null: the site's default

    @property
    def total_gpus(self) -> int:
        """GPUs on all nodes together."""
        return self.nodes * self.gpus


@dataclass
class ExpertConfig:
    """A named model for one domain."""

    model: str = REQUIRED  # model folder or hub id; with `adapter_of`, that of the LoRA adapter
    # Name of the expert whose engine serves this one as a LoRA adapter. An adapter has no jobs of its own.
    adapter_of: str | None = None
    revision: str | None = None  # branch, tag or commit of a model on the hub; null: its main branch
    # Domain of the expert in a sentence. Where a sentence encoder is installed, the classifier is trained with it.
    description: str = ""
    replicas: int = bounded(1, 0, MAX_REPLICAS)  # number of engines with this model, each with its own resources
    # Minimum number of replicas where it follows the demand, from `replicas` on; null: `replicas`. With 0, an unused
    # expert has no replica, and the next request starts one.
    min_replicas: int | None = bounded(None, 0, MAX_REPLICAS)
    max_replicas: int | None = bounded(None, 0, MAX_REPLICAS)  # maximum number of replicas; null: `replicas`
    idle_s: float = bounded(300.0, 1.0, 7 * DAY_S)  # time of low demand after which there are fewer replicas
    capacity: int = bounded(256, 1, 10**6)  # maximum number of requests in flight per replica
    # Maximum number of requests in flight on all replicas together; further ones wait. Null: the sum of the capacities.
    max_in_flight: int | None = bounded(None, 1, 10**6)
    engine: EngineConfig = field(default_factory=EngineConfig)  # the program that runs the model
    resources: ResourceConfig = field(default_factory=ResourceConfig)  # what each replica requests
    handover: HandoverMode | None = None  # as `cluster.handover`, for this expert; null: the cluster's
    # Kinds of input that the expert accepts: text, image, audio, tools, embeddings. `auto` sends it no other requests.
    # Null: as its engine reports; vLLM and `transformers serve` report nothing, and then it gets any request.
    accepts: list[str] | None = None
    # Example prompts of the domain, to train the classifier. Without any, the expert gets `auto` only as fallback.
    exemplars: list[str] = field(default_factory=list)


@dataclass
class ContainerConfig:
    """An Apptainer image that engines run in. Agents and the router run outside of it."""

    image: str | None = None  # a .sif file, a folder, or an address such as docker://...; null: no container
    program: str = "apptainer"  # command that runs the image; singularity also works
    binds: list[str] = field(default_factory=list)  # mounts in the container: SOURCE[:TARGET[:ro]]
    options: list[str] = field(default_factory=list)  # further arguments of `apptainer exec`, such as --nv


@dataclass
class ClusterConfig(JobOptions):
    """Where jobs run, and their environment there. The Slurm options apply to every job that does not set its own."""

    # local: processes on this machine; slurm: Slurm jobs; allocation: steps in the Slurm job that `up` runs in.
    kind: ClusterKind = "local"
    # GPUs per node; null: none if kind is local, else as Slurm reports for the partition.
    gpus: int | None = bounded(None, 0, 1024)
    gpu_request: GpuRequest = "gres"  # form of the GPU request: --gres=gpu:N or --gpus-per-node=N
    # Replicas with equal resources that run in one job, for sites that only give whole nodes.
    replicas_per_job: int = bounded(1, 1, MAX_REPLICAS)
    max_gpus: int | None = bounded(None, 1, 10**6)  # maximum GPUs of all jobs of the run together; null: no limit
    python: str | None = None  # Python interpreter of the jobs, present on every node; null: the one that runs `up`
    modules: list[str] = field(default_factory=list)  # arguments of `module load`, in this order
    setup: list[str] = field(default_factory=list)  # lines of bash that each job runs before its service
    env: dict[str, str] = field(default_factory=dict)  # variables added to each job's environment
    container: ContainerConfig = field(default_factory=ContainerConfig)  # image that engines run in
    # Network of the services: an interface (ib0), a network (10.1.0.0/16) or an address. Null: the network of the
    # node's name, else of the default route; if kind is local, the loopback.
    fabric: str | None = None
    # true: an engine on several nodes, which communicates without authentication, may run on nodes with other users.
    trusted_network: bool = False
    scratch: str = "/tmp"  # node-local folder for sockets and caches; the job expands $VARIABLES
    # Node-local folder to which each node copies local models once, for all engines of a user there, and where compile
    # caches are kept; the job expands $VARIABLES. Null: engines load from the model's folder.
    stage_to: str | None = None
    # Limit of a user's copies on one node in GB, beyond which unused ones are removed; null: the disk's free space.
    stage_gb: float | None = bounded(None, 1e-6, 1e6)
    # true: engines do not contact the hub and get no proxy variables; null: true if the model is a local folder.
    offline: bool | None = None
    login: str | None = None  # name of the login host, for `ssh` from outside; null: the name of this host
    drain_s: float = bounded(30.0, 0, 7 * DAY_S)  # time limit for requests in flight to complete after SIGTERM
    warn_s: float = bounded(90.0, 0, 7 * DAY_S)  # a job starts to drain this long before its walltime ends
    # How a job near its walltime is replaced. overlap: its successor starts before and it drains when that is ready;
    # drain_first: its successor is queued before and starts when it has ended; none: submitted when it has ended.
    handover: HandoverMode = "overlap"
    # Added to the expected time from submission to ready when the successor is submitted.
    handover_margin_s: float = bounded(60.0, 0, DAY_S)
    beat_s: float = bounded(2.0, MIN_DURATION_S, HOUR_S)  # interval at which a service renews its registry record
    reconcile_s: float = bounded(2.0, MIN_DURATION_S, HOUR_S)  # interval of the control loop
    # Minimum interval between queries to Slurm's controller, for all replicas and commands of a deployment together.
    ask_s: float = bounded(30.0, MIN_DURATION_S, HOUR_S)
    # Ended jobs of one replica whose records and logs are kept; the newest one always is.
    keep_generations: int = bounded(20, 1, 10_000)
    keep_days: float = bounded(30.0, 1, 3650)  # days for which the records and logs of ended jobs are kept
    # Mail address, or command with arguments, that is told when an expert is given up, a successor will be late,
    # max_gpus is reached, or the disk is full. The command gets a JSON object on its standard input.
    notify: str | None = None
    max_failures: int = bounded(3, 1, 1000)  # consecutive failed jobs after which a replica is not submitted again


@dataclass
class PolicyConfig:
    """How the expert of a request with `model: auto` is chosen."""

    kind: PolicyKind = "classifier"  # rule of choice; only the classifier reads the prompt
    artefact: str | None = None  # folder of a trained classifier; null: `up` trains one from the experts' exemplars
    # Folder of a second classifier that also classifies each prompt but does not route it; disagreements are counted.
    shadow: str | None = None
    # Expert for prompts that match no domain clearly. Null: the best-scoring expert; with model_field, an error.
    fallback: str | None = None
    window: int = bounded(2048, 1, 10**7)  # maximum number of characters of the user's messages that are classified
    # Minimum difference between the scores of the best two experts; null: the threshold in the artefact.
    margin: float | None = bounded(None, 0, 2)
    # Minimum probability that a decision is right, else the fallback (reason out_of_domain). Null: `margin` decides.
    min_confidence: float | None = bounded(None, 0, 1)
    # How much measured quality one unit of an expert's cost is worth, for artefacts with measured quality. Null: the
    # `weight` of the training.
    cost_weight: float | None = bounded(None, 0, 1e9)
    # Score that one second of waiting is worth: a prompt for a busy expert goes to the second-best expert if the
    # difference in score is less than this value times the wait. Null: the prompt waits for the best expert.
    spill_per_s: float | None = bounded(None, 1e-9, 1e6)


@dataclass
class ClassConfig:
    """The limits of one class of requests."""

    # Share of the places that become free, relative to the other class, while requests of both classes wait.
    weight: float = bounded(1.0, 0.01, 1000)
    # Maximum requests of the class in flight on one expert's replicas; further ones wait. Null: no limit.
    max_in_flight: int | None = bounded(None, 1, 10**6)


@dataclass
class ClassesConfig:
    """The classes of requests. A request names its class in the header `x-priority`."""

    interactive: ClassConfig = field(default_factory=lambda: ClassConfig(weight=10.0))  # requests without the header
    batch: ClassConfig = field(default_factory=ClassConfig)  # requests that may wait; shed first


@dataclass
class BatchConfig:
    """The Batch API: files that users upload, and batches of requests that run from them."""

    max_file_mb: float = bounded(1024.0, 1e-3, 1e6)  # maximum size of an uploaded file in MiB
    user_gb: float = bounded(10.0, 1e-6, 1e6)  # maximum size of all stored files of one user in GB
    max_lines: int = bounded(1_000_000, 1, 10**8)  # maximum requests of one batch
    max_batches: int = bounded(16, 1, 10_000)  # maximum batches of one user that have not ended
    in_flight: int = bounded(64, 1, 10_000)  # maximum requests of all batches in flight, with waiting ones
    keep_days: float = bounded(30.0, 1e-5, 3650)  # days for which files and ended batches are kept


@dataclass
class RouterConfig:
    """The router: admission, balancing, failover and timeouts."""

    place: RouterPlace = "job"  # job: the router runs as a job; here: as a process of the machine that runs `up`
    resources: ResourceConfig = field(default_factory=ResourceConfig)  # what the router's job requests
    host: str | None = None  # host name or address to listen on; null: the node's address on cluster.fabric
    port: int = bounded(0, 0, 65535)  # TCP port; 0: a free port, which the registry records
    workers: int | None = bounded(None, 1, MAX_WORKERS)  # worker processes; null: one per CPU of the job
    open: bool = False  # true: requests need no token, so anyone on the network can send them
    reconcile: bool = True  # true: the router's job also runs the control loop
    standby: bool = True  # true: on Slurm, a standby job waits for the end of the router's job and replaces it
    # Origins of web pages whose scripts may use the router, such as http://localhost:3000; "*" allows every page.
    allowed_origins: list[str] = field(default_factory=list)
    # Absolute path of the PEM file with the router's certificate chain: the router then serves HTTPS; null: HTTP.
    tls_cert: str | None = None
    tls_key: str | None = None  # absolute path of the PEM file with the private key of router.tls_cert
    # Absolute path of a folder outside the run directory through which other users find the router; null: none.
    share_dir: str | None = None
    share_group: str | None = None  # Unix group, by name or id, whose members can read router.share_dir
    max_body_mb: float = bounded(32.0, 1e-6, 4096)  # maximum size of a request body in MiB; larger ones get 413
    # Maximum size in MiB of an unstreamed response that is buffered until complete, so that the request can be retried.
    hold_mb: float = bounded(8.0, 1e-6, 4096)
    max_in_flight: int = bounded(4096, 1, 10**6)  # maximum requests in the router, with waiting ones; then 429
    max_waiting: int = bounded(1024, 1, 10**6)  # maximum requests that wait for one expert; then 429
    classes: ClassesConfig = field(default_factory=ClassesConfig)  # priorities of interactive and batch requests
    batch: BatchConfig = field(default_factory=BatchConfig)  # limits of files and batches
    # A replica is chosen for its prefix cache while it has at most this factor of the expert's average number of
    # requests in flight, plus 8; null: the cache does not matter, only the number of requests in flight.
    pin_bound: float | None = bounded(1.5, 1, 1000)
    eject_connect_errors: int = bounded(1, 1, 10**6)  # consecutive failed connections after which a replica is ejected
    # Consecutive responses with status 5xx after which a replica is ejected, within `eject_share`.
    eject_errors: int = bounded(5, 1, 10**6)
    # Maximum share of an expert's replicas that may be ejected for errors; the last ready one never is.
    eject_share: float = bounded(0.5, 0, 1)
    eject_s: float = bounded(10.0, MIN_DURATION_S, DAY_S)  # duration of a replica's first ejection; doubles each time
    eject_most_s: float = bounded(300.0, MIN_DURATION_S, 7 * DAY_S)  # maximum duration of an ejection
    retry_share: float = bounded(0.2, 0, 1)  # retry budget: maximum share of requests that are retried
    retry_least_per_s: float = bounded(10.0, 1e-3, 1e6)  # retries per second that are always allowed
    # Maximum wait of a request for a replica, then 503. Time in which a replica of its expert starts does not count.
    queue_timeout_s: float = bounded(30.0, MIN_DURATION_S, DAY_S)
    # What happens to a request for an expert without a ready replica; the header `x-wait` decides for one request.
    # wait: it is held while a replica starts; fail: 503 with Retry-After; fallback: if its model is `auto`, the next
    # expert with a ready replica serves it, and any other request is held as with wait.
    cold_start: ColdStart = "fallback"
    # A stream without a first byte for this long gets its head and SSE comments; null: only while a replica starts.
    early_headers_s: float | None = bounded(None, MIN_DURATION_S, DAY_S)
    connect_timeout_s: float = bounded(5.0, MIN_DURATION_S, HOUR_S)  # time limit to connect to a replica
    first_byte_timeout_s: float = bounded(600.0, MIN_DURATION_S, DAY_S)  # time limit until a streamed response begins
    # Time limit from a request to the first byte of its response, if not streamed.
    answer_timeout_s: float = bounded(3600.0, MIN_DURATION_S, DAY_S)
    idle_timeout_s: float = bounded(300.0, MIN_DURATION_S, DAY_S)  # maximum pause while a body is received or sent
    # A stream that pauses for this long gets an SSE comment, so that proxies do not close the connection.
    ping_s: float = bounded(15.0, MIN_DURATION_S, DAY_S)
    # Maximum size in GB of the records of requests and the sampled prompts; the oldest are removed. 0: no records.
    records_gb: float = bounded(1.0, 0, 1e6)
    # Share of the successful requests whose prompt is stored in samples/ of the run directory, to train with; 0: none.
    sample_prompts: float = bounded(0.0, 0, 1)
    discovery_s: float = bounded(0.5, MIN_DURATION_S, HOUR_S)  # interval at which the router reads the registry
    probe_s: float = bounded(2.0, MIN_DURATION_S, HOUR_S)  # interval of health probes of each replica
    probe_timeout_s: float = bounded(2.0, MIN_DURATION_S, HOUR_S)  # time limit of one health probe
    drain_s: float = bounded(10.0, MIN_DURATION_S, DAY_S)  # time limit for requests in flight to complete after SIGTERM


@dataclass
class Simulate:
    """Replaces every vLLM engine by a simulated one, to predict a deployment without GPUs."""

    gpu: SimulatedGpu | None = None  # GPU to simulate; null: no simulation
    slowdown: float = bounded(1.0, 1e-3, 1e6)  # wall seconds per simulated second, for machines that are too slow


@dataclass
class Deployment:
    """The root of the configuration: everything that one launch creates."""

    name: str = "deployment"  # first part of the run directory's name and of the jobs' names
    runs: str = "runs"  # folder in which run directories are created
    experts: dict[str, ExpertConfig] = field(default_factory=dict)  # the experts by name
    cluster: ClusterConfig = field(default_factory=ClusterConfig)  # where jobs run
    policy: PolicyConfig = field(default_factory=PolicyConfig)  # how the expert for `model: auto` is chosen
    router: RouterConfig = field(default_factory=RouterConfig)  # the router's settings
    simulate: Simulate = field(default_factory=Simulate)  # replaces GPU engines by simulated ones


def options_of(expert: str, engine: EngineConfig) -> EngineOptions:
    """Returns the options of the engine of `expert`, as an object of the class for its kind of engine. Raises
    ConfigError for an invalid option."""
    at = f"experts.{expert}.engine"
    check_values(engine, at=at)
    return parse(OPTIONS[engine.kind], engine.options, at=f"{at}.options")
