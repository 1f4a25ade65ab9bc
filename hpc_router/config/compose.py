"""From config files and overrides to a checked `Deployment`, with errors that name the file, the key and what is valid.

Hydra composes plain values; the dataclasses in `config` decide what is valid, once, here. So an override may name any
key of the schema, whether a file mentions it or not, and every refusal is ours to word.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Final, get_origin

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.types import Override, ValueType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError

from hpc_router.config.as_written import as_written
from hpc_router.config.frozen import GROUPS, IGNORED_KEYS, ROOT_KEYS, display_path, to_deployment, yaml_error_text
from hpc_router.config.parsing import is_text, type_at
from hpc_router.config.schema import Deployment, ExpertConfig
from hpc_router.config.sources import Sources, composed_files, parse_override, place_of
from hpc_router.errors import ConfigError, suggest


def conf_folder() -> Path:
    """`conf/` beside the package in a clone, inside it when installed from a wheel."""
    package = Path(__file__).parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.with_name("conf")


def load_deployment(
    overrides: Sequence[str], *, config_dir: Path | None = None, without: Sequence[str] = ()
) -> Deployment:
    """Compose `deploy.yaml` with a user's overrides and folder; the result has passed `check`.

    A user's folder goes before ours: a file of the same name replaces it. Keys in `without` are somebody else's.
    """
    overrides = single_values(overrides)
    settled = hydra_overrides(overrides)
    with (
        _told_in_our_words(config_dir),
        user_folder(config_dir),
        initialize_config_dir(str(conf_folder()), version_base="1.3"),
    ):
        composed = compose("deploy", settled)
        sources = Sources(overrides, composed_files(overrides))
        return _deployment(composed, sources, overrides, without=without)


def with_overrides(base: Deployment, overrides: Sequence[str], *, config_dir: Path | None = None) -> Deployment:
    """`base` with overrides on top: first what the chosen groups' files say, then the values."""
    overrides = single_values(overrides)
    settled = hydra_overrides(overrides)
    chosen = [override for override in map(parse_override, settled) if override.key_or_group in GROUPS]
    values = [override for override in map(parse_override, settled) if override.key_or_group not in GROUPS]
    merged: DictConfig | ListConfig = OmegaConf.create(_escaped(asdict(base)))
    with (
        _told_in_our_words(config_dir),
        user_folder(config_dir),
        initialize_config_dir(str(conf_folder()), version_base="1.3"),
    ):
        for override in chosen:
            merged = OmegaConf.merge(merged, compose(f"{override.key_or_group}/{override.value()}"))
        for override in values:
            OmegaConf.update(merged, override.key_or_group, override.value(), merge=True, force_add=True)
        assert isinstance(merged, DictConfig)
        names = {(override.key_or_group, override.value()) for override in chosen}
        files = [file for file in composed_files(overrides) if (file[0].parent.name, file[0].stem) in names]
        return _deployment(merged, Sources(overrides, files), overrides)


def _deployment(
    composed: DictConfig, sources: Sources, overrides: Sequence[str], *, without: Sequence[str] = ()
) -> Deployment:
    """A composed config as a checked `Deployment`: interpolations are resolved here, once. Call it while Hydra is
    initialised, since errors name the file."""
    with _located(overrides):
        plain = _resolved(composed)
    plain = as_written(Deployment, plain, sources.find)
    with _located(overrides):
        return to_deployment(plain, without=without)


@contextmanager
def _located(overrides: Sequence[str]) -> Iterator[None]:
    """Puts the override or file before the message of an error that names a key."""
    try:
        yield
    except ConfigError as error:
        if error.key is None:
            raise
        raise ConfigError(f"{place_of(error.key, overrides)}{error}") from error


def _resolved(composed: DictConfig) -> dict[str, Any]:
    """Plain values. An interpolation may name any key of the schema, whether a file mentions it or not."""
    experts = composed.get("experts") if OmegaConf.is_dict(composed.get("experts")) else {}
    defaults = asdict(Deployment()) | {"experts": {name: asdict(ExpertConfig()) for name in experts or {}}}
    merged = OmegaConf.merge(OmegaConf.create(defaults), composed)
    assert isinstance(merged, DictConfig)
    return {str(key): resolved(merged, key) for key in composed}


def resolved(config: DictConfig, key: Any) -> Any:
    """The plain value at `key`. Raises ConfigError for an interpolation that leads nowhere."""
    try:
        value = config[key]
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except InterpolationResolutionError as error:
        first, key = str(error).split("\n", 1)[0], str(error.full_key)
        quoted = re.search(r'"(.+)"$', first)
        hint = r"a dollar sign that the job's shell is to see is written as \${NAME}"
        raise ConfigError(f"'{key}': {quoted[1] if quoted else first}; {hint}", key=key) from error


_INTERPOLATION: Final = re.compile(r"(\\*)\$\{")


