"""Two result sets, point by point: what became worse, beyond noise.

    python -m analysis.compare BEFORE AFTER [--tolerance 5]

Exit status 1 when something became worse. A difference counts when it is beyond the tolerance and, where both sets have
repeats, when their confidence intervals do not overlap. Points invalid in either set are named and not compared.
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

from analysis.results import Group, NoResultsError, Series, Value, read, series_of

WHAT: Final = (
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
"""Name, key, scale, whether more is better."""


@dataclass(frozen=True, slots=True)
class Change:
    """`relative`: of the value before; `worse`, `better`: beyond tolerance and noise."""

    series: str
    load: float
    what: str
    before: Value
    after: Value
    relative: float
    worse: bool
    better: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """`left_out`: points that were not compared, and why."""

    changes: Sequence[Change]
    left_out: Sequence[str]


def compare(before: Sequence[Series], after: Sequence[Series], *, tolerance: float) -> Comparison:
    changes: list[Change] = []
    left_out: list[str] = []
    others = {(one.name, one.evidence, one.by): one for one in after}
    for one in before:
        other = others.pop((one.name, one.evidence, one.by), None)
        if other is None:
            left_out.append(f"{one.name} ({one.evidence}): only in the first set")
            continue
        loads = {group.load: group for group in other.groups}
        for group in one.groups:
            at = f"{one.name} at {group.load:g}"
            against = loads.pop(group.load, None)
            if against is None:
                left_out.append(f"{at}: only in the first set")
            elif not (group.valid and against.valid):
                left_out.append(f"{at}: invalid in the {'first' if not group.valid else 'second'} set")
            else:
                changes += _changes(one.name, group, against, tolerance)
        left_out += [f"{one.name} at {load:g}: only in the second set" for load in loads]
    left_out += [f"{name} ({evidence}): only in the second set" for name, evidence, _ in others]
    return Comparison(changes, left_out)


def _changes(name: str, group: Group, against: Group, tolerance: float) -> Iterator[Change]:
    for what, key, scale, more_is_better in WHAT:
        old, new = group.value(key, scale=scale), against.value(key, scale=scale)
        if old is None or new is None:
            continue
        relative = (new.mean - old.mean) / abs(old.mean) if old.mean else 0.0
        beyond = abs(relative) > tolerance and not _overlap(old, new)
        rose = relative > 0
        yield Change(
            name,
            group.load,
            what,
            old,
            new,
            relative,
            beyond and rose != more_is_better,
            beyond and rose == more_is_better,
        )


def _overlap(old: Value, new: Value) -> bool:
    """Of the intervals; without repeats there are none."""
    if old.half is None or new.half is None:
        return False
    return abs(old.mean - new.mean) <= old.half + new.half


def table(found: Comparison) -> Table:
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("deployment", "load", "figure", "before", "after", "change", ""):
        drawn.add_column(column, justify="left" if column in ("deployment", "figure", "") else "right")
    for change in found.changes:
        verdict = Text("WORSE", style="bold red") if change.worse else Text("better" if change.better else "")
        drawn.add_row(change.series, f"{change.load:g}", change.what, _shown(change.before), _shown(change.after),
                      f"{change.relative:+.1%}", verdict)  # fmt: skip
    return drawn


def _shown(value: Value) -> str:
    return f"{value.mean:.4g}" + ("" if value.half is None else f" ± {value.half:.2g}")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m analysis.compare", description=__doc__.split("\n", 1)[0])
    parser.add_argument("before", type=Path, metavar="BEFORE")
    parser.add_argument("after", type=Path, metavar="AFTER")
    parser.add_argument("--tolerance", type=float, default=5.0, metavar="PERCENT", help="smaller changes are none (5)")
    arguments = parser.parse_args(words)
    try:
        before, after = (series_of(read(path)) for path in (arguments.before, arguments.after))
    except NoResultsError as error:
        sys.stderr.write(f"analysis.compare: {error}\n")
        return 2
    found = compare(before, after, tolerance=arguments.tolerance / 100)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table(found))
    for why in found.left_out:
        print(f"not compared: {why}")
    worse = sum(change.worse for change in found.changes)
    print(f"{worse} of {len(found.changes)} figures became worse by more than {arguments.tolerance:g} %")
    if not found.changes:
        sys.stderr.write("analysis.compare: the two sets have no point in common\n")
        return 2
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
