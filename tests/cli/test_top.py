"""The screen of `hpc-router top`: what it shows, what it cuts, and its keys."""

import copy
import os
import pty
import sys
from typing import Any

import pytest
from rich.console import Console

from hpc_router.cli import top
from hpc_router.cli.main import main
from hpc_router.cli.top import MAX_ATTENTION, SORTS, TopView, watch


def replica(name: str, **changed: Any) -> dict[str, Any]:
    usual = {
        "replica": name, "state": "ready", "in_flight": 1, "capacity": 4, "node": "n1", "job_id": "7",
        "expires_at": 4600.0, "first_byte_s": None, "sick": None, "trouble": None, "silent": False,
    }  # fmt: skip
    return usual | changed


def queues(interactive: float | None = None, batch: float | None = None) -> dict[str, Any]:
    """By class, no request that waits, or one that has waited for these seconds."""
    waits = {"interactive": interactive, "batch": batch}
    return {name: {"waiting": int(waited is not None), "oldest_s": waited} for name, waited in waits.items()}


def expert(name: str, *replicas: dict[str, Any], **changed: Any) -> dict[str, Any]:
    usual = {
        "expert": name, "ready": len(replicas), "in_flight": 1, "waiting": 0, "requests_per_s": 1.5,
        "failed_per_s": 0.0, "first_byte_s": {"p50": 0.05, "p99": 0.25}, "replicas": list(replicas), "usage": None,
        "queues": queues(),
    }  # fmt: skip
    return usual | changed


def overview(*experts: dict[str, Any], **changed: Any) -> dict[str, Any]:
    return {
        "at": 1000.0, "window_s": 60.0, "attention": [], "experts": list(experts), "starting": [],
        "router": {"replica": "router-0.g1", "in_flight": 2}, "policy": {"kind": "classifier"},
    } | changed  # fmt: skip


PAIR = overview(
    expert("law", replica("law-0.g1", expires_at=None), requests_per_s=4.0, waiting=7, queues=queues(0.5, 61.0)),
    expert("math", replica("math-0.g1"), replica("math-1.g1", sick="is slow"), first_byte_s={"p50": 1.0, "p99": 9.0},
           usage={"gpu_hours": {"starting": 0.5, "busy": 7.0, "idle": 2.5, "draining": 0.0}, "idle_share": 0.25}),
    starting=[{"replica": "math-2.g1", "reason": "Resources", "ready_at": 1300.0}],
)  # fmt: skip
QUEUES = [
    "expert  interactive queue  oldest  batch queue  oldest  GPU hours  idle",
    "law     1                  0.50 s  1            61 s",
    "math    0                          0                    10.00      25%",
]


def shown(
    value: dict[str, Any],
    view: TopView | None = None,
    *,
    height: int = 24,
    width: int = 80,
    interactive: bool = True,
) -> list[str]:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    with console.file:
        console.print((view or TopView()).screen(value, height=height, interactive=interactive))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_the_screen_of_a_small_deployment() -> None:
    assert shown(PAIR) == [
        "router-0.g1  2 of 2 experts ready  2 in flight  policy classifier  last 60 s",
        "",
        "expert  ready  req/s  failed/s  p50     p99     in flight  waiting  ends in",
        "law     1/1    4.00   0.00      50 ms   0.25 s  1          7",
        "math    2/2    1.50   0.00      1.00 s  9.00 s  1          0        60 min",
        "",
        "replica    state    in flight  node  ends in",
        "law-0.g1   ready    1/4        n1",
        "math-0.g1  ready    1/4        n1    60 min",
        "math-1.g1  ready    1/4        n1    60 min   is slow",
        "math-2.g1  pending                            Resources, ready in 5 min",
        "q quit  s sort (name)  v view (replicas)  j k scroll",
    ]


def test_a_key_shows_queues_and_gpu_hours_below() -> None:
    view = TopView(first=1)
    replicas = shown(PAIR)
    assert view.key("v")
    lines = shown(PAIR, view)
    assert lines[:6] == replicas[:6]
    assert lines[6:] == [*QUEUES, "q quit  s sort (name)  v view (queues and GPU hours)  j k scroll"]
    assert view.key("v")
    assert shown(PAIR, view) == replicas


