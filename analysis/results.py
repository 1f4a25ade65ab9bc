"""Result files as series: one per deployment and kind of evidence, one group of repeats per load. Pure but for reading.

A record that was marked invalid stays, marked; figures and tables say so. Knows nothing of drawing.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final

from hpc_router.errors import ConfigError
from hpc_router.state.atomic_files import lines_of

Record = Mapping[str, Any]
_WHERE: Final = ("cluster.", "simulate.", "router.", "name=", "runs=")
"""Overrides that do not say what is measured."""
SCHEMA: Final = 2
EVIDENCE: Final[Mapping[str, str]] = {
    "gpu": "GPU, measured",
    "cpu": "CPU, measured",
    "simulated": "SIMULATED, a prediction",
    "unknown": "engines unknown, measured",
}
_T975: Final = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)
"""Student's t for a two-sided 95 % interval, by degrees of freedom from 1; beyond: the normal's 1.96."""


class NoResultsError(Exception):
    """Nothing to report on; the message says where was looked."""


@dataclass(frozen=True, slots=True)
class Value:
    """The mean over repeats; `half`: half the width of its 95 % confidence interval, None with one repeat."""

    mean: float
    half: float | None
    repeats: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Value | None":
        if not samples:
            return None
        if len(samples) == 1:
            return cls(samples[0], None, 1)
        freedom = len(samples) - 1
        t = _T975[freedom - 1] if freedom <= len(_T975) else 1.96
        return cls(fmean(samples), t * stdev(samples) / math.sqrt(len(samples)), len(samples))


@dataclass(frozen=True, slots=True)
class Group:
    """All repeats of one load on one deployment."""

    load: float
    records: Sequence[Record]

    @property
    def valid(self) -> bool:
        return all(record["valid"] for record in self.records)

    @property
    def reasons(self) -> list[str]:
        return [reason for record in self.records for reason in record["invalid"]]

    def value(self, key: str, *, scale: float = 1.0) -> Value | None:
        """`ttft_s.p50`, `tokens_per_s`, `router.ttft_s.added_s`: over the repeats that have it."""
        found = [value for record in self.records if (value := number_at(record, key)) is not None]
        return Value.of([value * scale for value in found])


@dataclass(frozen=True, slots=True)
class Series:
    """One deployment. `by`: users | rate_per_s | trace, what its loads are."""

    name: str
    evidence: str
    by: str
    gpus: int | None
    groups: Sequence[Group] = field(default_factory=tuple)

    def points(self, key: str, *, scale: float = 1.0) -> list[tuple[Group, Value]]:
        return [(g, v) for g in self.groups if (v := g.value(key, scale=scale)) is not None]


def number_at(record: Record, key: str) -> float | None:
    value: Any = record
    for part in key.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def read(path: Path) -> list[Record]:
    """Of a result folder or a file. Raises NoResultsError."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    found: list[Record] = []
    for file in files:
        if file.name.endswith(".requests.jsonl"):
            continue
        try:
            lines = list(lines_of(file))
        except ConfigError as error:
            raise NoResultsError(str(error)) from error
        found += [_record(line, f"{file}:{number}") for number, line in lines]
    if not found:
        raise NoResultsError(f"{path}: no result records (*.jsonl of `python -m launch.bench`)")
    return found


def _record(line: str, place: str) -> Record:
    try:
        record = json.loads(line)
        schema = record["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise NoResultsError(f"{place}: no result record") from error
    if schema != SCHEMA:
        raise NoResultsError(f"{place}: a record of schema {schema}; this version reads {SCHEMA}")
    return dict(record)


def series_of(records: Iterable[Record]) -> list[Series]:
    """In the order of evidence, then of names."""
    everything = list(records)
    name_of = _namer(everything)
    found: dict[tuple[str, str, str], dict[float, list[Record]]] = {}
    for record in everything:
        by = "users" if record["users"] is not None else "rate_per_s" if record["rate_per_s"] is not None else "trace"
        load = float(record[by]) if by != "trace" else record["requests_per_s"]
        key = (record["evidence"], name_of(record), by)
        found.setdefault(key, {}).setdefault(load, []).append(record)
    order = list(EVIDENCE)
    made = []
    for (evidence, name, by), loads in sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0])):
        groups = tuple(Group(load, loads[load]) for load in sorted(loads))
        made.append(Series(name, evidence, by, groups[0].records[0]["gpus"], groups))
    return made


def _namer(records: Sequence[Record]) -> Callable[[Record], str]:
    """A series is called by its topology, and by whatever else differs between records: policy, overrides, model."""
    policies = {record["policy"] for record in records if record["topology"] is None or _chose(record, "policy")}

    def name(record: Record) -> str:
        origin = record["provenance"]
        words = [record["topology"] or Path(origin["run"]).name]
        if len(policies) > 1 and _chose(record, "policy"):
            words.append(str(record["policy"]))
        words += [
            text for text in origin["overrides"] if not text.startswith(("cluster.", "simulate.", "router.", "name="))
        ]
        if record["model"] != "auto":
            words.append(f"model={record['model']}")
        return " ".join(words)

    return name


def _chose(record: Record, group: str) -> bool:
    return group in record["provenance"]["choices"]


@dataclass(frozen=True, slots=True)
class Saturation:
    """Where more load brings little more: the least load with at least 90 % of the highest throughput seen. `reached`:
    the highest was not at the highest load, or the last doubling of load brought less than 10 %."""

    load: float
    tokens_per_s: float
    reached: bool


def saturation(series: Series) -> Saturation | None:
    points = [(g.load, v.mean) for g, v in series.points("tokens_per_s") if g.valid]
    if len(points) < 2:
        return None
    best = max(value for _, value in points)
    load, value = next((at, value) for at, value in points if value >= 0.9 * best)
    (before, lower), (last, upper) = points[-2:]
    grown = upper / lower if lower > 0 else math.inf
    flat = last > before and grown <= 1.1
    return Saturation(load, value, flat or load < last)
