"""The identity check of a router, over real sockets."""

import asyncio
import json
import math
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from urllib.parse import parse_qs, urlsplit

import pytest

from hpc_router.client.router_identity import (
    MAX_RESPONSE_BYTES,
    PROOF_S,
    IdentityCache,
    IdentityCheck,
    check_identity,
    proves,
)
from hpc_router.net.auth import challenge_answer, replica_key
from hpc_router.state.registry import Record, RecordKind, State

SECRET = "the deployment's"
RECORD = Record(RecordKind.ROUTER, "router-0.g1", "http://127.0.0.1:1", State.READY, {}, nonce="n1")
Say = Callable[[str, asyncio.StreamWriter], Awaitable[None]]


def answered(challenge: str, *, replica: str = RECORD.replica, secret: str = SECRET, nonce: str = "n1") -> str:
    answer = challenge_answer(replica_key(secret, nonce), challenge)
    return json.dumps({"status": "ok", "replica": replica, "answer": answer})


def says(body: Callable[[str], str]) -> Say:
    async def say(challenge: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + body(challenge).encode())

    return say


@asynccontextmanager
async def at(say: Say) -> AsyncIterator[Record]:
    """The record's address, where `say` answers challenges."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
        try:
            await say(parse_qs(urlsplit(target).query)["challenge"][0], writer)
            await writer.drain()
        except ConnectionError:  # the client has closed the connection
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield replace(RECORD, url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")


async def drips(challenge: str, writer: asyncio.StreamWriter) -> None:
    """Sends a byte now and then, and never completes the response."""
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.01)


async def silent(challenge: str, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("say", "finding"),
    [
        (says(answered), IdentityCheck.PROVEN),
        (says(lambda c: answered(c, nonce="another")), IdentityCheck.OTHER_PROCESS),
        (says(lambda c: answered(c, secret="guessed")), IdentityCheck.OTHER_PROCESS),
        (says(lambda c: answered(c, replica="router-0.g2")), IdentityCheck.OTHER_PROCESS),
        (says(lambda _: answered("an old challenge")), IdentityCheck.OTHER_PROCESS),
        (says(lambda _: '{"status": "ok"}'), IdentityCheck.OTHER_PROCESS),
        (says(lambda _: '{"replica": "router-0.g1", "answer": ["\\ud800"]}'), IdentityCheck.OTHER_PROCESS),
        (says(lambda _: "[]"), IdentityCheck.OTHER_PROCESS),
        (says(lambda _: "<html>"), IdentityCheck.OTHER_PROCESS),
        (says(lambda _: "[" * 50_000), IdentityCheck.OTHER_PROCESS),
        (says(lambda c: answered(c) + " " * MAX_RESPONSE_BYTES), IdentityCheck.OTHER_PROCESS),
        (says(lambda _: ""), IdentityCheck.OTHER_PROCESS),
    ],
)
async def test_only_the_router_passes_the_check(say: Say, finding: IdentityCheck) -> None:
    async with at(say) as record:
        assert await asyncio.to_thread(check_identity, record, SECRET) is finding


@pytest.mark.parametrize("say", [silent, drips])
async def test_one_time_limit_holds_for_the_whole_check(say: Say) -> None:
    """A process that sends one byte at a time would otherwise block a client without limit."""
    async with at(say) as record, asyncio.timeout(10):
        assert await asyncio.to_thread(check_identity, record, SECRET, timeout_s=0.1) is IdentityCheck.UNREACHABLE


async def test_a_connection_that_is_closed_counts_as_unreachable() -> None:
    """A killed process accepts connections for a moment."""

    async def hangs_up(challenge: str, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with at(hangs_up) as record:
        assert await asyncio.to_thread(check_identity, record, SECRET) is IdentityCheck.UNREACHABLE


def test_an_address_without_a_listener_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    assert check_identity(replace(RECORD, url=url), SECRET) is IdentityCheck.UNREACHABLE


@pytest.mark.parametrize("url", ["https://127.0.0.1:1", "http://127.0.0.1:99999", "http://[::1", "http://"])
def test_an_invalid_address_does_not_pass(url: str) -> None:
    assert check_identity(replace(RECORD, url=url), SECRET) is not IdentityCheck.PROVEN


@pytest.mark.parametrize("nonce", [None, ""])
def test_a_record_without_a_nonce_cannot_be_checked(nonce: str | None) -> None:
    """An older version wrote it. No request is sent, because any process could answer it."""
    older = replace(RECORD, nonce=nonce)
    assert check_identity(older, SECRET) is IdentityCheck.NO_NONCE
    answer = json.loads(answered("c", nonce=nonce or ""))
    assert not proves(answer, record=older, key=replica_key(SECRET, ""), challenge="c")


class TestIdentityCache:
    """For which requests the result of a check is valid."""

    @pytest.fixture
    def cache(self) -> IdentityCache:
        cache = IdentityCache()
        cache.store(RECORD, IdentityCheck.PROVEN, begun_at=100.0, ended_at=101.0)
        return cache

    def test_without_a_check_there_is_no_result(self) -> None:
        assert IdentityCache().lookup(RECORD, since=0.0, now=0.0) is None

    @pytest.mark.parametrize(("age_s", "holds"), [(0.0, True), (PROOF_S, True), (math.nextafter(PROOF_S, 99), False)])
    def test_it_holds_for_a_while(self, cache: IdentityCache, age_s: float, holds: bool) -> None:
        """Its age counts from the start of the check."""
        cache = IdentityCache()
        cache.store(RECORD, IdentityCheck.PROVEN, begun_at=0.0, ended_at=age_s)
        assert cache.lookup(RECORD, since=age_s, now=age_s) is (IdentityCheck.PROVEN if holds else None)

    @pytest.mark.parametrize("change", [{"url": "http://127.0.0.1:2"}, {"nonce": "n2"}, {"replica": "router-0.g2"}])
    def test_of_that_router_only(self, cache: IdentityCache, change: dict[str, str]) -> None:
        assert cache.lookup(replace(RECORD, **change), since=101.0, now=101.0) is None  # type: ignore[arg-type]
        assert cache.lookup(replace(RECORD, beat=7), since=101.0, now=101.0) is IdentityCheck.PROVEN

    @pytest.mark.parametrize(("failed_at", "holds"), [(99.0, True), (100.0, False), (100.5, False), (102.0, False)])
    def test_a_failed_request_ends_earlier_results(self, cache: IdentityCache, failed_at: float, holds: bool) -> None:
        cache.invalidate(failed_at)
        cache.invalidate(50.0)  # reported late by another thread
        assert cache.lookup(RECORD, since=103.0, now=103.0) is (IdentityCheck.PROVEN if holds else None)

    @pytest.mark.parametrize(("since", "shared"), [(100.5, True), (101.0, True), (101.5, False)])
    def test_a_failed_check_holds_for_requests_that_waited_for_it(self, since: float, shared: bool) -> None:
        cache = IdentityCache()
        cache.store(RECORD, IdentityCheck.OTHER_PROCESS, begun_at=100.0, ended_at=101.0)
        assert cache.lookup(RECORD, since=since, now=102.0) is (IdentityCheck.OTHER_PROCESS if shared else None)

    def test_a_late_answer_does_not_replace_a_newer_one(self, cache: IdentityCache) -> None:
        cache.store(RECORD, IdentityCheck.UNREACHABLE, begun_at=99.0, ended_at=103.0)
        assert cache.lookup(RECORD, since=102.0, now=103.0) is IdentityCheck.PROVEN
