"""Reads files of prompts for training and evaluation.

Each line is a JSON object with `prompt` or `text`, or an API request body; optionally `id`, `domain`, `expert`, and by
expert `correct` and `cost`. An invalid line is an error that names file and line. Training leaves out rows without text
and repeated prompts, reports their number, and refuses a prompt with two different labels; an evaluation keeps repeated
prompts. A corpus may also be plain text, one passage per line.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from hpc_router.errors import ConfigError
from hpc_router.routing.prompt_text import PROMPT_FIELDS, prompt_text
from hpc_router.state.atomic_files import lines_of

_VALID_ROWS: Final = '(valid: {"prompt": "..."}, {"text": "..."}, a request body)'


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One prompt of a file. `line`: its line in the file, from 1. `id`: its id in the file; without one, `line` - 1."""

    line: int
    id: str | int
    text: str
    domain: str | None = None
    expert: str | None = None
    correct: Mapping[str, float] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str | None:
        """Returns the expert of the row; if it names none, its domain."""
        return self.expert if self.expert is not None else self.domain


def read_rows(path: Path) -> list[Row]:
    """Returns all rows of the file in order, including those without text. Raises ConfigError for an invalid line."""
    rows = [_row(line, number, f"{path}:{number}") for number, line in lines_of(path)]
    if not rows:
        raise ConfigError(f"{path}: the file contains no prompt")
    return rows


def read_corpus(path: Path) -> list[str]:
    """Returns the passages of the corpus in order, each once. If the first line starts with `{`, every line is a JSON
    object, else plain text."""
    lines = list(lines_of(path))
    if lines and lines[0][1].lstrip().startswith("{"):
        texts = [_row(line, number, f"{path}:{number}").text for number, line in lines]
    else:
        texts = [line for _, line in lines]
    return list(dict.fromkeys(text for text in texts if text.strip()))


def deduplicated(rows: Sequence[Row], *, path: Path, need_label: bool) -> tuple[list[Row], int]:
    """Returns the rows to train on and the number of rows left out.

    Prompts that differ only in case or spaces are the same prompt. With `need_label`, raises ConfigError for a row
    without a label and for a prompt with two different labels.
    """
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
                    f"{path}:{row.line}: the same prompt as line {first.line}, but labelled '{row.label}' instead of "
                    f"'{first.label}'; a prompt can have one label only"
                )
    return list(seen.values()), len(rows) - len(seen)


def fingerprint(rows: Sequence[Row]) -> str:
    """Returns a SHA-256 of the rows, without their ids and line numbers."""
    content = [[row.text, row.domain, row.expert, dict(row.correct), dict(row.cost)] for row in rows]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _row(line: str, number: int, place: str) -> Row:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{place}: not a JSON object")
    row_id = value.get("id", number - 1)
    if not isinstance(row_id, str | int):
        raise ConfigError(f'{place}: "id" must be a string or an integer')
    return Row(
        line=number,
        id=row_id,
        text=_text(value, place),
        domain=_name(value, "domain", place),
        expert=_name(value, "expert", place),
        correct=_numbers(value, "correct", place),
        cost=_numbers(value, "cost", place),
    )


def _text(value: Mapping[str, Any], place: str) -> str:
    fields = [name for name in PROMPT_FIELDS if name in value]
    text = prompt_text(value) if fields else value.get("text")
    if not isinstance(text, str):
        raise ConfigError(f"{place}: the row has no text {_VALID_ROWS}")
    if fields and not isinstance(value[fields[0]], str | list):
        raise ConfigError(f"{place}: '{fields[0]}' must be a string or a list {_VALID_ROWS}")
    return text.encode("utf-8", "ignore").decode()  # drops lone surrogates (JSON's \\ud800)


def _name(value: Mapping[str, Any], key: str, place: str) -> str | None:
    name = value.get(key)
    if name is not None and (not isinstance(name, str) or not name):
        raise ConfigError(f'{place}: "{key}" must be a non-empty string')
    return name


def _numbers(value: Mapping[str, Any], key: str, place: str) -> dict[str, float]:
    numbers = value.get(key)
    if numbers is None:
        return {}
    if not isinstance(numbers, dict) or not all(isinstance(v, int | float) and v == v for v in numbers.values()):
        raise ConfigError(f'{place}: "{key}" must be an object that maps experts to numbers, true or false')
    return {str(name): float(number) for name, number in numbers.items()}
