"""Reports the results of `python -m launch.bench` as one self-contained HTML page, and as figures.

    python -m analysis.report results --out report.html [--figures DIR] [--title TEXT]

RESULTS is the folder of a sweep or one result file; several are combined. Needs the extra `analysis`.
"""

import argparse
import html
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from analysis.results import (
    EVIDENCE,
    LoadPoint,
    NoResultsError,
    Record,
    Series,
    Value,
    rate_limit,
    read,
    saturation,
    series_of,
)

_CSS: Final = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; margin: 0 auto; max-width: 1240px;
  padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .2rem 0 .6rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .4rem; border-bottom: 2px solid #111; padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p, li { max-width: 75ch; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid #bbb; padding: .4rem; break-inside: avoid; }
figure svg { width: 100%; height: auto; display: block; }
.table { container-type: inline-size; }
table { border-collapse: collapse; font-size: .87rem; }
th, td { padding: .25rem .5rem; text-align: right; border-bottom: 1px solid #ccc; vertical-align: bottom; }
th { border-bottom: 2px solid #111; }
th:first-child, td:first-child { text-align: left; min-width: 7rem; overflow-wrap: anywhere; }
.label { border: 2px solid #111; padding: .1rem .5rem; font-weight: 700; font-size: .85rem; white-space: nowrap; }
.invalid { text-decoration: line-through; }
.warning { border: 3px double #111; padding: .5rem .8rem; margin: 1rem 0; }
code { font-size: .9em; overflow-wrap: anywhere; }
details { margin: .4rem 0; }
"""
_CARDS_CSS: Final = """
@container (max-width: WIDTH) {
  .CLASS, .CLASS tbody, .CLASS tr, .CLASS td { display: block; }
  .CLASS thead { display: none; }
  .CLASS tr { border: 1px solid #bbb; padding: .2rem .5rem; margin: .4rem 0; }
  .CLASS td, .CLASS td:first-child { border: 0; padding: .1rem 0; overflow: hidden; overflow-wrap: anywhere; }
  .CLASS td:first-child { font-weight: 700; }
  .CLASS td:not(:first-child)::before { content: attr(data-label); float: left; padding-right: .5rem; }
}
"""
_CARD_WIDTHS: Final = (("few", 4, "27rem"), ("some", 7, "42rem"), ("many", 10**9, "62rem"))
"""Classes of tables by their number of columns. In a narrower page each row becomes a card, so nothing is cut."""
_LATENCIES: Final = (
    ("TTFT p50\nms", "ttft_s.p50", 1e3),
    ("TTFT p99\nms", "ttft_s.p99", 1e3),
    ("ITL p50\nms/token", "itl_s.p50", 1e3),
    ("ITL p99\nms/token", "itl_s.p99", 1e3),
    ("TPOT p50\nms/token", "tpot_s.p50", 1e3),
    ("E2E p50\ns", "e2e_s.p50", 1.0),
    ("router adds\nTTFT ms", "router.ttft_s.added_s", 1e3),
    ("router adds\n% of TTFT", "router.ttft_s.share", 100.0),
)
_RATES: Final = (
    ("session\ntokens/s", "session_tokens_per_s.p50", 1.0),
    ("system\ntokens/s", "tokens_per_s", 1.0),
    ("requests/s", "requests_per_s", 1.0),
    ("goodput\nrequests/s", "goodput_per_s", 1.0),
    ("failed\n%", "failed_share", 100.0),
)
_CACHES: Final = (
    ("cached\ntokens", "hit_tokens", 1.0),
    ("cached\n% of prompts", "hit_share", 100.0),
    ("Jain index\nof work", "least_jain", 1.0),
    ("cancelled\n%", "cancelled_share", 100.0),
)
_QUANTILES: Final = ("mean", "p50", "p90")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m analysis.report", description=__doc__.split("\n", 1)[0])
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="folder of a sweep, or a result file")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="also write each figure to DIR, as SVG and PNG")
    parser.add_argument("--title", default="Experiment report")
    options = parser.parse_args(arguments)
    try:
        records = [record for path in options.results for record in read(path)]
        page = report(records, title=options.title, figures=options.figures)
    except NoResultsError as error:
        sys.stderr.write(f"analysis.report: {error}\n")
        return 2
    except ModuleNotFoundError as error:
        sys.stderr.write(f"analysis.report: {error.name} is missing: pip install 'hpc-router[analysis]'\n")
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page, encoding="utf-8")
    invalid = sum(not record["valid"] for record in records)
    print(f"{options.out}: {len(records)} points" + (f", {invalid} of them INVALID" if invalid else ""))
    return 0


def report(records: Sequence[Record], *, title: str, figures: Path | None = None) -> str:
    """Returns the HTML page, and saves the figures to a folder. Raises ModuleNotFoundError without matplotlib."""
    all_records = [{**record, **_derived(record)} for record in records]
    series = series_of(all_records)
    parts = [_head(title, all_records), *_warnings(all_records, series)]
    for evidence, label in EVIDENCE.items():
        for by in ("users", "rate_per_s", "trace"):
            section = [one for one in series if (one.evidence, one.by) == (evidence, by)]
            if section:
                parts += _section(section, label, figures)
    parts += [_definitions(), _origins(all_records), "</body></html>"]
    return "\n".join(parts)


def _derived(record: Record) -> dict[str, float]:
    """Returns further values of a record. Records of earlier versions have no cancelled requests and no Jain index."""
    requests, cancelled = record["requests"], record.get("cancelled", 0)
    found = {"failed_share": float(record["failed"]) / requests if requests else 1.0}
    if cancelled:
        found["cancelled_share"] = cancelled / requests
    if record.get("jain") and max(record["balance"].values(), default=1.0) > 1.0:
        found["least_jain"] = min(record["jain"].values())
    return found


def _head(title: str, records: Sequence[Record]) -> str:
    kinds = " ".join(
        f'<span class="label">{html.escape(label)}</span>'
        for kind, label in EVIDENCE.items()
        if any(record["evidence"] == kind for record in records)
    )
    cards = "".join(
        _CARDS_CSS.replace("CLASS", name).replace("WIDTH", width).strip() + "\n" for name, _, width in _CARD_WIDTHS
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{_CSS}{cards}</style></head><body><h1>{html.escape(title)}</h1><p>{kinds}</p>"
    )


def _warnings(records: Sequence[Record], series: Sequence[Series]) -> Iterator[str]:
    if any(record["evidence"] == "simulated" for record in records):
        yield (
            '<div class="warning"><b>Simulated points are predictions</b> of a roofline model of engines on GPUs, or '
            "of fixed latencies; they are no evidence of the speed of GPUs. Points marked as measured are.</div>"
        )
    invalid = [(one, point) for one in series for point in one.points if not point.valid]
    if invalid:
        items = "".join(
            f"<li>{html.escape(one.name)}, {_load(one, point.load)}: {html.escape(reason)}</li>"
            for one, point in invalid
            for reason in dict.fromkeys(point.reasons)
        )
        heading = "<b>Invalid: do not use</b>; crossed out in figures and tables"
        yield f'<div class="warning">{heading}<ul>{items}</ul></div>'
    versions = {str(record["provenance"]["git"]) for record in records}
    if len(versions) > 1:
        yield '<div class="warning">These points were measured with different versions of the code (see below).</div>'


def _section(series: Sequence[Series], label: str, figures: Path | None) -> Iterator[str]:
    from analysis.figures import balance, curves

    by = {"users": "concurrent users", "rate_per_s": "request rate", "trace": "a trace"}[series[0].by]
    yield f"<h2>{html.escape(label)}: by {by}</h2>"
    drawings = [*curves(series), *([bars] if (bars := balance(series)) is not None else [])]
    yield '<div class="figures">'
    for drawing in drawings:
        if figures is not None:
            drawing.save(figures)
        label = html.escape(drawing.description, quote=True)
        yield f'<figure role="img" aria-label="{label}">{_svg(drawing)}</figure>'
    yield "</div>"
    yield _saturations(series)
    yield _limits(series)
    yield (
        "<p>The tables show means over repeats, with several repeats ± half of the 95&nbsp;% confidence interval "
        "(Student's t).</p>"
    )
    yield _table("Latencies", _LATENCIES, series)
    yield _table("Rates", _RATES, series)
    yield _table("Prefix caches and balance", _CACHES, series)
    yield _groups("By class of the load", "classes", "class", series)
    yield _groups("By turn of the conversation", "turns", "turn", series)
    yield _balances(series)


def _svg(drawing: Any) -> str:
    import matplotlib as mpl

    from analysis.figures import RC

    text = io.StringIO()
    with mpl.rc_context(RC):
        drawing.figure.savefig(text, format="svg", metadata={"Date": None})
    document = text.getvalue()
    return _with_unique_ids(document[document.index("<svg") :], drawing.name)


def _with_unique_ids(svg: str, name: str) -> str:
    """Prefixes all ids with the name of the figure, because matplotlib's ids repeat across the figures of a page."""
    return svg.replace('id="', f'id="{name}-').replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')


def _saturations(series: Sequence[Series]) -> str:
    rows = []
    for one in series:
        result = saturation(one)
        if result is None:
            continue
        load = _load(one, result.load) if result.reached else f"not reached up to {_load(one, one.points[-1].load)}"
        gpus = str(one.gpus) if one.gpus else "-"
        per_gpu = f"{result.tokens_per_s / one.gpus:,.0f}" if one.gpus else "-"
        rows.append([html.escape(one.name), gpus, load, f"{result.tokens_per_s:,.0f}", per_gpu])
    if not rows:
        return ""
    return (
        "<h3>Saturation</h3><p>The lowest load with at least 90&nbsp;% of the highest throughput; valid points "
        "only.</p>" + _grid(("deployment", "GPUs", "saturates at", "tokens/s at that load", "tokens/s per GPU"), rows)
    )


def _limits(series: Sequence[Series]) -> str:
    rows = []
    for one in series:
        found = rate_limit(one)
        if found is None:
            continue
        highest, failing = (("-" if rate is None else f"{rate:g}") for rate in (found.rate_per_s, found.failing_per_s))
        goodput = "-" if found.goodput_per_s is None else _number(found.goodput_per_s)
        saturated = "yes" if found.exceeded else "no"
        name = html.escape(one.name)
        rows.append([name, f"{100 * found.share:g}", highest, goodput, failing, saturated])
    if not rows:
        return ""
    columns = ("deployment", "target\n% within limits", "highest rate\nper s", "goodput there\nrequests/s",
               "lowest rate that fails\nper s", "over-saturated\nthere")  # fmt: skip
    text = "<p>The highest rate at which the share of requests within the limits of bench.good reaches the target.</p>"
    return f"<h3>Highest rate</h3>{text}{_grid(columns, rows)}"


def _groups(title: str, key: str, column: str, series: Sequence[Series]) -> str:
    """Returns the table of the latencies of each class of the load, or of each turn; empty without such groups."""
    rows, marks = [], []
    for one in series:
        for point in one.points:
            names = {name: None for record in point.records for name in record.get(key) or {}}
            for name in names:
                at = f"{key}.{name}"
                cells = [point.value(f"{at}.count"), *(point.value(f"{at}.ttft_s.{p}", scale=1e3) for p in _QUANTILES),
                         point.value(f"{at}.e2e_s.p50"), point.value(f"{at}.hit_share", scale=100)]  # fmt: skip
                rows.append([html.escape(one.name), _point_load(point), html.escape(name), *map(_value, cells)])
                marks.append(not point.valid)
    if not rows:
        return ""
    columns = ("deployment", _load_name(series), column, "requests", "TTFT mean\nms",
               "TTFT p50\nms", "TTFT p90\nms", "E2E p50\ns", "cached\n% of prompts")  # fmt: skip
    return f"<h3>{title}</h3>{_grid(columns, rows, marks)}"


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]], invalid: Sequence[bool] = ()) -> str:
    """Returns an HTML table. `columns`: plain text with line breaks. `rows`: HTML. `invalid`: rows to cross out."""
    kind = next(name for name, most, _ in _CARD_WIDTHS if len(columns) <= most)
    head = "".join(f"<th>{html.escape(name).replace(chr(10), '<br>')}</th>" for name in columns)
    labels = [html.escape(name.replace("\n", " "), quote=True) for name in columns]
    body = []
    for number, row in enumerate(rows):
        mark = ' class="invalid"' if number < len(invalid) and invalid[number] else ""
        cells = (
            f'<td data-label="{label}">{f"<span{mark}>{cell}</span>" if mark and place else cell}</td>'
            for place, (label, cell) in enumerate(zip(labels, row, strict=True))
        )
        body.append(f"<tr>{''.join(cells)}</tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="table">{table.replace("<table>", f"<table class={chr(34)}{kind}{chr(34)}>", 1)}</div>'


def _table(title: str, columns: Sequence[tuple[str, str, float]], series: Sequence[Series]) -> str:
    used = [c for c in columns if any(one.values(c[1]) for one in series)]
    rows, marks = [], []
    for one in series:
        for point in one.points:
            cells = [_value(point.value(key, scale=scale)) for _, key, scale in used]
            rows.append([html.escape(one.name), _point_load(point), str(len(point.records)), *cells])
            marks.append(not point.valid)
    if not used:
        return ""
    names = ("deployment", _load_name(series), "repeats", *(name for name, _, _ in used))
    return f"<h3>{title}</h3>{_grid(names, rows, marks)}"


def _point_load(point: LoadPoint) -> str:
    return f"{point.load:g}"


def _load_name(series: Sequence[Series]) -> str:
    return "users" if series[0].by == "users" else "requests/s"


def _balances(series: Sequence[Series]) -> str:
    rows = []
    for one in series:
        point = one.points[-1]
        for expert in sorted({name for record in point.records for name in record["balance"]}):
            values = (
                point.value(f"experts.{expert}", scale=100),
                point.value(f"balance.{expert}"),
                point.value(f"jain.{expert}"),
            )
            rows.append([html.escape(one.name), _point_load(point), html.escape(expert), *map(_value, values)])
    columns = ("deployment", _load_name(series), "expert", "share\n%", "busiest\nreplica", "Jain index\nof work")
    return (
        "<details><summary>Balance per expert at the highest load</summary><p>Busiest replica: its requests over the "
        "mean of all replicas of the expert that answered; 1 is balanced. Jain index: of the tokens that each of them "
        f"computed; 1 is balanced.</p>{_grid(columns, rows)}</details>"
    )


def _definitions() -> str:
    return (
        "<h2>Definitions</h2><ul>"
        "<li><b>TTFT</b>: from the start of a request to the arrival of its first non-empty content.</li>"
        "<li><b>ITL</b>: time between two events with content, over the tokens per event of the response.</li>"
        "<li><b>TPOT</b>: (last content - first content) / (tokens - 1), per response.</li>"
        "<li><b>E2E</b>: from the start of a request to the end of its stream.</li>"
        "<li><b>Router adds</b>: the median through the router less the median of requests sent directly to its "
        "replicas, per expert, in the same run.</li>"
        "<li><b>Cached</b>: prompt tokens that the engines took from their prefix caches.</li>"
        "<li><b>Jain index of work</b>: of the tokens that the replicas of an expert computed; in the table, of the "
        "expert with the lowest.</li>"
        "<li><b>Goodput</b>: responses per second within the limits of bench.good.</li></ul>"
        "<p>docs/bench.md has the full definitions.</p>"
    )


def _origins(records: Sequence[Record]) -> str:
    seen: dict[str, None] = {}
    for record in records:
        origin = record["provenance"]
        git = origin["git"] or {}
        state = f"{git.get('commit', 'no git')[:12]}{' with changes' if git.get('changed') else ''}"
        machine = origin["hardware"]
        engines = sorted({_engine(endpoint["engine"]) for endpoint in origin["endpoints"]})
        job = f", job {origin['job_id']}" if origin["job_id"] else ""
        where = f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['memory_gb']} GB{job}"
        text = f"{where}; code {state}; {', '.join(engines)}"
        seen.setdefault(f"<li>{html.escape(text)}<br><code>{html.escape(origin['command'])}</code></li>")
    return f"<h2>Hardware, code and commands</h2><ul>{''.join(seen)}</ul>"


def _engine(engine: Record) -> str:
    parts = [str(engine["kind"]), str(engine["version"] or ""), Path(str(engine["model"])).name]
    return " ".join(part for part in parts if part)


def _load(one: Series, load: float) -> str:
    return f"{load:g} user{'s' if load != 1 else ''}" if one.by == "users" else f"{load:g} requests/s"


def _value(value: Value | None) -> str:
    if value is None:
        return "-"
    return _number(value.mean) if value.half is None else f"{_number(value.mean)} ±&nbsp;{_number(value.half)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
