"""Formats the results of `hpc-router bench router` as tables for a terminal and for Markdown, and as JSON with the
figures of every round."""

import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hpc_router.bench.relay_cost import requests, targets
from hpc_router.bench.relay_cost.options import LOWER_LOAD_DIVISOR, RelayCostOptions
from hpc_router.bench.relay_cost.processes import Cores
from hpc_router.bench.relay_cost.rounds import RelayRounds
from hpc_router.bench.relay_cost.statistics import RoundSpread, across, slope_per_million, spread

SCHEMA: Final = 1
ZERO: Final = RoundSpread(0.0, 0.0, 0.0)
DISTURBED_SHARE: Final = 0.1
"""Minimum share of a core used by other processes at which the report contains a note."""


@dataclass(frozen=True, slots=True)
class RelayCostResults:
    """The results of all relays. `absent`: relay that was not measured -> reason. `origin`: provenance as JSON.
    `interrupted`: whether the benchmark was stopped before all rounds were measured."""

    options: RelayCostOptions
    cores: Cores
    measured: Mapping[str, RelayRounds]
    absent: Mapping[str, str]
    origin: Mapping[str, Any]
    interrupted: bool = False

    @property
    def checks(self) -> list[targets.Check]:
        return targets.checks(self.measured, self.options)

    @property
    def failed(self) -> bool:
        """Returns whether a round or a request failed with this router, or in the measurement without a relay. Failures
        of other relays do not count."""
        return any(
            self.measured[name].failed
            for name in ("direct", "router", "router-user", "router-2-workers", "router+agent")
            if name in self.measured
        )


