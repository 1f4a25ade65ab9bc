"""A file of prompts -> rows to train on, or to evaluate with.

JSON lines: `prompt` or `text`, or an API request body; `id`, `domain`, `expert`, `correct` and `cost` (by expert) where
known. Whatever cannot be read is refused with file and line. Rows without a word are left out and counted; the same
prompt twice counts once in training (with two different labels it is refused there), and twice in an evaluation. A
corpus may also be plain text, one passage a line.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from hpc_router.errors import ConfigError
from hpc_router.routing.prompt_text import RequestError, prompt_text
from hpc_router.state.atomic_files import lines_of

LABELS: Final = ("expert", "domain")
_BODY: Final = ("messages", "input", "prompt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """`line` counts from 1; `id` is the row's own or its line from 0."""

    line: int
    id: str | int
    text: str
    domain: str | None = None
    expert: str | None = None
    correct: Mapping[str, float] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str | None:
        return self.expert if self.expert is not None else self.domain


def read_rows(path: Path) -> list[Row]:
    """All rows in order, those without text included. Raises ConfigError naming file and line."""
    rows = [_row(line, number, f"{path}:{number}") for number, line in lines_of(path)]
    if not rows:
        raise ConfigError(f"{path}: it contains no prompt")
    return rows


def read_corpus(path: Path) -> list[str]:
    """Distinct passages in order. JSON lines, when the first line is a JSON object, else plain text."""
    lines = list(lines_of(path))
    if lines and lines[0][1].lstrip().startswith("{"):
        texts = [_row(line, number, f"{path}:{number}").text for number, line in lines]
    else:
        texts = [line for _, line in lines]
    return list(dict.fromkeys(text for text in texts if text.strip()))


def distinct(rows: Sequence[Row], *, path: Path, need_label: bool) -> tuple[list[Row], int]:
    """The rows to train on, and how many were left out. Raises ConfigError for one prompt under two labels."""
    seen: dict[str, Row] = {}
    for row in rows:
        key = " ".join(row.text.lower().split())
        if not key:
            continue
        first = seen.setdefault(key, row)
        if need_label:
            if row.label is None:
                raise ConfigError(f'{path}:{row.line}: no "expert" or "domain"; method=exemplars needs one in each row')
            if row.label != first.label:
                raise ConfigError(
                    f"{path}:{row.line}: the same prompt as line {first.line}, which says "
                    f"'{first.label}' and not '{row.label}'; it can be an example for one only"
                )
    return list(seen.values()), len(rows) - len(seen)


def fingerprint(rows: Sequence[Row]) -> str:
    content = [[row.text, row.domain, row.expert, dict(row.correct), dict(row.cost)] for row in rows]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _row(line: str, number: int, place: str) -> Row:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{place}: not a JSON object")
    identity = value.get("id", number - 1)
    if not isinstance(identity, str | int):
        raise ConfigError(f'{place}: "id" must be text or a number')
    return Row(
        line=number,
        id=identity,
        text=_text(value, place),
        domain=_name(value, "domain", place),
        expert=_name(value, "expert", place),
        correct=_numbers(value, "correct", place),
        cost=_numbers(value, "cost", place),
    )


def _text(value: Mapping[str, Any], place: str) -> str:
    if isinstance(value.get("text"), str) and not any(name in value for name in _BODY):
        text: str = value["text"]
    else:
        try:
            text = prompt_text(value)
        except RequestError as error:
            raise ConfigError(
                f'{place}: {error} (valid: {{"prompt": "..."}}, {{"text": "..."}}, a request body)'
            ) from error
    return text.encode("utf-8", "ignore").decode()  # what JSON's \\ud800 makes is no text


def _name(value: Mapping[str, Any], key: str, place: str) -> str | None:
    name = value.get(key)
    if name is not None and (not isinstance(name, str) or not name):
        raise ConfigError(f'{place}: "{key}" must be text')
    return name


def _numbers(value: Mapping[str, Any], key: str, place: str) -> dict[str, float]:
    given = value.get(key)
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(v, int | float) and v == v for v in given.values()):
        raise ConfigError(f'{place}: "{key}" must be an object of numbers (or true and false) by expert')
    return {str(name): float(number) for name, number in given.items()}
