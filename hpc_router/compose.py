"""From config files and overrides to a checked `Deployment`, with errors that name the file, the key and what is valid.

Hydra composes, the dataclasses in `config` decide. Keys below `engine.options` and `engine.env` are open mappings,
so an override may add one without Hydra's `+`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hpc_router.config import Deployment, check, describe, parse
from hpc_router.errors import ConfigError, suggest

_OPEN_MAPPING: Final = re.compile(r"[\w.-]+\.(options|env)\.[\w.-]+=")
_GROUPS: Final = ("topology", "cluster", "policy", "router")


def conf_folder() -> Path:
    """`conf/` beside the package in a clone, inside it when installed from a wheel."""
    inside = Path(__file__).with_name("conf")
    return inside if inside.is_dir() else Path(__file__).parent.with_name("conf")


def register_schema() -> None:
    """Let `deploy.yaml` begin its defaults with the dataclasses."""
    ConfigStore.instance().store(name="deployment_schema", node=Deployment, provider="hpc_router.config")


def load_deployment(overrides: Sequence[str], *, config_dir: Path | None = None) -> Deployment:
    """Compose `conf/deploy.yaml` with a user's overrides and folder; the result has passed `check`."""
    if config_dir is not None and not config_dir.is_dir():
        raise ConfigError(f"--config-dir {config_dir}: no such folder")
    search = [f"hydra.searchpath=[file://{config_dir.resolve()}]"] if config_dir else []
    register_schema()
    try:
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            composed = compose("deploy", [*search, *open_mappings(overrides)])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, overrides)) from error
    except Exception as error:  # the YAML parser's own come through Hydra unwrapped
        raise ConfigError(f"cannot read the configuration: {' '.join(str(error).split())}") from error
    return to_deployment(composed)


def to_deployment(composed: DictConfig | dict[str, Any]) -> Deployment:
    """A composed config as a checked `Deployment`; what Hydra itself adds is left out."""
    plain = OmegaConf.to_container(composed) if isinstance(composed, DictConfig) else composed
    assert isinstance(plain, dict)
    deployment = parse(Deployment, {k: v for k, v in plain.items() if k != "hydra"}, at="")
    check(deployment)
    return deployment


def open_mappings(overrides: Sequence[str]) -> list[str]:
    """`experts.a.engine.options.dtype=x` -> `++experts...`: those mappings take keys the files don't have yet."""
    return [f"++{o}" if _OPEN_MAPPING.match(o) else o for o in overrides]


def to_yaml(deployment: Deployment) -> str:
    """What `config.yaml` of a run holds; equal deployments give equal texts."""
    return OmegaConf.to_yaml(OmegaConf.structured(deployment), resolve=True)


def read(path: Path) -> Deployment:
    """The frozen `config.yaml` of a run."""
    try:
        return to_deployment(OmegaConf.load(path))  # type: ignore[arg-type]
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:  # whatever the YAML parser raises
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def _explain(error: BaseException, overrides: Sequence[str]) -> str:
    """Hydra's message in one line, with the nearest valid name where it lists the valid ones."""
    if isinstance(error, MissingConfigException):
        return _missing(error)
    message = " ".join(str(error).split())
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OmegaConfBaseException):
            return f"{_place(str(error), overrides)}{describe(cause, at='')}"
        cause = cause.__cause__ or cause.__context__
    return message


def _missing(error: MissingConfigException) -> str:
    group, _, name = str(error.missing_cfg_file or "").rpartition("/")
    if error.options:
        return f"{group}={name}: no such config{suggest(name, error.options)}"
    key = re.search(r"'([\w/.-]+)'", str(error))
    named = key[1] if key else str(error.missing_cfg_file)
    return f"no config named '{named}'{suggest(named.split('=')[0], _GROUPS)}"


def _place(message: str, overrides: Sequence[str]) -> str:
    """`In 'topology/demo': ` or the override that holds the bad value, where Hydra tells."""
    file = re.match(r"In '([\w/.-]+)'", message)
    if file:
        return f"conf/{file[1]}.yaml: "
    named = re.search(r"override '?([\w.+~-]+)'?", message)
    if named:
        bad = next((o for o in overrides if named[1].lstrip("+~") in o), None)
        return f"override '{bad}': " if bad else ""
    return ""
