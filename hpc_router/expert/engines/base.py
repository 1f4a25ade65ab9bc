"""The interface between the agent and the program that runs the model.

An `Engine` describes a program and does not run it: its command line, environment and socket, its readiness check, the
model names that it serves, and the meaning of its log lines. Every engine listens on a unix socket in a private folder,
because all users of a node share its loopback ports. These modules import no engine and do not know agents.
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
ENGINE_GRACE_S: Final = 10.0
"""Seconds from SIGTERM to SIGKILL for an engine without requests in flight."""
INSIDE: Final = Path(__file__).with_name("inside")
"""Folder of this package's scripts that run in the engine's interpreter."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """One rank of an engine that runs on `nodes` nodes. All ranks connect to rank 0, the master.

    `address`: the address of the rank's node on the fabric. `interface`: the network interface that has this address.
    """

    rank: int
    nodes: int
    address: str = "0.0.0.0"
    interface: str | None = None
    master_address: str = "0.0.0.0"
    master_port: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """The place where one process of an engine runs.

    `folder`: the agent's private folder on this node, for the engine's socket, temporary files and caches. `ranks`:
    None for an engine on one node, and for a command that is only shown or checked. `copies`: for each model that was
    copied to the node's disk, the path of the copy. `kept_cache`: a cache folder that is kept after the agent ends.
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
        """Returns the path or hub id from which the engine loads a model."""
        return self.copies.get(model, model)


class Engine(Protocol):
    """Describes the engine of one expert and its adapters. `build_engine` creates it."""

    @property
    def python(self) -> str:
        """Returns the path of the Python interpreter that runs the engine."""

    @property
    def ready_path(self) -> str:
        """Returns the HTTP path at which the engine answers a GET with status 200 once it can serve."""

    @property
    def lists_models(self) -> bool:
        """Returns whether the engine's `/v1/models` lists exactly the models that it serves."""

    @property
    def packages(self) -> Sequence[str]:
        """Returns the Python packages that may provide the engine. The version of the first one that is installed is
        the engine's version."""

    @property
    def models(self) -> Sequence[str]:
        """Returns the folders and hub ids of the model and the adapters."""

    @property
    def signs(self) -> Sequence[Sign]:
        """Returns patterns of log lines that show why the engine failed, the most specific first."""

    @property
    def grace_s(self) -> float:
        """Returns the seconds from SIGTERM to SIGKILL for an engine without requests in flight."""

    def serves(self) -> Mapping[str, str]:
        """Returns, by expert, the model name that a request for this expert must have when it reaches the engine."""

    def names(self) -> Sequence[str]:
        """Returns every model name that the engine accepts in requests."""

    def info(self) -> EngineInfo:
        """Returns the engine's part of the registry record, without the values that only the running engine knows."""

    @property
    def accepts(self) -> tuple[str, ...] | None:
        """Returns the kinds of input that the engine accepts (`Record.accepts`); None if they depend on the model."""

    def argv(self, place: Place) -> list[str]: ...

    def drain_flags(self, drain_s: int, *, version: str | None) -> list[str]:
        """Returns flags that let the engine finish its responses for `drain_s` seconds after SIGTERM. Empty for a
        `version` without such flags."""

    def environment(self, place: Place) -> dict[str, str]:
        """Returns variables to add to the job's environment for the engine's process."""

    def check_command(self, place: Place) -> list[str] | None:
        """Returns a command that checks the flags in the engine's own interpreter without loading a model; None if the
        engine has no such check. The command exits with status 2 and a message if a flag is invalid."""


def ranks_at(place: Place, *, nodes: int) -> Ranks | None:
    """Returns the rank of the engine's process at `place`; None for an engine on one node. If `place` has no rank
    although the engine has several nodes, returns rank 0 with placeholder addresses."""
    return None if nodes == 1 else place.ranks or Ranks(0, nodes)


