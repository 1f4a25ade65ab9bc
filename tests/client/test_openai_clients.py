"""The official openai client, sync and async, with routers that move, drain and end, and with processes that
impersonate one."""

import asyncio
import logging
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web

from hpc_router.client import async_openai_client, endpoint, openai_client, router_identity, transport
from hpc_router.client.leader import Leader
from hpc_router.client.openai_clients import Endpoint, NoRouterError
from hpc_router.client.retry import RetryState
from hpc_router.client.router_identity import IdentityCheck
from hpc_router.errors import ConfigError
from hpc_router.net.protocol import DRAINING_HEADER
from hpc_router.state.registry import RecordKind, State, publish, withdraw
from hpc_router.state.run_directory import RunDir, make_run
from tests.client.fakes import (
    FakeRouter,
    Starter,
    answers,
    breaks_off,
    drains,
    enter,
    hangs_up,
    leaves_after,
    overloaded,
    record_of,
    router_starter,
)

GUARD_S = 60.0


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run")


@pytest.fixture
async def start(run: RunDir) -> AsyncIterator[Starter]:
    async with router_starter(run) as start:
        yield start


@dataclass
class Caller:
    """One client, sync or async, with the same interface."""

    client: openai.OpenAI | openai.AsyncOpenAI

    async def chat(self, *, stream: bool = False) -> str:
        async with asyncio.timeout(GUARD_S):
            if isinstance(self.client, openai.AsyncOpenAI):
                return await _async_chat(self.client, stream=stream)
            return await asyncio.to_thread(_sync_chat, self.client, stream=stream)

    async def get(self, path: str) -> Any:
        async with asyncio.timeout(GUARD_S):
            if isinstance(self.client, openai.AsyncOpenAI):
                return await self.client.get(path, cast_to=object)
            return await asyncio.to_thread(self.client.get, path, cast_to=object)


_MESSAGES: Any = [{"role": "user", "content": "2+2?"}]


def _sync_chat(client: openai.OpenAI, *, stream: bool) -> str:
    if stream:
        pieces = client.chat.completions.create(model="auto", messages=_MESSAGES, stream=True)
        return "".join(piece.choices[0].delta.content or "" for piece in pieces)
    return str(client.chat.completions.create(model="auto", messages=_MESSAGES).choices[0].message.content)


async def _async_chat(client: openai.AsyncOpenAI, *, stream: bool) -> str:
    if stream:
        pieces = await client.chat.completions.create(model="auto", messages=_MESSAGES, stream=True)
        return "".join([piece.choices[0].delta.content or "" async for piece in pieces])
    answer = await client.chat.completions.create(model="auto", messages=_MESSAGES)
    return str(answer.choices[0].message.content)


Make = Callable[..., Caller]


@pytest.fixture(params=["sync", "async"])
async def make(run: RunDir, request: pytest.FixtureRequest) -> AsyncIterator[Make]:
    clients: list[openai.OpenAI | openai.AsyncOpenAI] = []

    def one(**options: Any) -> Caller:
        made = openai_client if request.param == "sync" else async_openai_client
        clients.append(made(run.path, **options))
        return Caller(clients[-1])

    yield one
    for client in clients:
        if isinstance(client, openai.AsyncOpenAI):
            await client.close()
        else:
            client.close()


@dataclass
class Pauses:
    """Replaces the pauses between two reads of the registry. A test sees each pause begin and ends it."""

    begun: asyncio.Event
    over: threading.Event = field(default_factory=threading.Event)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    lengths: list[float] = field(default_factory=list)

    def sync(self, length_s: float) -> None:
        self.lengths.append(length_s)
        self.loop.call_soon_threadsafe(self.begun.set)
        assert self.over.wait(GUARD_S)

    async def wait(self, length_s: float) -> None:
        await asyncio.to_thread(self.sync, length_s)

    async def one(self) -> None:
        """Waits until a request waits for a router."""
        async with asyncio.timeout(GUARD_S):
            await self.begun.wait()


@pytest.fixture
async def pauses(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pauses]:
    pauses = Pauses(asyncio.Event())
    monkeypatch.setattr(transport, "_sleep", pauses.sync)
    monkeypatch.setattr(transport, "_async_sleep", pauses.wait)
    yield pauses
    pauses.over.set()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_finds_the_router(run: RunDir, start: Starter, make: Make, stream: bool) -> None:
    """Its address and the token come from the run directory; the host header is the router's."""
    router = await start()
    enter(run, record_of(router.url))
    caller = make()
    assert await caller.chat(stream=stream) == f"from {router.url}"
    assert router.offered == [f"Bearer {run.token()}"]
    assert router.hosts == [router.url.removeprefix("http://")]
    assert run.token() not in str(caller.client.api_key), "the client object itself holds no token"


