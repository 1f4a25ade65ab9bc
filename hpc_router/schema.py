"""Plain values into dataclasses, with refusals that name the key, the value and what would have been valid.

OmegaConf converts and finds what is wrong; its sentences speak of its own classes, so they are replaced by what the
dataclass says is expected at that key. Nothing here knows which dataclasses there are.
"""

import re
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Final, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigKeyError, InterpolationResolutionError, KeyValidationError, OmegaConfBaseException

from hpc_router.errors import ConfigError, suggest

_T = TypeVar("_T")
_NOUNS: Final[Mapping[Any, str]] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


def parse(schema: type[_T], value: Any, *, at: str) -> _T:
    """`value` as an instance of the dataclass `schema`: refuses typos, converts types. `at` stands before keys in
    errors."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"'{at}' is not a mapping", key=at or None)
    _check_sections(schema, value, at=at)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), value)
        absent = sorted(OmegaConf.missing_keys(merged))
        if absent:
            key = _join(at, absent[0])
            raise ConfigError(f"'{key}' is missing: it has no default", key=key)
        result = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _in_our_words(error, schema, value, at=at) from error
    assert isinstance(result, schema)
    return result


def _check_sections(schema: type, value: Mapping[str, Any], *, at: str) -> None:
    """A number where a section belongs: OmegaConf's error does not tell which."""
    for name, kind in get_type_hints(schema).items():
        if isinstance(kind, type) and is_dataclass(kind) and name in value:
            key = _join(at, name)
            if not isinstance(value[name], Mapping):
                raise ConfigError(f"'{key}': {_shown(value[name])} is not {_noun(kind)}", key=key)
            _check_sections(kind, value[name], at=key)


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)


def _in_our_words(error: OmegaConfBaseException, schema: type, value: Mapping[str, Any], *, at: str) -> ConfigError:
    full_key = str(error.full_key or error.key or "")
    key = _join(at, full_key)
    owner = error.object_type
    if isinstance(error, ConfigKeyError) and isinstance(owner, type) and is_dataclass(owner):
        return ConfigError(f"unknown key '{key}'{suggest(str(error.key), (f.name for f in fields(owner)))}", key=key)
    if isinstance(error, KeyValidationError):
        return ConfigError(f"'{key}': a key is text here, so put it in quotes", key=key)
    if isinstance(error, InterpolationResolutionError):
        first = str(error).split("\n", 1)[0]
        quoted = re.search(r'"(.+)"$', first)
        return ConfigError(f"'{key}': {quoted[1] if quoted else first}", key=key)
    given, expected = _value_at(value, full_key.split(".")), _noun(_type_at(schema, full_key.split(".")))
    if given is MISSING or expected is None:
        return ConfigError(f"'{key}': {str(error).splitlines()[0]}", key=key)
    return ConfigError(f"'{key}': {_shown(given)} is not {expected}", key=key)


def _join(at: str, key: str) -> str:
    return f"{at}.{key}" if at and key else at or key


def _value_at(value: Any, path: list[str]) -> Any:
    for part in path:
        if not isinstance(value, Mapping):
            return MISSING
        value = {str(name): item for name, item in value.items()}.get(part, MISSING)
    return value


def _type_at(schema: Any, path: list[str]) -> Any:
    """The declared type at a key; None where the schema says nothing."""
    kind: Any = schema
    for part in path:
        kind = _without_none(kind)
        if isinstance(kind, type) and is_dataclass(kind):
            kind = get_type_hints(kind).get(part)
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            return None
    return kind


def _noun(kind: Any) -> str | None:
    bare = _without_none(kind)
    nullable = " or null" if bare is not kind else ""
    if isinstance(bare, type) and is_dataclass(bare):
        return f"a mapping (keys: {', '.join(f.name for f in fields(bare))}){nullable}"
    noun = _NOUNS.get(get_origin(bare) or bare)
    return f"{noun}{nullable}" if noun else None


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        rest = [item for item in get_args(kind) if item is not type(None)]
        return rest[0] if len(rest) == 1 else kind
    return kind
