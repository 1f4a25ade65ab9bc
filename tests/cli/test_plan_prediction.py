"""`hpc-router plan --users`: its output, and what it says about wrong values. Nothing is deployed."""

import json
from pathlib import Path

import pytest

from hpc_router.cli.main import main

SHORT = ("--think", "2s", "--for", "5m", "topology=sim")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPC_ROUTER_RUN", raising=False)


def run(*words: str) -> int:
    try:
        return main(["plan", *words])
    except SystemExit as end:  # argparse
        return int(end.code or 0)


def test_a_table_a_plot_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--users", "20", *SHORT, "--plot", "p.svg", "experts.math.replicas=1,2") == 0
    text = capsys.readouterr().out
    assert text.startswith("PREDICTION, not a measurement")
    assert all(f"experts.math.replicas={count}" in text for count in (1, 2))
    assert (tmp_path / "p.svg").read_text().startswith("<svg")
    assert run("--users", "20", *SHORT, "--answer-tokens", "100", "--spread", "0", "--json") == 0
    value = json.loads(capsys.readouterr().out)
    total = value["deployments"][0]["total"]
    assert total["tokens_per_s"] == pytest.approx(100 * total["requests_per_s"])
    assert value["demand"]["think_s"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"p.svg"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--users", "0"], "--users: '0' is not a number of users (valid: 1 to 100000, or several"),
        (["--users", "1000000"], "--users: '1000000' is not a number of users"),
        (["--users", "5@1h"], "--users: '5@1h' is not a number of users"),
        (["--users", "5,6@2h,7@1h"], "is not a number of users"),
        (["--users", "5,6@2x"], "'2x' is not a time (valid: a number and s, m, h or d, such as 2h)"),
        (["--users", "5,"], "--users: '5,' is not a number of users"),
        (["--users", "5", "--think", "5x"], "--think: '5x' is not a time (valid: a number and s, m, h or d"),
        (["--users", "5", "--for", "0h"], "--for: '0h' is not a time"),
        (["--users", "5", "--prompt-tokens", "0"], "--prompt-tokens: '0' is not a number of tokens (valid: 1 to"),
        (["--users", "5", "--spread", "x"], "--spread: 'x' is not a number"),
        (["--users", "5", "--share", "math"], "--share: 'math' is not EXPERT=NUMBER"),
        (["--users", "5", "--share", "mth=1", *SHORT], "--share mth: no such expert; did you mean 'math'?"),
        (["--for", "1h", "topology=sim"], "--for is an option of a prediction, which needs --users"),
        (["--users", "5", "topology=llama3_4x8b_bf16"], "simulate.gpu=GPU (valid: h100-sxm"),
        (["--users", "5", "topology=nope,sim"], "topology=nope: no such config"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_valid(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    assert message in capsys.readouterr().err
