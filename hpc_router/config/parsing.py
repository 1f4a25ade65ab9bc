"""Parses plain values into dataclasses. Errors name the key, the value and what is valid.

Values are taken literally, without interpolation or escapes, so a config that is written and read again is unchanged. A
numeric field has its range in its metadata (`bounded`); a text field with a fixed set of values is a `Literal`.
`check_values` checks both at any depth. This module does not know the dataclasses of the schema.
"""

import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from hpc_router.errors import ConfigError, suggest

_T = TypeVar("_T")
REQUIRED: Final = "???"
"""Default of a field that a config must set, as in OmegaConf."""
_BOUNDS: Final = "bounds"
_NOUNS: Final[Mapping[Any, str]] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping",
}
_WHOLE: Final = re.compile(r"[-+]?[0-9]+")
_BOOLEANS: Final[Mapping[str, bool]] = {
    **dict.fromkeys(("true", "yes", "on", "y", "1"), True),
    **dict.fromkeys(("false", "no", "off", "n", "0"), False),
}


@dataclass(frozen=True, slots=True)
class NumberRange:
    """Valid range of a numeric field, or of each item of a list field. Both ends are included."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{number_text(self.low)} to {number_text(self.high)}"

    def contains(self, value: float) -> bool:
        return self.low <= value <= self.high


def within(low: float, high: float) -> dict[str, NumberRange]:
    """Returns dataclass field metadata that limits a number to `low`..`high`, both included."""
    return {_BOUNDS: NumberRange(low, high)}


def bounded(default: _T, low: float, high: float) -> _T:
    """Declares a dataclass field with a default and a valid range, `low` to `high`. As with `dataclasses.field`, type
    checkers see the type of the default as the result."""
    return field(default=default, metadata=within(low, high))


def bounds_of(schema: type, name: str) -> NumberRange | None:
    """Returns the range of a field of `schema`; None if the field has none."""
    return next((_bounds(item) for item in _fields(schema) if item.name == name), None)


def number_text(value: float) -> str:
    """Formats a number for messages: 4096, 0.5, 1e+12."""
    if abs(value) < 1e15 and value == int(value):
        return str(int(value))
    return f"{value:g}" if isinstance(value, float) else "more than 1e15" if value > 0 else "less than -1e15"


def parse(schema: type[_T], value: Any, *, at: str) -> _T:
    """Converts `value` to an instance of the dataclass `schema`. `at` is the key of `value`, for error messages.

    Raises ConfigError for an unknown key, a missing key, a wrong type, or a value that `check_values` rejects.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"'{at}' is not a mapping", key=at or None)
    result = _section(schema, value, at)
    check_values(result, at=at)
    assert isinstance(result, schema)
    return result


def check_values(instance: Any, *, at: str) -> None:
    """Checks all fields of a dataclass instance, including nested ones. Raises ConfigError for the first number that is
    not finite or outside its field's range, or text that is not one of its field's fixed values. `at`: the key of
    `instance`, for error messages."""
    kinds = get_type_hints(type(instance))
    for item in _fields(type(instance)):
        choices = choices_of(kinds[item.name])
        for key, value in _leaves(getattr(instance, item.name), _join(at, item.name)):
            if is_dataclass(value):
                check_values(value, at=key)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                _check_number(value, _bounds(item), key)
            elif isinstance(value, str) and choices and value not in choices:
                raise ConfigError(f"{key}={value}: not known{suggest(value, choices)}", key=key)


def _check_number(value: float, bounds: NumberRange | None, key: str) -> None:
    if bounds is not None and not bounds.contains(value):
        raise ConfigError(f"{key}={number_text(value)}: out of range (valid: {bounds})", key=key)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}={value}: not a finite number", key=key)


def _leaves(value: Any, at: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, _join(at, str(name)))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{at}[{number}]")
    else:
        yield at, value


def _section(schema: type, value: Mapping[Any, Any], at: str) -> Any:
    kinds = get_type_hints(schema)
    names = [item.name for item in _fields(schema)]
    for name in value:
        key = _text_key(name, at)
        if name not in names:
            raise ConfigError(f"unknown key '{key}'{suggest(name, names)}", key=key)
    given = {name: _value(kinds[name], item, _join(at, name)) for name, item in value.items()}
    for item in _fields(schema):
        required = item.default == REQUIRED or (item.default is MISSING and item.default_factory is MISSING)
        if required and given.get(item.name, REQUIRED) == REQUIRED:
            key = _join(at, item.name)
            raise ConfigError(f"'{key}' is missing: it has no default", key=at)  # the place that made the section
    return schema(**given)


