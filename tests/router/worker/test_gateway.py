"""The router between a real client and replicas that misbehave on script."""

import asyncio
import gc
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from yarl import URL

from hpc_router.client.router_identity import IdentityCheck, check_identity
from hpc_router.config.schema import ExpertConfig
from hpc_router.router.replicas.replica import RoutingState
from hpc_router.router.worker import request_body, route_request
from hpc_router.router.worker.gateway import LONG_BODY_BYTES
from hpc_router.router.worker.routed_request import RoutedRequest
from hpc_router.routing.prompt_text import Prompt, user_prompt
from hpc_router.state.registry import EngineInfo, Record, RecordKind, State
from tests.router.fakes import (
    NONCE,
    a_deployment,
    a_router,
    a_run,
    answer,
    event,
    fake_replica,
    hang,
    refuse,
    reset,
    stream,
)
from tests.router.support import CHAT, all_gauges_zero, chat, client_of, post, ready, session
from tests.router.support import relay as relay
from tests.routing.samples import EXPLANATION_KEYS
from tests.support.waiting import eventually


async def test_bytes_pass_through_untouched_both_ways(tmp_path: Path) -> None:
    """Unknown fields, odd spacing and escapes reach the engine as the client wrote them; so does its answer."""
    run = a_run(tmp_path)
    body = (
        b' { "messages":[{"role":"user","content":"\\u00e9 \xc3\xa9"}],\n"x_new": {"a":1.0e2}, "model" :"math","n":1 }'
    )
    async with fake_replica(run, "math-0.g1") as fake, a_router(run, a_deployment("math")) as router:
        await ready(router)
        status, value, headers = await post(router, body, **{"x-session-id": "s1", "x-request-id": "mine"})
        assert (status, value["choices"][0]["message"]["content"]) == (200, "math-0.g1")
        assert fake.bodies == [body]
        assert fake.headers[0]["x-session-id"] == "s1"
        assert fake.headers[0]["x-request-id"] == "mine"
        assert fake.headers[0]["authorization"] == f"Bearer {fake.key}", "never the client's own token"
        assert headers["x-engine"] == "fake"
        told = {k: headers[k] for k in ("x-request-id", "x-expert", "x-replica", "x-route-reason")}
        assert told == {
            "x-request-id": "mine", "x-expert": "math", "x-replica": "math-0.g1", "x-route-reason": "named",
        }  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/messages", "/v1/responses", "/route"])
async def test_a_long_body_is_read_outside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    run, threads = a_run(tmp_path), set[int]()

    def recorded(*args: Any, **options: Any) -> Prompt:
        threads.add(threading.get_ident())
        return user_prompt(*args, **options)

    monkeypatch.setattr(route_request, "user_prompt", recorded)
    fields = {"prompt": "2+2?"} if path == "/v1/completions" else {"input": "2+2?"} if path == "/v1/responses" else {}
    body = chat("auto") | fields | {"pad": "x" * LONG_BODY_BYTES}
    deployment = a_deployment("math", policy="round_robin")
    async with fake_replica(run, "math-0.g1") as fake, a_router(run, deployment) as router:
        await ready(router)
        status, value, _ = await post(router, body, path=path)
        assert (status, len(fake.bodies)) == (200, path != "/route"), value
    assert threads
    assert threading.get_ident() not in threads


