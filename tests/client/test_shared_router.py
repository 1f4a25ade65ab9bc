"""Clients of other users than the owner: a real router, the share folder, and the user's own token."""

import asyncio
import contextlib
import logging
import os
import pwd
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from hpc_router.client import async_openai_client, endpoint, openai_client
from hpc_router.client.leader import NoRouterError
from hpc_router.client.router_identity import IdentityCheck, check_identity, check_identity_to_user
from hpc_router.client.router_source import TOKEN_FILE, find_folder, users_token
from hpc_router.connect.forwarder import Forwarder
from hpc_router.connect.listener import _listen_unix
from hpc_router.errors import ConfigError, HpcRouterError, UnauthorizedError
from hpc_router.net.auth import replica_key, token_digest, user_key
from hpc_router.net.protocol import CHAT, MESSAGES
from hpc_router.relay.downstream.server import listening
from hpc_router.state.registry import Record, RecordKind, State, publish
from hpc_router.state.run_directory import RunDir, make_run
from hpc_router.state.share_dir import (
    ShareDir,
    SharedRouter,
    claimed_share,
    open_share,
    shared_record,
    write_router,
    write_token,
)
from hpc_router.state.user_tokens import create_token, revoke_tokens
from tests.router.fakes import NONCE, RunningRouter, a_deployment, a_router, a_run, fake_replica
from tests.router.support import ready
from tests.support.shared_router import status_of
from tests.support.users import MEMBER, OTHER_MEMBER, OUTSIDER, UnixUser, as_user, needs_root
from tests.support.waiting import GUARD_S, eventually

ME = pwd.getpwuid(os.getuid()).pw_name
GROUP = str(os.getgid())
TURNS: Any = [{"role": "user", "content": "hi"}]


@dataclass
class Shared:
    run: RunDir
    router: RunningRouter
    share: ShareDir
    token: str
    """The text of this user's token, which is also in the share folder."""

    @property
    def record(self) -> Record:
        return Record(RecordKind.ROUTER, "router-0.g1", self.router.url, State.READY, {}, nonce=NONCE)

    def publish(self, record: Record | None) -> None:
        shared = None if record is None else shared_record(record)
        write_router(self.share, SharedRouter(str(self.run.path), 32.0, shared), group=GROUP)

    async def known(self, count: int) -> None:
        await eventually(lambda: len(self.router.gateway.users) == count)


@pytest.fixture(autouse=True)
def without_token_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_FILE, raising=False)


@asynccontextmanager
async def shared(tmp_path: Path) -> AsyncIterator[Shared]:
    run = a_run(tmp_path)
    share = claimed_share(tmp_path / "share", GROUP, run)
    _, token = create_token(run, ME)
    assert write_token(share, ME, token) is None
    async with fake_replica(run, "math-0.g1"), a_router(run, a_deployment("math")) as router:
        await ready(router, 1)
        one = Shared(run, router, share, token)
        await one.known(1)
        one.publish(one.record)
        yield one


async def asked(one: Shared, **options: Any) -> str:
    async with async_openai_client(one.share.path, max_retries=0, **options) as client:
        made = await client.chat.completions.create(model="math", messages=TURNS)
        return made.model


async def test_the_openai_client_takes_the_folder(tmp_path: Path) -> None:
    async with shared(tmp_path) as one:
        assert await asked(one)

        def blocking() -> str:
            with openai_client(one.share.path, max_retries=0) as client:
                return client.chat.completions.create(model="math", messages=TURNS).model

        assert await asyncio.to_thread(blocking)
        assert (await asyncio.to_thread(endpoint, one.share.path)).token == one.token


async def test_each_side_knows_only_its_own_key(tmp_path: Path) -> None:
    """Neither the secret's key nor another user's key proves the router to a user; another nonce proves nothing."""
    async with shared(tmp_path) as one:
        _, other = create_token(one.run, "bob")
        await one.known(2)

        async def check(record: Record, token: str) -> IdentityCheck:
            return await asyncio.to_thread(check_identity_to_user, record, token)

        assert await check(one.record, one.token) is IdentityCheck.PROVEN
        assert await check(one.record, other) is IdentityCheck.PROVEN
        assert await check(replace(one.record, nonce="another"), one.token) is IdentityCheck.OTHER_PROCESS
        assert await check(replace(one.record, replica="router-0.g2"), one.token) is IdentityCheck.OTHER_PROCESS
        crossed = one.token[:14] + other[14:]
        assert await check(one.record, crossed) is IdentityCheck.OTHER_PROCESS
        assert await check(one.record, "hpcr-00000000-" + "0" * 64) is IdentityCheck.TOKEN_UNKNOWN
        assert await asyncio.to_thread(check_identity, one.record, one.run.secret()) is IdentityCheck.PROVEN
        assert await asyncio.to_thread(check_identity, one.record, one.token) is IdentityCheck.OTHER_PROCESS


