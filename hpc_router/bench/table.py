"""The figures on a terminal: one row per point, and which expert answered how much."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hpc_router.bench.measure import Figures, Spread

SATURATED: Final = 0.9
"""From this share of a core on, the load generator may be what was measured."""


@dataclass(frozen=True, slots=True)
class Row:
    users: int
    found: Figures
    load_cpu_share: float


def table(rows: Sequence[Row], *, simulated: bool) -> RenderableType:
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    drawn.add_column("users", justify="right")
    for column in ("ok", "failed", "TTFT ms\np50/p90/p99", "ITL ms\np50/p90/p99", "TPOT ms\np50", "E2E s\np50/p90/p99",
                   "session\ntok/s p50", "system\ntok/s", "req/s"):  # fmt: skip
        drawn.add_column(column, justify="right")
    for row in rows:
        found = row.found
        drawn.add_row(
            str(row.users),
            str(found.succeeded),
            Text(str(found.failed), style="bold red" if found.failed else ""),
            _three(found.ttft_s, scale=1e3),
            _three(found.itl_s, scale=1e3),
            _middle(found.tpot_s, scale=1e3),
            _three(found.e2e_s, scale=1.0),
            _middle(found.session_tokens_per_s, scale=1.0),
            _number(found.tokens_per_s),
            _number(found.requests_per_s),
        )
    told = [remark for row in rows for remark in _remarks(row)]
    return Group(*_head(simulated), drawn, *told)


def _head(simulated: bool) -> list[Text]:
    told = "simulated engine: these are no model's latencies"
    return [Text(told, style="yellow")] if simulated else []


def _remarks(row: Row) -> Iterator[Text]:
    found, at = row.found, f"{row.users} users: "
    shares = "  ".join(f"{name} {share:.0%}" for name, share in found.experts.items())
    yield Text(f"{at}answered by {shares or 'nobody'}")
    if found.failed:
        errors = ", ".join(f"{count} {kind}" for kind, count in found.errors.items())
        yield Text(f"{at}{found.failed} of {found.requests} requests failed: {errors}", style="red")
    if row.load_cpu_share >= SATURATED:
        told = f"the load generator used {row.load_cpu_share:.0%} of a core: the figures may be its own"
        yield Text(f"{at}{told}", style="yellow")


def _three(spread: Spread | None, *, scale: float) -> str:
    if spread is None:
        return "-"
    return "/".join(_number(value * scale) for value in (spread.p50, spread.p90, spread.p99))


def _middle(spread: Spread | None, *, scale: float) -> str:
    return "-" if spread is None else _number(spread.p50 * scale)


def _number(value: float) -> str:
    """Three digits or the whole number."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
