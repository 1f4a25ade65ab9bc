"""Reads result files as series: one per deployment and kind of evidence, with one group of repeats per load.

A record that is marked invalid keeps its mark, which figures and tables show. Only `read` does I/O. This module must
not know how results are drawn.
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
SCHEMA: Final = 2
EVIDENCE: Final[Mapping[str, str]] = {
    "gpu": "GPU, measured",
    "cpu": "CPU, measured",
    "simulated": "SIMULATED, a prediction",
    "unknown": "engines unknown, measured",
}
_UNNAMED_OVERRIDES: Final = ("cluster.", "simulate.", "router.", "name=")
"""Overrides that are left out of a series' name, because they say where it was measured and not what."""
_T975: Final = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
)  # fmt: skip
"""Student's t for a two-sided 95 % interval with 1, 2, ... degrees of freedom; beyond these, 1.96 (normal) is used."""


class NoResultsError(Exception):
    """There are no readable results. The message names the file or folder."""


@dataclass(frozen=True, slots=True)
class Value:
    """A mean over repeats. `half`: half the width of its 95 % confidence interval; None with one repeat."""

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
class LoadPoint:
    """All repeats of one load on one deployment."""

    load: float
    records: Sequence[Record]

    @property
    def valid(self) -> bool:
        return all(record["valid"] for record in self.records)

    @property
    def reasons(self) -> list[str]:
        """Why the records are invalid."""
        return [reason for record in self.records for reason in record["invalid"]]

    def value(self, key: str, *, scale: float = 1.0) -> Value | None:
        """Returns the value at a dotted key such as `ttft_s.p50`, over the repeats that have it; None if none has."""
        numbers = [number for record in self.records if (number := number_at(record, key)) is not None]
        return Value.of([number * scale for number in numbers])


@dataclass(frozen=True, slots=True)
class Series:
    """The points of one deployment, by increasing load. `by`: the unit of the load, users | rate_per_s | trace."""

    name: str
    evidence: str
    by: str
    gpus: int | None
    points: Sequence[LoadPoint] = field(default_factory=tuple)

    def values(self, key: str, *, scale: float = 1.0) -> list[tuple[LoadPoint, Value]]:
        """Returns the points that have a value at `key`."""
        return [(point, v) for point in self.points if (v := point.value(key, scale=scale)) is not None]


def number_at(record: Record, key: str) -> float | None:
    """Returns the number at a dotted key; None if it is missing or not a number."""
    value: Any = record
    for part in key.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def read(path: Path) -> list[Record]:
    """Returns the records of a result file, or of all result files in a folder. Raises NoResultsError."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    records: list[Record] = []
    for file in files:
        if file.name.endswith(".requests.jsonl"):
            continue
        try:
            lines = list(lines_of(file))
        except ConfigError as error:
            raise NoResultsError(str(error)) from error
        records += [_record(line, f"{file}:{number}") for number, line in lines]
    if not records:
        raise NoResultsError(f"{path}: no result records (*.jsonl of `python -m launch.bench`)")
    return records


def _record(line: str, place: str) -> Record:
    try:
        record = json.loads(line)
        schema = record["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise NoResultsError(f"{place}: not a result record") from error
    if schema != SCHEMA:
        raise NoResultsError(f"{place}: a record of schema {schema}; this version reads {SCHEMA}")
    return dict(record)


def series_of(records: Iterable[Record]) -> list[Series]:
    """Groups records into series, ordered as in EVIDENCE, then by name."""
    all_records = list(records)
    name_of = _namer(all_records)
    groups: dict[tuple[str, str, str], dict[float, list[Record]]] = {}
    for record in all_records:
        by = "users" if record["users"] is not None else "rate_per_s" if record["rate_per_s"] is not None else "trace"
        load = float(record[by]) if by != "trace" else record["requests_per_s"]
        key = (record["evidence"], name_of(record), by)
        groups.setdefault(key, {}).setdefault(load, []).append(record)
    order = list(EVIDENCE)
    series = []
    for (evidence, name, by), loads in sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0])):
        points = tuple(LoadPoint(load, loads[load]) for load in sorted(loads))
        series.append(Series(name, evidence, by, points[0].records[0]["gpus"], points))
    return series


def _namer(records: Sequence[Record]) -> Callable[[Record], str]:
    """Returns a function that names a record's series: topology, and policy, overrides and model where they differ."""
    policies = {record["policy"] for record in records if record["topology"] is None or _chose(record, "policy")}

    def name(record: Record) -> str:
        origin = record["provenance"]
        words = [record["topology"] or Path(origin["run"]).name]
        if len(policies) > 1 and _chose(record, "policy"):
            words.append(str(record["policy"]))
        words += [override for override in origin["overrides"] if not override.startswith(_UNNAMED_OVERRIDES)]
        if record["model"] != "auto":
            words.append(f"model={record['model']}")
        return " ".join(words)

    return name


def _chose(record: Record, group: str) -> bool:
    return group in record["provenance"]["choices"]


@dataclass(frozen=True, slots=True)
class Saturation:
    """The lowest load with at least 90 % of the highest throughput.

    `reached`: whether the throughput levels off: this is not the highest load, or the last increase in load raised the
    throughput by at most 10 %.
    """

    load: float
    tokens_per_s: float
    reached: bool


def saturation(series: Series) -> Saturation | None:
    """Returns the saturation over the valid points; None with fewer than two points."""
    curve = [(point.load, v.mean) for point, v in series.values("tokens_per_s") if point.valid]
    if len(curve) < 2:
        return None
    best = max(value for _, value in curve)
    load, value = next((at, value) for at, value in curve if value >= 0.9 * best)
    (previous_load, previous), (last_load, last) = curve[-2:]
    growth = last / previous if previous > 0 else math.inf
    flat = last_load > previous_load and growth <= 1.1
    return Saturation(load, value, flat or load < last_load)


@dataclass(frozen=True, slots=True)
class RateLimit:
    """The result of a search for the highest rate. `share`: the target. `rate_per_s`: the highest rate that reaches it,
    with its `goodput_per_s`; None if no rate does. `failing_per_s`: the lowest higher rate that does not; None if none
    was measured. `exceeded`: whether that one was over-saturated."""

    share: float
    rate_per_s: float | None
    goodput_per_s: float | None
    failing_per_s: float | None
    exceeded: bool


def rate_limit(series: Series) -> RateLimit | None:
    """Returns the highest rate whose goodput target holds; None if the series is not of a search."""
    records = [(point.load, record) for point in series.points for record in point.records]
    if series.by != "rate_per_s" or not any(record["bench"].get("search") for _, record in records):
        return None
    share = float(records[0][1]["bench"]["search_share"])
    failing = [(load, record) for load, record in records if record["exceeded"] or record["good_share"] < share]
    load, failed = min(failing, key=lambda pair: pair[0], default=(None, None))
    good = [(at, record) for at, record in records if (load is None or at < load)]
    rate, best = max(good, key=lambda pair: pair[0], default=(None, None))
    return RateLimit(
        share,
        rate,
        None if best is None else float(best["goodput_per_s"]),
        load,
        bool(failed and failed["exceeded"]),
    )
