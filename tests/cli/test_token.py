"""The verb `token`: the owner's token, and the tokens of other users."""

import json
import time
from pathlib import Path

import pytest

from hpc_router.cli.main import main
from hpc_router.cluster.commands.user_tokens import parse_expiry, parse_limits
from hpc_router.errors import ConfigError
from hpc_router.state.registry import Record, RecordKind, State, publish
from hpc_router.state.run_directory import RunDir, make_run
from hpc_router.state.user_tokens import LIMITS, TokenLimits, find_token, read_tokens


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = make_run(tmp_path / "run")
    record = Record(RecordKind.EXTERNAL, "math-x0.g1", "http://127.0.0.1:1", State.READY, {"math": "m", "law": "m"})
    publish(made.registry, record)
    return made


def call(capsys: pytest.CaptureFixture[str], run: RunDir, *words: str) -> tuple[int, str, str]:
    try:
        status = main(["token", *words, "--run", str(run.path)])
    except SystemExit as end:  # argparse
        status = int(end.code or 0)
    return status, *capsys.readouterr()


def test_without_a_task_it_is_the_owners(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, run) == (0, f"{run.token()}\n", "")


def test_a_token_is_made_listed_and_revoked(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--user", "alice", "--expires", "30d", "--limit", "requests=60,tokens=5000", "--limit", "concurrency=4"]
    status, out, err = call(capsys, run, "create", *words, "--experts", "math,law,math", "--json")
    made = json.loads(out)
    assert (status, err) == (0, "")
    (entry,) = read_tokens(run)
    assert find_token(made.pop("token"), {entry.id: entry}) == entry
    assert made == json.loads(json.dumps(entry.to_json()))
    assert (entry.limits, entry.experts) == (TokenLimits(60, 5000, 4), ("math", "law"))
    assert entry.expires_at == pytest.approx(time.time() + 30 * 86_400, abs=300)

    status, out, _ = call(capsys, run, "list")
    assert "requests=60 tokens=5000 concurrency=4" in out
    assert entry.digest not in out
    assert json.loads(call(capsys, run, "list", "--json")[1]) == [made | {"expired": False}]
    assert json.loads(call(capsys, run, "list", "--user", "bob", "--json")[1]) == []

    assert call(capsys, run, "revoke", entry.id)[:2] == (0, f"revoked {entry.id} of alice\n")
    assert read_tokens(run) == ()


def test_the_run_may_stand_before_the_task(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", "--run", str(run.path), "create", "--user", "alice"]) == 0
    (entry,) = read_tokens(run)
    assert find_token(capsys.readouterr().out.strip(), {entry.id: entry}) == entry


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("create",), "--user"),
        (("create", "--user", "a b"), "--user 'a b': not a user name (valid: 1 to 64 letters"),
        (("create", "--user", "a", "--limit", "rate=3"), "'rate=3': not a limit (valid: requests=N, tokens=N"),
        (("create", "--user", "a", "--limit", "tokens=0"), "tokens='0': not a whole number (valid: 1 to 1000000000)"),
        (("create", "--user", "a", "--limit", "tokens=1,tokens=2"), "--limit tokens: given twice"),
        (("create", "--user", "a", "--expires", "soon"), "--expires 'soon': not a time (valid: a time from now such"),
        (("create", "--user", "a", "--expires", "2020-01-01"), "not in the future (valid: "),
        (("create", "--user", "a", "--expires", "0d"), "not in the future (valid: "),
        (
            ("create", "--user", "a", "--experts", "mat"),
            "'mat': no expert has this name; did you mean 'math'? (valid: ",
        ),
        (("create", "--user", "a", "--experts", ""), "no expert is named (valid: law, math"),
        (("revoke",), "name either IDs of tokens or --user U"),
        (("revoke", "x", "--user", "a"), "name either IDs of tokens or --user U"),
        (("revoke", "x"), "no token has the ID 'x' (valid: none)"),
        (("revoke", "--user", "a"), "--user 'a' has no token (valid: none)"),
        (("remove",), "invalid choice: 'remove'"),
    ],
)
def test_wrong_values(run: RunDir, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str) -> None:
    status, out, err = call(capsys, run, *words)
    assert (status, out) == (2, "")
    assert message in err
    assert not run.tokens_json.exists()


def test_times_and_limits() -> None:
    assert parse_expiry("90m", now=100.0) == 100.0 + 5400
    assert parse_expiry("2w", now=0.0) == 14 * 86_400
    local = time.mktime((2031, 12, 31, 18, 0, 0, 0, 0, -1))
    assert parse_expiry("2031-12-31T18:00", now=0.0) == local
    with pytest.raises(ConfigError):
        parse_expiry("99999999-01-01", now=0.0)
    assert parse_limits([]) == TokenLimits()
    assert parse_limits(["requests=1", "tokens=2,concurrency=3"]) == TokenLimits(1, 2, 3)
    assert LIMITS == ("requests", "tokens", "concurrency"), "the values of `param` in a 429"
