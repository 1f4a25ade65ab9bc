"""Medians, checks, tables and files from figures; all figures here are invented."""

import json
import math
import operator
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_router.bench.provenance import shown_command
from hpc_router.bench.relay_cost.interface import Relay
from hpc_router.bench.relay_cost.measurements import Round
from hpc_router.bench.relay_cost.options import RelayCostOptions
from hpc_router.bench.relay_cost.other_relays import Direct, Nginx
from hpc_router.bench.relay_cost.processes import Cores, cores_of
from hpc_router.bench.relay_cost.report import RelayCostResults, markdown, notes, to_json
from hpc_router.bench.relay_cost.requests import SIZES, prompts, short
from hpc_router.bench.relay_cost.rounds import RelayRounds
from hpc_router.bench.relay_cost.statistics import RoundSpread, across, ratio, slope_per_million, spread
from hpc_router.bench.relay_cost.targets import Check, checks
from hpc_router.bench.relay_cost.this_router import RouterAndAgent, ThisRouter

ORIGIN = {
    "at": "2026-01-02T03:04:05Z",
    "command": "hpc-router bench router",
    "versions": {"python": "3.11"},
    "git": {"commit": "0123456789abcdef", "changed": True},
    "hardware": {"cpu": "a CPU", "cpus": 2, "kernel": "6.1"},
}


def measured(relay: Relay, *rounds: dict[str, float], soak: list[tuple[int, float]] | None = None) -> RelayRounds:
    return RelayRounds(relay, "1.0", {number: Round(dict(one)) for number, one in enumerate(rounds)}, soak=soak or [])


def results(*found: RelayRounds, absent: dict[str, str] | None = None) -> RelayCostResults:
    options = RelayCostOptions(out=Path("/nowhere"))
    cores = Cores(frozenset({0}), frozenset({1}))
    return RelayCostResults(options, cores, {one.relay.name: one for one in found}, absent or {}, ORIGIN)


def test_a_figure_is_the_median_of_its_rounds() -> None:
    found = measured(Nginx(), {"x": 3.0}, {"x": 1.0}, {"x": math.nan}, {"x": 2.5}, {})
    assert spread(found, "x") == RoundSpread(2.5, 1.0, 3.0)
    assert spread(found, "y") is None


def test_ratios_are_taken_within_a_round() -> None:
    """If the machine was slow in a round, it was slow for both relays."""
    ours, nginx = measured(ThisRouter(), {"us": 10.0}, {"us": 40.0}), measured(Nginx(), {"us": 5.0}, {"us": 20.0})
    assert across([(ours, "us"), (nginx, "us")], ratio) == RoundSpread(2.0, 2.0, 2.0)
    del nginx.rounds[0]
    nginx.rounds[7] = Round({"us": 1.0})
    assert across([(ours, "us"), (nginx, "us")], operator.sub) == RoundSpread(20.0, 20.0, 20.0)
    assert across([(ours, "us"), (None, "us")], ratio) is None


def test_the_slope_leaves_out_the_first_point() -> None:
    assert slope_per_million([(0, 10.0), (100_000, 50.0), (200_000, 50.0), (300_000, 50.0)]) == 0.0
    assert slope_per_million([(0, 0.0), (500_000, 50.0), (1_000_000, 51.0)]) == pytest.approx(2.0)
    assert math.isnan(slope_per_million([(0, 1.0)]))


def test_a_check_is_met_at_the_limit() -> None:
    at = RoundSpread(5.0, 4.0, 9.0)
    assert Check("", 5.0, "ms", at).met is True
    assert Check("", 5.0, "ms", at, strict=True).met is False
    assert Check("", 4.9, "ms", at).met is False
    assert Check("", 5.0, "ms", None).met is None


FIGURES = {
    "short_200B_us": 40.0,
    "short_200B_auto_us": 90.0,
    "short_2KB_us": 45.0,
    "short_2KB_auto_us": 245.0,
    "short_200KB_us": 400.0,
    "short_200KB_auto_us": 700.0,
    "stream_us": 24.0,
    "stream_hop_ms_p99": 10.1,
    "stream_half_hop_ms_p99": 1.0,
    "stream_private_mb": 60.0,
    "stream_lower_us": 30.0,
    "leave_before_ms_p50": math.nan,
    "ttft_ms_p50": 0.3,
}


def full() -> RelayCostResults:
    return results(
        measured(Direct(), {"ttft_ms_p50": 0.1}),
        measured(Nginx(), {"stream_us": 20.0, "short_200B_us": 12.0}),
        measured(ThisRouter(), FIGURES, soak=[(0, 50.0), (100_000, 60.0), (200_000, 60.05)]),
        measured(ThisRouter(name="router-user"), {"short_200B_us": 46.0, "stream_us": 25.0}),
        measured(RouterAndAgent(), {"short_200B_us": 81.0, "stream_lower_us": 60.0}),
        absent={"haproxy": "not installed (apt-get install haproxy)"},
    )