@pytest.mark.parametrize("stream", [False, True])
async def test_between_two_requests_the_router_moves(run: RunDir, start: Starter, make: Make, stream: bool) -> None:
    """The old router still listens, but gets no further request."""
    old, new, caller = await start(), await start(), make()
    enter(run, record_of(old.url))
    assert await caller.chat(stream=stream) == f"from {old.url}"
    enter(run, record_of(new.url, generation=2))
    assert await caller.chat(stream=stream) == f"from {new.url}"
    assert len(old.offered) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_router_dies_and_its_successor_comes_while_a_request_waits(
    run: RunDir, start: Starter, make: Make, pauses: Pauses, stream: bool
) -> None:
    """The dead router's records remain, as after a kill."""
    old, new, caller = await start(), await start(), make()
    enter(run, record_of(old.url))
    await caller.chat()
    await old.die()
    asked = asyncio.create_task(caller.chat(stream=stream))
    await pauses.one()
    enter(run, record_of(new.url, generation=2))
    pauses.over.set()
    assert await asked == f"from {new.url}"
    assert len(new.offered) == 1


async def test_the_first_router_comes_while_a_request_waits(
    run: RunDir, start: Starter, make: Make, pauses: Pauses
) -> None:
    router, caller = await start(), make()
    asked = asyncio.create_task(caller.chat())
    await pauses.one()
    enter(run, record_of(router.url))
    pauses.over.set()
    assert await asked == f"from {router.url}"


async def test_an_existing_successor_is_used_without_a_pause(run: RunDir, start: Starter, make: Make) -> None:
    """The summary still names the dead router. follow_s=0 allows no pause."""
    old, new, caller = await start(), await start(), make(follow_s=0)
    enter(run, record_of(old.url))
    publish(run.registry, record_of(new.url, generation=2))
    await old.die()
    assert await caller.chat() == f"from {new.url}"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_refused_by_a_draining_router_goes_to_the_next(
    run: RunDir, start: Starter, make: Make, stream: bool
) -> None:
    """Its 503 says that the router did not process the request, so the next router gets it, any number of times."""
    old, older, new = await start(drains), await start(drains), await start()
    enter(run, record_of(older.url))
    caller = make(follow_s=0)
    publish(run.registry, record_of(old.url, generation=2))
    publish(run.registry, record_of(new.url, generation=3))
    assert await caller.chat(stream=stream) == f"from {new.url}"
    assert (len(older.bodies), len(old.bodies), len(new.bodies)) == (1, 0, 1)


async def test_a_router_drains_before_its_successor_leads(
    run: RunDir, start: Starter, make: Make, pauses: Pauses
) -> None:
    old, new, caller = await start(drains), await start(), make()
    enter(run, record_of(old.url))
    asked = asyncio.create_task(caller.chat())
    await pauses.one()
    enter(run, record_of(old.url, state=State.DRAINING), record_of(new.url, generation=2))
    pauses.over.set()
    assert await asked == f"from {new.url}"


async def test_other_refusals_go_to_the_caller(run: RunDir, start: Starter, make: Make) -> None:
    """Only the openai client itself retries a 429, as its `max_retries` says."""
    router = await start(overloaded)
    enter(run, record_of(router.url))
    with pytest.raises(openai.InternalServerError, match="full"):
        await make(max_retries=0).chat()
    assert len(router.bodies) == 1


async def test_a_connection_that_ends_without_an_answer_is_tried_once_more(
    run: RunDir, start: Starter, make: Make
) -> None:
    router = await start(hangs_up, answers)
    enter(run, record_of(router.url))
    assert await make(follow_s=0).chat() == f"from {router.url}"
    assert len(router.bodies) == 2
    assert router.bodies[0] == router.bodies[1]


async def test_a_dying_router_does_not_get_the_request_again(
    run: RunDir, start: Starter, make: Make, pauses: Pauses
) -> None:
    """A killed process still accepts connections for a moment, which must not use up the one retry."""

    async def dies(router: FakeRouter, request: web.BaseRequest) -> web.StreamResponse:
        router.dying = True
        return await hangs_up(router, request)

    old, new, caller = await start(dies), await start(), make()
    enter(run, record_of(old.url))
    asked = asyncio.create_task(caller.chat())
    await pauses.one()
    assert (len(old.bodies), old.asked) == (1, 2)
    enter(run, record_of(new.url, generation=2))
    pauses.over.set()
    assert await asked == f"from {new.url}"
    assert len(old.bodies) == 1