def rank_flags(ranks: Ranks | None) -> list[str]:
    """Returns the flags that tell vLLM or the simulated engine its rank; none for an engine on one node."""
    if ranks is None:
        return []
    return [
        *("--nnodes", str(ranks.nodes)),
        *("--node-rank", str(ranks.rank)),
        *("--master-addr", ranks.master_address),
        *("--master-port", str(ranks.master_port)),
    ]


class AdapterEngine:
    """A base class for engines that serve adapters in addition to their own model."""

    expert: str
    config: ExpertConfig
    adapters: Mapping[str, str]

    @property
    def python(self) -> str:
        return interpreter(self.config.engine)

    @property
    def models(self) -> tuple[str, ...]:
        return (self.config.model, *self.adapters.values())

    def serves(self) -> dict[str, str]:
        return {name: name for name in (self.expert, *self.adapters)}

    def names(self) -> tuple[str, ...]:
        return (*own_names(self.expert, self.adapters), *self.adapters)


def own_names(expert: str, adapters: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the names under which an engine serves its own model: the expert's name, and `auto` if there are no
    adapters, since with adapters `auto` would be ambiguous."""
    return (expert,) if adapters else (expert, "auto")


def lora_modules(adapters: Mapping[str, str], place: Place) -> list[str]:
    """Returns the flag that lists the adapters, for vLLM and the simulated engine. Each adapter is `NAME=PATH`, or JSON
    if its path has a comma."""
    if not adapters:
        return []
    paths = {name: place.path_of(adapter) for name, adapter in adapters.items()}
    modules = [json.dumps({"name": n, "path": path}) if "," in path else f"{n}={path}" for n, path in paths.items()]
    return ["--lora-modules", *modules]


def one_node_only(expert: str, config: ExpertConfig) -> None:
    """Raises ConfigError if the config asks for several nodes. Called for engines that run only on one node."""
    nodes, key = config.resources.nodes, f"experts.{expert}.resources.nodes"
    if nodes > 1:
        kind = config.engine.kind
        raise ConfigError(f"{key}={nodes}: {kind} runs on one node (valid: 1, or another engine, as vllm)", key=key)


def interpreter(config: EngineConfig) -> str:
    return config.python or sys.executable


def version_command(engine: Engine) -> list[str]:
    """Returns a command that prints the engine's version, and prints nothing if the engine is not installed."""
    return [engine.python, str(INSIDE / "ask_version.py"), *engine.packages]


def engine_environment(
    engine: Engine,
    expert: ExpertConfig,
    place: Place,
    *,
    inherited: Mapping[str, str],
    cluster: ClusterConfig | None = None,
) -> dict[str, str]:
    """Returns the environment of the engine's process: `inherited`, the job's environment, with changes. Variables in
    `engine.env` take precedence over those in `cluster.env`, and these over all others. With `cluster.offline`
    (default: if all models are local folders), the engine does not use the hub and gets no proxy variables."""
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
    return os.path.isdir(model)  # noqa: PTH112 - a hub id is not a path


def flags(extra: Mapping[str, Any]) -> list[str]:
    """Formats options as flags: `{"seed": 1, "x": true, "y": false, "z": ["a", "b"]}` -> `--seed 1 --x --no-y --z a
    b`."""
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
    """Returns the name of a flag with dashes inside and none in front: `max_len` and `--max-len` give `max-len`."""
    return name.lstrip("-").replace("_", "-")


def orders_by_priority(extra: Mapping[str, Any]) -> bool:
    """Returns whether vLLM or the simulated engine, with the options `extra`, orders requests by their `priority`."""
    return {flag_name(name): value for name, value in extra.items()}.get("scheduling-policy") == "priority"


def checked_flags(extra: Mapping[str, Any], *, at: str, reserved: Mapping[str, str]) -> dict[str, Any]:
    """Returns `extra` with its names normalised by `flag_name`. Raises ConfigError for a flag in `reserved`, whose
    value is the reason why it cannot be set. `at`: the config key of `extra`, for the error."""
    named = {flag_name(name): value for name, value in extra.items()}
    for name in named:
        if name in reserved:
            raise ConfigError(f"{at}.extra.{name}: not a flag to set here; {reserved[name]}")
    return named
