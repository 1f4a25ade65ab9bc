"""Formats predictions as a table, as JSON and as a plot. Every form says that it is a prediction."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hpc_router.bench.figures import Percentiles
from hpc_router.bench.plot import Panel, svg
from hpc_router.bench.table import number
from hpc_router.bench.what_if.demand import UserDemand
from hpc_router.bench.what_if.simulation import Prediction, Series, Summary

HEADING: Final = "PREDICTION, not a measurement: simulated users, router and engines"
COLUMNS: Final = ("requests/s", "tokens/s", "TTFT s\np50/p90/p99", "wait s\np50/p99", "E2E s\np50/p90", "refused",
                  "cold\nstarts", "replicas", "GPU\nhours", "idle")  # fmt: skip
_UNITS: Final = (("h", 3600.0, 2 * 3600.0), ("min", 60.0, 120.0), ("s", 1.0, 0.0))
"""Units of the plot's axis: name, seconds, and the period from which it is used."""


def table(predictions: Mapping[str, Prediction], demand: UserDemand) -> RenderableType:
    grid = Table(box=None, pad_edge=False, header_style="bold")
    grid.add_column("deployment")
    for column in COLUMNS:
        grid.add_column(column, justify="right")
    for name, found in predictions.items():
        grid.add_row(name, *_cells(found.total, _range(found)))
        if len(found.experts) > 1:
            for expert, summary in found.experts.items():
                grid.add_row(f"  {expert}", *_cells(summary, _range(found, expert)), style="dim")
    notes = [Text(line) for line in _notes(predictions, demand)]
    return Group(Text(HEADING, style="bold yellow"), Text(demand_text(demand)), Text(), grid, Text(), *notes)


def to_json(predictions: Mapping[str, Prediction], demand: UserDemand) -> dict[str, Any]:
    return {
        "prediction": True,
        "demand": demand.to_json(),
        "deployments": [
            {
                "name": name,
                "simulated_s": found.simulated_s,
                "assumptions": list(found.service.assumptions),
                "total": asdict(found.total),
                "experts": {expert: asdict(summary) for expert, summary in found.experts.items()},
                "scaled": [asdict(change) for change in found.scaled],
                "series": [asdict(point) for point in found.series],
            }
            for name, found in predictions.items()
        ],
    }


def plot(predictions: Mapping[str, Prediction], demand: UserDemand) -> str:
    """Returns a plot over time as SVG text, with a line for each deployment."""
    length_s = max(found.simulated_s for found in predictions.values())
    unit, factor = next((unit, factor) for unit, factor, from_s in _UNITS if length_s >= from_s)

    def lines(key: str) -> dict[str, list[tuple[float, float]]]:
        return {name: _line(found.series, key, factor) for name, found in predictions.items()}

    first = next(iter(predictions.values()))
    has_gpus = any(point.gpus for found in predictions.values() for point in found.series)
    panels = [
        Panel(demand_text(demand), {"users": _line(first.series, "users", factor)}),
        Panel("time to first token, median, s", lines("ttft_s")),
        Panel("requests in flight on replicas", lines("in_flight")),
        Panel("requests that wait for a replica", lines("waiting")),
        Panel("GPUs in use", lines("gpus")) if has_gpus else Panel("replicas", lines("replicas")),
    ]
    return svg(HEADING, panels, length=length_s / factor, unit=unit, marks={})


def demand_text(demand: UserDemand) -> str:
    """Returns the demand in words."""
    users = str(demand.users[0][1])
    users += "".join(f", {count} from {duration_text(at_s)} on" for at_s, count in demand.users[1:])
    pause = f"pauses of {duration_text(demand.think_s)}" if demand.think_s else "no pauses"
    return (
        f"users: {users}; for {duration_text(demand.for_s)}; on average {pause}, prompts of "
        f"{demand.prompt_tokens.mean:g} tokens, answers of {demand.answer_tokens.mean:g} tokens"
    )


def duration_text(seconds: float) -> str:
    """Formats a duration with the largest unit that it has at least one of, as `--for` takes it."""
    for unit, length_s in (("d", 86400.0), ("h", 3600.0), ("m", 60.0)):
        if seconds >= length_s:
            return f"{seconds / length_s:.4g}{unit}"
    return f"{seconds:.4g}s"


def _line(series: Sequence[Series], key: str, factor: float) -> list[tuple[float, float]]:
    return [(point.at_s / factor, value) for point in series if (value := getattr(point, key)) is not None]


def _range(found: Prediction, expert: str | None = None) -> str:
    """Returns the least and the most replicas that jobs ran for, of one expert or of all, such as `0-3`."""
    if expert is None:
        counts = [point.replicas for point in found.series]
    elif expert not in found.service.experts:
        return "-"  # an adapter
    else:
        counts = [found.service.experts[expert].replicas]
        counts += [change.replicas for change in found.scaled if change.expert == expert]
    return f"{min(counts)}-{max(counts)}" if min(counts) < max(counts) else str(counts[0])


def _cells(summary: Summary, replicas: str) -> Iterator[str]:
    yield number(summary.requests_per_s)
    yield number(summary.tokens_per_s)
    yield _of(summary.ttft_s, "p50", "p90", "p99")
    yield _of(summary.wait_s, "p50", "p99")
    yield _of(summary.e2e_s, "p50", "p90")
    yield str(summary.refused)
    yield str(summary.cold_starts)
    yield replicas
    yield number(summary.gpu_hours) if summary.gpu_hours else "-"
    yield "-" if summary.idle_share is None else f"{summary.idle_share:.0%}"


def _of(spread: Percentiles | None, *names: str) -> str:
    return "-" if spread is None else "/".join(number(getattr(spread, name)) for name in names)


def _notes(predictions: Mapping[str, Prediction], demand: UserDemand) -> Iterator[str]:
    yield _shares_text(predictions, demand)
    lines = {line: None for found in predictions.values() for line in found.service.assumptions}
    yield from lines
    for name, found in predictions.items():
        if found.simulated_s < demand.for_s:
            simulated = duration_text(found.simulated_s)
            yield f"{name}: the first {simulated} are simulated; nothing changes after them."
        if found.scaled:
            yield f"{name}: the number of replicas changes {len(found.scaled)} times (--json lists them)."


def _shares_text(predictions: Mapping[str, Prediction], demand: UserDemand) -> str:
    if demand.shares:
        whole = sum(demand.shares.values())
        shares = ", ".join(f"{name} {share / whole:.0%}" for name, share in demand.shares.items())
        return f"Shares of the requests, as given: {shares}."
    policies = {found.service.policy for found in predictions.values()}
    by_load = policies & {"round_robin", "least_in_flight"}
    text = f"policy={' or '.join(sorted(by_load))} chooses the expert" if by_load else ""
    if policies - by_load:
        text += ("; with other policies, " if text else "") + "each expert gets the same share of the requests"
        text += " (--share sets others)"
    return f"{text[0].upper() if not by_load else text[0]}{text[1:]}."
