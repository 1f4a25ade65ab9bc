"""Paths that not every engine has: relayed for named experts, and a clear 404 where the engine lacks them."""

import json
from pathlib import Path
from typing import Any

import anthropic
import pytest
from aiohttp import web

from hpc_router.net import protocol
from tests.router.fakes import Act, FakeReplica, a_deployment, a_router, a_run, answer, fake_replica, refuse
from tests.router.support import GUARD_S, all_gauges_zero, post, ready, sim_replica
from tests.router.support import relay as relay
from tests.support.waiting import eventually

TURNS: Any = [{"role": "user", "content": "2+2?"}]
BODIES: dict[str, dict[str, Any]] = {
    protocol.COUNT_TOKENS: {"messages": TURNS},
    "/tokenize": {"prompt": "2 + 2"},
    "/detokenize": {"tokens": [1, 2]},
    **{path: {"text_1": "a", "text_2": ["b", "c"]} for path in ("/v1/score", "/score")},
    **{path: {"query": "a", "documents": ["b", "c"]} for path in ("/v1/rerank", "/rerank", "/v2/rerank")},
}
every_path = pytest.mark.parametrize("path", BODIES)
KEYS = {
    protocol.COUNT_TOKENS: {"input_tokens"},
    "/tokenize": {"count", "max_model_len", "tokens", "token_strs"},
    "/detokenize": {"prompt"},
    **{path: {"id", "object", "created", "model", "data", "usage"} for path in ("/v1/score", "/score")},
    **{path: {"id", "model", "results", "usage"} for path in ("/v1/rerank", "/rerank", "/v2/rerank")},
}


def say(status: int, body: bytes, content_type: str = "application/json") -> Act:
    async def act(fake: FakeReplica, request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=status, body=body, content_type=content_type)

    return act


def test_these_are_all_of_them() -> None:
    assert {*BODIES, *protocol.GENERATE_PATHS} == set(protocol.POST_PATHS)


@every_path
async def test_a_named_expert_is_asked(tmp_path: Path, path: str) -> None:
    run = a_run(tmp_path)
    async with sim_replica(run, "math-x0.g1"), a_router(run, a_deployment("math")) as router:
        await ready(router)
        status, value, headers = await post(router, {"model": "math", **BODIES[path]}, path=path + "/")
        assert (status, headers["x-expert"], headers["x-replica"]) == (200, "math", "math-x0.g1")
        assert set(value) >= KEYS[path]
        await eventually(lambda: all_gauges_zero(router))


@every_path
async def test_the_bytes_and_the_query_are_passed_on(tmp_path: Path, path: str) -> None:
    run = a_run(tmp_path)
    raw = json.dumps({"model": "math", **BODIES[path], "extra": 1.0}, indent=3).encode()
    async with (
        fake_replica(run, "math-0.g1", say(200, b'{"a": 1}')) as fake,
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router)
        assert (await post(router, raw, path=f"{path}?beta=true"))[:2] == (200, {"a": 1})
        assert (fake.lines, fake.bodies, fake.queries) == ([f"POST {path}"], [raw], ["beta=true"])


@every_path
async def test_it_fails_over_like_every_path(tmp_path: Path, path: str) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", refuse(503, headers={protocol.STARTING_HEADER: "1"})),
        fake_replica(run, "math-1.g1"),
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router, 2)
        for _ in range(2):
            status, _, headers = await post(router, {"model": "math", **BODIES[path]}, path=path)
            assert (status, headers["x-replica"]) == (200, "math-1.g1")


@every_path
async def test_auto_is_an_expert_for_the_tokens_of_a_message_only(tmp_path: Path, path: str) -> None:
    """The count is that of the expert that the message would go to; the other results mean something else elsewhere."""
    run = a_run(tmp_path)
    async with sim_replica(run, "math-x0.g1"), a_router(run, a_deployment("math", fallback="math")) as router:
        await ready(router)
        status, value, headers = await post(router, {"model": "auto", **BODIES[path]}, path=path)
        if path == protocol.COUNT_TOKENS:
            assert (status, value["input_tokens"], headers["x-expert"]) == (200, 1, "math")
        else:
            message = f"'auto' cannot be the model at {path}: the vectors, scores and tokens of experts differ"
            assert (status, value["error"]["param"]) == (400, "model")
            assert value["error"]["message"].startswith(message)


