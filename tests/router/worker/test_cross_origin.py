"""Web pages of allowed origins may use the router: preflights need no token, and every response says so."""

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.router.fakes import (
    FakeReplica,
    RunningRouter,
    a_deployment,
    a_router,
    a_run,
    completion,
    event,
    fake_replica,
    refuse,
    stream,
)
from tests.router.support import CHAT, GUARD_S, chat, post, ready, session
from tests.router.support import relay as relay
from tests.support.relays import OWN
from tests.support.waiting import eventually

PAGE, OTHER = "http://localhost:3000", "http://evil.example"
ASKED = "authorization,content-type,x-stainless-lang"
EXPOSED = {"x-request-id", "x-expert", "x-replica", "x-route-reason", "retry-after", "x-should-retry"}
ALLOW_ORIGIN = "access-control-allow-origin"


def preflight(origin: str | None = PAGE, method: str | None = "POST") -> dict[str, str]:
    asked = {"access-control-request-headers": ASKED}
    asked |= {} if origin is None else {"origin": origin}
    return asked if method is None else asked | {"access-control-request-method": method}


def cors(headers: Any) -> dict[str, list[str]]:
    return {name: headers.getall(name) for name in map(str.lower, headers) if name.startswith("access-control-")}


def assert_allows(headers: Any, origin: str = PAGE) -> None:
    """Once each: a browser refuses a header with two values."""
    assert headers.getall(ALLOW_ORIGIN) == [origin]
    [exposed] = headers.getall("access-control-expose-headers")
    assert set(exposed.split(", ")) == EXPOSED
    assert headers.get("vary", "").lower() == ("origin" if origin != "*" else "")
    assert "access-control-allow-credentials" not in headers


def assert_refuses(headers: Any) -> None:
    assert cors(headers) == {}
    assert headers["vary"].lower() == "origin"


async def ask(router: RunningRouter, method: str, path: str = CHAT, **headers: str) -> tuple[int, Any, bytes]:
    async with session() as s, s.request(method, router.url + path, headers=headers) as response:
        return response.status, response.headers, await response.read()


@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/v1/responses/resp_1", "/nowhere", "/health"])
async def test_a_preflight_needs_no_token(tmp_path: Path, path: str) -> None:
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math", allowed_origins=[OTHER, PAGE])) as router:
        status, headers, body = await ask(router, "OPTIONS", path, **preflight())
        assert (status, body) == (204, b"")
        assert_allows(headers)
        assert headers["access-control-allow-methods"] == "GET, HEAD, POST, DELETE"
        assert headers["access-control-allow-headers"] == ASKED
        assert headers["access-control-max-age"] == "600"


@pytest.mark.parametrize(
    ("origin", "method", "expected"),
    [
        ("http://localhost:3001", "POST", 403),
        ("https://localhost:3000", "POST", 403),
        ("http://LOCALHOST:3000", "POST", 403),
        ("http://localhost:3000.evil.example", "POST", 403),
        ("http://localhost", "POST", 403),
        ("null", "POST", 403),
        ("*", "POST", 403),
        ("", "POST", 403),
        (None, "POST", 403),
        (PAGE, None, 401),
    ],
)
async def test_another_origin_is_refused(tmp_path: Path, origin: str | None, method: str | None, expected: int) -> None:
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math", allowed_origins=[PAGE])) as router:
        status, headers, body = await ask(router, "OPTIONS", **preflight(origin, method))
        assert status == expected
        if expected == 403:
            assert_refuses(headers)
            error = json.loads(body)["error"]
            assert error["message"] == f"the origin {origin or ''!r} is not in router.allowed_origins"
            assert error["code"] == "origin_not_allowed"


