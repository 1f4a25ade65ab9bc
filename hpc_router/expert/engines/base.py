"""The seam between the agent and the program that computes.

An engine is described, never run, from here: its command line, environment, the socket it listens on, when it is
ready, the names it answers to, and what its last words mean. Every engine listens on a unix socket in a private
folder: loopback ports are everyone's on a shared node. No module here imports an engine or knows about agents.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
"""Scripts of ours that run in the engine's interpreter."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """One rank's part in an engine that spans `nodes` nodes: rank 0 is the master, which the others look for.

    `address` is this node's on the fabric, `interface` the one that carries it.
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
    temporary files and caches. `ranks`: None where one node is all, or where only the form of a command is wanted.
    """

    folder: Path
    ranks: Ranks | None = None

    @property
    def socket(self) -> Path:
        return self.folder / "engine.sock"

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"


class Engine(Protocol):
    """One engine: of an expert, and of those that are adapters on it. `build_engine` makes them."""

    @property
    def python(self) -> str:
        """The interpreter it runs in."""

    @property
    def ready_path(self) -> str:
        """Answers GET with 200 once the engine can serve."""

    @property
    def lists_models(self) -> bool:
        """Whether its own `/v1/models` lists what it serves, and only that."""

    @property
    def packages(self) -> Sequence[str]:
        """Distributions whose version is the engine's; the first that is installed counts."""

    @property
    def models(self) -> Sequence[str]:
        """Folders and hub ids of what it loads: its model, and adapters."""

    @property
    def signs(self) -> Sequence[Sign]:
        """What its log lines mean after it has failed, the most telling first."""

    def serves(self) -> Mapping[str, str]:
        """Expert -> the name the engine answers to."""

    def names(self) -> Sequence[str]:
        """Every model name the engine answers to."""

    def info(self) -> EngineInfo:
        """For the registry; the version is asked later."""

    def argv(self, place: Place) -> list[str]: ...

    def drain_flags(self, drain_s: int, *, version: str | None) -> list[str]:
        """What makes it finish running answers for so long after SIGTERM; empty where this version cannot."""

    def environment(self, place: Place) -> dict[str, str]:
        """What is added to the job's environment."""

    def check_command(self, place: Place) -> list[str] | None:
        """Asks the engine's own interpreter about the flags without loading a model: exit status 2 and a message if
        one is wrong. None: cannot be asked."""


def ranks_at(place: Place, *, nodes: int) -> Ranks | None:
    """None for an engine on one node. A bare place stands for rank 0, wherever that will be."""
    return None if nodes == 1 else place.ranks or Ranks(0, nodes)


def rank_flags(ranks: Ranks | None) -> list[str]:
    """As vLLM calls them, and the simulated engine after it."""
    if ranks is None:
        return []
    return [
        *("--nnodes", str(ranks.nodes)),
        *("--node-rank", str(ranks.rank)),
        *("--master-addr", ranks.master_address),
        *("--master-port", str(ranks.master_port)),
    ]


class TakesAdapters:
    """What engines that serve adapters beside their own model have in common."""

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
    """What an engine's own model is called. With adapters `auto` may mean any of them: then it has no such name."""
    return (expert,) if adapters else (expert, "auto")


def lora_modules(adapters: Mapping[str, str]) -> list[str]:
    """As vLLM calls them, and the simulated engine after it: `NAME=PATH`, or JSON where that could be read wrongly."""
    if not adapters:
        return []
    told = [json.dumps({"name": n, "path": path}) if "," in path else f"{n}={path}" for n, path in adapters.items()]
    return ["--lora-modules", *told]


def one_node_only(expert: str, config: ExpertConfig) -> None:
    """For engines that cannot span nodes. Raises ConfigError."""
    nodes, key = config.resources.nodes, f"experts.{expert}.resources.nodes"
    if nodes > 1:
        kind = config.engine.kind
        raise ConfigError(f"{key}={nodes}: {kind} runs on one node (valid: 1, or another engine, as vllm)", key=key)


def interpreter(config: EngineConfig) -> str:
    return config.python or sys.executable


def version_command(engine: Engine) -> list[str]:
    """Prints the version, or nothing."""
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

    Offline the hub is not asked and there are no proxies: by default where all it loads is in local folders.
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
    """A name in `extra` as the flag has it."""
    return name.lstrip("-").replace("_", "-")


def refuse(extra: Mapping[str, Any], *, at: str, owned: Mapping[str, str]) -> dict[str, Any]:
    """`extra` with its names in the form flags have. Raises ConfigError for a flag that is set elsewhere."""
    named = {flag_name(name): value for name, value in extra.items()}
    for name in named:
        if name in owned:
            raise ConfigError(f"{at}.extra.{name}: not a flag to set here; {owned[name]}")
    return named
