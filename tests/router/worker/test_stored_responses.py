"""`/v1/responses/ID` goes to the replica that has the response, whichever worker or router is asked."""

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web

from hpc_router.config.schema import ExpertConfig
from hpc_router.net import protocol
from hpc_router.router.worker import stored_responses
from hpc_router.state.registry import EngineInfo
from tests.router import fakes
from tests.router.fakes import (
    Act,
    FakeReplica,
    RunningRouter,
    a_deployment,
    a_router,
    a_run,
    fake_replica,
    hang,
    refuse,
    reset,
    stream,
)
from tests.router.support import GUARD_S, all_gauges_zero, client_of, ready, session, sim_replica
from tests.router.support import relay as relay
from tests.support.relays import OWN
from tests.support.waiting import eventually

ID = "resp_1"
PATH = f"/v1/responses/{ID}"
RESPONSE = {"id": ID, "object": "response", "status": "completed", "output": []}
NOT_FOUND = {"error": {"message": f"Response with id '{ID}' not found.", "type": "invalid_request_error", "code": 404}}
NOT_ALLOWED = {"detail": "Method Not Allowed"}


def keeps(*names: str, **by_method: Act) -> Act:
    """An engine that has these responses. `by_method`: what it does with a request for one of them."""

    async def act(fake: FakeReplica, request: web.BaseRequest) -> web.StreamResponse:
        if request.path.split("/")[3] not in names:
            return web.json_response(NOT_FOUND, status=404)
        if request.method in by_method:
            return await by_method[request.method](fake, request)
        if request.method != "GET":
            return web.json_response(NOT_ALLOWED, status=405)
        return web.json_response(RESPONSE, headers={"x-engine": fake.replica})

    return act


async def deleted(fake: FakeReplica, request: web.BaseRequest) -> web.StreamResponse:
    return web.json_response({"id": ID, "object": "response.deleted", "deleted": True})


async def ask(router: RunningRouter, method: str = "GET", path: str = PATH, **headers: str) -> tuple[int, Any, Any]:
    async with (
        session() as s,
        s.request(method, router.url + path, headers=router.headers | headers) as response,
    ):
        raw = await response.read()
        return (
            response.status,
            json.loads(raw) if response.content_type == "application/json" and raw else raw,
            response.headers,
        )


