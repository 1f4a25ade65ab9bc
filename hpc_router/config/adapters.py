"""Which experts share an engine: a host, and the LoRA adapters that its engine serves under names of their own.

A host has jobs and a record in the registry; an adapter is only a name in it. So whoever looks after jobs asks for
`hosts`, whoever looks after requests knows all experts alike. Nothing here looks at an adapter's files but `own_rank`.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Final

from hpc_router.config.schema import ExpertConfig
from hpc_router.errors import ConfigError, suggest

ENGINES: Final = ("vllm", "sim")
"""Those that serve adapters."""
CONFIG: Final = "adapter_config.json"
"""What PEFT writes beside an adapter's weights."""
_OWN: Final = frozenset({"model", "adapter_of", "description", "exemplars"})
"""What an adapter may say; all else is its host's to say, for the engine, or makes no sense."""


def hosts(experts: Mapping[str, ExpertConfig]) -> dict[str, ExpertConfig]:
    """The experts that have engines, and so jobs, of their own."""
    return {name: expert for name, expert in experts.items() if expert.adapter_of is None}


def host_of(experts: Mapping[str, ExpertConfig], name: str) -> str:
    """The expert whose engine serves this one: itself, or the one whose adapter it is."""
    return experts[name].adapter_of or name


def adapters_of(experts: Mapping[str, ExpertConfig], host: str) -> dict[str, str]:
    """The adapters on this expert's engine: expert -> folder or hub id."""
    return {name: expert.model for name, expert in experts.items() if expert.adapter_of == host}


def check_adapter(name: str, experts: Mapping[str, ExpertConfig]) -> None:
    """Raises ConfigError for an adapter of nothing, and for keys that it cannot honour."""
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
        said = f"the engine '{experts[host].engine.kind}' of '{host}' takes no adapters"
        raise ConfigError(f"{key}={host}: {said} (valid: one with engine.kind {' or '.join(ENGINES)})", key=key)
    default = ExpertConfig(model=expert.model)
    for item in fields(ExpertConfig):
        if item.name not in _OWN and getattr(expert, item.name) != getattr(default, item.name):
            key = f"experts.{name}.{item.name}"
            said = f"'{name}' is an adapter on the engine of '{host}' and has no {item.name} of its own"
            raise ConfigError(f"{key}: {said}; edit experts.{host}.{item.name}, which holds for both", key=key)


def own_rank(folder: Path) -> int:
    """The rank that an adapter in a folder has, its largest where its modules differ. Raises ValueError."""
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