async def test_the_model_name_of_a_long_body_is_located_outside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The body contains `"model"` twice, so that it is parsed member by member."""
    run, threads, parse = a_run(tmp_path), set[int](), request_body._parse_text

    def recorded(text: str) -> Any:
        threads.add(threading.get_ident())
        return parse(text)

    monkeypatch.setattr(request_body, "_parse_text", recorded)
    body = chat("math") | {"pad": {"model": "x" * LONG_BODY_BYTES}}
    async with (
        fake_replica(run, "math-0.g1", serves={"math": "other", "law": "law"}) as fake,
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router)
        status, value, _ = await post(router, body)
        assert status == 200, value
        assert json.loads(fake.bodies[0]) == body | {"model": "other"}
    assert threads
    assert threading.get_ident() not in threads


async def test_an_unknown_model_of_30_mb_is_refused_at_once(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math")) as router:
        before = time.thread_time()
        status, value, _ = await post(router, b'{"model": "%b"}' % (b"math" * 7_500_000))
        assert (status, value["error"]["code"]) == (404, "unknown_model")
        assert value["error"]["message"] == f"no model is named {'math' * 25!r} (valid: auto, math)"
        assert time.thread_time() - before < 1.0, "the search for similar names took 2 to 10 s"


async def test_a_long_body_of_too_many_values_is_refused(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math")) as router:
        raw = b'{"model": "math", "prompt": [%b[]]}' % (b"[]," * request_body.MAX_CONTAINERS)
        status, value, _ = await post(router, raw, path="/v1/completions")
        assert (status, value["error"]["code"]) == (400, "bad_request")
        assert value["error"]["message"].startswith("the body has too many values")


async def test_a_long_body_arrives_whole(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    body = json.dumps(chat() | {"pad": "x" * 3_000_000}).encode()
    async with fake_replica(run, "math-0.g1") as fake, a_router(run, a_deployment("math")) as router:
        await ready(router)
        assert (await post(router, body))[0] == 200
        assert fake.bodies == [body]


async def test_only_the_model_value_is_replaced_where_the_engine_has_another_name(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    body = b'{"model":  "auto" , "messages":[{"role":"user","content":"auto"}]}'
    async with (
        fake_replica(run, "math-0.g1", models=("/m@main",)) as fake,
        a_router(run, a_deployment("math", fallback="math")) as router,
    ):
        await ready(router)
        await post(router, body)
        assert fake.bodies == [body.replace(b'"auto" ', b'"/m@main" ')]


async def test_an_engine_of_several_experts_is_always_told_which_one_is_meant(tmp_path: Path) -> None:
    """By its name for it, whatever else it answers to: `auto` and the name of an expert that is gone are not its."""
    run = a_run(tmp_path)
    serves = {"base": "base", "math": "/adapters/math"}
    deployment = a_deployment("base", "math", "code", policy="round_robin")
    async with (
        fake_replica(run, "base-0.g1", models=("base", "math", "auto", "code"), serves=serves) as fake,
        a_router(run, deployment) as router,
        client_of(router) as client,
    ):
        await ready(router)
        answered = [(await post(router, chat(name)))[2] for name in ("base", "math", "auto", "auto")]
        assert [(h["x-expert"], h["x-replica"]) for h in answered] == [
            (expert, "base-0.g1") for expert in ("base", "math", "base", "math")
        ]
        asked = [json.loads(body)["model"] for body in fake.bodies]
        assert asked == ["base", "/adapters/math", "base", "/adapters/math"]
        listed = {m.id: m.model_dump().get("ready_replicas") async for m in client.models.list()}
        assert listed == {"auto": None, "base": 1, "code": 0, "math": 1}
        async with session() as s, s.get(router.url + "/status", headers=router.headers) as response:
            told = (await response.json())["experts"]
        shown = {name: [replica["replica"] for replica in expert["replicas"]] for name, expert in told.items()}
        assert shown == {"base": ["base-0.g1"], "math": ["base-0.g1"], "code": []}
        await eventually(lambda: all_gauges_zero(router))


async def test_a_model_card_has_the_facts_of_the_engines(tmp_path: Path) -> None:
    run, serves = a_run(tmp_path), {"math": "math", "law": "law"}
    deployment = a_deployment("math", "law", "code")
    deployment.experts["law"] = ExpertConfig(model="/adapters/law", adapter_of="math")

    def engine(max_model_len: int | None) -> EngineInfo:
        return EngineInfo(kind="vllm", model="m", max_model_len=max_model_len)

    async with (
        fake_replica(run, "math-0.g1", serves=serves, engine=engine(8192)),
        fake_replica(run, "math-1.g1", serves=serves, engine=engine(4096)),
        fake_replica(run, "math-2.g1", serves=serves, engine=engine(None)),
        fake_replica(run, "math-3.g1", serves=serves, engine=engine(1024)) as leaving,
        fake_replica(run, "ext-0.g1", engine=EngineInfo(model="other/model")),
        a_router(run, deployment) as router,
        client_of(router) as client,
    ):
        await ready(router, 5)
        leaving.state = "draining"
        await eventually(lambda: sum(r.state is RoutingState.READY for r in router.gateway.table.of("math")) == 3)
        cards = {m.id: m.model_dump() async for m in client.models.list()}
        facts = {name: (card["root"], card["parent"], card["max_model_len"]) for name, card in cards.items()}
        assert facts == {
            "auto": ("auto", None, 4096),
            "code": ("m", None, None),
            "ext": ("other/model", None, None),
            "law": ("/adapters/law", "math", 4096),
            "math": ("m", None, 4096),
        }
        assert (await client.models.retrieve("law")).model_dump() == cards["law"]


async def test_the_openai_client_chats_streams_and_lists(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    events = [event("a"), event("b")[:10], event("b")[10:] + event("c"), b"data: [DONE]\n\n"]
    async with (
        fake_replica(run, "math-0.g1", answer, stream(events)) as fake,
        a_router(run, a_deployment("math", "code", fallback="math")) as router,
        client_of(router) as client,
    ):
        await ready(router)
        done = await client.chat.completions.create(model="math", messages=[{"role": "user", "content": "hi"}])
        assert done.choices[0].message.content == "math-0.g1"
        chunks = await client.chat.completions.create(
            model="auto", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        assert [c.choices[0].delta.content async for c in chunks] == ["a", "b", "c"]
        assert [m.id async for m in client.models.list()] == ["auto", "code", "math"]
        assert (await client.models.retrieve("math")).id == "math"
        assert len(fake.bodies) == 2
        await eventually(lambda: all_gauges_zero(router))


async def test_errors_are_the_clients_own_exceptions(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", refuse(400)) as _,
        a_router(run, a_deployment("math")) as router,
        client_of(router) as client,
    ):
        await ready(router)
        messages: Any = [{"role": "user", "content": "hi"}]
        with pytest.raises(openai.NotFoundError, match="did you mean 'math'"):
            await client.chat.completions.create(model="maths", messages=messages)
        with pytest.raises(openai.NotFoundError, match=r"policy\.fallback"):
            await client.chat.completions.create(model="auto", messages=messages)
        with pytest.raises(openai.BadRequestError, match="scripted 400"):
            await client.chat.completions.create(model="math", messages=messages)
        with pytest.raises(openai.BadRequestError, match="'auto' cannot be the model at /v1/embeddings"):
            await client.embeddings.create(model="auto", input="hi")
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "ends too early"),
        (b"[]", 400, "JSON object"),
        (b"\xff", 400, "UTF-8"),
        ({"messages": [{"role": "user", "content": "x"}]}, 400, "'model' is missing"),
        (chat(model="nobody"), 404, "valid: auto, math"),
        (b'{"model": "math", "pad": "' + b"x" * 2**21 + b'"}', 413, "max_body_mb"),
    ],
)
async def test_bad_requests_are_told_why(tmp_path: Path, body: Any, status: int, says: str) -> None:
    """In OpenAI's error shape, without reaching a replica, and with every counter back at zero."""
    run = a_run(tmp_path)
    async with fake_replica(run, "math-0.g1") as fake, a_router(run, a_deployment("math", max_body_mb=1)) as router:
        await ready(router)
        got, value, _ = await post(router, body)
        assert got == status
        assert set(value["error"]) == {"message", "type", "param", "code"}
        assert says in value["error"]["message"]
        assert not fake.bodies
        await eventually(lambda: all_gauges_zero(router))