async def test_a_response_is_found_wherever_it_was_made_also_by_another_router(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    made: dict[str, Any] = {}
    async with sim_replica(run, "math-x0.g1"), sim_replica(run, "math-x1.g1"), sim_replica(run, "code-x0.g1"):
        async with a_router(run, a_deployment("math", "code", pin_bound=None)) as router, client_of(router) as client:
            await ready(router, 3)
            while len(made) < 3:
                raw = await client.responses.with_raw_response.create(
                    model="code" if "math-x1.g1" in made and "math-x0.g1" in made else "math", input="hello"
                )
                made[raw.headers["x-replica"]] = raw.parse()
            for response in made.values():
                assert await client.responses.retrieve(response.id) == response
        async with a_router(run, a_deployment("math", "code")) as router, client_of(router) as client:
            await ready(router, 3)
            for name, response in made.items():
                found = await client.responses.with_raw_response.retrieve(response.id)
                assert found.parse() == response
                assert found.headers["x-replica"] == name
                assert found.headers["x-expert"] == name.partition("-")[0]
                assert found.headers["x-route-reason"] == "named"
                assert found.headers["x-request-id"]
            with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
                await client.responses.cancel(response.id)
            with pytest.raises(openai.NotFoundError, match="does not serve DELETE"):
                await client.responses.delete(response.id)
            with pytest.raises(openai.NotFoundError, match="'resp_none' is not found: no ready replica has it"):
                await client.responses.retrieve("resp_none")
            await eventually(lambda: all_gauges_zero(router))


async def test_a_delete_reaches_only_the_replica_that_has_it(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", keeps(ID, DELETE=deleted)) as owner,
        fake_replica(run, "math-1.g1", keeps("resp_2")) as other,
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router, 2)
        status, value, headers = await ask(router, "DELETE")
        assert (status, value["deleted"], headers["x-replica"]) == (200, True, "math-0.g1")
        assert owner.lines == [f"GET {PATH}", f"DELETE {PATH}"]
        assert other.lines == [f"GET {PATH}"]
        await eventually(lambda: all_gauges_zero(router))


async def test_of_experts_that_share_an_engine_it_names_the_one_with_the_jobs(tmp_path: Path) -> None:
    """Unless the session tells which of them answered."""
    run, serves = a_run(tmp_path), {"law": "law", "math": "base"}
    own = {protocol.SESSION_HEADER: "mine"}
    deployment = a_deployment("math", "law")
    deployment.experts["law"] = ExpertConfig(model="/adapters/law", adapter_of="math")

    async def give(fake: FakeReplica, request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response(RESPONSE)

    async with fake_replica(run, "math-0.g1", give, serves=serves), a_router(run, deployment) as router:
        await ready(router)
        assert (await ask(router))[2]["x-expert"] == "math"
        async with session() as s:
            body = {"model": "law", "input": "hello"}
            async with s.post(router.url + "/v1/responses", json=body, headers=router.headers | own) as response:
                assert response.status == 200
        assert (await ask(router, **own))[2]["x-expert"] == "law"


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_the_only_replica_is_not_asked_first(tmp_path: Path, method: str) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", keeps(ID, DELETE=deleted)) as fake,
        fake_replica(run, "code-0.g1", engine=EngineInfo("transformers")) as stateless,
        fake_replica(run, "law-0.g1", keeps(ID)) as starting,
        a_router(run, a_deployment("math", "code", "law")) as router,
    ):
        starting.state = "starting"
        await ready(router, 2)
        await eventually(lambda: len(router.gateway.table.ready()) == 2)
        assert (await ask(router, method, PATH + "?include=a&starting_after=3"))[0] == 200
        assert (fake.lines, fake.queries) == ([f"{method} {PATH}"], ["include=a&starting_after=3"])
        assert fake.bodies == [b""]
        assert fake.headers[0].get("content-length", "0") == "0"
        assert (stateless.lines, starting.lines) == ([], [])


async def test_a_session_is_asked_for_where_it_was_answered_last(tmp_path: Path) -> None:
    run = a_run(tmp_path)

    async def make(fake: FakeReplica, request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response(RESPONSE)

    async with (
        fake_replica(run, "math-0.g1", make, keeps(ID)) as first,
        fake_replica(run, "math-1.g1", make, keeps(ID)) as second,
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router, 2)
        own = {protocol.SESSION_HEADER: "mine"}
        async with session() as s:
            body = {"model": "math", "input": "hello"}
            async with s.post(router.url + "/v1/responses", json=body, headers=router.headers | own) as response:
                answered = response.headers["x-replica"]
        assert (await ask(router, **own))[0] == 200
        asked = {fake.replica: fake.lines for fake in (first, second)}
        assert asked.pop(answered) == ["POST /v1/responses", f"GET {PATH}", f"GET {PATH}"]
        assert list(asked.values()) == [[]]
        assert (await ask(router, **{protocol.SESSION_HEADER: "a b"}))[0] == 400


async def test_head_is_a_get_without_a_body(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with fake_replica(run, "math-0.g1", keeps(ID)) as fake, a_router(run, a_deployment("math")) as router:
        await ready(router)
        status, value, headers = await ask(router, "HEAD")
        assert (status, value, headers["content-length"]) == (200, b"", str(len(json.dumps(RESPONSE))))
        assert fake.lines == [f"GET {PATH}"]


@pytest.mark.parametrize("others", [0, 2])
async def test_what_no_replica_has_is_404(tmp_path: Path, others: int) -> None:
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math")) as router:
        if others:
            async with fake_replica(run, "math-0.g1", keeps()), fake_replica(run, "math-1.g1", refuse(400)):
                await ready(router, 2)
                status, value, _ = await ask(router)
        else:
            status, value, _ = await ask(router)
    assert (status, value["error"]["code"], value["error"]["param"]) == (404, "response_not_found", "response_id")


@pytest.mark.parametrize("act", [reset, refuse(500), refuse(503), refuse(429)])
async def test_where_it_may_be_but_cannot_be_asked_is_503(tmp_path: Path, act: Act) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", keeps()),
        fake_replica(run, "math-1.g1", act),
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router, 2)
        status, value, headers = await ask(router)
        assert (status, headers["retry-after"]) == (503, "2")
        assert value["error"]["message"] == "it is not known where the response 'resp_1' is: math-1.g1 did not answer"


async def test_a_replica_that_does_not_answer_is_not_waited_for_if_another_has_it(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", keeps(ID)),
        fake_replica(run, "math-1.g1", hang) as silent,
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router, 2)
        assert (await ask(router))[2]["x-replica"] == "math-0.g1"
        await eventually(lambda: silent.cancelled == 1 or not silent.lines)


async def test_it_is_waited_for_no_longer_than_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_responses, "ASK_S", 0.05)
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", hang),
        fake_replica(run, "math-1.g1", keeps()),
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router, 2)
        assert (await ask(router))[0] == 503


