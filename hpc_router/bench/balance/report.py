"""Formats the results of `hpc-router bench balance` as JSON, Markdown and one HTML page.

The page has one table per group of figures. Its tables are at most five columns wide; on a narrow screen each row
becomes a card, so that nothing is cut.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any, Final

from hpc_router.bench.balance.options import CLASSES, TRACE, BalanceOptions
from hpc_router.bench.figures import Figures, GroupFigures, Percentiles

SCHEMA: Final = 1
LATE_SHARE: Final = 0.05
"""Share of their time from which simulated engines that fell behind make a result unreliable."""
BOUND_SHARE, PEER_SHARE, TTFT_SHARE, JAIN = 0.9, 0.95, 0.9, 0.95
"""The targets of this router: hit tokens of the upper bound and of the best peer, TTFT of the best peer, Jain index."""


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """The figures of one policy. `jain`: Jain index of the tokens that the engines computed. `bound`: cached tokens
    with one cache of all budgets, for the order in which this policy's requests began."""

    name: str
    peer: bool
    setup: str
    figures: Figures
    jain: float
    bound: int
    late_share: float
    load_cpu_share: float

    @property
    def hit_tokens(self) -> int:
        return self.figures.hit_tokens or 0

    @property
    def ttft_s(self) -> Percentiles:
        assert self.figures.ttft_s is not None
        return self.figures.ttft_s


@dataclass(frozen=True, slots=True)
class BalanceResults:
    """Everything that one run found. `absent`: the policies that could not be measured, and why."""

    options: BalanceOptions
    policies: Sequence[PolicyResult]
    absent: Mapping[str, str]
    origin: Mapping[str, Any]

    @property
    def bound(self) -> int:
        return max((one.bound for one in self.policies), default=0)

    @property
    def failed(self) -> bool:
        """Whether a request failed, or the engines fell too far behind."""
        return any(one.figures.failed or one.late_share > LATE_SHARE for one in self.policies)

    def checks(self) -> list[tuple[str, float, str, bool]]:
        """Returns the targets of this router: what, its value, the limit, and whether it is met."""
        own = next((one for one in self.policies if one.name == "prefix"), None)
        peers = [one for one in self.policies if one.peer]
        if own is None:
            return []
        found = [
            ("hit tokens / upper bound", own.hit_tokens / max(1, self.bound), BOUND_SHARE, True),
            ("Jain index of work", own.jain, JAIN, True),
        ]
        if peers:
            hits = max(one.hit_tokens for one in peers)
            best = {
                "mean TTFT": (own.ttft_s.mean, min(one.ttft_s.mean for one in peers)),
                "p90 TTFT": (own.ttft_s.p90, min(one.ttft_s.p90 for one in peers)),
            }
            found.append(("hit tokens / best peer's", own.hit_tokens / max(1, hits), PEER_SHARE, True))
            found += [(f"{name} / best peer's", a / b, TTFT_SHARE, False) for name, (a, b) in best.items()]
        return [
            (what, value, f"{'at least' if least else 'at most'} {limit}", value >= limit if least else value <= limit)
            for what, value, limit, least in found
        ]


def to_json(results: BalanceResults) -> dict[str, Any]:
    options = results.options
    return {
        "schema": SCHEMA,
        "evidence": "simulated",
        "options": {
            "replicas": options.replicas,
            "seconds": options.seconds,
            "warmup_s": options.warmup_s,
            "slowdown": options.slowdown,
            "loads": list(options.loads),
            "rates": dict(options.rates),
            "trace": None if options.trace is None else options.trace.name,
            "trace_speed": options.trace_speed,
            "trace_block": options.trace_block,
            "seed": options.seed,
            "engine": asdict(options.engine),
        },
        "upper_bound_tokens": results.bound,
        "policies": [{**asdict(one), "hit_tokens": one.hit_tokens} for one in results.policies],
        "absent": dict(results.absent),
        "checks": [
            {"what": what, "value": value, "limit": limit, "met": met} for what, value, limit, met in results.checks()
        ],
        "provenance": dict(results.origin),
    }


Row = Sequence[str]


@dataclass(frozen=True, slots=True)
class _Sheet:
    title: str
    columns: Row
    rows: Sequence[Row]


