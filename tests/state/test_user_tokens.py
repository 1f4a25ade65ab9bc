"""The file with the users' tokens."""

import json
import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hpc_router.errors import ConfigError, LaunchError, RegistryError
from hpc_router.state import user_tokens
from hpc_router.state.run_directory import RunDir, make_run
from hpc_router.state.user_tokens import (
    SLOTS,
    TokenLimits,
    create_token,
    find_token,
    parse_tokens,
    read_tokens,
    revoke_tokens,
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run")


def by_id(run: RunDir) -> dict[str, user_tokens.UserToken]:
    return {token.id: token for token in read_tokens(run)}


def test_a_token_is_found_by_its_text_which_the_file_does_not_have(run: RunDir) -> None:
    made, text = create_token(run, "alice", expires_at=9e9, limits=TokenLimits(requests=60), experts=["math"])
    assert read_tokens(run) == (made,)
    assert find_token(text, by_id(run)) == made
    assert (made.user, made.expires_at, made.limits.requests, made.experts) == ("alice", 9e9, 60, ("math",))
    content = run.tokens_json.read_text()
    assert text not in content
    assert text.rpartition("-")[2] not in content
    assert stat.S_IMODE(run.tokens_json.stat().st_mode) == 0o600
    assert "digest" not in made.to_json()


def test_any_other_text_finds_nothing(run: RunDir) -> None:
    made, text = create_token(run, "alice")
    _, other = create_token(run, "bob")
    crossed = f"hpcr-{made.id}-{other.rpartition('-')[2]}"
    for wrong in ("", "hpcr", run.token(), text[:-1], text + "0", text.upper(), crossed, "hpcr-é-\udce9", f" {text}"):
        assert find_token(wrong, by_id(run)) is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_cannot_read_the_tokens(run: RunDir) -> None:
    """Not even in a folder that is open: the file itself is closed."""
    create_token(run, "alice")
    for folder in (run.path, *run.path.parents[:3]):
        folder.chmod(0o755)
    other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    read = subprocess.run([*other, "cat", str(run.tokens_json)], capture_output=True, text=True, check=False)
    assert (read.returncode, read.stdout) == (1, "")
    assert "Permission denied" in read.stderr


def test_revoked_tokens_are_removed_and_recorded(run: RunDir) -> None:
    first, text = create_token(run, "alice")
    second, _ = create_token(run, "alice")
    third, _ = create_token(run, "bob")
    assert revoke_tokens(run, by="me", ids=[third.id]) == [third]
    assert {token.id for token in revoke_tokens(run, by="me", user="alice")} == {first.id, second.id}
    assert find_token(text, by_id(run)) is None
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    assert [(e["kind"], e["by"]) for e in events] == [("token_revoked", "me")] * 3
    assert events[0]["reason"] == f"token {third.id} of bob"


def test_a_slot_is_not_reused_at_once(run: RunDir) -> None:
    slots = []
    for _ in range(3):
        made, _ = create_token(run, "alice")
        slots.append(made.slot)
        revoke_tokens(run, by="me", user="alice")
    assert slots == [0, 1, 2]
    content = json.loads(run.tokens_json.read_text())
    run.tokens_json.write_text(json.dumps(content | {"next_slot": SLOTS - 1}))
    assert [create_token(run, "alice")[0].slot for _ in range(2)] == [SLOTS - 1, 0]


@pytest.mark.parametrize("user", ["", "-x", "a b", "a" * 65, "é", "a\nb"])
def test_a_wrong_user_name(run: RunDir, user: str) -> None:
    with pytest.raises(ConfigError, match="--user"):
        create_token(run, user)
    assert not run.tokens_json.exists()


def test_what_is_not_there_cannot_be_revoked(run: RunDir) -> None:
    made, _ = create_token(run, "alice")
    with pytest.raises(ConfigError, match=rf"no token has the ID 'xx' \(valid: {made.id}"):
        revoke_tokens(run, by="me", ids=[made.id, "xx"])
    with pytest.raises(ConfigError, match=r"--user 'bob' has no token \(valid: alice"):
        revoke_tokens(run, by="me", user="bob")
    assert read_tokens(run) == (made,)


def test_the_number_of_tokens_is_bounded(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_tokens, "MAX_TOKENS", 1)
    create_token(run, "alice")
    with pytest.raises(LaunchError, match="has 1 tokens, which is the limit"):
        create_token(run, "bob")


def test_changes_at_the_same_time_lose_no_token(run: RunDir) -> None:
    start = threading.Barrier(4)

    def create(user: str) -> str:
        start.wait()
        return create_token(run, user)[0].id

    with ThreadPoolExecutor(4) as threads:
        ids = set(threads.map(create, "abcd"))
    assert by_id(run).keys() == ids
    assert len({token.slot for token in read_tokens(run)}) == 4


def test_a_claim_of_a_killed_process_does_not_stay(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = run.path / ".tokens.changing"
    claim.mkdir()
    monkeypatch.setattr("hpc_router.state.exclusive.STALE_S", 0.0)
    create_token(run, "alice")
    assert not claim.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"user": 1}, {"digest": "short"}, {"slot": SLOTS}, {"slot": True}, {"expires_at": "soon"}, {"experts": "math"},
        {"experts": [1]}, {"limits": {"requests": 0}}, {"limits": {"tokens": 1.5}}, {"limits": None},
    ],
)  # fmt: skip
def test_a_wrong_entry_is_refused(run: RunDir, change: dict[str, Any]) -> None:
    made, _ = create_token(run, "alice")
    content = json.loads(run.tokens_json.read_text())
    content["tokens"][made.id] |= change
    with pytest.raises(RegistryError):
        parse_tokens(content)


def test_a_damaged_file_is_named(run: RunDir) -> None:
    for text in ("{", '{"schema": 2}', '{"schema": 1, "tokens": []}'):
        run.tokens_json.write_text(text)
        with pytest.raises(RegistryError):
            read_tokens(run)
        with pytest.raises(RegistryError, match=r"tokens\.json.*repair or remove it"):
            create_token(run, "alice")


def test_the_token_is_in_no_argument_list(run: RunDir) -> None:
    """It is printed, and no process that makes it has it among its arguments or in its environment."""
    argv = [sys.executable, "-m", "hpc_router.cli", "token", "create", "--user", "alice", "--run", str(run.path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert find_token(done.stdout.strip(), by_id(run)) is not None
    assert done.stdout.strip() not in done.stderr
    for file in run.path.rglob("*"):
        assert file.is_dir() or done.stdout.strip() not in file.read_text()