def test_one_look_has_all_tables() -> None:
    lines = shown(PAIR, interactive=False)
    assert lines == [*shown(PAIR)[:6], *QUEUES, "", *shown(PAIR)[6:-1]]


def test_a_router_without_experts_has_empty_tables() -> None:
    for view in (TopView(), TopView(lower="queues and GPU hours")):
        assert shown(overview(), view)[0].startswith("router-0.g1  0 of 0 experts ready")


@pytest.mark.parametrize(
    ("sort", "experts", "replicas"),
    [
        ("name", ["law", "math"], ["law-0.g1", "math-0.g1", "math-1.g1", "math-2.g1"]),
        ("requests", ["law", "math"], ["law-0.g1", "math-0.g1", "math-1.g1", "math-2.g1"]),
        ("waiting", ["law", "math"], ["law-0.g1", "math-0.g1", "math-1.g1", "math-2.g1"]),
        ("latency", ["math", "law"], ["law-0.g1", "math-0.g1", "math-1.g1", "math-2.g1"]),
        ("end", ["math", "law"], ["math-0.g1", "math-1.g1", "law-0.g1", "math-2.g1"]),
    ],
)
def test_the_order_of_the_tables(sort: str, experts: list[str], replicas: list[str]) -> None:
    lines = shown(PAIR, TopView(sort))
    assert [line.split()[0] for line in lines[3:5]] == experts
    assert [line.split()[0] for line in lines[7:11]] == replicas


@pytest.mark.parametrize(("height", "problems"), [(10, 2), (24, MAX_ATTENTION)])
def test_two_hundred_replicas_and_many_problems_fit_the_window(height: int, problems: int) -> None:
    many = [expert(f"e{n:02}", *(replica(f"e{n:02}-{k}.g1") for k in range(10))) for n in range(20)]
    value = overview(*many, attention=[f"problem {number}" for number in range(9)])
    view = TopView()
    lines = shown(value, view, height=height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= 80
    first = [f"! problem {number}" for number in range(problems - 1)]
    assert lines[1 : 1 + problems] == [*first, f"! and {10 - problems} more problems"]
    assert sum(line.startswith("and ") for line in lines) == 2
    for _ in range(300):
        assert view.key("j")
    assert shown(value, view, height=height)[-2].startswith("e19-9.g1"), "scrolled to the end"
    for _ in range(300):
        assert view.key("k")
    assert shown(value, view, height=height) == lines
    assert view.key("v")
    lines = shown(value, view, height=height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= 80
    for _ in range(30):
        assert view.key("j")
    assert shown(value, view, height=height)[-2].startswith("e19"), "scrolled to the end"


def test_markup_in_the_data_is_shown_as_it_is() -> None:
    value = copy.deepcopy(PAIR)
    value["attention"] = ["[red]x[/red] [/]"]
    value["experts"][0]["replicas"][0]["sick"] = "[bold]"
    lines = shown(value, width=120)
    assert "! [red]x[/red] [/]" in lines
    assert any(line.endswith("[bold]") for line in lines)


def test_the_options_name_the_orders(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["top", "--help"])
    assert f"{{{','.join(SORTS)}}}" in capsys.readouterr().out
    for words in (["--sort", "size"], ["--interval", "0"], ["--interval", "nan"]):
        with pytest.raises(SystemExit) as ended:
            main(["top", *words])
        assert ended.value.code == 2


def test_keys_sort_and_end_the_view(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real terminal. A look that fails keeps the last one on the screen."""
    terminal, other = pty.openpty()
    with os.fdopen(other, "r+b", buffering=0) as end, os.fdopen(terminal, "r+b", buffering=0) as keyboard:
        monkeypatch.setattr(sys, "stdin", end)
        drawn = Console(file=open(os.devnull, "w"), force_terminal=True, width=80, height=24)  # noqa: SIM115, PTH123
        monkeypatch.setattr(top, "Console", lambda **_: drawn)
        answers = iter([PAIR, "the router does not answer"])
        view = TopView()

        def read() -> Any:
            value = next(answers)
            keyboard.write(b"q" if isinstance(value, str) else b"ssx")
            return value

        with drawn.file:
            watch(read, view, interval_s=0.1)
    assert view.sort == "waiting"
