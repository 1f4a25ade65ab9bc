"""Compares two result sets point by point and reports regressions beyond noise.

    python -m analysis.compare BEFORE AFTER [--tolerance 5]

Exit status 1 if a figure became worse. A difference counts if it exceeds the tolerance and, if both sets have repeats,
their confidence intervals do not overlap. Points that are invalid in either set are listed and not compared.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.results import LoadPoint, NoResultsError, Series, Value, read, series_of

FIGURES: Final = (
    ("TTFT p50 [ms]", "ttft_s.p50", 1e3, False),
    ("TTFT p99 [ms]", "ttft_s.p99", 1e3, False),
    ("ITL p50 [ms/token]", "itl_s.p50", 1e3, False),
    ("ITL p99 [ms/token]", "itl_s.p99", 1e3, False),
    ("E2E p50 [s]", "e2e_s.p50", 1.0, False),
    ("system [tokens/s]", "tokens_per_s", 1.0, True),
    ("requests/s", "requests_per_s", 1.0, True),
    ("goodput [requests/s]", "goodput_per_s", 1.0, True),
    ("router adds to TTFT [ms]", "router.ttft_s.added_s", 1e3, False),
)
"""Name, key, scale, and whether a higher value is better."""


@dataclass(frozen=True, slots=True)
class Change:
    """The change of one figure. `relative`: difference / value before. `worse`, `better`: beyond noise."""

    series: str
    load: float
    figure: str
    before: Value
    after: Value
    relative: float
    worse: bool
    better: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """The changes of all figures. `not_compared`: points that were left out, with the reason."""

    changes: Sequence[Change]
    not_compared: Sequence[str]


def compare(before: Sequence[Series], after: Sequence[Series], *, tolerance: float) -> Comparison:
    """Compares all figures of the points that both sets have. `tolerance`: a fraction of the value before."""
    changes: list[Change] = []
    not_compared: list[str] = []
    unmatched = {(series.name, series.evidence, series.by): series for series in after}
    for old_series in before:
        name = old_series.name
        new_series = unmatched.pop((name, old_series.evidence, old_series.by), None)
        if new_series is None:
            not_compared.append(f"{name} ({old_series.evidence}): only in the first set")
            continue
        new_points = {point.load: point for point in new_series.points}
        for old in old_series.points:
            place = f"{name} at {old.load:g}"
            new = new_points.pop(old.load, None)
            if new is None:
                not_compared.append(f"{place}: only in the first set")
            elif not (old.valid and new.valid):
                not_compared.append(f"{place}: invalid in the {'first' if not old.valid else 'second'} set")
            else:
                changes += _changes(name, old, new, tolerance)
        not_compared += [f"{name} at {load:g}: only in the second set" for load in new_points]
    not_compared += [f"{name} ({evidence}): only in the second set" for name, evidence, _ in unmatched]
    return Comparison(changes, not_compared)


def _changes(name: str, before: LoadPoint, after: LoadPoint, tolerance: float) -> Iterator[Change]:
    for figure, key, scale, higher_is_better in FIGURES:
        old, new = before.value(key, scale=scale), after.value(key, scale=scale)
        if old is None or new is None:
            continue
        relative = (new.mean - old.mean) / abs(old.mean) if old.mean else 0.0
        significant = abs(relative) > tolerance and not _overlap(old, new)
        improved = (relative > 0) == higher_is_better
        worse, better = significant and not improved, significant and improved
        yield Change(name, before.load, figure, old, new, relative, worse, better)


def _overlap(old: Value, new: Value) -> bool:
    """Returns whether the confidence intervals overlap; False if either value has none."""
    if old.half is None or new.half is None:
        return False
    return abs(old.mean - new.mean) <= old.half + new.half


def table(comparison: Comparison) -> Table:
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("deployment", "load", "figure", "before", "after", "change", ""):
        rows.add_column(column, justify="left" if column in ("deployment", "figure", "") else "right")
    for change in comparison.changes:
        verdict = Text("WORSE", style="bold red") if change.worse else Text("better" if change.better else "")
        rows.add_row(change.series, f"{change.load:g}", change.figure, _text(change.before), _text(change.after),
                     f"{change.relative:+.1%}", verdict)  # fmt: skip
    return rows


def _text(value: Value) -> str:
    return f"{value.mean:.4g}" + ("" if value.half is None else f" ± {value.half:.2g}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m analysis.compare", description=__doc__.split("\n", 1)[0])
    parser.add_argument("before", type=Path, metavar="BEFORE")
    parser.add_argument("after", type=Path, metavar="AFTER")
    parser.add_argument("--tolerance", type=float, default=5.0, metavar="PERCENT", help="ignore smaller changes (5)")
    options = parser.parse_args(arguments)
    try:
        before, after = (series_of(read(path)) for path in (options.before, options.after))
    except NoResultsError as error:
        sys.stderr.write(f"analysis.compare: {error}\n")
        return 2
    comparison = compare(before, after, tolerance=options.tolerance / 100)
    console = Console(markup=False) if sys.stdout.isatty() else Console(width=160, markup=False)
    console.print(table(comparison))
    for point in comparison.not_compared:
        print(f"not compared: {point}")
    worse = sum(change.worse for change in comparison.changes)
    print(f"{worse} of {len(comparison.changes)} figures became worse by more than {options.tolerance:g} %")
    if not comparison.changes:
        sys.stderr.write("analysis.compare: the two sets have no point in common\n")
        return 2
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