def test_every_target_is_checked() -> None:
    met = {check.what: check.met for check in full().checks}
    assert met == {
        "CPU per short request, against vllm-router": None,
        "CPU per short request, against sglang-router": None,
        "CPU of classifying a prompt of 200 B": True,
        "CPU of classifying a prompt of 2 KB": True,
        "CPU of classifying a prompt of 200 KB, against one of 2 KB": False,
        "CPU per event at 1000 x 40/s, against nginx": True,
        "hop p99 at 1000 x 40/s": False,
        "hop p99 at 500 x 40/s": True,
        "requests and streams that failed": True,
        "private memory with 1000 open streams": True,
        "private memory, growth per million requests": True,
        "CPU of a user's token, limits and class, per short request": True,
        "CPU of a user's token, limits and class, per event": False,
        "CPU per short request with two workers on one core, against one": None,
        "CPU per event with two workers on one core, against one": None,
        "CPU per short request through the agent, against one hop": False,
        "CPU per event through the agent, against one hop": True,
        "requests and streams through the agent that failed": True,
    }


def test_without_figures_no_check_is_met_or_missed() -> None:
    assert {check.met for check in checks({}, RelayCostOptions(out=Path()))} == {None}


def test_failures_of_this_router_fail_the_call() -> None:
    found = full()
    assert found.failed is False
    found.measured["nginx"].rounds[0].fail("1000 streams", {"cut": 3, "none": 0})
    assert found.failed is False, "another relay may fail"
    found.measured["router"].rounds[0].fail("1000 streams", {"incomplete": 2})
    assert bool(found.failed)
    assert "nginx: failed: 3 x 1000 streams: cut" in notes(found)
    assert {check.what: check.met for check in found.checks}["requests and streams that failed"] is False


def test_the_content_of_the_files() -> None:
    found = full()
    value = json.loads(json.dumps(to_json(found), allow_nan=False))
    assert value["absent"] == {"haproxy": "not installed (apt-get install haproxy)"}
    assert value["relays"]["router"]["figures"]["stream_us"] == {"median": 24.0, "low": 24.0, "high": 24.0}
    assert value["relays"]["router"]["rounds"]["0"]["figures"]["leave_before_ms_p50"] is None
    assert value["relays"]["router"]["soak"] == [[0, 50.0], [100_000, 60.0], [200_000, 60.05]]
    assert len(value["checks"]) == 18
    assert value["cores"] == {"relay": [1], "load": [0]}
    text = markdown(found)
    for part in ("commit 0123456789ab with changes", "| router 1.0 | 40 |", "NOT MET", "haproxy: not measured", "0.2"):
        assert part in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 6
    assert all(len({line.count("|") for line in table}) == 1 for table in tables), (
        "rows have as many columns as the header"
    )


def test_a_note_on_streams_that_were_not_open_together() -> None:
    found = results(measured(ThisRouter(), {"stream_opened": 1000.0}, {"stream_opened": 998.0}))
    assert notes(found) == ["router: only 998 of 1000 streams were open at the same time"]


def test_results_contain_no_paths() -> None:
    arguments = [
        "bench",
        "router",
        "--peers",
        "/home/me/my venv",
        "--tree",
        "old=/a/b/c-1",
        "--out=/x/y/",
        "--only",
        "a,b",
    ]
    assert shown_command(arguments) == "hpc-router bench router --peers 'my venv' --tree old=c-1 --out=y/ --only a,b"


def test_a_note_on_other_processes() -> None:
    router = measured(
        ThisRouter(), {"stream_others_share": 0.02}, {"stream_others_share": 0.3}, {"stream_others_share": 0}
    )
    direct = measured(Direct(), {"stream_others_share": 0.9, "stream_load_others_share": 0.1})
    assert notes(results(router, direct)) == [
        "router: other processes used 0.02 (0\N{EN DASH}0.3) of the core of the relay",
        "direct: other processes used 0.1 of the core of load generator and engine",
    ]


def test_a_note_on_a_quick_run() -> None:
    found = full()
    quick = RelayCostResults(replace(found.options, quick=True), found.cores, found.measured, {}, ORIGIN)
    assert any(note.startswith("a quick run") for note in notes(quick))


def test_a_note_on_an_interrupt() -> None:
    direct, router = measured(Direct(), {"x": 1.0}, {"x": 1.0}), measured(ThisRouter(), {"x": 1.0})
    found = replace(results(direct, router), interrupted=True)
    assert notes(found) == ["interrupted: every relay has 1 of 3 rounds"]
    assert "- interrupted: every relay" in markdown(found)


def test_a_note_on_a_single_core() -> None:
    found = full()
    alone = RelayCostResults(found.options, cores_of([3]), found.measured, {}, ORIGIN)
    assert any(note.startswith("only one core") for note in notes(alone))


@pytest.mark.parametrize(
    ("usable", "load", "relay"),
    [([0], {0}, {0}), ([4, 2], {2}, {4}), ([0, 1, 2], {0, 1}, {2}), (range(8), {0, 1}, {7})],
)
def test_the_relay_has_a_core_to_itself(usable: list[int], load: set[int], relay: set[int]) -> None:
    assert cores_of(usable) == Cores(frozenset(load), frozenset(relay))


@pytest.mark.parametrize("size", SIZES)
def test_prompts_are_different_and_of_one_length(size: str) -> None:
    made = prompts(size)
    assert len(set(made)) == len(made) > 1
    assert {len(text) for text in made} == {SIZES[size]}


def test_requests_differ_only_by_address_and_token() -> None:
    lengths = {
        len(one) for one in short(11111, token="a" * 64, size="200 B") + short(22222, token="b" * 64, size="200 B")
    }
    assert max(lengths) - min(lengths) < 16, "quotes in a prompt cost a byte each"