def test_the_keys_differ() -> None:
    digest = token_digest("hpcr-x")
    keys = {
        user_key(digest, "n"),
        user_key(digest, "m"),
        user_key(token_digest("hpcr-y"), "n"),
        replica_key(digest, "n"),
    }
    assert len(keys) == 4
    assert digest not in keys


@pytest.mark.parametrize("kind", ["revoked", "of another run"])
async def test_a_token_that_the_router_does_not_know(tmp_path: Path, kind: str) -> None:
    """The client gets 401 at once, and the token is not sent."""
    async with shared(tmp_path) as one:
        if kind == "revoked":
            assert await asked(one)
            revoke_tokens(one.run, by="me", user=ME)
            await one.known(0)
        else:
            _, foreign = create_token(make_run(tmp_path / "other"), ME)
            write_token(one.share, ME, foreign)
        with pytest.raises(openai.AuthenticationError, match="revoked, or belongs to another run"):
            await asked(one)
        with pytest.raises(UnauthorizedError, match="revoked, or belongs to another run"):
            await asyncio.to_thread(endpoint, one.share.path)


async def test_a_client_takes_a_new_token_without_a_restart(tmp_path: Path) -> None:
    async with shared(tmp_path) as one, async_openai_client(one.share.path, max_retries=0) as client:
        await client.chat.completions.create(model="math", messages=TURNS)
        revoke_tokens(one.run, by="me", user=ME)
        _, newer = create_token(one.run, ME)
        await eventually(lambda: one.router.gateway.users.find(newer) is not None)
        write_token(one.share, ME, newer)
        assert await client.chat.completions.create(model="math", messages=TURNS)


async def test_an_expired_token(tmp_path: Path) -> None:
    async with shared(tmp_path) as one:
        _, expired = create_token(one.run, ME, expires_at=1.0)
        await one.known(2)
        write_token(one.share, ME, expired)
        with pytest.raises(openai.AuthenticationError, match="expired"):
            await asked(one)