async def test_a_lost_request_is_resent_only_once(run: RunDir, start: Starter, make: Make) -> None:
    """`max_retries` does not matter, because a router may have processed the request each time."""
    router = await start(hangs_up)
    enter(run, record_of(router.url))
    with pytest.raises(openai.APIConnectionError, match=r"router-0\.g1 at .* ended without a response"):
        await make(max_retries=5).chat()
    assert len(router.bodies) == 2


async def test_a_new_token_is_used(run: RunDir, start: Starter, make: Make) -> None:
    """Many requests at once use it, too."""
    router, caller, before = await start(), make(), run.token()
    enter(run, record_of(router.url))
    await caller.chat()
    (run.path / "token").write_text("another\n")
    assert await asyncio.gather(*(caller.chat() for _ in range(8))) == [f"from {router.url}"] * 8
    assert set(router.offered) == {f"Bearer {before}", "Bearer another"}
    assert await caller.chat() == f"from {router.url}"
    assert router.offered[-1] == "Bearer another"


async def test_a_refused_token_is_sent_once(run: RunDir, start: Starter, make: Make) -> None:
    async def refuses(router: FakeRouter, request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no"}}, status=401)

    router = await start(refuses)
    enter(run, record_of(router.url))
    with pytest.raises(openai.AuthenticationError):
        await make().chat()
    assert len(router.offered) == 1


async def test_without_a_router_the_error_names_the_remedy(run: RunDir, make: Make) -> None:
    """With follow_s=0 the error comes at once, and `max_retries` does not multiply the wait."""
    with pytest.raises(NoRouterError, match=f"no router serves {run.path}; `hpc-router up --run {run.path}`") as caught:
        await make(follow_s=0).chat()
    assert isinstance(caught.value, openai.APIConnectionError), "programs that know openai's errors catch it too"


async def test_a_dead_router_is_named(run: RunDir, start: Starter, make: Make) -> None:
    router = await start()
    enter(run, record_of(router.url))
    await router.die()
    with pytest.raises(NoRouterError, match=rf"router-0\.g1 at {router.url} took no request within 0 s"):
        await make(follow_s=0).chat()


async def test_a_router_that_leaves_after_it_answered(run: RunDir, start: Starter, make: Make, pauses: Pauses) -> None:
    """A broken connection that was kept for the next request does not make that request fail."""
    old, new, caller = await start(leaves_after(answers)), await start(), make()
    enter(run, record_of(old.url))
    assert await caller.chat() == f"from {old.url}"
    asked = asyncio.create_task(caller.chat())
    await pauses.one()
    enter(run, record_of(new.url, generation=2))
    pauses.over.set()
    assert await asked == f"from {new.url}"


class TestWhatAStrangerGets:
    """A process that is not the router never gets the token."""

    @pytest.fixture
    async def stranger(self, start: Starter) -> AsyncIterator[FakeRouter]:
        stranger = await start()
        yield stranger
        assert stranger.offered == []

    async def test_the_port_of_a_router_that_was_killed(
        self, run: RunDir, stranger: FakeRouter, make: Make, pauses: Pauses, start: Starter
    ) -> None:
        """Its record remains until a successor starts; a request waits for that one."""
        stranger.stranger = True
        enter(run, record_of(stranger.url))
        with pytest.raises(NoRouterError, match=rf"router-0\.g1 at {stranger.url} .* something else answers there"):
            await make(follow_s=0).chat()
        asked = asyncio.create_task(make().chat())
        await pauses.one()
        router = await start()
        enter(run, record_of(router.url, generation=2))
        pauses.over.set()
        assert await asked == f"from {router.url}"

    async def test_the_port_of_a_router_that_was_known(self, run: RunDir, start: Starter, make: Make) -> None:
        """The router passed the check and was killed during a response. Another process then bound its port."""
        caller = make(follow_s=0, max_retries=0)
        router = await start(answers, breaks_off)
        enter(run, record_of(router.url))
        assert await caller.chat() == f"from {router.url}"
        with pytest.raises(Exception) as broken:
            await caller.chat(stream=True)
        assert type(broken.value).__name__ in ("APIConnectionError", "ReadError", "RemoteProtocolError"), (
            "as openai has it"
        )
        router.stranger = True
        with pytest.raises(NoRouterError, match="something else answers there"):
            await caller.chat()
        assert len(router.offered) == 2

    async def test_the_port_of_a_router_of_an_older_version(
        self, run: RunDir, stranger: FakeRouter, make: Make
    ) -> None:
        """Its record has no nonce."""
        enter(run, replace(record_of(stranger.url), nonce=None))
        with pytest.raises(NoRouterError, match="older version"):
            await make(follow_s=0).chat()
        assert stranger.asked == 0

    async def test_the_endpoint_for_other_libraries(self, run: RunDir, stranger: FakeRouter) -> None:
        stranger.stranger = True
        enter(run, record_of(stranger.url))
        with pytest.raises(NoRouterError, match="something else answers there"):
            await asyncio.to_thread(endpoint, run.path)

    async def test_the_port_of_a_router_that_has_left(self, run: RunDir, stranger: FakeRouter, make: Make) -> None:
        """`registry.json` remains after the last router; the router's own record is removed."""
        enter(run, record_of(stranger.url))
        withdraw(run.registry, "router-0.g1")
        with pytest.raises(NoRouterError):
            await make(follow_s=0).chat()

    @pytest.mark.parametrize("state", [State.STARTING, State.DRAINING])
    async def test_the_port_of_a_router_that_is_not_ready(
        self, run: RunDir, stranger: FakeRouter, make: Make, state: State
    ) -> None:
        enter(run, record_of(stranger.url))
        publish(run.registry, record_of(stranger.url, state=state))
        with pytest.raises(NoRouterError):
            await make(follow_s=0).chat()

    async def test_an_older_summary(self, run: RunDir, start: Starter, stranger: FakeRouter, make: Make) -> None:
        """The router's own record names another address than the summary."""
        router = await start()
        enter(run, record_of(stranger.url))
        publish(run.registry, record_of(router.url))
        assert await make().chat() == f"from {router.url}"

    async def test_an_endpoint_that_is_no_router(
        self, run: RunDir, start: Starter, stranger: FakeRouter, make: Make
    ) -> None:
        router = await start()
        enter(run, record_of(router.url), record_of(stranger.url, kind=RecordKind.EXTERNAL, generation=9))
        assert await make().chat() == f"from {router.url}"

    async def test_a_proxy(
        self, run: RunDir, start: Starter, stranger: FakeRouter, monkeypatch: pytest.MonkeyPatch, make: Make
    ) -> None:
        router = await start()
        enter(run, record_of(router.url))
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, stranger.url)
        monkeypatch.setenv("OPENAI_BASE_URL", stranger.url)
        assert await make().chat() == f"from {router.url}"

    async def test_a_redirection(self, run: RunDir, start: Starter, stranger: FakeRouter, make: Make) -> None:
        async def redirects(router: FakeRouter, request: web.BaseRequest) -> web.StreamResponse:
            return web.Response(status=307, headers={"location": stranger.url})

        router = await start(redirects)
        enter(run, record_of(router.url))
        with pytest.raises(openai.APIStatusError):
            await make(max_retries=0).chat()

    async def test_an_address_in_the_request(
        self, run: RunDir, start: Starter, stranger: FakeRouter, make: Make
    ) -> None:
        router = await start()
        enter(run, record_of(router.url))
        with pytest.raises(openai.APIConnectionError):
            await make(max_retries=0).get(f"{stranger.url}/v1/models")
        assert router.offered == []


