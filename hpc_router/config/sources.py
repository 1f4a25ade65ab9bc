"""Finds where a config value was set: the override or the file and line, and the text there.

Hydra's result does not say where a value was set, so the overrides and Hydra's list of files are searched, each from
the last to the first. If the source is uncertain, error messages do not name one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import yaml
from hydra._internal.grammar.functions import Functions
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.overrides_visitor import HydraOverrideVisitor
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import CommonTokenStream, InputStream, OverrideLexer  # type: ignore[attr-defined]
from hydra.grammar.gen.OverrideParser import OverrideParser
from hydra.types import RunMode
from omegaconf import OmegaConf

from hpc_router.config import as_written
from hpc_router.config.as_written import Written
from hpc_router.config.frozen import GROUPS, display_path
from hpc_router.errors import ConfigError


def shown(text: str) -> str:
    """Returns an override's name for messages: `override 'key=value'`, in one line."""
    return f"override '{text}'" if text.isprintable() else f"override {text!r}"


def parse_override(text: str) -> Override:
    """Parses one override of the command line. Raises ConfigError, whose message contains the override."""
    try:
        return OverridesParser.create().parse_override(text)
    except RecursionError as error:
        raise ConfigError(f"{shown(text)}: nested too deeply") from error
    except (HydraException, ValueError) as error:  # ValueError: a number of too many digits
        first = str(error).split("\n", 1)[0]
        raise ConfigError(
            f"{shown(text)}: {first} (valid: key=value, a group's topology=name, ~key; "
            "quote values with special characters: key='a, b')"
        ) from error


_ABSENT: Final = object()


@dataclass
class Sources:
    """Finds the text that the user wrote for a value, in `overrides` and `files`. `files`: pairs of the path of a file
    and its package (the key of the config under which Hydra puts the file's values), in the order of composition."""

    overrides: Sequence[str]
    files: Iterable[tuple[Path, str]]

    def find(self, path: as_written.Path, value: object) -> Written | None:
        """Returns the text that sets the key `path` to the scalar `value`, and its place: from the last such override,
        else the last such line of a file. Returns None if there is neither, as for a default or an interpolation."""
        for text, key, parts, typed in self._parsed_overrides:
            if path[: len(key)] == key and _equal(_value_at(typed, path[len(key) :]), value):
                written = _value_at(parts, path[len(key) :])
                if isinstance(written, str):
                    return Written(written, shown(text))
        for file, package, root in self._parsed_files:
            if path[: len(package)] == package:
                node = _node_at(root, path[len(package) :])
                if isinstance(node, yaml.ScalarNode) and _equal(_typed(node), value):
                    return Written(node.value, f"{display_path(file)}:{node.start_mark.line + 1}")
        return None

    @cached_property
    def _parsed_overrides(self) -> list[tuple[str, as_written.Path, Any, Any]]:
        """Returns each override that sets a value, last first, as (the override, its key, the value with numbers as
        text, the value as Hydra reads it)."""
        found: list[tuple[str, as_written.Path, Any, Any]] = []
        for text in reversed(self.overrides):
            override = parse_override(text)
            if override.package is None and not override.is_delete() and not override.is_sweep_override():
                key = tuple(override.key_or_group.split("."))
                found.append((text, key, _with_text(text).value(), override.value()))
        return found

    @cached_property
    def _parsed_files(self) -> list[tuple[Path, as_written.Path, yaml.Node | None]]:
        found: list[tuple[Path, as_written.Path, yaml.Node | None]] = []
        for path, package in self.files:
            with path.open(encoding="utf-8") as stream:
                below = tuple(package.split(".")) if package else ()
                found.append((path, below, yaml.compose(stream, Loader=yaml.SafeLoader)))
        return found[::-1]


class _WithText(HydraOverrideVisitor):
    """Override parser that returns numbers and truth values as the text in the override."""

    def _createPrimitive(self, ctx: Any) -> Any:
        value = super()._createPrimitive(ctx)
        return ctx.getText().strip() if isinstance(value, bool | int | float) else value