@dataclass(frozen=True, slots=True)
class Sheet:
    """One table of the report."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def sheets(results: RelayCostResults) -> list[Sheet]:
    found = [_relays(results), _classifying(results), _agent(results), _load_side(results), _soak(results)]
    return [sheet for sheet in (*found, _checks(results)) if sheet.rows]


def notes(results: RelayCostResults) -> list[str]:
    """Returns remarks for the reader on what limits the figures."""
    found = [f"{name}: not measured, {why}" for name, why in results.absent.items()]
    for name, measured in results.measured.items():
        found += [f"{name}: a round failed: {why}" for why in measured.broken]
        failed = sum((Counter(one.failed) for one in measured.rounds.values()), Counter[str]())
        found += [f"{name}: failed: {count} x {kind}" for kind, count in failed.items()]
        opened, wanted = spread(measured, "stream_opened"), results.options.streams
        if opened is not None and opened.low < wanted:
            found.append(f"{name}: only {opened.low:.0f} of {wanted} streams were open at the same time")
        found += _disturbed(measured)
    if results.interrupted:
        rounds = min(len(measured.rounds) for measured in results.measured.values())
        found.append(f"interrupted: every relay has {rounds} of {results.options.rounds} rounds")
    if results.options.quick:
        found.append("a quick run only shows that the benchmark works: its figures and checks are not meaningful")
    if not results.cores.separate:
        found.append("only one core: load generator and engine share it with the relays, so hop times are too long")
    return found


def _disturbed(measured: RelayRounds) -> list[str]:
    """Returns notes on cores that other processes used during the measurement, with the share that these took."""
    shares = {"load generator and engine": "load_others_share"}
    if measured.relay.hops:
        shares["the relay"] = "others_share"
    found = []
    for owner, key in shares.items():
        worst = max((spread(measured, f"{kind}_{key}") or ZERO for kind in ("short_200B", "stream")),
                    key=lambda spread: spread.high)  # fmt: skip
        if worst.high >= DISTURBED_SHARE:
            found.append(f"{measured.relay.name}: other processes used {_format(worst)} of the core of {owner}")
    return found


def _relays(results: RelayCostResults) -> Sheet:
    n, rate = results.options.streams, f"{results.options.rate:g}"
    half = max(1, n // 2)
    columns = [
        ("relay", ""),
        ("CPU us per short request", "short_200B_us"),
        ("added TTFT ms", "ttft_ms_p50"),
        (f"added TTFT ms, {n} streams open", "ttft_beside_ms_p50"),
        (f"CPU us per event, {n} x {rate}/s", "stream_us"),
        ("hop p50 ms", "stream_hop_ms_p50"),
        ("hop p99 ms", "stream_hop_ms_p99"),
        (f"hop p99 ms, {half} x {rate}/s", "stream_half_hop_ms_p99"),
        (f"private MiB, {n} streams", "stream_private_mb"),
        ("core used", "stream_relay_share"),
        ("disconnect mid-stream ms", "leave_mid_ms_p50"),
        ("disconnect before first byte ms", "leave_before_ms_p50"),
        ("failed", ""),
    ]
    rows = []
    for name, measured in results.measured.items():
        cells = [_cell(results, measured, key) for _, key in columns[1:-1]]
        rows.append([f"{name} {measured.version}".strip(), *cells, str(measured.failed)])
    return Sheet("Relays: median (min\N{EN DASH}max) of the rounds", [title for title, _ in columns], rows)


def _cell(results: RelayCostResults, measured: RelayRounds, key: str) -> str:
    """Returns the figure `key` of a relay as text. A time to first token is shown as its difference to that of
    `direct`, the measurement without a relay; for `direct` itself, the time is shown in brackets."""
    if not key.startswith("ttft"):
        return _format(spread(measured, key))
    if measured.relay.name == "direct":
        return f"[{_format(spread(measured, key))}]"
    return _format(across([(measured, key), (results.measured.get("direct"), key)], operator.sub))


def _classifying(results: RelayCostResults) -> Sheet:
    rows = []
    for name, measured in results.measured.items():
        for size in requests.SIZES:
            keys = [f"short_{size.replace(' ', '')}{kind}_us" for kind in ("_auto", "")]
            if extra := across([(measured, key) for key in keys], operator.sub):
                auto, named = (_format(spread(measured, key)) for key in keys)
                rows.append([name, size, named, auto, _format(extra)])
    columns = ["relay", "prompt", "model named", "auto", "more for auto"]
    return Sheet("Classifying: CPU us per short request", columns, rows)


def _agent(results: RelayCostResults) -> Sheet:
    rows = []
    for name, measured in results.measured.items():
        if spread(measured, "stream_lower_us"):
            keys = ("short_200B_us", "stream_lower_us", "stream_lower_hop_ms_p50", "stream_lower_hop_ms_p99",
                    "stream_lower_private_mb", "stream_lower_relay_share")  # fmt: skip
            rows.append([name, *(_format(spread(measured, key)) for key in keys)])
    streams = f"{max(1, results.options.streams // LOWER_LOAD_DIVISOR)} x {results.options.rate:g}/s"
    columns = ["relay", "CPU us per short request", f"CPU us per event, {streams}", "hop p50 ms", "hop p99 ms",
               "private MiB", "core used"]  # fmt: skip
    return Sheet("Through the agent: both hops on one core, counted together", columns, rows)


def _load_side(results: RelayCostResults) -> Sheet:
    rows = []
    for name, measured in results.measured.items():
        keys = ("short_200B_per_s", "short_200B_load_us", "short_200B_engine_us", "stream_per_s", "stream_load_us",
                "stream_engine_us", "stream_engine_late_ms_p99", "stream_others_share",
                "stream_load_others_share")  # fmt: skip
        if measured.rounds:
            rows.append([name, *(_format(spread(measured, key)) for key in keys)])
    columns = ["relay", "requests/s", "load: us per request", "engine: us per request", "events/s",
               "load: us per event", "engine: us per event", "engine late p99 ms, at most",
               "other processes on the relay's core", "on the load's cores"]  # fmt: skip
    return Sheet("Load generator and engine: their CPU time and throughput", columns, rows)


def _soak(results: RelayCostResults) -> Sheet:
    router = results.measured.get("router")
    points = router.soak if router is not None else []
    rows = [[f"{count:,}", f"{mib:.1f}"] for count, mib in points]
    slope = slope_per_million(points) if points else math.nan
    return Sheet(f"Soak: {slope:+.2f} MiB per million requests", ["short requests", "private MiB"], rows)


def _checks(results: RelayCostResults) -> Sheet:
    rows = []
    for check in results.checks:
        sign = "<" if check.strict else "<="
        verdict = {True: "met", False: "NOT MET", None: "not measured"}[check.met]
        rows.append([check.what, f"{sign} {check.limit:g} {check.unit}".strip(), _format(check.found), verdict])
    return Sheet("Checks", ["what", "target", "found", ""], rows)


def _format(found: RoundSpread | None) -> str:
    if found is None:
        return "-"
    if found.low == found.high:
        return _number(found.median)
    return f"{_number(found.median)} ({_number(found.low)}\N{EN DASH}{_number(found.high)})"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def on_screen(results: RelayCostResults) -> RenderableType:
    parts: list[RenderableType] = []
    for sheet in sheets(results):
        grid = Table(box=None, pad_edge=False, header_style="bold")
        for column in sheet.columns:
            grid.add_column(column, overflow="fold")
        for row in sheet.rows:
            grid.add_row(*(Text(cell, style="bold red" if cell == "NOT MET" else "") for cell in row))
        parts += [Text(sheet.title, style="bold"), grid, Text()]
    return Group(*parts, *(Text(note, style="yellow") for note in notes(results)))


def markdown(results: RelayCostResults) -> str:
    origin = results.origin
    lines = [
        f"# Relay benchmark, {origin['at']}",
        "",
        f"`{origin['command']}`",
        "",
        f"{origin['hardware']['cpu']}, {origin['hardware']['cpus']} cores, Linux {origin['hardware']['kernel']}; "
        f"commit {_commit(origin['git'])}; the relay on core {_cores(results.cores.relay)}, "
        f"load generator and engine on {_cores(results.cores.load)}; {results.options.rounds} rounds.",
    ]
    for sheet in sheets(results):
        lines += ["", f"## {sheet.title}", "", _line(sheet.columns), _line(["---"] * len(sheet.columns))]
        lines += [_line(row) for row in sheet.rows]
    if remarks := notes(results):
        lines += ["", "## Notes", "", *(f"- {note}" for note in remarks)]
    return "\n".join(lines) + "\n"


def to_json(results: RelayCostResults) -> dict[str, Any]:
    """Returns the results as JSON values. Missing figures are null, because JSON has no NaN."""
    value = {
        "schema": SCHEMA,
        **results.origin,
        "options": {
            key: item for key, item in asdict(results.options).items() if key not in ("out", "environment", "trees")
        },
        "cores": {"relay": sorted(results.cores.relay), "load": sorted(results.cores.load)},
        "relays": {name: _relay_json(measured) for name, measured in results.measured.items()},
        "absent": dict(results.absent),
        "checks": targets.to_json(results.checks),
        "notes": notes(results),
    }
    clean: dict[str, Any] = _without_nan(value)
    return clean


def _relay_json(measured: RelayRounds) -> dict[str, Any]:
    names = sorted({name for one in measured.rounds.values() for name in one.figures})
    return {
        "version": measured.version,
        "figures": {name: asdict(found) for name in names if (found := spread(measured, name))},
        "rounds": {str(number): asdict(one) for number, one in sorted(measured.rounds.items())},
        "broken": measured.broken,
        "soak": measured.soak,
    }


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cores(cores: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(cores)))


def _commit(git: Mapping[str, Any] | None) -> str:
    return "unknown" if git is None else f"{git['commit'][:12]}{' with changes' if git['changed'] else ''}"