async def test_a_client_that_leaves_ends_the_search(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", hang) as first,
        fake_replica(run, "math-1.g1", hang) as second,
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router, 2)
        call = asyncio.create_task(ask(router))
        await first.arrived.wait()
        await second.arrived.wait()
        call.cancel()
        await eventually(lambda: (first.cancelled, second.cancelled) == (1, 1))
        await eventually(lambda: all_gauges_zero(router))


async def test_a_get_is_repeated(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", reset, reset, reset, keeps(ID)) as fake,
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router)
        assert (await ask(router))[0] == 200
        assert len(fake.lines) == 4


@pytest.mark.parametrize(("method", "path"), [("DELETE", PATH), ("POST", PATH + "/cancel")])
async def test_what_may_have_taken_effect_is_not_repeated(tmp_path: Path, method: str, path: str) -> None:
    """A connection that broke after the request was sent says nothing about its effect. A pooled one that breaks at
    once was closed by the server before, so the request is sent once more."""
    run = a_run(tmp_path)
    async with fake_replica(run, "math-0.g1", reset) as fake, a_router(run, a_deployment("math")) as router:
        await ready(router)
        status, value, headers = await ask(router, method, path)
        assert (status, value["error"]["code"], headers["x-replica"]) == (502, "replica_failed", "math-0.g1")
        assert (
            value["error"]["message"] == f"math-0.g1 failed before its response, so the {method} may have taken effect"
        )
        assert set(fake.lines) == {f"{method} {path}"}
        assert len(fake.lines) == 1 if fakes.RELAY is OWN else len(fake.lines) <= 2
        await eventually(lambda: all_gauges_zero(router))


async def test_an_error_of_the_engine_to_a_delete_is_passed_on_at_once(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", refuse(500)) as fake,
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router)
        status, value, _ = await ask(router, "DELETE")
        assert (status, value["error"]["type"], len(fake.lines)) == (500, "scripted", 1)


