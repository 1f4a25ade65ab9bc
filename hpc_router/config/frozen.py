"""Writes and reads the `config.yaml` of a run: the complete config, which all jobs of the run read.

`compose` makes the config once, with Hydra. Reading the file does not import Hydra.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final, TextIO

import yaml
from yaml import YAMLError

from hpc_router.config.parsing import parse
from hpc_router.config.schema import Deployment
from hpc_router.config.simulation import simulated
from hpc_router.config.validation import check
from hpc_router.errors import ConfigError, suggest

GROUPS: Final = ("topology", "cluster", "policy", "router", "expert")
"""Config groups: folders of `conf/`, each with one file per choice."""
IGNORED_KEYS: Final = ("hydra",)
"""Keys of a composed config that are not part of a deployment."""
ROOT_KEYS: Final = frozenset(f.name for f in fields(Deployment))
"""Keys at the root of a config."""
_WIDTH: Final = 120
_SafeLoader: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""PyYAML's loader in C, which takes a tenth of the time, if PyYAML was built with it."""


class _Loader(_SafeLoader):  # type: ignore[misc]
    """YAML loader that refuses a mapping with the same key twice; PyYAML alone would take the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"found duplicate key {key.value}", key.start_mark)
            seen.add(key.value)
        made: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return made


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """YAML writer that escapes the line ends of Unicode. Within the quotes that PyYAML alone would choose, its reader
    takes some of them for spaces."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = '"' if any(end in value for end in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def to_deployment(plain: Any, *, without: Sequence[str] = ()) -> Deployment:
    """Returns the checked deployment with the values in `plain`. Ignores the keys in `without`. Raises ConfigError."""
    if not isinstance(plain, Mapping):
        raise ConfigError("not a mapping of keys to values")
    left_out = {*IGNORED_KEYS, *without}
    for key in (str(key) for key in plain if key not in left_out and key not in ROOT_KEYS):
        if key in GROUPS:
            raise ConfigError(f"a file of the group '{key}' does not start with the line `# @package _global_`")
        raise ConfigError(f"unknown key '{key}'{suggest(key, {*ROOT_KEYS, *GROUPS})}", key=key)
    deployment = simulated(parse(Deployment, {k: v for k, v in plain.items() if k not in left_out}, at=""))
    check(deployment)
    return deployment


def to_yaml(deployment: Deployment) -> str:
    """Returns the text of `config.yaml`. Equal deployments give equal texts."""
    text: str = yaml.dump(asdict(deployment), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_WIDTH)
    return text


def from_yaml(text: str | TextIO) -> Deployment:
    """Returns the deployment that `to_yaml` wrote as `text`. Raises ConfigError or YAMLError."""
    return to_deployment(yaml.load(text, Loader=_Loader))


def read(path: Path) -> Deployment:
    """Returns the deployment in the `config.yaml` at `path`. Raises ConfigError."""
    try:
        with path.open(encoding="utf-8") as stream:
            return from_yaml(stream)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(yaml_error_text(error, display_path(path))) from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def differing_keys(left: Deployment, right: Deployment) -> list[str]:
    """Returns the keys, such as `router.port`, whose values differ between two deployments; sorted."""
    return list(differing_values(left, right))


def differing_values(left: Deployment, right: Deployment) -> dict[str, tuple[Any, Any]]:
    """Returns key -> (value in `left`, value in `right`) of each key whose values differ, sorted by key. A value is
    None if its deployment does not have the key."""
    one, other, absent = flat(asdict(left)), flat(asdict(right)), object()
    keys = sorted(key for key in one.keys() | other.keys() if one.get(key, absent) != other.get(key, absent))
    return {key: (one.get(key), other.get(key)) for key in keys}


def flat(value: Any, at: str = "") -> dict[str, Any]:
    """Returns the values in nested mappings by their dotted keys: {"router": {"port": 1}} gives {"router.port": 1}.
    `at`: prefix of all keys."""
    if not isinstance(value, dict) or not value:
        return {at: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= flat(item, f"{at}.{key}" if at else str(key))
    return found


def yaml_error_text(error: YAMLError | UnicodeDecodeError, name: str) -> str:
    """Returns the error as `FILE:LINE: problem`, without the line if the parser gives none. `name`: the file's path."""
    if isinstance(error, UnicodeDecodeError):
        return f"{name}: not UTF-8 text (byte {error.start}); save the file as UTF-8"
    mark: Any = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", None) or error).split("\n", 1)[0]
    where = f"{display_path(Path(mark.name))}:{mark.line + 1}" if mark is not None else name
    duplicate = re.match(r"found duplicate key (.+)", problem)
    if duplicate:
        return f"{where}: '{duplicate[1]}' is given twice in one mapping"
    return f"{where}: not valid YAML: {problem}"


def display_path(path: Path) -> str:
    """Returns the path relative to the working directory if it lies inside, else the full path."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