def _value(kind: Any, value: Any, at: str) -> Any:
    """Returns `value` converted to the type `kind` that its field declares. `at`: its key. Raises ConfigError."""
    bare = without_none(kind)
    if bare is Any or (value is None and bare is not kind):
        return value
    if isinstance(bare, type) and is_dataclass(bare) and isinstance(value, Mapping):
        return _section(bare, value, at)
    if get_origin(bare) is dict and isinstance(value, Mapping):
        return {str(name): _value(get_args(bare)[1], item, _text_key(name, at)) for name, item in value.items()}
    if get_origin(bare) is list and isinstance(value, list):
        return [_value(get_args(bare)[0], item, f"{at}[{number}]") for number, item in enumerate(value)]
    converted = _scalar(bare, value)
    if isinstance(converted, str) and not converted.isascii():
        _check_encodable(converted, at)
    if converted is None:
        raise ConfigError(f"'{at}': {_display(value)} is not {_noun(kind)}", key=at)
    return converted


def _scalar(kind: Any, value: Any) -> str | bool | int | float | None:
    """Returns `value` as text, truth value or number, whichever `kind` requires; None if it cannot be converted."""
    text = value.strip() if isinstance(value, str) else None
    if is_text(kind):
        return value if isinstance(value, str) else None
    if kind is bool:
        return value if isinstance(value, bool) else _BOOLEANS.get(text.lower()) if text is not None else None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        if kind is float:
            return float(value) if text is None or (text.isascii() and "_" not in text) else None
        if kind is int:
            return int(value) if isinstance(value, int) or (text is not None and _WHOLE.fullmatch(text)) else None
    except (ValueError, OverflowError):
        pass
    return None


def _check_encodable(text: str, key: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"'{key}': {text!r} is not valid UTF-8 text", key=key) from error


def _text_key(name: Any, at: str) -> str:
    """Returns the full key of the entry `name` in the mapping at `at`. Raises ConfigError if the name is not text."""
    key = _join(at, str(name))
    if not isinstance(name, str):
        raise ConfigError(f"'{key}': keys of this mapping are text; write the key in quotes", key=key)
    return key


def _display(value: Any) -> str:
    return "null" if value is None else repr(value)


def _join(at: str, key: str) -> str:
    return f"{at}.{key}" if at and key else at or key


def _noun(kind: Any) -> str:
    bare = without_none(kind)
    nullable = " or null" if bare is not kind else ""
    if isinstance(bare, type) and is_dataclass(bare):
        return f"a mapping (keys: {', '.join(f.name for f in fields(bare))}){nullable}"
    return f"{_NOUNS[str if is_text(bare) else get_origin(bare) or bare]}{nullable}"


def type_at(schema: Any, path: Sequence[str]) -> Any:
    """Returns the type that the dataclass `schema` declares for the key `path`; for an optional type, such as `int |
    None`, the type without None. Returns None if there is no such key."""
    kind = schema
    for part in path:
        if isinstance(kind, type) and is_dataclass(kind):
            kind = without_none(get_type_hints(kind).get(part))
        elif get_origin(kind) is dict:
            kind = without_none(get_args(kind)[1])
        elif kind is not Any:
            return None
    return kind


def choices_of(kind: Any) -> tuple[str, ...]:
    """Returns the values of a `Literal["a", "b"]`; empty for another type."""
    bare = without_none(kind)
    return get_args(bare) if get_origin(bare) is Literal else ()


def is_text(kind: Any) -> bool:
    """Returns whether a type is `str` or a `Literal` of texts."""
    return kind is str or bool(choices_of(kind))


def without_none(kind: Any) -> Any:
    """Returns the type without None: `int` for `int | None`."""
    if get_origin(kind) in (Union, types.UnionType):
        rest = [item for item in get_args(kind) if item is not type(None)]
        return rest[0] if len(rest) == 1 else kind
    return kind


def _fields(schema: Any) -> tuple[Field[Any], ...]:
    return fields(schema)


def _bounds(item: Field[Any]) -> NumberRange | None:
    found = item.metadata.get(_BOUNDS)
    assert found is None or isinstance(found, NumberRange)
    return found