NO_SUCH_PATH = [
    (404, b'{"detail":"Not Found"}', "application/json"),
    (405, b'{"detail":"Method Not Allowed"}', "application/json"),
    (404, b'{"error":{"message":"Not Found","type":"Not Found","param":null,"code":404}}', "application/json"),
    (404, b'{"error":"Not Found"}', "application/json"),
    (404, b"", "text/plain"),
    (404, b"<html>no</html>", "text/html"),
    (404, b"[1]", "application/json"),
    (404, b"\xff{", "application/json"),
]


@pytest.mark.parametrize(("status", "body", "content_type"), NO_SUCH_PATH)
@pytest.mark.parametrize("path", ["/v1/rerank", protocol.EMBEDDINGS, protocol.MESSAGES])
async def test_an_engine_without_the_path_is_a_clear_404(
    tmp_path: Path, path: str, status: int, body: bytes, content_type: str
) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", say(status, body, content_type)) as fake,
        a_router(run, a_deployment("math", queue_timeout_s=4 * GUARD_S)) as router,
    ):
        await ready(router)
        for _ in range(2):
            code, value, headers = await post(router, {"model": "math", "input": "x"}, path=path)
            assert (code, headers["x-replica"], headers["content-type"]) == (404, "math-0.g1", "application/json")
            assert value["error"]["message"].startswith(
                f"the engine of 'math' (fake) does not serve POST {path} ({status}"
            )
            assert path == protocol.MESSAGES or value["error"]["code"] == "unsupported_operation"
            assert headers["x-request-id"]
        assert len(fake.bodies) == 2
        [replica] = router.gateway.table.all()
        assert not replica.recent_error
        await eventually(lambda: all_gauges_zero(router))


@pytest.mark.parametrize(
    "body",
    [
        b'{"error":{"message":"The model `x` does not exist.","type":"NotFoundError","param":"model","code":404}}',
        b'{"type":"error","error":{"type":"not_found_error","message":"x"}}',
        b'{"object":"error","message":"The model `x` does not exist.","code":404}',
        b'{"error":"model x not found"}',
    ],
)
async def test_an_engines_own_404_is_passed_on(tmp_path: Path, body: bytes) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", say(404, body)),
        fake_replica(run, "math-1.g1", say(404, body)),
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router, 2)
        status, value, headers = await post(router, {"model": "math"}, path="/tokenize")
        assert (status, value, headers["x-expert"]) == (404, json.loads(body), "math")


async def test_another_engine_of_the_expert_may_have_the_path(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", say(404, b'{"detail":"Not Found"}')) as without,
        fake_replica(run, "math-1.g1"),
        a_router(run, a_deployment("math", pin_bound=None)) as router,
    ):
        await ready(router, 2)
        while not without.bodies:
            status, _, headers = await post(router, {"model": "math"}, path="/tokenize")
            assert (status, headers["x-replica"]) == (200, "math-1.g1")


async def test_a_404_ends_a_row_of_errors(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    acts = [refuse(500), say(404, b'{"error":{"message":"x"}}'), answer]
    async with (
        fake_replica(run, "math-0.g1", *acts) as fake,
        fake_replica(run, "math-1.g1") as other,
        a_router(run, a_deployment("math", eject_errors=2, pin_bound=None)) as router,
    ):
        await ready(router, 2)
        known = router.gateway.table.get("math-0.g1")
        assert known is not None
        while len(fake.bodies) < 2:
            await post(router, {"model": "math"}, path="/tokenize")
        assert other.bodies
        assert not known.recent_error


async def test_the_anthropic_client_counts_tokens(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with sim_replica(run, "math-x0.g1"), a_router(run, a_deployment("math")) as router:
        await ready(router)
        async with anthropic.AsyncAnthropic(
            base_url=router.url, api_key=router.token, max_retries=0, timeout=GUARD_S
        ) as client:
            counted = await client.messages.count_tokens(model="math", system="be brief", messages=TURNS)
            assert counted.input_tokens == 3
            with pytest.raises(anthropic.NotFoundError, match="no model is named"):
                await client.messages.count_tokens(model="nobody", messages=TURNS)