def _escaped(value: Any) -> Any:
    """Plain values as OmegaConf resolves to the same ones again."""
    if isinstance(value, Mapping):
        return {name: _escaped(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return _INTERPOLATION.sub(r"\1\1\\${", value) if isinstance(value, str) else value


class _UserFolder(SearchPathPlugin):
    """Hydra makes its own instance, so what it is to add stands at the class."""

    folder: ClassVar[Path | None] = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.folder is not None:
            search_path.prepend("user", f"file://{self.folder}")


@contextmanager
def user_folder(config_dir: Path | None) -> Iterator[None]:
    """Inside, Hydra looks into a user's folder before ours."""
    if config_dir is not None and not config_dir.is_dir():
        raise ConfigError(f"--config-dir {config_dir}: no such folder")
    Plugins.instance().register(_UserFolder)
    _UserFolder.folder = config_dir.resolve() if config_dir is not None else None
    try:
        yield
    finally:
        _UserFolder.folder = None


def single_values(overrides: Sequence[str]) -> list[str]:
    """Overrides with a comma list in quotes where the key holds text: Hydra takes `partition=a,b` for two values of a
    sweep. Raises ConfigError for other sweeps, which only `python -m launch... -m` carries out."""
    return [_single_value(text, parse_override(text)) for text in overrides]


def _single_value(text: str, override: Override) -> str:
    if not override.is_sweep_override():
        return text
    key, _, value = text.partition("=")
    kind = type_at(Deployment, override.key_or_group.split("."))
    text_or_any = kind is Any or is_text(kind)
    if text_or_any and override.value_type is ValueType.SIMPLE_CHOICE_SWEEP and not set(value) & set("'\"\\"):
        return f"{key}='{value.strip()}'"
    valid = f"{key}=[{value}] for a list" if get_origin(kind) is list else f"{key}=VALUE"
    said = "several values, which only a sweep takes (`python -m launch.deploy -m`)"
    raise ConfigError(f"override '{text}': {said}; valid here: {valid}", key=override.key_or_group)


def hydra_overrides(overrides: Sequence[str]) -> list[str]:
    """Overrides as Hydra wants them: a value's gets `++`, for our files leave out what has a default.

    Raises ConfigError for one that is none.
    """
    settled = []
    for text in overrides:
        override = parse_override(text)
        key = override.key_or_group
        first, dot, rest = key.partition(".")
        if dot and first in GROUPS and first not in ROOT_KEYS:
            valid = f"; did you mean 'experts.{rest}'?" if first == "expert" else suggest(first, ROOT_KEYS)
            raise ConfigError(f"override '{text}': unknown key '{key}'{valid}", key=key)
        is_value = not (
            key in GROUPS or key.split(".")[0] in IGNORED_KEYS or "/" in key or override.package is not None
        )
        plain = override.input_line is not None and not override.input_line.startswith(("+", "~"))
        settled.append(f"++{text}" if is_value and plain else text)
    return settled


@contextmanager
def _told_in_our_words(config_dir: Path | None) -> Iterator[None]:
    try:
        yield
    except MissingConfigException as error:
        raise ConfigError(_missing(error, config_dir)) from error
    except (HydraException, OmegaConfBaseException) as error:
        said = str(error.__context__ if isinstance(error.__context__, OmegaConfBaseException) else error)
        raise ConfigError(f"{_composed_file(error)}{' '.join(said.split(chr(10), 1)[0].split())}") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(yaml_error_text(error, _undecodable(error, config_dir))) from error


def _undecodable(error: YAMLError | UnicodeDecodeError, config_dir: Path | None) -> str:
    """The user's file that is not UTF-8; Hydra's error has its bytes and not its name."""
    if isinstance(error, UnicodeDecodeError) and config_dir is not None:
        for path in sorted(config_dir.rglob("*.yaml")):
            if path.read_bytes().startswith(error.object):
                return display_path(path)
    return "a config file"


def _missing(error: MissingConfigException, config_dir: Path | None) -> str:
    """Hydra says which file's defaults list names it, and not always what there is."""
    wanted = str(error.missing_cfg_file or "")
    inside = re.match(r"In '([\w/.-]+)': Could not \w+ '([\w/.-]+)'", str(error))
    if inside:
        wanted = inside[2]
    group, _, name = wanted.rpartition("/")
    valid = suggest(name, (path.stem for folder in _folders(config_dir) for path in (folder / group).glob("*.yaml")))
    if inside and inside[1] != "deploy":
        return f"the defaults list of {inside[1]}.yaml names '{wanted}': no such config{valid}"
    return f"{group}={name}: no such config{valid}" if group else f"'{name}': no such config{suggest(name, GROUPS)}"


def _folders(config_dir: Path | None) -> list[Path]:
    return [conf_folder()] if config_dir is None else [config_dir, conf_folder()]


def _composed_file(error: BaseException) -> str:
    inside = re.match(r"In '([\w/.-]+)'", str(error))
    return f"{inside[1]}.yaml: " if inside else ""
