"""The report of `bench balance`: its targets, and a page that is readable from 360 to 1,600 pixels."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_router.bench.balance.options import BalanceOptions
from hpc_router.bench.balance.report import BalanceResults, PolicyResult, html, markdown, to_json
from hpc_router.bench.figures import MeasurementPart, Observation, Window, figures
from tests.support.page_widths import WIDTHS, cut_elements

ORIGIN = {"command": "hpc-router bench balance", "at": "2026-01-01T00:00:00Z", "hardware": {"cpus": 2, "cpu": "<cpu>"}}


def result(name: str, *, ttft_s: float, cached: int, peer: bool = False, jain: float = 0.99) -> PolicyResult:
    seen = [
        Observation(
            part=MeasurementPart.MEASURED, user=0, started_s=2.0, ended_s=4.0, content_s=(2.0 + ttft_s, 3.9), tokens=2,
            prompt_tokens=1000, cached_tokens=cached, load_class=kind, turn=turn,
        )
        for kind, turns in (("chat", 3), ("shared", 1), ("mooncake", 1)) for turn in range(1, turns + 1)
    ]  # fmt: skip
    return PolicyResult(name, peer, f"set-up of {name} " * 8, figures(seen, Window(1, 9)), jain, 4500, 0.001, 0.02)


def results(*policies: PolicyResult) -> BalanceResults:
    return BalanceResults(BalanceOptions(Path()), policies, {"vllm-router": "not installed"}, ORIGIN)


OWN = result("prefix", ttft_s=0.1, cached=850)
PEERS = [
    result("smg", ttft_s=0.2, cached=860, peer=True),
    result("vllm-router-spread", ttft_s=0.15, cached=700, peer=True),
    result("round_robin", ttft_s=0.05, cached=10),
]


def met(*policies: PolicyResult) -> dict[str, bool]:
    return {what: good for what, _, _, good in results(*policies).checks()}


def test_the_targets_compare_with_the_best_of_the_peers() -> None:
    """By each figure, and with no policy that does not look at caches."""
    assert set(met(OWN, *PEERS).values()) == {True}
    values = {what: value for what, value, _, _ in results(OWN, *PEERS).checks()}
    assert values["mean TTFT / best peer's"] == pytest.approx(0.1 / 0.15)
    assert values["hit tokens / best peer's"] == pytest.approx(850 / 860)
    assert values["hit tokens / upper bound"] == pytest.approx(5 * 850 / 4500)
    assert not met(result("prefix", ttft_s=0.14, cached=850), *PEERS)["p90 TTFT / best peer's"]
    assert not met(replace(OWN, jain=0.9), *PEERS)["Jain index of work"]
    assert not met(result("prefix", ttft_s=0.1, cached=800), *PEERS)["hit tokens / upper bound"]
    assert results(*PEERS).checks() == []
    assert len(met(OWN)) == 2


def test_unreliable_engines_and_failed_requests_fail_the_run() -> None:
    assert not results(OWN).failed
    assert results(OWN, replace(OWN, late_share=0.06)).failed
    assert results(replace(OWN, figures=replace(OWN.figures, failed=1))).failed


def test_all_figures_are_in_every_form() -> None:
    found = results(OWN, *PEERS)
    plain, page, value = markdown(found), html(found), to_json(found)
    for text in (plain, page):
        for word in ("SIMULATED", "round_robin", "4,250", "By class: chat", "By turn of the conversation: 3", "0.944"):
            assert word in text
    assert "&lt;cpu&gt;" in page
    assert json.loads(json.dumps(value))["policies"][0]["hit_tokens"] == 4250


@pytest.mark.e2e
@pytest.mark.browser
def test_nothing_is_cut(tmp_path: Path) -> None:
    assert cut_elements(html(results(OWN, *PEERS)), tmp_path) == {str(width): [] for width in WIDTHS}
