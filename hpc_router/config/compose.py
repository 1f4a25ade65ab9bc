"""Composes config files and overrides into a checked `Deployment`. Errors name the file, the key and what is valid.

Hydra only composes plain values; the dataclasses of `schema` decide what is valid. An override may therefore set a key
of the schema that no file mentions, and every error has our text instead of Hydra's.
"""

import re
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError

from hpc_router.config.as_written import as_written
from hpc_router.config.frozen import GROUPS, IGNORED_KEYS, ROOT_KEYS, display_path, flat, to_deployment, yaml_error_text
from hpc_router.config.parsing import REQUIRED, is_text, type_at
from hpc_router.config.schema import Deployment, ExpertConfig
from hpc_router.config.sources import Sources, composed_files, parse_override, place_of, shown
from hpc_router.errors import ConfigError, suggest


def conf_folder() -> Path:
    """Returns the folder `conf/`: beside the package in a clone, inside it in an installed wheel."""
    package = Path(__file__).parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.with_name("conf")


def load_deployment(
    overrides: Sequence[str], *, config_dir: Path | None = None, without: Sequence[str] = ()
) -> Deployment:
    """Returns the checked deployment that results from `deploy.yaml`, the files it includes, and the overrides. Raises
    ConfigError.

    `config_dir`: the user's folder; a file in it replaces the file of the same name in `conf/`. `without`: keys to
    ignore, because another program reads them.
    """
    overrides = single_values(overrides)
    in_hydra_form = hydra_overrides(overrides)
    with (
        _translated_errors(config_dir),
        user_folder(config_dir),
        initialize_config_dir(str(conf_folder()), version_base="1.3"),
    ):
        composed = compose("deploy", in_hydra_form)
        sources = Sources(overrides, composed_files(overrides))
        return _deployment(composed, sources, overrides, without=without)


def with_overrides(base: Deployment, overrides: Sequence[str], *, config_dir: Path | None = None) -> Deployment:
    """Returns `base` with the overrides applied: first those that choose a file of a config group (`topology=sim`),
    then those that set a value. `config_dir`: the user's folder, searched before `conf/`. Raises ConfigError."""
    overrides = single_values(overrides)
    in_hydra_form = hydra_overrides(overrides)
    chosen = [override for override in map(parse_override, in_hydra_form) if override.key_or_group in GROUPS]
    values = [override for override in map(parse_override, in_hydra_form) if override.key_or_group not in GROUPS]
    merged: DictConfig | ListConfig = OmegaConf.create(_escaped(asdict(base)))
    with (
        _translated_errors(config_dir),
        user_folder(config_dir),
        initialize_config_dir(str(conf_folder()), version_base="1.3"),
    ):
        for override in chosen:
            merged = OmegaConf.merge(merged, compose(f"{override.key_or_group}/{override.value()}"))
        for override in values:
            if override.is_delete():
                _delete(merged, override)
                continue
            OmegaConf.update(merged, override.key_or_group, override.value(), merge=True, force_add=True)
        assert isinstance(merged, DictConfig)
        names = {(override.key_or_group, override.value()) for override in chosen}
        files = [file for file in composed_files(overrides) if (file[0].parent.name, file[0].stem) in names]
        return _deployment(merged, Sources(overrides, files), overrides)


def _delete(config: DictConfig | ListConfig, override: Override) -> None:
    """Removes the key of an override `~key` from the config. Raises ConfigError if there is no such key."""
    parent, _, name = override.key_or_group.rpartition(".")
    holder = OmegaConf.select(config, parent) if parent else config
    if not isinstance(holder, DictConfig) or name not in holder:
        raise ConfigError(f"{shown(str(override.input_line))}: there is no '{override.key_or_group}' to remove")
    del holder[name]


def _deployment(
    composed: DictConfig, sources: Sources, overrides: Sequence[str], *, without: Sequence[str] = ()
) -> Deployment:
    """Returns the config that Hydra composed as a checked `Deployment`, with its interpolations (`${...}`) resolved.
    Hydra must be initialised, because errors name the file that set the value. `without`: keys to ignore."""
    with _located(overrides):
        plain = _resolved(composed)
    plain = as_written(Deployment, plain, sources.find)
    with _located(overrides):
        return to_deployment(plain, without=without)


@contextmanager
def _located(overrides: Sequence[str]) -> Iterator[None]:
    """Makes each ConfigError from the block begin with the place where its key was set: the override or the file."""
    try:
        yield
    except ConfigError as error:
        if error.key is None:
            raise
        raise ConfigError(f"{place_of(error.key, overrides)}{error}") from error


