"""The terminal view of `hpc-router top`: the dashboard's content, in tables that fit the window. It changes nothing."""

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hpc_router.cli.tables import duration, new_table, state_text

Overview = Mapping[str, Any]
Rows = list[Mapping[str, Any]]

LOWER: Final = ("replicas", "queues and GPU hours")
"""What the lower table of the screen can show."""
MAX_ATTENTION: Final = 3
"""Number of lines for what needs attention."""
_NEVER: Final = float("inf")


def _largest(key: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda row: -(row.get(key) or 0)


SORTS: Final[Mapping[str, Callable[[Mapping[str, Any]], Any]]] = {
    "name": lambda row: row.get("replica") or row["expert"],
    "requests": lambda row: -(row.get("requests_per_s") or row["in_flight"]),
    "waiting": _largest("waiting"),
    "latency": lambda row: -_seconds(row),
    "end": lambda row: row.get("ends_at") or row.get("expires_at") or _NEVER,
}
"""The orders of the tables. Rows without a value come last; of equal rows, the first name comes first."""


def _seconds(row: Mapping[str, Any]) -> float:
    found = row.get("first_byte_s")
    return float((found["p99"] if isinstance(found, Mapping) else found) or 0)


@dataclass(slots=True)
class TopView:
    """Formats one overview after another for the screen. `sort`: a key of `SORTS`. `lower`: what the lower table shows,
    a value of `LOWER`. `first`: number of rows that are scrolled out at its top."""

    sort: str = "name"
    lower: str = "replicas"
    first: int = 0

    def key(self, pressed: str) -> bool:
        """Handles the pressed key `pressed`. Returns False if this key ends the view."""
        orders = list(SORTS)
        if pressed == "s":
            self.sort = orders[(orders.index(self.sort) + 1) % len(orders)]
        elif pressed == "v":
            self.lower, self.first = LOWER[(LOWER.index(self.lower) + 1) % len(LOWER)], 0
        elif pressed in ("j", " "):
            self.first += 1 if pressed == "j" else 10
        elif pressed == "k":
            self.first = max(0, self.first - 1)
        return pressed not in ("q", "\x03", "\x04")

    def screen(self, value: Overview, *, height: int, interactive: bool = True) -> RenderableType:
        """Returns the screen for the overview `value`. `height`: number of lines; a table that does not fit is cut, and
        says how many rows are missing. `interactive`: whether there is one lower table, and a last line that lists the
        keys; otherwise there are all lower tables."""
        head = _head(value)
        attention = [Text(f"! {line}", style="red", no_wrap=True, overflow="ellipsis") for line in value["attention"]]
        most = max(1, min(MAX_ATTENTION, height - 8))
        if len(attention) > most:
            more = len(attention) - most + 1
            attention = [*attention[: most - 1], Text(f"! and {more} more problems", style="red")]
        experts, replicas = self._ordered(_experts(value)), self._ordered(_replicas(value))
        if not interactive:
            tables = (_expert_table, experts), (_queue_table, experts), (_replica_table, replicas)
            parts = [part for table, rows in tables for part in (Text(), table((rows, 0), value["at"]))]
            return Group(head, *attention, *parts)
        foot = Text(f"q quit  s sort ({self.sort})  v view ({self.lower})  j k scroll", style="dim")
        rows, table = (replicas, _replica_table) if self.lower == "replicas" else (experts, _queue_table)
        left = height - len(attention) - 6  # head, foot, and for each table a title row and an empty line
        for_experts = max(1, min(len(experts), left // 2 if rows else left))
        below = max(1, left - for_experts)
        self.first = max(0, min(self.first, len(rows) - below))
        return Group(
            head,
            *attention,
            Text(),
            _expert_table(_cut(experts, for_experts), value["at"]),
            Text(),
            table(_cut(rows[self.first :], below), value["at"]),
            foot,
        )

    def _ordered(self, rows: Rows) -> Rows:
        return sorted(sorted(rows, key=SORTS["name"]), key=SORTS[self.sort])


def _cut(rows: Rows, most: int) -> tuple[Rows, int]:
    """Returns the first rows, as many as fit into a table of `most` lines, and the number of rows left out. If any is
    left out, one line of the table shows their number."""
    return (rows, 0) if len(rows) <= most else (rows[: most - 1], len(rows) - most + 1)


def _head(value: Overview) -> Text:
    router = value["router"]
    ready = sum(bool(one["ready"]) for one in value["experts"])
    window = "" if value["window_s"] is None else f"  last {duration(value['window_s'])}"
    text = (
        f"{router['replica']}  {ready} of {len(value['experts'])} experts ready  {router['in_flight']} in flight"
        f"  policy {value['policy']['kind']}{window}"
    )
    return Text(text, style="bold", no_wrap=True, overflow="ellipsis")


def _experts(value: Overview) -> Rows:
    rows: Rows = []
    for one in value["experts"]:
        ends = [r["expires_at"] for r in one["replicas"] if r["state"] == "ready" and r["expires_at"]]
        rows.append({**one, "ends_at": min(ends, default=None)})
    return rows


def _replicas(value: Overview) -> Rows:
    """Returns a row for each replica that the router knows, and for each whose job waits or starts. An engine with
    adapters serves several experts, but has only one row."""
    rows = {r["replica"]: {**r, "why": _why(r)} for one in value["experts"] for r in one["replicas"]}
    for coming in value["starting"]:
        at = coming.get("ready_at")
        why = ", ".join(filter(None, (coming.get("reason"), at and f"ready in {duration(at - value['at'])}")))
        row = rows.setdefault(coming["replica"], {"replica": coming["replica"], "state": "pending", "in_flight": 0})
        if row["state"] != "ready":
            row["why"] = why
    return list(rows.values())


def _why(replica: Mapping[str, Any]) -> str:
    return "; ".join(filter(None, (replica["sick"], replica["trouble"], "silent" if replica["silent"] else None)))


def _expert_table(cut: tuple[Rows, int], now: float) -> Table:
    shown = new_table("expert", "ready", "req/s", "failed/s", "p50", "p99", "in flight", "waiting", "ends in")
    rows, more = cut
    for one in rows:
        latency = one["first_byte_s"] or {}
        shown.add_row(
            one["expert"],
            Text(f"{one['ready']}/{len(one['replicas'])}", style="green" if one["ready"] else "bold red"),
            _rate(one["requests_per_s"]),
            _rate(one["failed_per_s"]),
            duration(latency.get("p50")),
            duration(latency.get("p99")),
            str(one["in_flight"]),
            str(one["waiting"]),
            _until(one["ends_at"], now),
        )
    return _with_rest(shown, more)


def _queue_table(cut: tuple[Rows, int], now: float) -> Table:
    """Returns a table of the requests that wait for each expert, by class, and of the expert's GPU hours."""
    rows, more = cut
    classes = list(rows[0]["queues"]) if rows else []
    titles = [title for name in classes for title in (f"{name} queue", "oldest")]
    shown = new_table("expert", *titles, "GPU hours", "idle")
    for one in rows:
        cells: list[RenderableType] = []
        for name in classes:
            queue = one["queues"][name]
            cells += [
                Text(str(queue["waiting"]), style="yellow" if queue["waiting"] else ""),
                duration(queue["oldest_s"]),
            ]
        usage = one["usage"]
        known = usage is not None and usage["idle_share"] is not None
        hours = (f"{sum(usage['gpu_hours'].values()):.2f}", f"{usage['idle_share']:.0%}") if known else ("", "")
        shown.add_row(one["expert"], *cells, *hours)
    return _with_rest(shown, more)


def _replica_table(cut: tuple[Rows, int], now: float) -> Table:
    shown = new_table("replica", "state", "in flight", "node", "ends in", "")
    rows, more = cut
    for one in rows:
        shown.add_row(
            one["replica"],
            state_text(one["state"]),
            f"{one['in_flight']}/{one['capacity']}" if "capacity" in one else "",
            one.get("node") or "",
            _until(one.get("expires_at"), now),
            Text(one["why"] or "", no_wrap=True, overflow="ellipsis"),
        )
    return _with_rest(shown, more)


def _with_rest(shown: Table, more: int) -> Table:
    for column in shown.columns:
        column.overflow, column.no_wrap = "ellipsis", True
    if more:
        shown.add_row(Text(f"and {more} more", style="dim"))
    return shown


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _until(at: float | None, now: float) -> str:
    return "" if at is None else duration(max(0.0, at - now))


def watch(read: Callable[[], Overview | str], view: TopView, *, interval_s: float) -> None:
    """Shows overviews on the terminal until the user presses a key that ends the view. `read` returns an overview, or a
    text that says why there is none; then the last overview stays on the screen below that text."""
    console = Console(markup=False)
    shown: Overview | None = None
    with _single_keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            value = read()
            if not isinstance(value, str):
                shown = value
            until, now = time.monotonic() + interval_s, 0.0
            while now < until:
                parts: list[RenderableType] = [Text(value, style="red")] if isinstance(value, str) else []
                if shown is not None:
                    parts.append(view.screen(shown, height=console.height - len(parts)))
                live.update(Group(*parts), refresh=True)
                key = pressed(max(0.0, until - time.monotonic()))
                if key is not None and not view.key(key):
                    return
                now = time.monotonic()


@contextlib.contextmanager
def _single_keys() -> Iterator[Callable[[float], str | None]]:
    """Yields a function that waits the given seconds for a pressed key and returns it; None if there was none."""
    descriptor = sys.stdin.fileno()
    if not os.isatty(descriptor):
        yield lambda limit_s: time.sleep(limit_s)
        return
    before = termios.tcgetattr(descriptor)

    def pressed(limit_s: float) -> str | None:
        readable, _, _ = select.select([descriptor], [], [], limit_s)
        return os.read(descriptor, 1).decode(errors="replace") if readable else None

    try:
        tty.setcbreak(descriptor)
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
