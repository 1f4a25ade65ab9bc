"""A deployment that is shared with a Unix group: what a member can do, and what a user outside the group cannot."""

import http.client
import json
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from hpc_router.client import openai_client
from hpc_router.connect.main import ConnectOptions, connect
from hpc_router.errors import HpcRouterError
from hpc_router.state.share_dir import open_share
from tests.e2e.deployment import Deployed, deployed, kill
from tests.e2e.support import until_known
from tests.support.shared_router import status_of
from tests.support.users import (
    MEMBER,
    OTHER_MEMBER,
    OUTSIDER,
    UnixUser,
    as_user,
    needs_root,
    running_as,
)
from tests.support.waiting import eventually_sync

pytestmark = [pytest.mark.e2e, needs_root]

TURNS: Any = [{"role": "user", "content": "hi"}]
EXPERTS = ("topology=sim", "policy=model_field", "policy.fallback=null", "~experts.generalist", "~experts.medicine")


def asked(folder: Path) -> str:
    """The result of one request of this process's user: `answered`, or the type of the error and its message."""
    try:
        with openai_client(folder, max_retries=0, timeout=60) as client:
            made = client.chat.completions.create(model="math", messages=TURNS, max_tokens=2)
            return "answered" if made.choices else "nothing"
    except (HpcRouterError, openai.OpenAIError) as error:
        return f"{type(error).__name__}: {error}"


def until(user: UnixUser, share: Path, expected: str) -> None:
    answers: list[str] = []

    def seen() -> bool:
        answers.append(as_user(user, lambda: asked(share)))
        return expected in answers[-1]

    try:
        eventually_sync(seen, every_s=0.2)
    except AssertionError as error:
        error.add_note(f"the last answer: {answers[-1]}")
        raise


def models(socket_path: str) -> list[str] | str:
    """The models that a plain client without a token gets over a unix socket, or the error."""
    connection = http.client.HTTPConnection("localhost")
    with socket.socket(socket.AF_UNIX) as connection.sock:
        try:
            connection.sock.connect(socket_path)
        except OSError as error:
            return repr(error)
        connection.request("GET", "/v1/models")
        return [model["id"] for model in json.load(connection.getresponse())["data"]]


def serve_connect(share: Path, report: Callable[[str], None]) -> None:
    options = ConnectOptions(open_share(share), port=None, hold_s=30, max_body_mb=1)
    connect(options, on_serving=lambda running: report(running.address))


def assert_no_token_is_shown(one: Deployed, token: str) -> None:
    """Neither in what another user sees of the processes, nor in any log."""
    seen = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "ps", "-eo", "args", "-ww"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "hpc_router.router" in seen
    logs = [path.read_text(errors="replace") for path in one.run.rglob("*.log")]
    assert logs
    for secret in (token.rpartition("-")[2], one.token):
        assert secret not in seen
        assert not any(secret in log for log in logs)


def test_members_of_the_group_call_and_others_do_nothing(open_path: Path) -> None:
    share = open_path / "share"
    sharing = (f"router.share_dir={share}", "router.share_group=games")
    with deployed(open_path, *EXPERTS, *sharing) as one:
        assert asked(one.run) == "answered"  # also loads what the forks below need
        tokens = {user: one.verb("token", "create", "--user", user).stdout.strip() for user in ("games", "man")}
        until_known(one.url, *tokens.values())
        for user in (MEMBER, OTHER_MEMBER):
            until(user, share, "answered")
        assert as_user(MEMBER, lambda: [status_of(share, path) for path in ("/v1/models", "/status")]) == [200, 403]
        assert "cannot open" in as_user(OUTSIDER, lambda: asked(share))
        for user in (MEMBER, OUTSIDER):
            assert "cannot open" in as_user(user, lambda: asked(one.run)), "the run directory is the owner's"
        assert_no_token_is_shown(one, tokens["games"])
        with running_as(MEMBER, lambda report: serve_connect(share, report)) as address:
            assert set(as_user(MEMBER, lambda: models(address))) >= {"auto", "math"}
            assert "PermissionError" in as_user(OTHER_MEMBER, lambda: models(address))

        before = open_share(share).router_file().read()
        assert before is not None
        assert before.router is not None
        kill(one.progress(before.router.replica)["pid"])
        one.up()
        until(MEMBER, share, "answered")
        after = open_share(share).router_file().read()
        assert after is not None
        assert after.router is not None
        assert after.router.replica != before.router.replica

        one.verb("token", "revoke", "--user", "games")
        assert not (share / "tokens" / "games").exists()
        until(MEMBER, share, "has no token for games")
        until(OTHER_MEMBER, share, "answered")
    left = open_share(share).router_file().read()
    assert left is None or left.router is None, "the address was removed when the router ended"
