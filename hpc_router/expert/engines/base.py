"""The interface between the agent and the program that computes.

An engine is described here, never run: its command line, environment, the socket it listens on, when it is ready, the
model names it serves, and the meaning of its log lines. Every engine listens on a unix socket in a private folder,
because all users of a node share its loopback ports. No module here imports an engine or knows about agents.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from hpc_router.config.schema import ClusterConfig, EngineConfig, ExpertConfig
from hpc_router.errors import ConfigError
from hpc_router.expert.engines.failure import Sign
from hpc_router.net.job_environment import without_job_variables
from hpc_router.state.registry import EngineInfo

_PROXIES: Final = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ftp_proxy")
_THREADS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_MAX_THREADS")
INSIDE: Final = Path(__file__).with_name("inside")
"""Our scripts that run in the engine's interpreter."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """One rank of an engine that spans `nodes` nodes; rank 0 is the master, to which the others connect.

    `address` is this node's address on the fabric, `interface` its network interface.
    """

    rank: int
    nodes: int
    address: str = "0.0.0.0"
    interface: str | None = None
    master_address: str = "0.0.0.0"
    master_port: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where one process of an engine runs. `folder`: the node-local 0700 folder of its agent, for the engine's socket,
    temporary files and caches. `ranks` is None on one node, and where only the form of a command is needed.
    `copies`: models, as configured, that the engine loads from another path. `kept_cache`: a cache folder that outlasts
    the agent.
    """

    folder: Path
    ranks: Ranks | None = None
    copies: Mapping[str, str] = field(default_factory=dict)
    kept_cache: Path | None = None

    @property
    def socket(self) -> Path:
        return self.folder / "engine.sock"

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    @property
    def cache(self) -> Path:
        return self.kept_cache or self.folder / "cache"

    def path_of(self, model: str) -> str:
        """The path or hub id from which the engine loads a model."""
        return self.copies.get(model, model)


class Engine(Protocol):
    """The engine of one expert and of the experts that are adapters on it. `build_engine` makes it."""

    @property
    def python(self) -> str:
        """The interpreter it runs in."""

    @property
    def ready_path(self) -> str:
        """The path that answers GET with 200 once the engine can serve."""

    @property
    def lists_models(self) -> bool:
        """Whether its own `/v1/models` lists exactly the models that it serves."""

    @property
    def packages(self) -> Sequence[str]:
        """Distributions whose version is the engine's; the first installed one counts."""

    @property
    def models(self) -> Sequence[str]:
        """Folders and hub ids of its model and its adapters."""

    @property
    def signs(self) -> Sequence[Sign]:
        """The meaning of its log lines after a failure, the most specific first."""

    def serves(self) -> Mapping[str, str]:
        """Expert -> the name the engine answers to."""

    def names(self) -> Sequence[str]:
        """Every model name the engine answers to."""

    def info(self) -> EngineInfo:
        """The record for the registry, without the version."""

    def argv(self, place: Place) -> list[str]: ...

    def drain_flags(self, drain_s: int, *, version: str | None) -> list[str]:
        """Flags that let it finish running responses for `drain_s` after SIGTERM; empty if this version has none."""

    def environment(self, place: Place) -> dict[str, str]:
        """Variables that are added to the job's environment."""

    def check_command(self, place: Place) -> list[str] | None:
        """A command that checks the flags in the engine's own interpreter without loading a model: exit status 2 and a
        message if one is wrong. None if the engine has no such check."""


def ranks_at(place: Place, *, nodes: int) -> Ranks | None:
    """None for an engine on one node. A place without ranks counts as rank 0 on an unknown node."""
    return None if nodes == 1 else place.ranks or Ranks(0, nodes)


def rank_flags(ranks: Ranks | None) -> list[str]:
    """vLLM's flags, which the simulated engine has too."""
    if ranks is None:
        return []
    return [
        *("--nnodes", str(ranks.nodes)),
        *("--node-rank", str(ranks.rank)),
        *("--master-addr", ranks.master_address),
        *("--master-port", str(ranks.master_port)),
    ]