def _resolved(composed: DictConfig) -> dict[str, Any]:
    """Returns the config as plain values, with its interpolations (`${...}`) resolved. An interpolation may name any
    key of the schema, even one that no file mentions; the key then has its default."""
    experts = composed.get("experts") if OmegaConf.is_dict(composed.get("experts")) else {}
    defaults = asdict(Deployment()) | {"experts": {name: asdict(ExpertConfig()) for name in experts or {}}}
    merged = OmegaConf.merge(OmegaConf.create(defaults), composed)
    assert isinstance(merged, DictConfig)
    texts = flat(OmegaConf.to_container(merged))
    for key, value in flat(OmegaConf.to_container(composed)).items():
        if value == REQUIRED and texts[key] != REQUIRED:  # OmegaConf took the default instead
            raise ConfigError(f"'{key}' is missing: `{REQUIRED}` stands for a value that has to be set", key=key)
    return {str(key): resolved(merged, key) for key in composed}


def resolved(config: DictConfig, key: Any) -> Any:
    """Returns the plain value at `key`, with its interpolations (`${...}`) resolved. Raises ConfigError if one names an
    unknown key or variable."""
    try:
        value = config[key]
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except InterpolationResolutionError as error:
        first, key = str(error).split("\n", 1)[0], str(error.full_key)
        quoted = re.search(r'"(.+)"$', first)
        raise ConfigError(f"'{key}': {quoted[1] if quoted else first}; {_DOLLAR_HINT}", key=key) from error


_DOLLAR_HINT: Final = r"write a dollar sign for the job's shell as \${NAME}"
_INTERPOLATION: Final = re.compile(r"(\\*)\$\{")


