"""Experts that share an engine: a host, and the LoRA adapters that the host's engine serves.

Each adapter is an expert with a name of its own. A host has jobs and a record in the registry; an adapter is only a
name in that record. Code that manages jobs therefore uses `hosts`, and code that routes requests treats all experts
alike. Only `adapter_rank` reads files of an adapter.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Final

from hpc_router.config.schema import ExpertConfig
from hpc_router.errors import ConfigError, suggest

ENGINES: Final = ("vllm", "sim")
"""Kinds of engine that can serve LoRA adapters."""
CONFIG: Final = "adapter_config.json"
"""File with an adapter's settings, which PEFT writes next to the weights."""
_OWN: Final = frozenset({"model", "adapter_of", "description", "exemplars"})
"""Keys that an adapter may set. Its host sets the others, because they belong to the engine or its jobs."""


def hosts(experts: Mapping[str, ExpertConfig]) -> dict[str, ExpertConfig]:
    """Returns the experts that have their own engine, and therefore their own jobs."""
    return {name: expert for name, expert in experts.items() if expert.adapter_of is None}


def host_of(experts: Mapping[str, ExpertConfig], name: str) -> str:
    """Returns the expert whose engine serves `name`: `name` itself, or its host if `name` is an adapter."""
    return experts[name].adapter_of or name


def adapters_of(experts: Mapping[str, ExpertConfig], host: str) -> dict[str, str]:
    """Returns the adapters that the engine of `host` serves: expert name -> adapter folder or hub id."""
    return {name: expert.model for name, expert in experts.items() if expert.adapter_of == host}


def check_adapter(name: str, experts: Mapping[str, ExpertConfig]) -> None:
    """Raises ConfigError if the adapter `name` has no valid host, or sets a key that an adapter may not set."""
    expert, valid = experts[name], [host for host in hosts(experts) if experts[host].engine.kind in ENGINES]
    key = f"experts.{name}.adapter_of"
    host = expert.adapter_of
    assert host is not None
    if host == name:
        raise ConfigError(f"{key}={host}: an expert cannot be its own adapter{suggest('', valid)}", key=key)
    if host not in experts:
        raise ConfigError(f"{key}={host}: no expert is named '{host}'{suggest(host, valid)}", key=key)
    if experts[host].adapter_of is not None:
        raise ConfigError(f"{key}={host}: '{host}' is an adapter itself{suggest('', valid)}", key=key)
    if experts[host].engine.kind not in ENGINES:
        problem = f"the engine '{experts[host].engine.kind}' of '{host}' takes no adapters"
        raise ConfigError(f"{key}={host}: {problem} (valid: one with engine.kind {' or '.join(ENGINES)})", key=key)
    default = ExpertConfig(model=expert.model)
    for item in fields(ExpertConfig):
        if item.name not in _OWN and getattr(expert, item.name) != getattr(default, item.name):
            key = f"experts.{name}.{item.name}"
            problem = f"'{name}' is an adapter on the engine of '{host}' and has no {item.name} of its own"
            raise ConfigError(f"{key}: {problem}; edit experts.{host}.{item.name}, which holds for both", key=key)


def adapter_rank(folder: Path) -> int:
    """Returns the rank of the LoRA adapter in `folder`, the largest if its modules have several. Raises ValueError if
    the adapter's settings file is missing or has no valid rank."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    except FileNotFoundError:
        raise ValueError(f"it has no {CONFIG}, so it is no LoRA adapter") from None
    except OSError as error:
        raise ValueError(f"its {CONFIG} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its {CONFIG} has no rank `r`") from error
    if not all(isinstance(rank, int) and not isinstance(rank, bool) and rank > 0 for rank in ranks):
        raise ValueError(f"its {CONFIG} has no rank `r`")
    return int(max(ranks))
