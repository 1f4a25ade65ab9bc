"""The deployment's configuration: dataclasses as the only schema and the only home of defaults.

`conf/` holds values, `hpc_router.compose` turns files and overrides into a `Deployment`; each component then gets its
own slice. What one dataclass cannot see (TP x PP against GPUs, a fallback that is no expert) is checked in `check`.
"""

import re
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Final, TypeVar

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from hpc_router.errors import ConfigError, suggest

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
class SimOptions:
    """The simulated engine: latencies in milliseconds, faults as its own `--faults` takes them."""

    seed: int = 0
    ttft_ms: float = 20.0
    itl_ms: float = 5.0
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
class ResourceConfig:
    """What one replica asks for, per node."""

    nodes: int = 1
    gpus: int = 0
    cpus: int = 1
    memory_gb: float | None = None


@dataclass
class ExpertConfig:
    """A named specialised model. `exemplars`: a few prompts of its domain; none: reachable by name or as fallback."""

    model: str = MISSING
    revision: str | None = None
    description: str = ""
    replicas: int = 1
    capacity: int = 256  # requests in flight per replica
    engine: EngineConfig = field(default_factory=EngineConfig)
    resources: ResourceConfig = field(default_factory=ResourceConfig)
    exemplars: list[str] = field(default_factory=list)


@dataclass
class ClusterConfig:
    """Where jobs run."""

    kind: str = "local"
    gpus: int = 0  # GPUs per node
    address: str = "127.0.0.1"  # what agents bind and publish
    scratch: str = "/tmp"  # node-local folder for sockets and caches
    drain_s: float = 30.0  # in-flight requests may take this long after SIGTERM
    beat_s: float = 2.0
    reconcile_s: float = 2.0
    max_failures: int = 3  # failed jobs of one replica in a row before it is left alone


@dataclass
class PolicyConfig:
    """prompt -> expert, for `model: auto` only."""

    kind: str = "classifier"  # classifier | model_field | round_robin | least_in_flight
    artefact: str | None = None  # null: trained at `up` from the experts' exemplars
    fallback: str | None = None  # the expert for what nobody knows
    window: int = 2048  # characters of the user's messages that are looked at
    margin: float | None = None  # null: the artefact's own threshold


POLICIES: Final = ("classifier", "model_field", "round_robin", "least_in_flight")


@dataclass
class RouterConfig:
    """The router process."""

    host: str = "127.0.0.1"
    port: int = 0  # 0: the kernel gives a free one, the registry tells it
    workers: int = 1
    open: bool = False  # true: no token asked; anybody on the network may call
    reconcile: bool = True  # run the control loop beside the router
    max_body_mb: float = 32.0
    hold_mb: float = 8.0  # a non-streaming answer up to this size is held until complete, so it can fail over
    max_in_flight: int = 4096
    queue_timeout_s: float = 30.0  # wait for a replica of the expert
    connect_timeout_s: float = 5.0
    first_byte_timeout_s: float = 600.0
    idle_timeout_s: float = 300.0
    discovery_s: float = 0.5
    probe_s: float = 2.0
    probe_timeout_s: float = 2.0
    drain_s: float = 10.0


@dataclass
class Deployment:
    """The config root: all that one launch creates."""

    name: str = "deployment"
    runs: str = "runs"
    experts: dict[str, ExpertConfig] = field(default_factory=dict)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    router: RouterConfig = field(default_factory=RouterConfig)


_T = TypeVar("_T")


def parse(schema: type[_T], value: Any, *, at: str) -> _T:
    """`value` as an instance of the dataclass `schema`: refuses typos, converts types. `at` names it in errors."""
    try:
        result = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), value))
    except OmegaConfBaseException as error:
        raise ConfigError(describe(error, at=at)) from error
    assert isinstance(result, schema)
    return result


def describe(error: OmegaConfBaseException, *, at: str) -> str:
    """An OmegaConf error in our words: the key, what is wrong, the nearest valid key."""
    first = str(error).split("\n", 1)[0]
    full_key = getattr(error, "full_key", None) or getattr(error, "key", None) or "?"
    where = f"{at}.{full_key}" if at else str(full_key)
    schema = getattr(error, "object_type", None)
    if isinstance(error, ConfigKeyError) and isinstance(schema, type) and is_dataclass(schema):
        return f"unknown key '{where}'{suggest(str(error.key), (f.name for f in fields(schema)))}"
    return f"'{where}': {first}"