@pytest.mark.parametrize("text", ["", "sk-1234", "hpcr-0-0", "é" * 10, "hpcr-" + "0" * 5000])
async def test_a_malformed_token(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    share = claimed_share(tmp_path / "share", GROUP, run)
    path = tmp_path / "mine"
    path.write_text(text)
    path.chmod(0o600)
    monkeypatch.setenv(TOKEN_FILE, str(path))
    with pytest.raises(ConfigError, match="not a token") as refused:
        openai_client(share.path)
    assert not text or text not in str(refused.value)


async def test_a_token_file_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with shared(tmp_path) as one:
        (one.share.tokens / ME).unlink()
        with pytest.raises(ConfigError, match=f"has no token for {ME}"):
            openai_client(one.share.path)
        path = tmp_path / "mine"
        path.write_text(one.token + "\n")
        monkeypatch.setenv(TOKEN_FILE, str(path))
        path.chmod(0o640)
        with pytest.raises(ConfigError, match="other users may have access to it"):
            users_token(one.share)
        path.chmod(0o600)
        assert await asked(one)
        path.unlink()
        with pytest.raises(ConfigError, match="No such file"):
            users_token(one.share)


async def test_a_stranger_at_the_address_learns_nothing(tmp_path: Path) -> None:
    """Another process has the port of a router that ended; it answers everything that it can know."""
    got: list[str] = []

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(b'HTTP/1.1 200 OK\r\n\r\n{"replica": "router-0.g1", "answer": "' + b"0" * 64 + b'"}')
        writer.close()

    async with shared(tmp_path) as one, await asyncio.start_server(say, "127.0.0.1", 0) as server:
        one.publish(replace(one.record, url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        with pytest.raises(NoRouterError, match="something else answers there"):
            await asked(one, follow_s=0)
        secret = one.token.rpartition("-")[2]
        assert got
        assert not any(secret in text or token_digest(one.token) in text for text in got)


async def test_it_follows_the_file_to_another_router(tmp_path: Path) -> None:
    """While the file names no router, or one that has gone, a request waits."""
    async with shared(tmp_path) as one:
        for before in (None, replace(one.record, url="http://127.0.0.1:1")):
            one.publish(before)
            request = asyncio.create_task(asked(one))
            one.publish(one.record)
            assert await request
        one.publish(None)
        with pytest.raises(NoRouterError, match="no router serves"):
            await asked(one, follow_s=0)


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_connect_takes_the_folder(tmp_path: Path, path: str) -> None:
    """It adds the user's token, and reports an unknown one in the format of each API."""
    async with shared(tmp_path) as one:
        folder = find_folder(one.share.path)
        with closing(Forwarder(folder, hold_s=5, adds_tokens=True)) as forwarder:
            async with (
                listening(forwarder.handle, _listen_unix(tmp_path / "s"), max_body=2**16),
                aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(tmp_path / "s"))) as session,
            ):

                async def call() -> tuple[int, Any]:
                    body = {"model": "math", "messages": TURNS, "max_tokens": 5}
                    async with session.post(f"http://localhost{path}", json=body) as response:
                        return response.status, await response.json()

                assert (await call())[0] == 200
                revoke_tokens(one.run, by="me", user=ME)
                await one.known(0)
                status, value = await call()
                assert status == 401
                assert value["error"]["type"] == "authentication_error"
                assert (value.get("type") == "error") is (path == MESSAGES)


def answered(folder: Path) -> str:
    """The result of one request of this process's user: the model's name, or the error."""
    try:
        with openai_client(folder, max_retries=0, timeout=GUARD_S) as client:
            return client.chat.completions.create(model="math", messages=TURNS).model
    except (HpcRouterError, openai.OpenAIError) as error:
        return str(error)


@needs_root
async def test_members_call_and_others_do_nothing(open_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Real Unix users: two members of the group, and one user outside it. No log has a token or its digest."""
    caplog.set_level(logging.DEBUG)
    run = a_run(open_path)
    share = claimed_share(open_path / "share", "games", run)
    texts = {name: create_token(run, name)[1] for name in ("games", "man")}
    for name, text in texts.items():
        assert write_token(share, name, text) is None

    async def by(user: UnixUser, function: Callable[[], Any]) -> Any:
        return await asyncio.to_thread(as_user, user, function)

    async with fake_replica(run, "math-0.g1"), a_router(run, a_deployment("math")) as router:
        await ready(router, 1)
        await eventually(lambda: len(router.gateway.users) == 2)
        record = Record(RecordKind.ROUTER, "router-0.g1", router.url, State.READY, {}, nonce=NONCE)
        write_router(share, SharedRouter(str(run.path), 32.0, shared_record(record)), group="games")
        expected = await asyncio.to_thread(loaded, run, record, share.path)  # imports what the forks need
        for user in (MEMBER, OTHER_MEMBER):
            assert await by(user, lambda: answered(share.path)) == expected
            assert await by(user, lambda: status_of(share.path, "/v1/models")) == 200
            assert await by(user, lambda: status_of(share.path, "/status")) == 403
        assert "only the members of a group" in await by(OUTSIDER, lambda: answered_as_share(share.path))
        for user in (MEMBER, OUTSIDER):
            assert "Permission denied" in await by(user, lambda: answered(run.path)), "the run directory is closed"
        revoke_tokens(run, by="me", user="games")
        await eventually(lambda: len(router.gateway.users) == 1)
        assert "revoked, or belongs to another run" in await by(MEMBER, lambda: answered(share.path))
        assert await by(OTHER_MEMBER, lambda: answered(share.path)) == expected
    for text in texts.values():
        assert text.rpartition("-")[2] not in caplog.text
        assert token_digest(text) not in caplog.text


def loaded(run: RunDir, record: Record, share: Path) -> str:
    """The result of a request of the owner, after which this process has imported what a client needs."""
    publish(run.registry, record)
    with contextlib.suppress(HpcRouterError):
        status_of(share, "/v1/models")
    return answered(run.path)


def answered_as_share(share: Path) -> str:
    try:
        open_share(share)
    except ConfigError as error:
        return str(error)
    return "opened"