@pytest.mark.parametrize(
    ("value", "streams"),
    [
        (True, True), (1, True), (1.0, True), ("true", True), ("True", True), ("on", True), ("1", True), ("y", True),
        (None, False), (0, False), ("no", False), ("false", False), (2, False), ("maybe", False), ([], False),
    ],
)  # fmt: skip
async def test_stream_is_read_as_engines_read_it(tmp_path: Path, value: object, streams: bool) -> None:
    """vLLM takes the numbers and words of pydantic. Whatever it is, the engine gets it and decides whether it is valid;
    here it decides whether the bytes pass as they come."""
    run = a_run(tmp_path)
    act = stream([b"one ", b"two"], then="hang", content_type="application/json")
    async with fake_replica(run, "math-0.g1", act) as fake, a_router(run, a_deployment("math")) as router:
        await ready(router)
        async with aiohttp.ClientSession(headers={"authorization": f"Bearer {router.token}"}) as client:
            call = asyncio.create_task(client.post(router.url + CHAT, json={**chat(), "stream": value}))
            await eventually(lambda: fake.bodies)
            assert json.loads(fake.bodies[0])["stream"] == value
            if streams:
                assert await (await call).content.readexactly(7) == b"one two"
            else:
                assert not call.done()
            fake.go_on.set()
            assert (await (await call).read()).endswith(b"two"[3 * streams :])
        await eventually(lambda: all_gauges_zero(router))


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"messages": [{"role": "user", "content": None}]}, CHAT),
        ({"messages": [{"role": "user"}]}, CHAT),
        ({"messages": [{"role": "user", "content": 3}]}, CHAT),
        ({"messages": [{"role": "user", "content": ["hi", {"type": "text"}, {"type": []}]}]}, CHAT),
        ({"messages": [{"content": "hi"}, "hi", None]}, CHAT),
        ({"messages": []}, CHAT),
        ({"messages": "hi"}, CHAT),
        ({}, CHAT),
        ({"prompt": None}, "/v1/completions"),
        ({"prompt": ["hi", None, [1, "a"]]}, "/v1/completions"),
        ({"input": {}}, "/v1/responses"),
        ({"input": [None, {"role": "user", "content": 1}]}, "/v1/responses"),
        ({"messages": [{"role": "user", "content": None}]}, "/v1/messages"),
    ],
    ids=repr,
)
async def test_auto_takes_what_a_named_expert_takes(tmp_path: Path, fields: dict[str, Any], path: str) -> None:
    """Whether a body is valid is for the engine to say; `/route` reads it alike."""
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1") as fake,
        a_router(run, a_deployment("math", fallback="math")) as router,
    ):
        await ready(router)
        for model in ("math", "auto"):
            assert (await post(router, {"model": model, **fields}, path=path))[0] == 200
        assert [json.loads(body) | {"model": ""} for body in fake.bodies] == [{"model": "", **fields}] * 2
        status, explained, _ = await post(router, fields, path="/route")
        assert (status, explained.get("expert")) == ((200, "math") if fields else (400, None))
        await eventually(lambda: all_gauges_zero(router))


