"""Formats the result of `hpc-router classify eval` as tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def evaluation_text(result: Mapping[str, Any]) -> RenderableType:
    """Formats `result`, which `cli.classify.evaluate` returned, as tables."""
    artefact = result["artefact"]
    clusters, prompts = artefact["clusters"], result["prompts"]
    parts: list[RenderableType] = [
        Text(f"artefact {artefact['version']}, {artefact['method']}, {clusters} clusters; {prompts} prompts")
    ]
    if "accuracy" in result:
        low, high = result["accuracy_interval"]
        accuracy = f"accuracy {result['accuracy']:.3f} ({low:.3f} to {high:.3f}), NMI {result['nmi']:.3f}"
        parts.append(Text(f"{accuracy}; clusters named by {result['cluster_names_from']}"))
    if "confidence" in result:
        parts.append(Text(_confidence(result["confidence"])))
    balance, low_margin = result["balance_efficiency"], result["low_margin_share"]
    unknown = result["no_known_terms_share"]
    parts.append(Text(f"balance efficiency {balance:.2f}, low margin {low_margin:.1%}, no known terms {unknown:.1%}"))
    shares = sorted(result["load_share"].items(), key=lambda item: -item[1])
    parts.append(_table("load", ("", "share"), ((name, f"{value:.1%}") for name, value in shares)))
    if "confusion" in result:
        parts.append(_confusion(result["confusion"]))
        rows = ((f"{r['margin']:.4f}", f"{r['coverage']:.1%}", f"{r['accuracy']:.3f}") for r in result["coverage"])
        parts.append(_table("above a margin", ("margin", "coverage", "accuracy"), rows))
    if "curve" in result.get("cost_quality", {}):
        parts += _cost_quality(result["cost_quality"])
    latency = ((name, f"{t['p50_us']:.1f}", f"{t['p99_us']:.1f}") for name, t in result["latency"].items())
    parts.append(_table("latency in us", ("prompt", "p50", "p99"), latency))
    return Group(*parts)


def _confidence(result: Mapping[str, float]) -> str:
    lost = f"right decisions with a low margin {result['right_below_threshold']:.1%}"
    text = f"calibration error {result['ece']:.3f}, {lost}"
    return f"{text}, AUROC of prompts of no domain {result['auroc']:.3f}" if "auroc" in result else text


def _cost_quality(result: Mapping[str, Any]) -> list[RenderableType]:
    mean, low, high = (100 * result["above_random_mixing"][key] for key in ("mean", "low", "high"))
    single = ", ".join(f"{name} {value:.3f}" for name, value in result["single"].items())
    rows = (tuple(f"{r[key]:.3f}" for key in ("cost", "accuracy", "random", "oracle")) for r in result["curve"])
    routed = result["routed"]
    worse = [
        Text(
            f"the dearer model is the worse one: {result['dear']} {result['single'][result['dear']]:.3f}, "
            f"{result['cheap']} {result['single'][result['cheap']]:.3f}",
            style="yellow",
        )
    ]
    return [
        *(worse if result["dear_is_worse"] else []),
        Text(f"as routed: {routed['accuracy']:.3f} ({routed['low']:.3f} to {routed['high']:.3f})"),
        Text(
            f"above random mixing by {mean:.2f} points ({low:.2f} to {high:.2f}), averaged over costs; "
            f"alone: {single}; oracle {result['oracle']:.3f}"
        ),
        _table("cost and quality", ("cost", "accuracy", "random mixing", "oracle"), rows),
    ]


def _confusion(confusion: Mapping[str, Mapping[str, int]]) -> Table:
    names = sorted({name for row in confusion.values() for name in row})
    rows = ((label, *(str(row.get(name, "")) for name in names)) for label, row in confusion.items())
    return _table("confusion", ("label / decided", *names), rows)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table