def _with_text(text: str) -> Override:
    """Parses an override and returns it with all numbers and truth values as text. If its value is a function call,
    returns an override without value."""
    lexer = OverrideLexer(InputStream(text))
    parser = OverrideParser(CommonTokenStream(lexer))
    try:
        override = _WithText(Functions()).visit(parser.override())  # type: ignore[no-untyped-call]
    except HydraException:  # a function call
        return Override(type=None, key_or_group="", value_type=None, _value=None)  # type: ignore[arg-type]
    assert isinstance(override, Override)
    return override


def _equal(found: object, value: object) -> bool:
    if type(found) is not type(value):
        return False
    return found == value or (found != found and value != value)  # NaN is unequal to itself


def _value_at(value: Any, path: as_written.Path, *, absent: object = None) -> Any:
    """Returns the value at `path` inside `value`, a parsed override or file; `absent` if there is none."""
    for part in path:
        if isinstance(value, Mapping):
            value = {str(name): item for name, item in value.items()}.get(str(part), absent)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            return absent
    return value


def _node_at(node: yaml.Node | None, path: as_written.Path) -> yaml.Node | None:
    for part in path:
        if isinstance(node, yaml.MappingNode):
            node = _entry(node, str(part))
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
        else:
            return None
    return node


def _entry(node: yaml.MappingNode, name: str) -> yaml.Node | None:
    """Returns the YAML node of the value that the mapping `node` has for the key `name`, either in the mapping itself
    or in one merged into it (`<<`). Returns None if neither has the key."""
    for key, value in node.value:
        if key.value == name:
            assert isinstance(value, yaml.Node)
            return value
    for key, value in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                found = _entry(merged, name) if isinstance(merged, yaml.MappingNode) else None
                if found is not None:
                    return found
    return None


def _typed(node: yaml.ScalarNode) -> object:
    """Returns the value that OmegaConf reads from this node; None for text in quotes."""
    return OmegaConf.create(f"- {node.value}")[0] if node.style is None and node.value else None


def place_of(key: str, overrides: Sequence[str]) -> str:
    """Returns where the value at `key` was set, as the beginning of an error message; an empty text if this is unknown.

    The result is such as `override 'router.port=x': ` or `my/topology/a.yaml: `. Hydra must be initialised.
    """
    for text in reversed(overrides):
        override = parse_override(text)
        chooses_file = override.key_or_group in GROUPS and isinstance(override.value(), str)
        if not chooses_file and _touches(override.key_or_group, key):
            return f"{shown(text)}: "
    for path, package in reversed(list(composed_files(overrides))):
        below = _below(key, package)
        if below and _value_at(OmegaConf.to_container(OmegaConf.load(path)), below, absent=_ABSENT) is not _ABSENT:
            return f"{display_path(path)}: "
    return ""


def _touches(overridden: str, key: str) -> bool:
    return key == overridden or key.startswith(f"{overridden}.") or overridden.startswith(f"{key}.")


def composed_files(overrides: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """Yields each file that Hydra composes for these overrides: its path, and the key of the config under which its
    values are. Hydra must be initialised."""
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    loader = hydra.config_loader
    chosen = loader.compute_defaults_list("deploy", list(overrides), RunMode.MULTIRUN)
    sources = [source for source in loader.get_sources() if source.scheme() == "file"]
    for default in chosen.defaults:
        if default.config_path is None:
            continue
        for source in sources:
            path = Path(source.path) / f"{default.config_path}.yaml"
            if path.is_file():
                yield path, default.package or ""
                break


def _below(key: str, package: str) -> as_written.Path | None:
    """Returns `key` as a path relative to the key `package` of the config, under which a file's values are. Returns
    None if `key` is not below `package`."""
    parts, prefix = tuple(key.split(".")), tuple(package.split(".")) if package else ()
    return parts[len(prefix) :] if parts[: len(prefix)] == prefix else None
