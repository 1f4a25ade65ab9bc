"""Requests with a user's token: what they reach, which limits hold, and the errors in both APIs."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from hpc_router.router.control.token_watcher import CHECK_S
from hpc_router.router.worker.gateway import LONG_BODY_BYTES
from hpc_router.state.run_directory import RunDir, make_run
from hpc_router.state.user_tokens import TokenLimits, create_token, revoke_tokens
from tests.router.fakes import (
    RunningRouter,
    a_deployment,
    a_router,
    a_run,
    event,
    fake_replica,
    hang,
    refuse,
    stream,
)
from tests.router.support import CHAT, GUARD_S, all_gauges_zero, chat, post, ready, session
from tests.router.support import relay as relay
from tests.support.waiting import eventually

EXPERTS = ("code", "law", "math")
USAGE_EVENT = b'data: {"id": "c", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7}}\n\n'
DONE = b"data: [DONE]\n\n"


@asynccontextmanager
async def served(run: RunDir, *, policy: str = "model_field", **options: Any) -> AsyncIterator[RunningRouter]:
    """A router with a replica of each expert."""
    deployment = a_deployment(*EXPERTS, policy=policy, fallback="math", **options)  # type: ignore[arg-type]
    async with (
        fake_replica(run, "code-0.g1"),
        fake_replica(run, "law-0.g1"),
        fake_replica(run, "math-0.g1"),
        a_router(run, deployment) as router,
    ):
        await ready(router, 3)
        yield router


async def as_user(
    router: RunningRouter, token: str, body: Any = None, *, path: str = CHAT, header: str = "bearer"
) -> tuple[int, Any, Any]:
    given = {"authorization": f"Bearer {token}"} if header == "bearer" else {"authorization": "", "x-api-key": token}
    return await post(router, chat() if body is None else body, path=path, **given)


async def get(router: RunningRouter, path: str, token: str) -> tuple[int, Any]:
    headers = {"authorization": f"Bearer {token}"}
    async with session() as s, s.get(router.url + path, headers=headers) as response:
        return response.status, await response.json()


async def known(router: RunningRouter, count: int = 1) -> None:
    await eventually(lambda: len(router.gateway.users) == count)


def error_of(value: Any) -> tuple[str, str | None]:
    return value["error"]["code"], value["error"]["param"]


async def exposition(router: RunningRouter) -> str:
    async with session() as s, s.get(f"{router.url}/metrics", headers=router.headers) as response:
        return await response.text()


@pytest.mark.parametrize("header", ["bearer", "x-api-key"])
async def test_a_token_opens_the_api_and_nothing_else(tmp_path: Path, header: str) -> None:
    run = a_run(tmp_path)
    _, token = create_token(run, "alice")
    async with served(run) as router:
        await known(router)
        for _ in range(4):  # the first ones are parsed, the later ones are taken from the cache of heads
            assert (await as_user(router, token, header=header))[0] == 200
        assert (await as_user(router, token, chat(text="x" * LONG_BODY_BYTES), header=header))[0] == 200
        assert (await as_user(router, token, {"prompt": "x"}, path="/route", header=header))[0] == 200
        assert (await get(router, "/v1/models", token))[0] == 200
        for path in ("/status", "/metrics", "/status/"):
            status, value = await get(router, path, token)
            assert (status, value["error"]["code"], value["error"]["type"]) == (403, "owner_only", "permission_error")
        assert (await post(router, chat()))[0] == 200, "the owner's token works as before"
        await eventually(lambda: all_gauges_zero(router))


async def test_the_replica_gets_its_own_key_and_not_the_token(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    _, token = create_token(run, "alice")
    async with fake_replica(run, "math-0.g1") as fake, a_router(run, a_deployment("math")) as router:
        await ready(router)
        await known(router)
        await as_user(router, token)
        await as_user(router, token, header="x-api-key")
        assert all(token not in value for headers in fake.headers for value in headers.values())


async def test_a_token_is_made_and_revoked_while_the_router_serves(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with served(run) as router:
        made, token = create_token(run, "alice")
        await known(router)
        for _ in range(4):
            assert (await as_user(router, token))[0] == 200
        at = time.monotonic()
        revoke_tokens(run, by="me", ids=[made.id])
        await eventually(lambda: not len(router.gateway.users))
        assert CHECK_S <= 1.0, f"within two seconds, here after {time.monotonic() - at:.2f} s"
        status, value, headers = await as_user(router, token)
        assert (status, error_of(value)) == (401, ("unauthorized", None))
        assert "not revoked" in value["error"]["message"]
        assert headers["www-authenticate"] == "Bearer"


async def test_tokens_that_are_not_valid(tmp_path: Path) -> None:
    run, other = a_run(tmp_path), make_run(tmp_path / "other")
    _, expired = create_token(run, "alice", expires_at=time.time() - 1)
    _, of_other_run = create_token(other, "alice")
    async with served(run) as router:
        await known(router)
        for token, text in (
            (expired, "has expired"),
            (of_other_run, "this run's owner"),
            ("hpcr-x", "this run's owner"),
        ):
            for _ in range(3):
                status, value, _ = await as_user(router, token)
                assert (status, value["error"]["code"]) == (401, "unauthorized")
                assert text in value["error"]["message"]
        async with anthropic.AsyncAnthropic(base_url=router.url, api_key=expired, max_retries=0) as client:
            with pytest.raises(anthropic.AuthenticationError, match="has expired"):
                await client.messages.create(model="math", max_tokens=5, messages=[{"role": "user", "content": "x"}])


async def test_a_token_expires_while_its_head_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path)
    made, token = create_token(run, "alice", expires_at=time.time() + 3600)
    async with served(run) as router:
        await known(router)
        for _ in range(4):
            assert (await as_user(router, token))[0] == 200
        access = router.gateway.users.access_of(made.id)
        assert access is not None
        access.expires_at = time.time()
        assert (await as_user(router, token))[0] == 401


async def test_experts(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    _, token = create_token(run, "alice", experts=["code", "law"])
    async with served(run, policy="round_robin") as router:
        await known(router)
        assert [card["id"] for card in (await get(router, "/v1/models", token))[1]["data"]] == ["auto", "code", "law"]
        assert (await get(router, "/v1/models/law", token))[0] == 200
        assert (await get(router, "/v1/models/math", token))[1]["error"]["code"] == "expert_forbidden"
        assert (await as_user(router, token, chat("law")))[0] == 200
        status, value, _ = await as_user(router, token, chat("math"))
        assert (status, error_of(value)) == (403, ("expert_forbidden", "model"))
        assert "(valid: auto, code, law)" in value["error"]["message"]
        status, value, _ = await as_user(router, token, chat("nothing"))
        assert (status, error_of(value)) == (404, ("unknown_model", "model"))
        assert "math" not in value["error"]["message"]
        seen = {(await as_user(router, token, chat("auto")))[2]["x-expert"] for _ in range(8)}
        assert seen == {"code", "law"}
        owners = {(await post(router, chat("auto")))[2]["x-expert"] for _ in range(8)}
        assert owners == set(EXPERTS)
        assert 'hpc_router_limit_refusals_total{limit="experts"} 2.0' in await exposition(router)


async def test_auto_without_an_expert_that_is_allowed(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    _, token = create_token(run, "alice", experts=["law"])
    async with served(run) as router:  # `auto` is the fallback only
        await known(router)
        status, value, _ = await as_user(router, token, chat("auto"))
        assert (status, error_of(value)) == (403, ("expert_forbidden", "model"))
        assert "(valid: law)" in value["error"]["message"]


async def test_too_many_requests_a_minute(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    made, token = create_token(run, "alice", limits=TokenLimits(requests=3))
    async with served(run) as router:
        await known(router)
        clock(router, made.id).now = 600.0
        assert [(await as_user(router, token))[0] for _ in range(3)] == [200] * 3
        clock(router, made.id).now += 20.2
        status, value, headers = await as_user(router, token)
        assert (status, error_of(value)) == (429, ("rate_limited", "requests"))
        assert value["error"]["type"] == "rate_limit_error"
        assert headers["retry-after"] == "40"
        assert (await post(router, chat()))[0] == 200, "the owner has no limit"
        clock(router, made.id).now += 39.9
        assert (await as_user(router, token))[0] == 200
        assert 'hpc_router_limit_refusals_total{limit="requests"} 1.0' in await exposition(router)


async def test_the_errors_of_both_official_clients(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    _, token = create_token(run, "alice", limits=TokenLimits(tokens=100), experts=["math"])
    async with served(run) as router:
        await known(router)
        turns: Any = [{"role": "user", "content": "x"}]
        async with openai.AsyncOpenAI(base_url=f"{router.url}/v1", api_key=token, timeout=GUARD_S) as client:
            with pytest.raises(openai.RateLimitError) as limited:
                await client.chat.completions.create(model="math", messages=turns, max_tokens=101)
            assert (limited.value.code, limited.value.param) == ("rate_limited", "tokens")
            assert limited.value.response.headers["x-should-retry"] == "false"
            with pytest.raises(openai.PermissionDeniedError) as forbidden:
                await client.chat.completions.create(model="law", messages=turns)
            assert forbidden.value.code == "expert_forbidden"
        async with anthropic.AsyncAnthropic(base_url=router.url, api_key=token, timeout=GUARD_S) as claude:
            with pytest.raises(anthropic.RateLimitError, match="limit of 100 generated tokens per minute"):
                await claude.messages.create(model="math", messages=turns, max_tokens=101)
            with pytest.raises(anthropic.PermissionDeniedError, match="may not use the expert"):
                await claude.messages.create(model="law", messages=turns, max_tokens=5)
        assert 'hpc_router_limit_refusals_total{limit="tokens"} 2.0' in await exposition(router)


async def test_too_many_requests_at_once(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    _, token = create_token(run, "alice", limits=TokenLimits(concurrency=1))
    async with fake_replica(run, "math-0.g1", hang) as fake, a_router(run, a_deployment("math")) as router:
        await ready(router)
        await known(router)
        first = asyncio.create_task(as_user(router, token))
        await fake.arrived.wait()
        status, value, headers = await as_user(router, token)
        assert (status, error_of(value)) == (429, ("rate_limited", "concurrency"))
        assert headers["retry-after"] == "2"
        fake.go_on.set()
        assert (await first)[0] == 200
        assert (await as_user(router, token))[0] == 200


async def test_a_client_that_leaves_frees_its_place(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    made, token = create_token(run, "alice", limits=TokenLimits(concurrency=1))
    async with fake_replica(run, "math-0.g1", hang) as fake, a_router(run, a_deployment("math")) as router:
        await ready(router)
        await known(router)
        for _ in range(3):
            left = asyncio.create_task(as_user(router, token))
            await fake.arrived.wait()
            left.cancel()
            await asyncio.gather(left, return_exceptions=True)
            await eventually(lambda: all_gauges_zero(router))
            fake.arrived.clear()
        access = router.gateway.users.access_of(made.id)
        assert access is not None
        assert access.counts.in_flight == 0


@pytest.mark.parametrize(
    ("act", "streamed", "tokens", "source"),
    [
        (None, False, 1, "usage"),
        (stream([event("a"), event("b"), USAGE_EVENT, DONE]), True, 7, "usage"),
        (stream([event("a") + event("b"), event("c"), DONE]), True, 3, "chunks"),
        (stream([event("a"), event("b")], then="reset"), True, 2, "chunks"),
        (refuse(400), False, 0, None),
        (stream([b'{"id": "c", "choices": []}'], content_type="application/json"), False, 40, "reserved"),
    ],
    ids=["body", "stream with usage", "stream", "broken stream", "refused", "no usage"],
)
async def test_the_reservation_is_settled_by_what_was_generated(
    tmp_path: Path, act: Any, streamed: bool, tokens: int, source: str | None
) -> None:
    """Of a limit of 100, 40 are reserved; afterwards the rest can be reserved to the last token."""
    run = a_run(tmp_path)
    made, token = create_token(run, "alice", limits=TokenLimits(tokens=100))
    acts = () if act is None else (act,)
    async with fake_replica(run, "math-0.g1", *acts) as fake, a_router(run, a_deployment("math")) as router:
        await ready(router)
        await known(router)
        clock(router, made.id).now = 600.0
        await as_user(router, token, chat(stream=streamed, max_tokens=40))
        await eventually(lambda: all_gauges_zero(router))
        fake.acts.clear()
        fake.acts.append(refuse(400))
        status, value, _ = await as_user(router, token, chat(max_tokens=100 - tokens + 1))
        assert (status, error_of(value)) == (429, ("rate_limited", "tokens"))
        assert (await as_user(router, token, chat(max_tokens=100 - tokens)))[0] == 400, "the replica has got it"
        counted = [
            line
            for line in (await exposition(router)).splitlines()
            if line.startswith("hpc_router_tokens_total") and 'kind="prompt"' not in line
        ]
        expected = f'hpc_router_tokens_total{{expert="math",kind="{source}"}} {float(tokens)}'
        assert counted == ([] if source is None else [expected])


async def test_no_token_and_no_digest_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = a_run(tmp_path)
    made, token = create_token(run, "alice", limits=TokenLimits(requests=1))
    caplog.set_level("DEBUG")
    async with served(run) as router:
        await known(router)
        assert [(await as_user(router, token))[0] for _ in range(2)] == [200, 429]
        revoke_tokens(run, by="me", ids=[made.id])
        await known(router, 0)
        assert (await as_user(router, token))[0] == 401
    assert "user alice has reached" in caplog.text
    assert token not in caplog.text
    assert token.rpartition("-")[2] not in caplog.text
    assert made.digest not in caplog.text


async def test_a_file_that_cannot_be_read_changes_nothing(tmp_path: Path) -> None:
    """The last tokens stay while the file is incomplete; a file with other content gives no tokens."""
    run = a_run(tmp_path)
    _, token = create_token(run, "alice")
    async with served(run) as router:
        await known(router)
        content = run.tokens_json.read_text()
        run.tokens_json.write_text(content[: len(content) // 2])
        watcher = router.control.token_watcher
        await watcher._check()
        assert (await as_user(router, token))[0] == 200
        run.tokens_json.write_text('{"schema": 99}')
        await known(router, 0)
        assert (await as_user(router, token))[0] == 401


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def clock(router: RunningRouter, token_id: str) -> Clock:
    """The clock of the token's limits, which a test sets."""
    access = router.gateway.users.access_of(token_id)
    assert access is not None
    if not isinstance(access.clock, Clock):
        access.clock = Clock()
    assert isinstance(access.clock, Clock)
    return access.clock