class AdapterEngine:
    """The common part of engines that serve adapters beside their own model."""

    expert: str
    config: ExpertConfig
    adapters: Mapping[str, str]

    @property
    def models(self) -> tuple[str, ...]:
        return (self.config.model, *self.adapters.values())

    def serves(self) -> dict[str, str]:
        return {name: name for name in (self.expert, *self.adapters)}

    def names(self) -> tuple[str, ...]:
        return (*own_names(self.expert, self.adapters), *self.adapters)


def own_names(expert: str, adapters: Mapping[str, str]) -> tuple[str, ...]:
    """The names of an engine's own model. With adapters there is no `auto`, which could mean any of them."""
    return (expert,) if adapters else (expert, "auto")


def lora_modules(adapters: Mapping[str, str], place: Place) -> list[str]:
    """vLLM's flag, which the simulated engine has too: `NAME=PATH`, or JSON if the path contains a comma."""
    if not adapters:
        return []
    paths = {name: place.path_of(adapter) for name, adapter in adapters.items()}
    modules = [json.dumps({"name": n, "path": path}) if "," in path else f"{n}={path}" for n, path in paths.items()]
    return ["--lora-modules", *modules]


def one_node_only(expert: str, config: ExpertConfig) -> None:
    """Raises ConfigError for an engine that cannot span nodes, if the expert has more than one."""
    nodes, key = config.resources.nodes, f"experts.{expert}.resources.nodes"
    if nodes > 1:
        kind = config.engine.kind
        raise ConfigError(f"{key}={nodes}: {kind} runs on one node (valid: 1, or another engine, as vllm)", key=key)


def interpreter(config: EngineConfig) -> str:
    return config.python or sys.executable


def version_command(engine: Engine) -> list[str]:
    """A command that prints the version, or nothing."""
    return [engine.python, str(INSIDE / "ask_version.py"), *engine.packages]


def engine_environment(
    engine: Engine,
    expert: ExpertConfig,
    place: Place,
    *,
    inherited: Mapping[str, str],
    cluster: ClusterConfig | None = None,
) -> dict[str, str]:
    """The whole environment of the engine's process; the user's `engine.env` wins, then `cluster.env`.

    Offline means that the hub is not used and that there are no proxies. It is the default if all models are local.
    """
    cluster = cluster or ClusterConfig()
    offline = all(map(is_local, engine.models)) if cluster.offline is None else cluster.offline
    environment = {k: v for k, v in without_job_variables(inherited).items() if not (offline and k.lower() in _PROXIES)}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"} if offline else {}
    environment |= {
        "TMPDIR": str(place.temporary),
        "TORCHINDUCTOR_CACHE_DIR": str(place.cache / "inductor"),
        "TRITON_CACHE_DIR": str(place.cache / "triton"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if expert.engine.threads is not None:
        environment |= dict.fromkeys(_THREADS, str(expert.engine.threads))
    return environment | engine.environment(place) | cluster.env | expert.engine.env


def is_local(model: str) -> bool:
    return os.path.isdir(model)  # noqa: PTH112 - a hub id is no path


def flags(extra: Mapping[str, Any]) -> list[str]:
    """`{"seed": 1, "x": true, "y": false, "z": ["a", "b"]}` -> `--seed 1 --x --no-y --z a b`; null leaves one out."""
    words: list[str] = []
    for name, value in extra.items():
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list | tuple):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [f"--{name}", json.dumps(value) if isinstance(value, Mapping) else str(value)]
    return words


def flag_name(name: str) -> str:
    """The flag's form of a name in `extra`."""
    return name.lstrip("-").replace("_", "-")


def checked_flags(extra: Mapping[str, Any], *, at: str, reserved: Mapping[str, str]) -> dict[str, Any]:
    """`extra` with its names in the form of flags. Raises ConfigError for a reserved flag."""
    named = {flag_name(name): value for name, value in extra.items()}
    for name in named:
        if name in reserved:
            raise ConfigError(f"{at}.extra.{name}: not a flag to set here; {reserved[name]}")
    return named
