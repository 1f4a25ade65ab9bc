"""Restores the text that the user wrote where YAML turned it into a number or truth value.

YAML 1.1 and Hydra's overrides read `0421`, `no`, `1.10`, `10:30` and `695e0514` as numbers or truth values, so a text
field would not contain what the file shows. If the value prints as it was written (`account: 421`), the text is used;
otherwise the error asks for quotes. A numeric field takes only plain decimal numbers, because YAML reads `010` as 8.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Final, get_args, get_origin, get_type_hints

from hpc_router.config.parsing import is_text, without_none
from hpc_router.errors import ConfigError

Path = tuple[str | int, ...]
TYPED_BY: Final = "typed_by"
"""Metadata key of a mapping field whose schema depends on other fields. The metadata value is a function that takes the
section with the mapping and returns the mapping's schema."""
WORDS: Final = "words"
"""Metadata key of a mapping with arbitrary keys, whose values become command-line arguments. Numbers in it keep the
text that the user wrote."""


@dataclass(frozen=True, slots=True)
class Written:
    """The text of a value as the user wrote it, without quotes. `place`: where it is written, as `override 'a=b'` or
    `my/topology/a.yaml:3`."""

    text: str
    place: str


Find = Callable[[Path, object], Written | None]
"""Returns the written text of the value at a key; None if its source is not known."""


def as_written(schema: Any, value: Any, find: Find, *, at: str = "") -> Any:
    """Returns `value`, the part of a config with the type `schema`, with texts where YAML has read a text field as a
    number or truth value: `421` becomes "421". Raises ConfigError if the user wrote something that prints differently
    (`0421`, `no`), and for a numeric field that is not in plain decimal notation. `find` looks up what the user wrote.
    `at`: the key of `value`, for error messages."""
    return _Reader(find, at).read(schema, value, ())


class _Reader:
    def __init__(self, find: Find, at: str) -> None:
        self._find, self._at = find, at

    def read(self, kind: Any, value: Any, path: Path, *, words: bool = False) -> Any:
        kind = without_none(kind)
        if isinstance(value, Mapping):
            return {name: self._entry(kind, value, name, path, words=words) for name in value}
        if isinstance(value, list):
            item = get_args(kind)[0] if get_origin(kind) is list else Any
            return [self.read(item, each, (*path, number)) for number, each in enumerate(value)]
        if is_text(kind) and isinstance(value, bool | int | float):
            return self._text(value, path)
        if kind is not bool and isinstance(value, int | float) and not isinstance(value, bool):
            return self._number(value, path, words=words)
        return value

    def _entry(self, kind: Any, section: Mapping[Any, Any], name: Any, path: Path, *, words: bool) -> Any:
        value, path = section[name], (*path, str(name))
        if isinstance(kind, type) and is_dataclass(kind):
            item = next((item for item in fields(kind) if item.name == name), None)
            if item is None:
                return value
            typed_by = item.metadata.get(TYPED_BY)
            inner = get_type_hints(kind)[name] if typed_by is None else typed_by(section)
            return self.read(inner, value, path, words=WORDS in item.metadata)
        inner = get_args(kind)[1] if get_origin(kind) is dict else Any
        return self.read(inner, value, path, words=words and not isinstance(value, Mapping | list))

    def _text(self, value: object, path: Path) -> str:
        written = self._find(path, value)
        if written is None and type(value) is int:
            return str(value)  # the value of an interpolation has no source text
        text = _plain(value) if written is None else written.text
        if written is None or text != _plain(value):
            raise self._error(value, path, written, f"write it in quotes: {_quoted(path, text, self._at)}")
        return text

    def _number(self, value: float, path: Path, *, words: bool) -> Any:
        written = self._find(path, value)
        if written is None:
            return value
        if not _same(written.text, value):
            quoted = f", or as text in quotes: {_quoted(path, written.text, self._at)}" if words else ""
            raise self._error(value, path, written, f"write a plain decimal number{quoted}")
        return written.text if words and isinstance(value, float) else value

    def _error(self, value: object, path: Path, written: Written | None, advice: str) -> ConfigError:
        key = _dotted(path, self._at)
        place = "" if written is None else f"{written.place}: "
        given = "the value" if written is None else written.text
        return ConfigError(f"{place}'{key}': {given} is read as {_type_and_text(value)}; {advice}", key=key)


def _same(text: str, value: float) -> bool:
    """Returns whether `text` is a plain decimal notation of `value`; True for infinity and NaN, which are refused
    later."""
    if isinstance(value, float) and not math.isfinite(value):
        return True  # infinity and NaN: the parser reports them as out of range
    try:
        return (int(text) if isinstance(value, int) else float(text)) == value and not _leading_zero(text)
    except ValueError:
        return False


def _leading_zero(text: str) -> bool:
    digits = text.lstrip("+-")
    return len(digits) > 1 and digits[0] == "0" and digits[1].isdecimal()


def _plain(value: object) -> str:
    """Returns a number or truth value as text, in the form of YAML 1.2."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type_and_text(value: object) -> str:
    return f"{'the truth value' if isinstance(value, bool) else 'the number'} {_plain(value)}"


def _quoted(path: Path, text: str, at: str) -> str:
    """Returns advice for an error message: how to write `text` at the key `path` in quotes, in a file and on the
    command line."""
    keys = [part for part in path if isinstance(part, str)]
    if isinstance(path[-1], int):
        return f"""- "{text}" in a file, '{_dotted(keys, at)}=["{text}"]' on the command line"""
    return f"""{keys[-1]}: "{text}" in a file, '{_dotted(path, at)}="{text}"' on the command line"""


def _dotted(path: Sequence[str | int], at: str = "") -> str:
    key = at
    for part in path:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else part
    return key