def _sheets(results: BalanceResults) -> list[_Sheet]:
    bound = max(1, results.bound)
    found = [
        _Sheet(
            "Caches and balance",
            ("policy", "hit tokens", "of the bound", "Jain index", "requests/s"),
            [
                *(
                    (
                        one.name,
                        f"{one.hit_tokens:,}",
                        f"{one.hit_tokens / bound:.3f}",
                        f"{one.jain:.3f}",
                        f"{one.figures.requests_per_s:.1f}",
                    )
                    for one in results.policies
                ),
                ("upper bound", f"{results.bound:,}", "1", "", ""),
            ],
        ),
        _Sheet(
            "Time to first token, ms",
            ("policy", "mean", "p50", "p90", "p99"),
            [(one.name, *_ms(one.ttft_s)) for one in results.policies],
        ),
    ]
    for title, groups in (("By class", "classes"), ("By turn of the conversation", "turns")):
        named: dict[str, list[Row]] = {}
        for one in results.policies:
            group: Mapping[str, GroupFigures] = getattr(one.figures, groups)
            for name, each in group.items():
                if each.ttft_s is not None:
                    share = "" if each.hit_share is None else f"{each.hit_share:.3f}"
                    row = (one.name, str(each.count), f"{each.ttft_s.mean * 1e3:.0f}", f"{each.ttft_s.p90 * 1e3:.0f}")
                    named.setdefault(name, []).append((*row, share))
        columns = ("policy", "requests", "TTFT mean, ms", "TTFT p90, ms", "hit share")
        found += [_Sheet(f"{title}: {name}", columns, rows) for name, rows in named.items()]
    checks = [(what, f"{value:.3f}", limit, "yes" if met else "no") for what, value, limit, met in results.checks()]
    found.append(_Sheet("Targets of this router", ("target", "value", "limit", "met"), checks))
    reliable = [
        (
            one.name,
            str(one.figures.requests),
            str(one.figures.failed),
            f"{100 * one.late_share:.1f} %",
            f"{100 * one.load_cpu_share:.0f} %",
        )
        for one in results.policies
    ]
    columns = ("policy", "measured requests", "failed", "engines late", "load generator's core")
    found.append(_Sheet("Is it reliable?", columns, reliable))
    found.append(_Sheet("How they were set up", ("policy", "set-up"), [(o.name, o.setup) for o in results.policies]))
    return found


def _ms(one: Percentiles) -> tuple[str, ...]:
    return tuple(f"{value * 1e3:.0f}" for value in (one.mean, one.p50, one.p90, one.p99))


def _introduction(results: BalanceResults) -> list[str]:
    options = results.options
    loads = [f"{name}: {options.rates[name]:g} conversations per second" for name in CLASSES if name in options.loads]
    if options.trace is not None and TRACE in options.loads:
        speed, words = f"{options.trace_speed:g} times as fast", f"{options.trace_block} words per block of 512 tokens"
        loads.append(f"{TRACE}: Mooncake's conversation trace, {speed}, {words}")
    engine = options.engine
    model = f"{engine.model} ({engine.quantization}) on one {engine.gpu} each"
    measured = f"Measured for {options.seconds:g} s after {options.warmup_s:g} s, in the engines' time"
    return [
        f"SIMULATED: {options.replicas} replicas of {model}, with prefix caches. Every policy gets fresh engines and "
        "the same requests at the same times.",
        f"Load: {'; '.join(loads)}. {measured}; one such second takes {options.slowdown:g} s.",
        "Hit tokens: prompt tokens that the engines took from their caches. Upper bound: the same requests with one "
        "cache that has the sum of all budgets. Jain index: of the tokens that the engines computed.",
        *(f"Not measured: {name}, {why}." for name, why in results.absent.items()),
        f"{results.origin['command']} at {results.origin['at']}, {results.origin['hardware']['cpus']} x "
        f"{results.origin['hardware']['cpu']}.",
    ]


def markdown(results: BalanceResults) -> str:
    lines = ["# Balance", ""]
    for text in _introduction(results):
        lines += [text, ""]
    for sheet in _sheets(results):
        lines += [f"## {sheet.title}", "", _line(sheet.columns), _line(["---"] * len(sheet.columns))]
        lines += [*map(_line, sheet.rows), ""]
    return "\n".join(lines)


def _line(cells: Row) -> str:
    return f"| {' | '.join(cells)} |"


_STYLE: Final = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1100px; padding: 1rem; }
p, td, th { overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #8886; }
th:first-child, td:first-child, .text td { text-align: left; }
tr.own { font-weight: 600; }
@media (max-width: 640px) {
  thead { display: none; }
  tr { display: block; border-bottom: 1px solid #8886; padding: .4rem 0; }
  td, td:first-child { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem 0; }
  td::before { content: attr(data-name); opacity: .75; font-weight: 400; }
  td:empty { display: none; }
}
"""


def html(results: BalanceResults) -> str:
    """Returns a page without any script or further file."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Balance</title>',
        f"<style>{_STYLE}</style></head><body><main><h1>Balance</h1>",
        *(f"<p>{escape(text)}</p>" for text in _introduction(results)),
    ]
    for sheet in _sheets(results):
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in sheet.columns)
        rows = "".join(
            f"<tr{' class=own' if row[0] == 'prefix' else ''}>"
            + "".join(
                f'<td data-name="{escape(name)}">{escape(cell)}</td>'
                for name, cell in zip(sheet.columns, row, strict=True)
            )
            + "</tr>"
            for row in sheet.rows
        )
        kind = ' class="text"' if len(sheet.columns) == 2 else ""
        parts.append(
            f"<h2>{escape(sheet.title)}</h2><table{kind}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        )
    return "\n".join([*parts, "</main></body></html>\n"])
