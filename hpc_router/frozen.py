"""A deployment's config as text and back: what `config.yaml` of a run holds, read by every job of the run.

Hydra composes it once, in `compose`; nobody who only reads it loads Hydra.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final

from omegaconf import MISSING, DictConfig, OmegaConf
from yaml import YAMLError

from hpc_router.checks import check
from hpc_router.config import Deployment
from hpc_router.errors import ConfigError, suggest
from hpc_router.schema import parse
from hpc_router.simulate import simulated

GROUPS: Final = ("topology", "cluster", "policy", "router", "expert")
"""Folders of `conf/`."""
LEFT_OUT: Final = ("hydra",)
_TOP: Final = frozenset(f.name for f in fields(Deployment))


def to_deployment(composed: DictConfig, *, without: Sequence[str] = ()) -> Deployment:
    """A composed config as a checked `Deployment`."""
    plain = OmegaConf.to_container(composed)
    if not isinstance(plain, dict):
        raise ConfigError("not a mapping of keys to values")
    left_out = {*LEFT_OUT, *without}
    for key in (str(key) for key in plain if key not in left_out and key not in _TOP):
        if key in GROUPS:
            raise ConfigError(f"a file of the group '{key}' does not begin with the line `# @package _global_`")
        raise ConfigError(f"unknown key '{key}'{suggest(key, {*_TOP, *GROUPS})}", key=key)
    deployment = simulated(parse(Deployment, {k: v for k, v in plain.items() if k not in left_out}, at=""))
    check(deployment)
    return deployment


def to_yaml(deployment: Deployment) -> str:
    """What `config.yaml` of a run holds; equal deployments give equal texts."""
    return OmegaConf.to_yaml(OmegaConf.structured(deployment), resolve=True)


def read(path: Path) -> Deployment:
    """The frozen `config.yaml` of a run."""
    try:
        loaded = OmegaConf.load(path)
        return to_deployment(loaded if isinstance(loaded, DictConfig) else OmegaConf.create({"": None}))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(yaml_fault(error, shown(path))) from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def differing_keys(left: Deployment, right: Deployment) -> list[str]:
    """Keys whose values differ."""
    one, other = _flat(asdict(left)), _flat(asdict(right))
    return sorted(key for key in one.keys() | other.keys() if one.get(key, MISSING) != other.get(key, MISSING))


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {at: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{at}.{key}" if at else str(key))
    return flat


def yaml_fault(error: YAMLError | UnicodeDecodeError, name: str) -> str:
    """`file:line: what`, where the parser tells."""
    mark: Any = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", None) or error)
    where = f"{shown(Path(mark.name))}:{mark.line + 1}" if mark is not None else name
    duplicate = re.match(r"found duplicate key (.+)", problem)
    if duplicate:
        return f"{where}: '{duplicate[1]}' is given twice in one mapping"
    return f"{where}: not valid YAML: {problem}"


def shown(path: Path) -> str:
    """As the user would type it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
