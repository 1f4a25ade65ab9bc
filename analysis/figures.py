"""Draws the figures of a result set: one panel each, narrow enough for a phone.

Series differ by line style and marker, so the figures are readable without colour. An invalid point is hollow and
crossed out, and the legend explains the mark. Every axis has a unit, and every figure names its evidence: simulation,
CPUs or GPUs.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from analysis.results import EVIDENCE, LoadPoint, Series, Value, rate_limit

WIDTH_IN: Final = 5.0
LEGEND_CHARACTERS: Final = 46
BAR_CHARACTERS: Final = 60
STYLES: Final = (
    ("#000000", "-", "o"),
    ("#0072B2", "--", "s"),
    ("#D55E00", "-.", "^"),
    ("#009E73", ":", "D"),
    ("#CC79A7", (0, (6, 1, 1, 1, 1, 1)), "v"),
    ("#555555", (0, (1, 1)), "P"),
    ("#E69F00", (0, (8, 2)), "X"),
    ("#56B4E9", (0, (3, 1, 1, 1)), "*"),
)
HATCHES: Final = ("", "///", "...", "xxx", "\\\\\\", "ooo", "---", "+++")
GREYS: Final = ("#f2f2f2", "#bdbdbd", "#e0e0e0", "#8f8f8f", "#d0d0d0", "#ffffff", "#a8a8a8", "#c8c8c8")
RC: Final[Any] = {
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.labelsize": 10.5,
    "legend.fontsize": 9,
    "svg.fonttype": "path",
    "svg.hashsalt": "hpc_router",
    "font.family": "DejaVu Sans",
    "lines.linewidth": 1.6,
    "lines.markersize": 6,
}


@dataclass(frozen=True, slots=True)
class Drawing:
    """A finished figure. `description`: its content in one sentence, for screen readers."""

    name: str
    title: str
    description: str
    figure: Figure

    def save(self, folder: Path) -> None:
        """Writes the figure as SVG and PNG."""
        folder.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(RC):
            self.figure.savefig(folder / f"{self.name}.svg", metadata={"Date": None})
            self.figure.savefig(folder / f"{self.name}.png", dpi=144)


@dataclass(frozen=True, slots=True)
class Curve:
    """A figure over the load. `key`: the value drawn as a line. `upper`: a second value, drawn as a thin line."""

    name: str
    title: str
    unit: str
    key: str
    upper: str | None = None
    scale: float = 1.0
    log: bool = True


CURVES: Final = (
    Curve("throughput", "System throughput", "output tokens/s", "tokens_per_s"),
    Curve("session", "Session throughput, median", "output tokens/s per user", "session_tokens_per_s.p50"),
    Curve("ttft", "Time to first token: median, thin: p99", "ms", "ttft_s.p50", "ttft_s.p99", 1e3),
    Curve("itl", "Inter-token latency: median, thin: p99", "ms per token", "itl_s.p50", "itl_s.p99", 1e3),
    Curve("e2e", "End-to-end latency: median, thin: p99", "s", "e2e_s.p50", "e2e_s.p99"),
    Curve("goodput", "Goodput: responses within the limits", "requests/s", "goodput_per_s", log=False),
    Curve("good_share", "Requests within the limits", "% of the measured requests", "good_share", scale=100, log=False),
    Curve("router", "Time to first token added by the router", "ms, difference of medians", "router.ttft_s.added_s",
          scale=1e3, log=False),
    Curve("router_share", "The router's share of the time to first token", "% of the median", "router.ttft_s.share",
          scale=100, log=False),
)  # fmt: skip


def curves(series: Sequence[Series]) -> list[Drawing]:
    """Draws the curves of series with the same evidence and unit of load. Leaves out curves without any value."""
    return [drawing for curve in CURVES if (drawing := _curve(curve, series)) is not None]


def _curve(curve: Curve, series: Sequence[Series]) -> Drawing | None:
    lines = [(one, one.values(curve.key, scale=curve.scale)) for one in series]
    if not any(values for _, values in lines):
        return None
    evidence, by = series[0].evidence, series[0].by
    with mpl.rc_context(RC):
        legend_lines = sum(_legend_label(one.name).count("\n") + 1 for one, _ in lines)
        figure, axes = _panel(curve.title, evidence, height_in=3.1 + 0.19 * legend_lines)
        has_invalid = False
        for number, (one, values) in enumerate(lines):
            if values:
                upper = one.values(curve.upper, scale=curve.scale) if curve.upper else []
                has_invalid |= _line(axes, one.name, number, values, upper)
        if curve.key == "good_share":
            _mark_limits(axes, series)
        _load_axis(axes, by, sorted({point.load for _, values in lines for point, _ in values}))
        positive = all(value.mean > 0 for _, values in lines for _, value in values)
        if curve.log and positive:
            keys = [key for key in (curve.key, curve.upper) if key]
            drawn = [v for one in series for key in keys for _, v in one.values(key, scale=curve.scale)]
            low, high = min(v.mean for v in drawn) / 1.25, max(v.mean + (v.half or 0.0) for v in drawn) * 1.25
            axes.set_ylim(low, high)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
            axes.yaxis.set_major_formatter(FuncFormatter(_tick_label))
            axes.yaxis.set_minor_formatter(NullFormatter())
        elif positive:
            axes.set_ylim(bottom=0)
        axes.set_ylabel(curve.unit)
        axes.grid(visible=True, which="major", color="#d8d8d8", linewidth=0.6)
        _legend(axes, has_invalid)
    return Drawing(f"{evidence}-{by}-{curve.name}", curve.title, _description(curve, lines, by), figure)


def _line(
    axes: Any, name: str, number: int, values: list[tuple[LoadPoint, Value]], upper: list[tuple[LoadPoint, Value]]
) -> bool:
    """Draws a series. Returns whether it has an invalid point."""
    colour, line, marker = STYLES[number % len(STYLES)]
    loads, means = [point.load for point, _ in values], [v.mean for _, v in values]
    face = colour if number // len(STYLES) % 2 == 0 else "white"  # hollow markers when the styles repeat
    label = _legend_label(name)
    axes.plot(loads, means, color=colour, linestyle=line, marker=marker, markerfacecolor=face, label=label, zorder=3)
    intervals = [(point.load, v.mean, v.half) for point, v in values if v.half is not None]
    if intervals:
        at, mean, half = zip(*intervals, strict=True)
        axes.errorbar(at, mean, yerr=half, color=colour, linestyle="none", capsize=3, linewidth=1, zorder=3)
    if upper:
        uppers = [v.mean for _, v in upper]
        axes.plot([point.load for point, _ in upper], uppers, color=colour, linestyle=line, linewidth=0.7)
    invalid = [(point.load, v.mean) for point, v in values if not point.valid]
    if invalid:
        at, mean = zip(*invalid, strict=True)
        axes.plot(at, mean, linestyle="none", marker=marker, markersize=9, markerfacecolor="white",
                  markeredgecolor=colour, zorder=4)  # fmt: skip
        axes.plot(at, mean, linestyle="none", marker="x", markersize=7, color="black", zorder=5)
    return bool(invalid)


def _mark_limits(axes: Any, series: Sequence[Series]) -> None:
    """Draws the target of a search, and the highest rate that reaches it."""
    limits = [found for one in series if (found := rate_limit(one)) is not None]
    for share in sorted({found.share for found in limits}):
        axes.axhline(100 * share, color="black", linewidth=0.9, linestyle=":", label=f"target: {100 * share:g} %")
    for found in limits:
        if found.rate_per_s is not None:
            label = f"highest rate: {found.rate_per_s:g} per s"
            axes.axvline(found.rate_per_s, color="#555555", linewidth=0.9, linestyle="--", label=label)


def balance(series: Sequence[Series]) -> Drawing | None:
    """Draws each expert's share of the requests at each series' highest load; None with one expert."""
    rows = [(one, one.points[-1]) for one in series if one.points]
    experts = sorted({name for _, point in rows for record in point.records for name in record["experts"]})
    if len(experts) < 2:
        return None
    labels = [textwrap.fill(f"{one.name} ({_load(one.by, point.load)})", BAR_CHARACTERS) for one, point in rows]
    lines = [label.count("\n") + 1 for label in labels]
    legend_columns = max(1, min(3, LEGEND_CHARACTERS // max(map(len, experts))))
    legend_rows = -(-len(experts) // legend_columns)
    with mpl.rc_context(RC):
        # The unit of the vertical axis is a line of text: a label, its bar, and half a line of space.
        height_in = 1.4 + 0.17 * sum(count + 1.5 for count in lines) + 0.2 * legend_rows
        figure, axes = _panel("Share of requests per expert", series[0].evidence, height_in=height_in)
        top = 0.0
        for label, count, (_, point) in zip(labels, lines, rows, strict=True):
            axes.text(0.8, top, label, fontsize=8.5, va="top")
            middle, left = top + count + 0.5, 0.0
            top += count + 1.5
            for place, expert in enumerate(experts):
                value = point.value(f"experts.{expert}", scale=100)
                if value is None:
                    continue
                axes.barh(middle, value.mean, left=left, height=0.9, color=GREYS[place % len(GREYS)],
                          hatch=HATCHES[place % len(HATCHES)], edgecolor="black", linewidth=0.8)  # fmt: skip
                left += value.mean
        axes.set_yticks([])
        axes.set_ylim(top, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel("% of the successful requests")
        handles = [
            Patch(facecolor=GREYS[i % len(GREYS)], hatch=HATCHES[i % len(HATCHES)], edgecolor="black", label=e)
            for i, e in enumerate(experts)
        ]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=legend_columns, frameon=False, handlelength=2.4
        )
    description = "Horizontal bars, one per deployment, divided by expert."
    return Drawing(f"{series[0].evidence}-{series[0].by}-balance", "Share of requests per expert", description, figure)


def _panel(title: str, evidence: str, *, height_in: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    axes = figure.add_subplot()
    figure.suptitle(title, fontsize=11, fontweight="bold")
    axes.set_title(EVIDENCE[evidence], fontsize=9.5, fontweight="normal")
    return figure, axes


def _load_axis(axes: Any, by: str, loads: list[float]) -> None:
    axes.set_xscale("log")
    ticks = _spaced(loads)
    axes.set_xticks(ticks, [f"{load:g}" for load in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("concurrent users" if by == "users" else "requests/s offered")


def _spaced(loads: list[float]) -> list[float]:
    """Returns a subset of the sorted loads, spaced by a factor of at least 1.6 so that labels do not overlap."""
    kept: list[float] = []
    for load in loads:
        if not kept or load >= 1.6 * kept[-1]:
            kept.append(load)
    return kept


def _legend(axes: Any, has_invalid: bool) -> None:
    if has_invalid:
        axes.plot([], [], linestyle="none", marker="x", color="black", label="crossed out: INVALID, do not use")
    axes.figure.legend(loc="outside lower left", ncols=1, frameon=False, handlelength=4.5)


def _legend_label(name: str) -> str:
    """Breaks a name into lines that fit beside the sample of a legend."""
    return textwrap.fill(name, LEGEND_CHARACTERS, break_on_hyphens=False)


def _load(by: str, load: float) -> str:
    return f"{load:g} user{'s' if load != 1 else ''}" if by == "users" else f"{load:g}/s"


def _tick_label(value: float, _position: object) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:g}"


def _description(curve: Curve, lines: Sequence[tuple[Series, list[tuple[LoadPoint, Value]]]], by: str) -> str:
    parts = []
    for one, values in lines:
        if values:
            (first, lowest), (last, highest) = values[0], values[-1]
            ends = f"{lowest.mean:.3g} at {_load(by, first.load)}, {highest.mean:.3g} at {_load(by, last.load)}"
            parts.append(f"{one.name}: {ends}")
    return f"{curve.title} in {curve.unit}. " + "; ".join(parts) + "."