async def test_the_log_holds_no_token(
    run: RunDir, start: Starter, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    router = await start()
    enter(run, record_of(router.url))
    await make().chat()
    assert run.token() not in caplog.text


async def test_files_of_another_user_are_ignored(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(run, record_of("http://127.0.0.1:1"))
    leader = Leader(run)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert leader.find() is None


async def test_an_unreadable_registry_keeps_the_last_result(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    enter(run, record_of("http://127.0.0.1:1"))
    leader = Leader(run)
    seen = leader.find()

    def stale(_self: Path) -> os.stat_result:
        raise OSError("Stale file handle")

    monkeypatch.setattr(Path, "lstat", stale)
    assert leader.find() == seen
    assert "Stale file handle" in caplog.text


def test_without_a_summary_the_registry_folder_is_read(run: RunDir) -> None:
    publish(run.registry, record_of("http://127.0.0.1:1"))
    publish(run.registry, record_of("http://127.0.0.1:2", generation=2))
    found = Leader(run).find()
    assert found is not None
    assert found.url == "http://127.0.0.1:2"


def test_a_damaged_summary_is_ignored(run: RunDir) -> None:
    publish(run.registry, record_of("http://127.0.0.1:1"))
    for content in ("{", "[]", '{"records": 3}', '{"records": [3, {"schema": 99}]}'):
        run.registry_json.write_text(content)
        assert Leader(run).find() == record_of("http://127.0.0.1:1")


def test_a_run_that_was_removed(run: RunDir) -> None:
    enter(run, record_of("http://127.0.0.1:1"))
    leader = Leader(run)
    assert leader.find() is not None
    withdraw(run.registry, "router-0.g1")
    run.registry.rmdir()
    assert leader.find() is None


async def test_the_endpoint_for_other_libraries(run: RunDir, start: Starter, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoRouterError, match="no router serves"):
        endpoint(run.path)
    router = await start()
    enter(run, record_of(router.url))
    found = await asyncio.to_thread(endpoint, str(run.path))
    assert found == Endpoint(router.url, run.token())
    assert found.base_url == f"{router.url}/v1"
    assert run.token() not in repr(found)
    monkeypatch.setenv("HPC_ROUTER_RUN", str(run.path))
    assert await asyncio.to_thread(endpoint) == found
    await router.die()
    with pytest.raises(NoRouterError, match=f"router-0.g1 at {router.url}: no process answers there; no router serves"):
        await asyncio.to_thread(endpoint)


async def test_many_requests_share_one_identity_check(run: RunDir, start: Starter, make: Make) -> None:
    router, caller = await start(), make()
    enter(run, record_of(router.url))
    await asyncio.gather(*(caller.chat() for _ in range(50)))
    await caller.chat()
    assert (router.asked, len(router.offered)) == (1, 51)


async def test_an_identity_check_expires(
    run: RunDir, start: Starter, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    router, caller = await start(), make()
    enter(run, record_of(router.url))
    await caller.chat()
    monkeypatch.setattr(router_identity, "PROOF_S", -1.0)
    await caller.chat()
    assert router.asked == 2


async def test_a_successor_on_the_same_port_is_checked_again(run: RunDir, start: Starter, make: Make) -> None:
    router, caller = await start(), make()
    enter(run, record_of(router.url))
    await caller.chat()
    withdraw(run.registry, "router-0.g1")
    enter(run, record_of(router.url, generation=2))
    await caller.chat()
    assert router.asked == 2


@pytest.mark.parametrize("make_client", [openai_client, async_openai_client])
def test_options_that_the_run_sets_are_refused(run: RunDir, make_client: Any) -> None:
    with pytest.raises(ConfigError, match="api_key, base_url: the run directory sets"):
        make_client(run.path, base_url="http://h", api_key="k")
    with pytest.raises(ConfigError, match="there is no run directory"):
        make_client(run.path / "nope")


def test_importing_it_loads_no_http_library() -> None:
    forbidden = ["openai", "httpx", "httpx2", "anyio", "aiohttp", "submitit", "torch", "hydra"]
    program = f"import sys, hpc_router.client; print([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_openai_it_says_what_to_install(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install 'hpc-router\[client\]'"):
        openai_client(run.path)


class TestRetryState:
    ROUTER = record_of("http://127.0.0.1:1")

    @pytest.fixture
    def state(self) -> RetryState:
        return RetryState(follow_s=10, now=0.0, replayable=True)

    def test_pauses_grow_up_to_a_limit(self, state: RetryState) -> None:
        assert [state.pause_s(0.0, 1.0) for _ in range(6)] == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0]
        assert state.pause_s(0.0, 0.0) == 1.0, "jitter halves them at most"

    @pytest.mark.parametrize(("now", "pause_s"), [(9.95, pytest.approx(0.05)), (10.0, None), (11.0, None)])
    def test_the_deadline(self, state: RetryState, now: float, pause_s: float | None) -> None:
        assert state.pause_s(now, 1.0) == pause_s

    def test_the_same_router_is_tried_again_after_a_pause_only(self, state: RetryState) -> None:
        state.not_taken(self.ROUTER, IdentityCheck.UNREACHABLE)
        assert not state.may_try(self.ROUTER)
        assert state.may_try(record_of("http://127.0.0.1:2", generation=2))
        state.pause_s(0.0, 0.5)
        assert state.may_try(self.ROUTER)

    @pytest.mark.parametrize("replayable", [True, False])
    def test_a_generated_body_cannot_be_sent_again(self, replayable: bool) -> None:
        state = RetryState(follow_s=10, now=0.0, replayable=replayable)
        assert state.refused_by_drain(503, {DRAINING_HEADER: "1"}) is replayable
        assert (state.may_resend(), state.may_resend()) == (replayable, False)
        assert (state.may_renew_token(), state.may_renew_token()) == (replayable, False)