def options_of(expert: str, engine: EngineConfig) -> EngineOptions:
    """The engine's options, typed by its kind."""
    if engine.kind not in OPTIONS:
        raise ConfigError(
            f"experts.{expert}.engine.kind: unknown engine '{engine.kind}'{suggest(engine.kind, OPTIONS)}"
        )
    return parse(OPTIONS[engine.kind], engine.options, at=f"experts.{expert}.engine.options")


def check(deployment: Deployment) -> None:
    """Everything that can be refused before a job is submitted. Raises ConfigError naming the key."""
    _one_of("cluster.kind", deployment.cluster.kind, ("local",))
    _one_of("policy.kind", deployment.policy.kind, POLICIES)
    check_router(deployment.router)
    _positive("cluster.beat_s", deployment.cluster.beat_s)
    _positive("cluster.reconcile_s", deployment.cluster.reconcile_s)
    _positive("policy.window", deployment.policy.window)
    for name, expert in deployment.experts.items():
        _check_expert(name, expert, deployment.cluster)
    if deployment.experts:
        check_fallback(deployment.policy.fallback, deployment.experts)
    if deployment.policy.kind == "classifier" and deployment.experts and deployment.policy.artefact is None:
        taught = [name for name, expert in deployment.experts.items() if expert.exemplars]
        if len(taught) < 2:
            raise ConfigError(
                "policy=classifier needs policy.artefact=DIR or exemplars of at least two experts; "
                f"exemplars were given for: {', '.join(taught) or 'none'} (policy=model_field needs neither)"
            )


def check_router(router: RouterConfig) -> None:
    if router.workers != 1:
        raise ConfigError(f"router.workers={router.workers}: this version runs one worker (valid: 1)")
    if not 0 <= router.port <= 65535:
        raise ConfigError(f"router.port={router.port}: not a port (valid: 0 to 65535; 0 takes a free one)")
    for item in fields(router):
        value = getattr(router, item.name)
        if item.name.endswith(("_s", "_mb")) or item.name == "max_in_flight":
            _positive(f"router.{item.name}", value)


def check_fallback(fallback: str | None, experts: Any) -> None:
    if fallback is not None and fallback not in experts:
        raise ConfigError(f"policy.fallback: no expert is named '{fallback}'{suggest(fallback, experts)}")


def _check_expert(name: str, expert: ExpertConfig, cluster: ClusterConfig) -> None:
    at = f"experts.{name}"
    if not EXPERT_NAME.fullmatch(name) or name in RESERVED_NAMES:
        raise ConfigError(
            f"{at}: '{name}' cannot name an expert (valid: lower-case letters, digits, '-' and '_', at most 63, "
            f"not {' or '.join(sorted(RESERVED_NAMES))})"
        )
    if OmegaConf.is_missing(expert, "model") or not expert.model or expert.model == MISSING:
        raise ConfigError(f"{at}.model is missing: a model folder or a hub id")
    if expert.replicas < 0:
        raise ConfigError(f"{at}.replicas={expert.replicas}: cannot be negative")
    for key, value in {
        "capacity": expert.capacity,
        "resources.nodes": expert.resources.nodes,
        "resources.cpus": expert.resources.cpus,
        "engine.startup_timeout_s": expert.engine.startup_timeout_s,
    }.items():
        _positive(f"{at}.{key}", value)
    options = options_of(name, expert.engine)
    if cluster.kind == "local" and expert.resources.nodes > 1:
        raise ConfigError(f"{at}.resources.nodes={expert.resources.nodes}: cluster=local is one node")
    if expert.resources.gpus > cluster.gpus:
        raise ConfigError(
            f"{at}.resources.gpus={expert.resources.gpus}: a node of this cluster has cluster.gpus={cluster.gpus}"
        )
    if isinstance(options, VllmOptions):
        _check_vllm(at, expert, options)


def _check_vllm(at: str, expert: ExpertConfig, options: VllmOptions) -> None:
    _one_of(f"{at}.engine.options.device", options.device, ("cuda", "cpu"))
    tensor, pipeline = options.tensor_parallel_size, options.pipeline_parallel_size
    _positive(f"{at}.engine.options.tensor_parallel_size", tensor)
    _positive(f"{at}.engine.options.pipeline_parallel_size", pipeline)
    gpus = expert.resources.gpus * expert.resources.nodes
    if options.device == "cuda" and tensor * pipeline != gpus:
        raise ConfigError(
            f"{at}: tensor_parallel_size {tensor} x pipeline_parallel_size {pipeline} = {tensor * pipeline} GPUs, but "
            f"resources ask for {expert.resources.nodes} node(s) x {expert.resources.gpus} GPUs = {gpus}"
        )


def _one_of(key: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigError(f"{key}={value}: not known{suggest(value, valid)}")


def _positive(key: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{key}={value}: must be above 0")
