"""What `hpc-router classify eval` found, as tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def evaluation_text(found: Mapping[str, Any]) -> RenderableType:
    artefact = found["artefact"]
    parts: list[RenderableType] = [
        Text(
            f"artefact {artefact['version']}, {artefact['method']}, {artefact['clusters']} clusters; "
            f"{found['prompts']} prompts"
        )
    ]
    if "accuracy" in found:
        low, high = found["accuracy_interval"]
        parts.append(
            Text(
                f"accuracy {found['accuracy']:.3f} ({low:.3f} to {high:.3f}), NMI {found['nmi']:.3f}; "
                f"clusters named by {found['cluster_names_from']}"
            )
        )
    parts.append(
        Text(
            f"balance efficiency {found['balance_efficiency']:.2f}, low margin {found['low_margin_share']:.1%}, "
            f"no known terms {found['no_known_terms_share']:.1%}"
        )
    )
    share = sorted(found["load_share"].items(), key=lambda item: -item[1])
    parts.append(_table("load", ("", "share"), ((name, f"{value:.1%}") for name, value in share)))
    if "confusion" in found:
        parts.append(_confusion(found["confusion"]))
        rows = ((f"{r['margin']:.4f}", f"{r['coverage']:.1%}", f"{r['accuracy']:.3f}") for r in found["coverage"])
        parts.append(_table("above a margin", ("margin", "coverage", "accuracy"), rows))
    if "curve" in found.get("cost_quality", {}):
        parts += _cost_quality(found["cost_quality"])
    latency = ((name, f"{t['p50_us']:.1f}", f"{t['p99_us']:.1f}") for name, t in found["latency"].items())
    parts.append(_table("latency in us", ("prompt", "p50", "p99"), latency))
    return Group(*parts)


def _cost_quality(found: Mapping[str, Any]) -> list[RenderableType]:
    above = found["above_random_mixing"]
    single = ", ".join(f"{name} {value:.3f}" for name, value in found["single"].items())
    rows = (tuple(f"{r[key]:.3f}" for key in ("cost", "accuracy", "random", "oracle")) for r in found["curve"])
    return [
        Text(
            f"above random mixing by {100 * above['mean']:.2f} points ({100 * above['low']:.2f} to "
            f"{100 * above['high']:.2f}), averaged over costs; alone: {single}; oracle {found['oracle']:.3f}"
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