async def test_every_response_says_it(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    deployment = a_deployment("math", allowed_origins=[PAGE], max_body_mb=0.001, max_in_flight=1)
    async with (
        fake_replica(run, "math-0.g1", stream([event("a")]), refuse(400)) as fake,
        a_router(run, deployment) as router,
    ):
        await ready(router)
        status, headers, body = await ask(router, "GET", "/v1/models", origin=PAGE, **router.headers)
        assert (status, json.loads(body)["object"]) == (200, "list")
        assert_allows(headers)
        _, _, headers = await post(router, chat(stream=True), origin=PAGE)
        assert headers["content-type"] == "text/event-stream"
        assert_allows(headers)
        for sent, expected in ((chat(), 400), (chat(model="nobody"), 404), (b"{" * 5000, 413), (b"x", 400)):
            status, _, headers = await post(router, sent, origin=PAGE)
            assert status == expected
            assert_allows(headers)
        status, _, headers = await post(router, chat(), origin=PAGE, authorization="Bearer no")
        assert status == 401
        assert_allows(headers)
        status, _, headers = await post(router, b"{}", origin=PAGE, **{"content-encoding": "gzip"})
        assert status == 415
        assert_allows(headers)
        for path, expected in (("/nowhere", 404), ("/health", 200), ("/ready", 200), (CHAT, 405)):
            status, headers, _ = await ask(router, "GET", path, origin=PAGE, **router.headers)
            assert status == expected
            assert_allows(headers)
        router.gateway.deployment.router.max_in_flight = 0
        status, _, headers = await post(router, chat(), origin=PAGE)
        assert (status, headers["retry-after"]) == (429, "1")
        assert_allows(headers)
        router.gateway.draining = True
        status, _, headers = await post(router, chat(), origin=PAGE)
        assert status == 503
        assert_allows(headers)
        assert "origin" not in fake.headers[0]


async def test_a_pooled_connection_and_a_short_answer_say_it_too(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with fake_replica(run, "math-0.g1"), a_router(run, a_deployment("math", allowed_origins=[PAGE])) as router:
        await ready(router)
        for origin in (PAGE, PAGE, OTHER, PAGE):
            status, _, headers = await post(router, chat(), origin=origin)
            assert status == 200
            if origin == PAGE:
                assert_allows(headers)
            else:
                assert_refuses(headers)
        status, _, headers = await post(router, chat())
        assert_refuses(headers)


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET / HTTP/1.1\r\norigin: %b\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nhost: x\r\norigin: %b\r\n" + b"a: b\r\n" * 300 + b"\r\n", b"431"),
        (b"POST / HTTP/1.1\r\nhost: x\r\norigin: %b\r\ntransfer-encoding: gzip\r\n\r\n", b"501"),
    ],
)
async def test_a_request_that_is_refused_early_says_it_too(
    tmp_path: Path, raw: bytes, status: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference leaves these refusals to aiohttp."""
    monkeypatch.setattr("tests.router.fakes.RELAY", OWN)
    run = a_run(tmp_path)
    for allowed, lines in (([PAGE], 1), ([], 0)):
        async with a_router(run, a_deployment("math", allowed_origins=allowed)) as router:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(router.url.rpartition(":")[2]))
            writer.write(raw % PAGE.encode())
            got = await asyncio.wait_for(reader.read(), GUARD_S)
            writer.close()
            assert got.startswith(b"HTTP/1.1 " + status)
            assert got.lower().count(b"access-control-allow-origin: " + PAGE.encode()) == lines


@pytest.mark.parametrize("origin", [PAGE, "null", None])
async def test_a_star_allows_every_page(tmp_path: Path, origin: str | None) -> None:
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math", allowed_origins=["*"])) as router:
        status, headers, _ = await ask(router, "OPTIONS", **preflight(origin))
        assert status == 204
        assert_allows(headers, "*")
        status, headers, _ = await ask(router, "GET", "/health", **({} if origin is None else {"origin": origin}))
        assert_allows(headers, "*")


async def test_without_allowed_origins_nothing_changes(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math")) as router:
        status, headers, _ = await ask(router, "OPTIONS", **preflight())
        assert (status, cors(headers), "vary" in headers) == (401, {}, False)
        status, headers, _ = await ask(router, "OPTIONS", **preflight(), authorization=f"Bearer {router.token}")
        assert (status, headers["allow"]) == (405, "POST")
        _, headers, _ = await ask(router, "GET", "/health", origin=PAGE)
        assert (cors(headers), "vary" in headers) == ({}, False)


@pytest.mark.parametrize("allowed", [[], [PAGE]])
async def test_what_an_engine_allows_is_dropped(tmp_path: Path, allowed: list[str]) -> None:
    """vLLM allows every page by default. Two values would be refused by a browser, and none is the engine's to give."""
    run = a_run(tmp_path)
    theirs = {
        "Access-Control-Allow-Origin": "*",
        "Access-Control-Allow-Credentials": "true",
        "Access-Control-Expose-Headers": "x-engine",
        "Access-Control-Allow-Methods": "*",
        "Access-Control-Allow-Headers": "*",
        "Access-Control-Max-Age": "1",
    }

    async def act(fake: FakeReplica, request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response(completion(), headers=theirs)

    async with (
        fake_replica(run, "math-0.g1", act) as fake,
        a_router(run, a_deployment("math", allowed_origins=allowed)) as router,
    ):
        await ready(router)
        for _ in range(2):
            status, _, headers = await post(router, chat(), origin=PAGE)
            assert status == 200
            if allowed:
                assert_allows(headers)
            else:
                assert cors(headers) == {}
        assert all("origin" not in sent for sent in fake.headers)


async def test_it_can_change_while_the_router_serves(tmp_path: Path) -> None:
    """Also for connections that are open."""
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math")) as router, aiohttp.ClientSession() as s:

        async def allowed() -> bool:
            async with s.get(router.url + "/health", headers={"origin": PAGE}) as response:
                return ALLOW_ORIGIN in response.headers

        assert not await allowed()
        for origins in ([PAGE], []):
            run.desired.write_text(json.dumps({"settings": {"router.allowed_origins": origins}}))
            router.control.config_watcher.check_now()
            await eventually(lambda at=origins: router.gateway.deployment.router.allowed_origins == at)  # type: ignore[misc]
            assert await allowed() is bool(origins)
