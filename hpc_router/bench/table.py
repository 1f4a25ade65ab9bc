"""Formats the figures as a table for a terminal: one row per measurement point, then remarks on the points."""

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hpc_router.bench.figures import GroupFigures, Percentiles
from hpc_router.bench.point import MeasuredPoint


def table(rows: Sequence[MeasuredPoint], *, simulated: bool) -> RenderableType:
    grid = Table(box=None, pad_edge=False, header_style="bold")
    grid.add_column("load", justify="left")
    for column in ("ok", "failed", "TTFT ms\np50/p90/p99", "ITL ms\np50/p90/p99", "TPOT ms\np50", "E2E s\np50/p90/p99",
                   "session\ntok/s p50", "system\ntok/s", "req/s", "router adds\nTTFT ms"):  # fmt: skip
        grid.add_column(column, justify="right")
    for row in rows:
        found = row.figures
        grid.add_row(
            Text(row.point.name, style="strike" if row.invalid else ""),
            str(found.succeeded),
            Text(str(found.failed), style="bold red" if found.failed else ""),
            _percentiles(found.ttft_s, scale=1e3),
            _percentiles(found.itl_s, scale=1e3),
            _median(found.tpot_s, scale=1e3),
            _percentiles(found.e2e_s, scale=1.0),
            _median(found.session_tokens_per_s, scale=1.0),
            number(found.tokens_per_s),
            number(found.requests_per_s),
            _overhead(row),
        )
    remarks = [remark for row in rows for remark in _remarks(row)]
    warning = Text("simulated engine: these latencies are not those of a real model", style="yellow")
    return Group(*([warning] if simulated else []), grid, *remarks)


def _remarks(row: MeasuredPoint) -> Iterator[Text]:
    found, at = row.figures, f"{row.point.name}: "
    shares = "  ".join(f"{name} {share:.0%}" for name, share in found.experts.items())
    yield Text(f"{at}answered by {shares or 'no expert'}")
    if found.failed:
        errors = ", ".join(f"{count} {kind}" for kind, count in found.errors.items())
        yield Text(f"{at}{found.failed} of {found.requests} requests failed: {errors}", style="red")
    if found.cancelled:
        yield Text(f"{at}{found.cancelled} requests were cancelled by the client")
    if found.hit_share is not None:
        yield Text(f"{at}prefix caches had {found.hit_share:.0%} of the prompt tokens")
    if found.jain and max(found.balance.values(), default=1.0) > 1.0:
        yield Text(f"{at}Jain index of the work " + "  ".join(f"{k} {v:.3f}" for k, v in found.jain.items()))
    for kind, groups in (("class", found.classes), ("turn", found.turns)):
        if len(groups) > 1:
            yield Text(f"{at}TTFT ms p50/p90/p99 by {kind}: " + "  ".join(map(_group, groups.items())))
    for reason in row.invalid:
        yield Text(f"{at}INVALID: {reason}", style="bold red")
    for note in row.notes:
        yield Text(f"{at}{note}", style="yellow")


def _group(item: tuple[str, GroupFigures]) -> str:
    name, found = item
    hits = "" if found.hit_share is None else f" ({found.hit_share:.0%} cached)"
    return f"{name}: {_percentiles(found.ttft_s, scale=1e3)}{hits}"


def _overhead(row: MeasuredPoint) -> str:
    found = (row.overhead or {}).get("ttft_s")
    return "-" if found is None else f"{found['added_s'] * 1e3:.3g} ({found['share']:.0%})"


def _percentiles(spread: Percentiles | None, *, scale: float) -> str:
    if spread is None:
        return "-"
    return "/".join(number(value * scale) for value in (spread.p50, spread.p90, spread.p99))


def _median(spread: Percentiles | None, *, scale: float) -> str:
    return "-" if spread is None else number(spread.p50 * scale)


def number(value: float) -> str:
    """Formats a number with three significant digits; from 100 on as a whole number."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