async def test_a_delete_that_was_not_begun_is_sent_again(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    starting = refuse(503, headers={protocol.STARTING_HEADER: "1"})
    async with (
        fake_replica(run, "math-0.g1", starting, keeps(ID, DELETE=deleted)) as fake,
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router)
        status, value, _ = await ask(router, "DELETE")
        if status == 404:  # an engine that starts has no responses
            assert value["error"]["code"] == "response_not_found"
        else:
            assert (status, fake.lines) == (200, [f"DELETE {PATH}"] * 2)


async def test_a_replica_that_is_lost_takes_its_responses_along(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    draining = refuse(503, headers={protocol.DRAINING_HEADER: "1"})
    async with fake_replica(run, "math-0.g1", draining) as fake, a_router(run, a_deployment("math")) as router:
        await ready(router)
        fake.state = "draining"
        status, value, _ = await ask(router)
        assert (status, value["error"]["code"]) == (404, "response_not_found")


EVENTS = [b'event: response.created\ndata: {"type": "response.created"}\n\n', b"data: {}\n\n"]


async def test_a_background_response_is_streamed(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", stream(EVENTS), stream(EVENTS, then="reset")) as fake,
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router)
        path = PATH + "?stream=true&starting_after=0"
        status, raw, headers = await ask(router, path=path)
        assert (status, raw, headers["content-type"]) == (200, b"".join(EVENTS), "text/event-stream")
        _, raw, _ = await ask(router, path=path)
        error = raw.removeprefix(b"".join(EVENTS))
        assert error.startswith(b'event: error\ndata: {"type": "error", "code": "replica_failed"')
        assert fake.queries == ["stream=true&starting_after=0"] * 2
        await eventually(lambda: all_gauges_zero(router))


async def test_a_cancelled_response_is_no_failure(tmp_path: Path) -> None:
    """As an answer to a POST it is: nobody asked for the end. Here the client reads what it cancelled."""
    run, cancelled = a_run(tmp_path), RESPONSE | {"status": "cancelled"}

    async def give(fake: FakeReplica, request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response(cancelled)

    async with fake_replica(run, "math-0.g1", give) as fake, a_router(run, a_deployment("math")) as router:
        await ready(router)
        for method, path in (("GET", PATH), ("POST", PATH + "/cancel"), ("GET", PATH + "/input_items")):
            assert (await ask(router, method, path))[:2] == (200, cancelled)
        assert fake.lines == [f"GET {PATH}", f"POST {PATH}/cancel", f"GET {PATH}/input_items"]


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        (PATH + "/", PATH),
        ("/v1//responses//resp_1", PATH),
        ("/v1/responses/resp%5F1", PATH),
        ("/v1/responses/resp_bGl0ZWxsbTo6==", "/v1/responses/resp_bGl0ZWxsbTo6=="),
        ("/v1/responses/" + "x" * 256, "/v1/responses/" + "x" * 256),
        ("/v1/responses/" + "x" * 257, None),
        ("/v1/responses/a/b", None),
        ("/v1/responses/a%2Fb", None),
        ("/v1/responses/..%2F..%2Fsim%2Ffaults", None),
        ("/v1/responses/%2e%2e", None),
        ("/v1/responses/.", None),
        ("/v1/responses/_x", None),
        ("/v1/responses/a%00b", None),
        ("/v1/responses/a%0Ab", None),
        ("/v1/responses/a%0A", None),
        ("/v1/responses/%C3%A9", None),
        ("/v1/responses/a%FF", None),
        ("/v1/responses/a%20b", None),
        ("/v1/responses/a%25", None),
        ("/v1/responses/resp_1/cancel/x", None),
        ("/v1/responses/resp_1/other", None),
    ],
)
@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_only_an_id_reaches_an_engine(tmp_path: Path, method: str, path: str, sent: str | None) -> None:
    run = a_run(tmp_path)
    act = keeps("resp_1", "resp_bGl0ZWxsbTo6==", "x" * 256, DELETE=deleted)
    async with fake_replica(run, "math-0.g1", act) as fake, a_router(run, a_deployment("math")) as router:
        await ready(router)
        raw = b"%b %b HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\nconnection: close\r\n\r\n" % (
            method.encode(), path.encode(), router.token.encode(),
        )  # fmt: skip
        reader, writer = await asyncio.open_connection("127.0.0.1", int(router.url.rpartition(":")[2]))
        writer.write(raw)
        got = await asyncio.wait_for(reader.read(), GUARD_S)
        writer.close()
        if sent is None:
            assert got.startswith(b"HTTP/1.1 404 ")
            assert b'"unknown_path"' in got
            assert fake.lines == []
        else:
            assert got.startswith(b"HTTP/1.1 200 ")
            assert fake.lines == [f"{method} {sent}"]


async def test_it_needs_the_token(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", keeps(ID)) as fake,
        a_router(run, a_deployment("math")) as router,
        session() as s,
    ):
        await ready(router)
        for method in ("GET", "DELETE"):
            async with s.request(method, router.url + PATH) as response:
                assert response.status == 401
        assert fake.lines == []