def _escaped(value: Any) -> Any:
    """Returns `value` with each `${` in a text escaped, so that OmegaConf does not read it as an interpolation."""
    if isinstance(value, Mapping):
        return {name: _escaped(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return _INTERPOLATION.sub(r"\1\1\\${", value) if isinstance(value, str) else value


class _UserFolder(SearchPathPlugin):
    """Hydra plugin that makes Hydra search the user's folder. Hydra creates the plugin object, so `folder` is an
    attribute of the class."""

    folder: ClassVar[Path | None] = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.folder is not None:
            search_path.prepend("user", f"file://{self.folder}")


@contextmanager
def user_folder(config_dir: Path | None) -> Iterator[None]:
    """Makes Hydra search the user's folder before `conf/` during the block. Raises ConfigError if it does not exist."""
    if config_dir is not None and not config_dir.is_dir():
        raise ConfigError(f"--config-dir {config_dir}: no such folder")
    for path in sorted(config_dir.rglob("*.yaml")) if config_dir is not None else ():
        if _hides_its_package(path):
            name = display_path(path)
            raise ConfigError(
                f"{name}: a byte order mark hides its first line from Hydra; save it as UTF-8 without one"
            )
    Plugins.instance().register(_UserFolder)
    _UserFolder.folder = config_dir.resolve() if config_dir is not None else None
    try:
        yield
    finally:
        _UserFolder.folder = None


def _hides_its_package(path: Path) -> bool:
    """Returns whether the line `# @package ...` is the file's first and follows a byte order mark: Hydra ignores it."""
    with suppress(OSError), path.open("rb") as stream:
        first = stream.readline()
        return first.startswith(BOM_UTF8) and b"@package" in first
    return False


def single_values(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides with quotes around values of text keys that Hydra would not read as one text: it reads
    `partition=a,b` as a sweep over two values, and does not know `exclude=n[1-2]` at all.

    Raises ConfigError for any other sweep, because only `python -m launch.deploy -m` runs sweeps.
    """
    return [_single_value(text, parse_override(text)) for text in map(_quoted_text, overrides)]


def _quoted_text(text: str) -> str:
    """Returns the override with quotes around its value if the key takes text and the value is not in Hydra's grammar
    or is a list of one there, as in `constraint=[a|b]`. Otherwise returns the override unchanged."""
    key, equals, value = text.partition("=")
    kind = type_at(Deployment, key.lstrip("+").split("."))
    plain = kind is Any and not value.startswith(("{", "["))
    if not equals or not (plain or is_text(kind)) or "${" in value or set(value) & set("'\"\\"):
        return text
    try:
        parsed = parse_override(text).value()
    except ConfigError as error:
        return f"{key}='{value}'" if isinstance(error.__cause__, HydraException) else text
    return f"{key}='{value}'" if isinstance(parsed, list) and len(parsed) == 1 else text


def _single_value(text: str, override: Override) -> str:
    if not override.is_sweep_override():
        return text
    key, _, value = text.partition("=")
    kind = type_at(Deployment, override.key_or_group.split("."))
    text_or_any = kind is Any or is_text(kind)
    if text_or_any and override.value_type is ValueType.SIMPLE_CHOICE_SWEEP and not set(value) & set("'\"\\"):
        return f"{key}='{value.strip()}'"
    valid = f"{key}=[{value}] for a list" if get_origin(kind) is list else f"{key}=VALUE"
    problem = "several values are only valid in a sweep (`python -m launch.deploy -m`)"
    raise ConfigError(f"{shown(text)}: {problem}; valid here: {valid}", key=override.key_or_group)


def hydra_overrides(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides in Hydra's form: `key=value` becomes `++key=value`, because Hydra would refuse a key that
    no file in `conf/` mentions.

    Raises ConfigError for an invalid override.
    """
    prefixed = []
    for text in overrides:
        override = parse_override(text)
        key = override.key_or_group
        first, dot, rest = key.partition(".")
        if dot and first in GROUPS and first not in ROOT_KEYS:
            valid = f"; did you mean 'experts.{rest}'?" if first == "expert" else suggest(first, ROOT_KEYS)
            raise ConfigError(f"{shown(text)}: unknown key '{key}'{valid}", key=key)
        is_value = not (
            key in GROUPS or key.split(".")[0] in IGNORED_KEYS or "/" in key or override.package is not None
        )
        plain = override.input_line is not None and not override.input_line.startswith(("+", "~"))
        prefixed.append(f"++{text}" if is_value and plain else text)
    return prefixed


@contextmanager
def _translated_errors(config_dir: Path | None) -> Iterator[None]:
    """Turns errors of Hydra, OmegaConf and YAML inside the block into ConfigError. `config_dir`: the user's folder,
    whose files the messages can name."""
    try:
        yield
    except MissingConfigException as error:
        raise ConfigError(_missing(error, config_dir)) from error
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__context__ if isinstance(error.__context__, OmegaConfBaseException) else error
        problem = " ".join(str(cause).split("\n", 1)[0].split())
        if isinstance(cause, GrammarParseError):
            problem = _interpolation_error(cause, problem, override=str(error), config_dir=config_dir)
        raise ConfigError(f"{_composed_file(error)}{problem}") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(yaml_error_text(error, _undecodable(error, config_dir))) from error
    except RecursionError as error:
        raise ConfigError("a config file is nested too deeply, or an alias in it contains itself") from error
    except ValueError as error:  # such as a number of too many digits
        raise ConfigError(f"a config file has a value that cannot be read: {error}") from error


def _interpolation_error(error: GrammarParseError, problem: str, *, override: str, config_dir: Path | None) -> str:
    """Returns the error message for a text with an invalid `${`: where it is (the override or the user's file, and the
    key) if that can be found, then `problem`. `override`: the message of Hydra's error, which may contain the
    override."""
    merged = re.match(r"Error merging override \+*(.+)", override, re.DOTALL)
    invalid = re.search(r"'(\$\{.*)'", problem)
    files = sorted(config_dir.rglob("*.yaml")) if config_dir is not None and invalid is not None else ()
    found = (display_path(path) for path in files if invalid and invalid[1].encode() in path.read_bytes())
    place = shown(merged[1]) if merged else next(found, None)
    key = re.search(r"full_key: (\S+)", str(error))
    where = "".join(f"{part}: " for part in (place, key and f"'{key[1]}'") if part)
    return f"{where}{problem}; {_DOLLAR_HINT}"


def _undecodable(error: YAMLError | UnicodeDecodeError, config_dir: Path | None) -> str:
    """Returns the path of the file in `config_dir` that is not UTF-8; "a config file" if none is found. Hydra's error
    does not name the file, so files are compared with the bytes in the error."""
    if isinstance(error, UnicodeDecodeError) and config_dir is not None:
        for path in sorted(config_dir.rglob("*.yaml")):
            if path.read_bytes().startswith(error.object):
                return display_path(path)
    return "a config file"


def _missing(error: MissingConfigException, config_dir: Path | None) -> str:
    """Returns the error message for a missing config file: the config group or the defaults list that names the file,
    and the valid names."""
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
