"""The page is self-contained and marks invalid points; its figures distinguish series without colour."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from analysis import report
from analysis.figures import STYLES, balance, curves
from analysis.results import RateLimit, rate_limit, series_of
from tests.analysis.records import LONG, result_record, searched

RECORDS = [
    *(
        result_record(users, repeat=repeat, ttft_s=0.1 + 0.01 * repeat, added_s=0.002)
        for users in (1, 10)
        for repeat in (0, 1)
    ),
    result_record(1, topology="one_large <b>"),
    result_record(10, topology="one_large <b>", invalid=("the window is too short: 3 answers",)),
    result_record(4, topology="here", evidence="cpu", added_s=-0.001),
]


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.links.append(value or "")


def test_the_page_is_self_contained() -> None:
    text = report.report(RECORDS, title="A <title>")
    page = Page()
    page.feed(text)
    assert all(link.startswith("#") for link in page.links), "it loads no other files"
    assert set(page.links) <= {f"#{name}" for name in page.ids}
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "img", "link"} & set(page.tags)
    assert "A &lt;title&gt;" in text
    assert "one_large &lt;b&gt;" in text
    assert "&lt;&amp;&gt;" in text
    assert "width=device-width" in text


def test_the_page_names_evidence_and_invalid_points() -> None:
    text = report.report(RECORDS, title="t")
    assert "SIMULATED, a prediction" in text
    assert "CPU, measured" in text
    assert "GPU, measured" not in text
    assert "one_large &lt;b&gt;, 10 users: the window is too short: 3 answers" in text
    assert text.count('class="invalid"') > 5
    assert "±" in text


def loads_of(line: Any) -> list[float]:
    return list(line.get_xdata())


def test_series_differ_without_colour() -> None:
    assert len({str(line) for _, line, _ in STYLES}) == len({marker for _, _, marker in STYLES}) == len(STYLES)
    simulated = [one for one in series_of(RECORDS) if one.evidence == "simulated"]
    many = [replace(simulated[0], name=f"topology {n}") for n in range(2 * len(STYLES))]
    lines = [
        line for line in curves(many)[0].figure.axes[0].get_lines() if str(line.get_label()).startswith("topology")
    ]
    seen = {(line.get_marker(), line.get_markerfacecolor()) for line in lines}
    assert len(seen) == len(lines) == len(many)
    for drawing in curves(simulated):
        axes = drawing.figure.axes[0]
        assert re.search(r"ms|s$|/s|%|users", axes.get_ylabel()), "a unit"
        assert axes.get_xlabel() == "concurrent users"
        assert axes.get_title() == "SIMULATED, a prediction"
        lines = [line for line in axes.get_lines() if line.get_marker() in list("osD^") and len(loads_of(line)) > 1]
        assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == len(lines)
    names = {drawing.name for drawing in curves(simulated)}
    assert {
        "simulated-users-throughput",
        "simulated-users-ttft",
        "simulated-users-itl",
        "simulated-users-router",
    } <= names
    bars = balance(simulated)
    assert bars is not None
    assert bars.figure.axes[0].get_xlabel() == "% of the successful requests"


def test_an_invalid_point_is_crossed_and_the_legend_says_so() -> None:
    simulated = [one for one in series_of(RECORDS) if one.evidence == "simulated"]
    throughput = next(drawing for drawing in curves(simulated) if drawing.name.endswith("throughput"))
    crosses = [line for line in throughput.figure.axes[0].get_lines() if line.get_marker() == "x"]
    assert [loads_of(line) for line in crosses] == [[10], []]
    (legend,) = throughput.figure.legends
    assert any("INVALID" in text.get_text() for text in legend.get_texts())


def test_the_command_writes_page_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(one) + "\n" for one in RECORDS))
    words = [str(tmp_path), "--out", str(tmp_path / "out" / "r.html"), "--figures", str(tmp_path / "figures")]
    assert report.main(words) == 0
    assert "7 points, 1 of them INVALID" in capsys.readouterr().out
    kinds = {path.suffix for path in (tmp_path / "figures").iterdir()}
    assert kinds == {".svg", ".png"}
    assert report.main([str(tmp_path / "figures")]) == 2
    assert "no result records" in capsys.readouterr().err


SEARCH = [searched(rate, good=rate < 20) for rate in (1.0, 11.31, 22.63)]


def test_a_search_has_its_highest_rate_and_its_knee() -> None:
    [one] = series_of(SEARCH)
    assert rate_limit(one) == RateLimit(0.95, 11.31, one.points[1].records[0]["goodput_per_s"], 22.63, exceeded=True)
    [failing] = series_of(SEARCH[2:])
    assert rate_limit(failing) == RateLimit(0.95, None, None, 22.63, exceeded=True)
    [holding] = series_of(SEARCH[:2])
    assert rate_limit(holding) == RateLimit(
        0.95, 11.31, one.points[1].records[0]["goodput_per_s"], None, exceeded=False
    )
    assert rate_limit(series_of(RECORDS)[0]) is None
    [drawing] = [drawing for drawing in curves([one]) if drawing.name.endswith("good_share")]
    labels = [line.get_label() for line in drawing.figure.axes[0].get_lines()]
    assert {"target: 95 %", "highest rate: 11.31 per s"} <= set(labels)


def test_the_page_has_hits_balance_classes_and_turns_of_one_run() -> None:
    text = report.report(SEARCH, title="t")
    for heading in ("Highest rate", "Prefix caches and balance", "By class of the load", "By turn of the conversation"):
        assert f"<h3>{heading}</h3>" in text
    assert 'data-label="class">agent<' in text
    assert 'data-label="turn">12<' in text
    assert 'data-label="cached % of prompts">81<' in text
    assert 'data-label="Jain index of work">1<' in text
    plain = report.report(RECORDS, title="t")
    assert "Highest rate" not in plain
    assert "By turn" not in plain


def test_a_legend_is_within_its_figure() -> None:
    for drawing in curves(series_of([result_record(users, topology=LONG, added_s=0.1) for users in (1, 10)])):
        canvas: Any = FigureCanvasAgg(drawing.figure)
        canvas.draw()
        [legend] = drawing.figure.legends
        box, whole = legend.get_window_extent(canvas.get_renderer()), drawing.figure.bbox
        assert 0 <= box.x0 <= box.x1 <= whole.x1
        assert 0 <= box.y0 <= box.y1 <= whole.y1