async def test_paths_tokens_and_open_paths(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math")) as router, session() as s:
        cases = [
            ("GET", "/health", {}, 200),
            ("GET", "/ready", {}, 503),
            ("GET", "/status", {}, 401),
            ("GET", "/metrics", {}, 401),
            ("POST", CHAT, {}, 401),
            ("GET", "/status", {"authorization": f"Bearer {router.token}x"}, 401),
            ("GET", "/status", router.headers, 200),
            ("GET", "/metrics", router.headers, 200),
            ("GET", "//health", {}, 200),
            ("GET", "//status", {}, 401),
            ("GET", "/v1//models", router.headers, 200),
            ("GET", "/v1//models//math", router.headers, 200),
            ("GET", "/nowhere", router.headers, 404),
            ("GET", "/v1/models/nobody", router.headers, 404),
            ("HEAD", "/v1/models/math", router.headers, 200),
            ("GET", CHAT, {}, 401),
        ]
        for method, path, headers, status in cases:
            async with s.request(
                method, router.url + path, headers=headers, data=b"{}" if method == "POST" else None
            ) as r:
                assert (method, path, r.status) == (method, path, status)


GET, STORED = "GET, HEAD", "GET, DELETE, HEAD"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", CHAT, "POST"),
        ("DELETE", CHAT, "POST"),
        ("PUT", "/v1/rerank", "POST"),
        ("GET", "/tokenize", "POST"),
        ("OPTIONS", CHAT, "POST"),
        ("GET", "/v1/responses", "POST"),
        ("GET", "/v1/responses/", "POST"),
        ("POST", "/health", GET),
        ("POST", "/v1/models", GET),
        ("DELETE", "/v1/models/math", GET),
        ("POST", "/v1/responses/resp_1", STORED),
        ("PATCH", "/v1//responses/resp_1/", STORED),
        ("GET", "/v1/responses/resp_1/cancel", "POST"),
        ("DELETE", "/v1/responses/resp_1/input_items", GET),
    ],
)
async def test_a_wrong_method_is_405_with_the_valid_ones(tmp_path: Path, method: str, path: str, allowed: str) -> None:
    run = a_run(tmp_path)
    async with (
        a_router(run, a_deployment("math")) as router,
        session() as s,
        s.request(method, router.url + path, headers=router.headers) as r,
    ):
        assert (r.status, r.headers["allow"]) == (405, allowed)
        assert (await r.json())["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("encoding", ["gzip", "compress", "identity, gzip"])
@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/responses", "/v1/embeddings", "/route"])
async def test_a_compressed_body_is_refused_with_the_valid_encoding(tmp_path: Path, path: str, encoding: str) -> None:
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math")) as router:
        status, value, headers = await post(router, b"{}", path=path, **{"content-encoding": encoding})
        assert (status, headers["accept-encoding"]) == (415, "identity")
        assert value["error"]["message"] == "request bodies must not be compressed: send them without Content-Encoding"
        assert path == "/v1/messages" or value["error"]["code"] == "unsupported_encoding"


async def test_an_uncompressed_body_is_served_and_the_engine_is_asked_for_the_same(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with fake_replica(run, "math-0.g1") as fake, a_router(run, a_deployment("math")) as router:
        await ready(router)
        sent = {"content-encoding": "Identity", "accept-encoding": "gzip, br"}
        assert (await post(router, chat(), **sent))[0] == 200
        assert fake.headers[0]["accept-encoding"] == "identity"


async def test_open_mode_asks_no_token(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        a_router(run, a_deployment("math", open=True)) as router,
        session() as s,
        s.get(router.url + "/v1/models") as response,
    ):
        assert response.status == 200


FAULTS = {
    "reset": reset,
    "500": refuse(500),
    "503": refuse(503),
    "429": refuse(429),
    "half an event": stream([b"data: half"], then="reset"),
    "half a body": stream([b'{"a'], then="reset", content_type="application/json"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("model", ["math", "auto"])
async def test_a_failure_before_the_first_byte_goes_elsewhere(tmp_path: Path, fault: Any, model: str) -> None:
    """The client sees the other replica's answer and nothing of the failure."""
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", fault) as sick,
        fake_replica(run, "math-1.g1") as well,
        a_router(run, a_deployment("math", fallback="math")) as router,
    ):
        await ready(router, 2)
        for _ in range(2):
            status, value, _ = await post(router, chat(model))
            assert (status, value["choices"][0]["message"]["content"]) == (200, "math-1.g1")
        assert sick.bodies
        assert len(well.bodies) == 2
        await eventually(lambda: all_gauges_zero(router))


async def test_an_error_nobody_does_better_is_passed_on(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", refuse(429, headers={"retry-after": "7"})),
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router)
        status, value, headers = await post(router, chat())
        assert (status, value["error"]["message"], headers["retry-after"]) == (429, "scripted 429", "7")


async def test_auto_falls_back_when_the_expert_is_gone(tmp_path: Path) -> None:
    """The fallback's replica answers, with reason `unavailable`; the named expert is waited for, then 503."""
    run = a_run(tmp_path)
    deployment = a_deployment("math", "general", policy="round_robin", queue_timeout_s=0.2)
    async with fake_replica(run, "general-0.g1", models=("general",)), a_router(run, deployment) as router:
        await ready(router)
        status, value, headers = await post(router, chat("auto"))
        assert (status, headers["x-expert"]) == (200, "general")
        status, value, headers = await post(router, chat("math"))
        assert status == 503
        assert int(headers["retry-after"]) >= 1
        assert "math" in value["error"]["message"]
        await eventually(lambda: all_gauges_zero(router))


async def test_a_named_request_waits_for_its_expert_to_come_back(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math")) as router:
        waiting = asyncio.create_task(post(router, chat()))
        await eventually(lambda: router.gateway.table.waiting("math") == 1 or router.gateway.in_flight.count == 1)
        async with fake_replica(run, "math-0.g1"):
            status, _, _ = await waiting
        assert status == 200


async def test_requests_beyond_the_capacity_wait_their_turn(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", hang, capacity=1) as fake,
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router)
        tasks = [asyncio.create_task(post(router, chat())) for _ in range(3)]
        await eventually(lambda: router.gateway.table.waiting("math") == 2)
        await fake.arrived.wait()
        assert len(fake.bodies) == 1
        fake.go_on.set()
        assert [status for status, _, _ in await asyncio.gather(*tasks)] == [200, 200, 200]
        await eventually(lambda: all_gauges_zero(router))


async def test_more_than_max_in_flight_is_refused_at_once(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", hang) as fake,
        a_router(run, a_deployment("math", max_in_flight=1)) as router,
    ):
        await ready(router)
        first = asyncio.create_task(post(router, chat()))
        await fake.arrived.wait()
        status, value, headers = await post(router, chat())
        assert (status, value["error"]["code"]) == (429, "overloaded")
        assert "retry-after" in headers
        fake.go_on.set()
        assert (await first)[0] == 200


async def test_a_stream_that_breaks_ends_with_an_error_event(tmp_path: Path) -> None:
    """Whole events, then an event with an `error` key, on which the openai client raises; never a silent cut."""
    run = a_run(tmp_path)
    broken = stream([event("a"), event("b"), b"data: unfinished"], then="reset")
    async with (
        fake_replica(run, "math-0.g1", broken),
        a_router(run, a_deployment("math")) as router,
        client_of(router) as client,
    ):
        await ready(router)
        _, raw, _ = await post(router, chat(stream=True))
        assert raw.startswith(event("a") + event("b") + b'data: {"error"')
        assert raw.endswith(b"\n\n")
        assert b"unfinished" not in raw
        chunks = await client.chat.completions.create(
            model="math", messages=[{"role": "user", "content": "x"}], stream=True
        )
        assert [(await anext(chunks)).choices[0].delta.content for _ in range(2)] == ["a", "b"]
        with pytest.raises(openai.APIError, match="failed before it had finished"):
            await anext(chunks)
        await eventually(lambda: all_gauges_zero(router))


async def test_a_stream_that_ends_inside_an_event_is_no_clean_end(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", stream([event("a"), b"data: unfin"])),
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router)
        _, raw, _ = await post(router, chat(stream=True))
        assert raw.startswith(event("a") + b'data: {"error"')


async def test_a_long_answer_that_breaks_is_cut_visibly(tmp_path: Path) -> None:
    """Beyond `hold_mb` a body is streamed; its failure breaks the client's connection."""
    run = a_run(tmp_path)
    pieces = [b"x" * 2**20] * 3
    broken = stream(pieces, then="reset", content_type="application/json")
    async with fake_replica(run, "math-0.g1", broken), a_router(run, a_deployment("math", hold_mb=1)) as router:
        await ready(router)
        with pytest.raises(aiohttp.ClientError):
            await post(router, chat())
        await eventually(lambda: all_gauges_zero(router))


@pytest.mark.parametrize("act", [hang, stream([event("a")], then="hang")], ids=["before the first byte", "mid-stream"])
async def test_a_client_that_leaves_cancels_upstream(tmp_path: Path, act: Any) -> None:
    run = a_run(tmp_path)
    async with fake_replica(run, "math-0.g1", act) as fake, a_router(run, a_deployment("math")) as router:
        await ready(router)
        call = asyncio.create_task(post(router, chat(stream=True)))
        await fake.arrived.wait()
        call.cancel()
        await eventually(lambda: fake.cancelled == 1, within_s=5)
        await eventually(lambda: all_gauges_zero(router), within_s=5)


async def test_a_client_that_leaves_the_queue_leaves_nothing(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math")) as router:
        call = asyncio.create_task(post(router, chat()))
        await eventually(lambda: router.gateway.in_flight.count == 1)
        call.cancel()
        await eventually(lambda: all_gauges_zero(router), within_s=5)


async def test_a_stream_that_falls_silent_ends_with_an_error_event(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", stream([event("a")], then="hang")),
        a_router(run, a_deployment("math", idle_timeout_s=0.2)) as router,
    ):
        await ready(router)
        _, raw, _ = await post(router, chat(stream=True))
        assert raw.startswith(event("a") + b'data: {"error"')


async def test_a_draining_replica_gets_nothing_new(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", refuse(503, headers={"x-hpc-router-draining": "1"})) as leaving,
        fake_replica(run, "math-1.g1"),
        a_router(run, a_deployment("math", probe_s=60)) as router,
    ):
        await ready(router, 2)
        assert [(await post(router, chat()))[0] for _ in range(4)] == [200] * 4
        assert len(leaving.bodies) == 1
        replica = router.gateway.table.get("math-0.g1")
        assert replica is not None
        assert replica.state is RoutingState.DRAINING


async def test_status_metrics_and_route_tell_the_truth(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with fake_replica(run, "math-0.g1"), a_router(run, a_deployment("math", fallback="math")) as router:
        await ready(router)
        await post(router, chat("auto"))
        async with session() as s:
            async with s.get(router.url + "/status", headers=router.headers) as response:
                status = await response.json()
            async with s.get(router.url + "/metrics", headers=router.headers) as response:
                metrics = await response.text()
        assert status["experts"]["math"]["ready"] == 1
        assert status["experts"]["math"]["replicas"][0]["replica"] == "math-0.g1"
        assert 'hpc_router_requests_total{expert="math",reason="policy",status="200"} 1.0' in metrics
        assert 'hpc_router_replicas{expert="math",standing="ready"} 1.0' in metrics
        assert "hpc_router_requests_in_flight 0.0" in metrics
        explained = (await post(router, {"prompt": "2+2"}, path="/route"))[1]
        assert set(explained) == {*EXPLANATION_KEYS, "replicas"}
        assert explained["replicas"] == [], "there is no choice"
        assert (explained["expert"], explained["reason"]) == ("math", "policy")


async def test_a_hung_replica_is_left_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers neither probes nor requests: it is ejected, and what it had goes elsewhere."""
    monkeypatch.setattr("hpc_router.router.replicas.replica.LOST_S", 0.1)
    run = a_run(tmp_path)
    deployment = a_deployment("math", "code", policy="round_robin", fallback="code", probe_timeout_s=0.1)
    async with (
        fake_replica(run, "math-0.g1", hang) as hung,
        a_router(run, deployment) as router,
    ):
        await ready(router)
        calls = [asyncio.create_task(post(router, chat(model))) for model in ("math", "auto")]
        await eventually(lambda: len(hung.bodies) == 2)
        async with fake_replica(run, "math-1.g1"), fake_replica(run, "code-0.g1"):
            await ready(router, 3)
            hung.silent = True
            for status, value, _ in await asyncio.gather(*calls):
                assert status == 200
                assert value["choices"][0]["message"]["content"] != "math-0.g1"
        hung.go_on.set()


async def test_a_stream_of_a_lost_replica_ends_with_an_error_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpc_router.router.replicas.replica.LOST_S", 0.1)
    run = a_run(tmp_path)
    act = stream([event("a")], then="hang")
    async with (
        fake_replica(run, "math-0.g1", act) as hung,
        a_router(run, a_deployment("math", probe_timeout_s=1)) as router,
    ):
        await ready(router)
        call = asyncio.create_task(post(router, chat(stream=True)))
        await hung.arrived.wait()
        hung.silent = True
        _, raw, _ = await call
        assert raw.startswith(event("a") + b'data: {"error"')
        error = json.loads(raw.removeprefix(event("a") + b"data: ").partition(b"\n")[0])["error"]
        assert error["code"] == "replica_failed"
        assert error["message"].startswith("math-0.g1 failed before it had finished: it does not answer any more (")
        hung.go_on.set()


async def test_the_query_goes_upstream_as_it_came(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with fake_replica(run, "math-0.g1") as fake, a_router(run, a_deployment("math")) as router, session() as s:
        await ready(router)
        url = URL(f"{router.url}{CHAT}?x=a%20b&y=%c3%a9%23", encoded=True)
        async with s.post(url, json=chat(), headers=router.headers) as response:
            assert response.status == 200
        assert fake.queries == ["x=a%20b&y=%c3%a9%23"]


async def test_a_client_that_expects_to_be_told_to_go_on_is_told(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with fake_replica(run, "math-0.g1"), a_router(run, a_deployment("math")) as router, session() as s:
        await ready(router)
        async with s.post(router.url + CHAT, json=chat(), headers=router.headers, expect100=True) as response:
            assert response.status == 200


async def test_head_and_draining(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with fake_replica(run, "math-0.g1"), a_router(run, a_deployment("math")) as router, session() as s:
        await ready(router)
        async with s.head(router.url + "/ready") as response:
            assert (response.status, await response.read()) == (200, b"")
        router.gateway.draining = True
        async with s.get(router.url + "/ready") as response:
            assert (response.status, response.headers["connection"]) == (503, "close")


API_CALLS = [
    ("POST", CHAT),
    ("POST", "/v1/embeddings"),
    ("POST", "/route"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/math"),
]


async def test_while_it_drains_nothing_new_is_taken(tmp_path: Path) -> None:
    """Its successor takes it: `follow` looks for the header. What is in flight ends, and one can watch it do so."""
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", hang) as fake,
        a_router(run, a_deployment("math")) as router,
        session() as s,
    ):
        await ready(router)
        last = asyncio.create_task(post(router, chat()))
        await fake.arrived.wait()
        router.gateway.draining = True
        for method, path in API_CALLS:
            body = json.dumps(chat()).encode() if method == "POST" else None
            async with s.request(method, router.url + path, headers=router.headers, data=body) as response:
                told = {
                    name: response.headers.get(name) for name in ("x-hpc-router-draining", "retry-after", "connection")
                }
                error = (await response.json())["error"]
            assert (response.status, told) == (
                503, {"x-hpc-router-draining": "1", "retry-after": "2", "connection": "close"},
            )  # fmt: skip
            assert (error["type"], error["code"]) == ("service_unavailable", "draining")
        async with s.post(router.url + CHAT, json=chat()) as response:
            assert response.status == 401, "strangers are told nothing"
        for path in ("/health", "/status", "/metrics"):
            async with s.get(router.url + path, headers=router.headers) as response:
                assert (path, response.status) == (path, 200)
        fake.go_on.set()
        assert (await last)[0] == 200
        assert len(fake.bodies) == 1


async def test_it_proves_to_be_the_router_of_its_record(tmp_path: Path) -> None:
    """Without a token, also while it drains."""
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math")) as router:
        record = Record(RecordKind.ROUTER, "router-0.g1", router.url, State.READY, {}, nonce=NONCE)
        for draining in (False, True):
            router.gateway.draining = draining
            assert await asyncio.to_thread(check_identity, record, run.secret()) is IdentityCheck.PROVEN
        assert (
            await asyncio.to_thread(check_identity, replace(record, nonce="another"), run.secret())
            is IdentityCheck.OTHER_PROCESS
        )
        assert await asyncio.to_thread(check_identity, record, "guessed") is IdentityCheck.OTHER_PROCESS


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("", 200),
        ("?challenge=", 200),
        ("?challenge=0a", 200),
        (f"?challenge={'f' * 256}", 200),
        (f"?challenge={'f' * 257}", 400),
        ("?challenge=xyz", 400),
        ("?challenge=%ED%A0%80", 400),
        ("?challenge=0a%0A", 400),
        ("?challenge=%D9%A1", 400),
    ],
)
async def test_challenges_are_short_and_plain(tmp_path: Path, query: str, status: int) -> None:
    async with (
        a_router(a_run(tmp_path), a_deployment("math")) as router,
        session() as s,
        s.get(URL(f"{router.url}/health{query}", encoded=True)) as response,
    ):
        assert response.status == status
        if status == 200:
            said = await response.json()
            assert (said["status"], said["replica"]) == ("ok", "router-0.g1")
            assert (said["answer"] is not None) == (len(query) > len("?challenge="))


async def test_an_unreadable_request_leaves_no_content_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math")) as router:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(router.url.rpartition(":")[2]))
        writer.write(b"GET /status HTTP/1.1\r\nhost: x\r\nauthorization: Bearer SECRET\x01\r\n\r\n")
        assert b" 400 " in await reader.readline()
        writer.close()
        await writer.wait_closed()
    assert "SECRET" not in caplog.text


async def test_a_client_that_sends_no_body_is_given_up(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math", idle_timeout_s=0.1)) as router:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(router.url.rpartition(":")[2]))
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {router.token}\r\ncontent-length: 9\r\n\r\n"
        writer.write(head.encode())
        assert b" 408 " in await reader.readline()
        writer.close()
        await writer.wait_closed()
        await eventually(lambda: all_gauges_zero(router))


async def test_a_doubled_key_is_told_and_holds_no_place(tmp_path: Path) -> None:
    """Where the model's name has to be replaced, which needs to know where it stands."""
    run = a_run(tmp_path)
    body = b'{"a":{"model":"x"},"mode\\u006c":"math","n":1,"n":1,"messages":[{"role":"user","content":"Hello"}]}'
    async with (
        fake_replica(run, "math-0.g1", models=("theirs",)) as fake,
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router)
        for _ in range(3):
            status, value, _ = await post(router, body)
            assert (status, "occurs twice" in value["error"]["message"]) == (400, True)
            await eventually(lambda: all_gauges_zero(router))
        assert not fake.bodies


async def test_finished_requests_wait_for_no_garbage_collector(tmp_path: Path) -> None:
    """Their bodies would pile up: what a request made is gone with its answer, streamed or not."""
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", stream([event("a")]), answer) as fake,
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router)
        gc.collect()
        gc.disable()
        try:
            for streaming in (True, False):
                assert (await post(router, chat(stream=streaming)))[0] == 200
            await eventually(lambda: all_gauges_zero(router))
            left = [thing for thing in gc.get_objects() if isinstance(thing, RoutedRequest)]
        finally:
            gc.enable()
        assert (left, len(fake.bodies)) == ([], 2)
