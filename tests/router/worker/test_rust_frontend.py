"""Requests that vLLM's Rust front end does not serve: a clear error, and no replica is blamed. The responses are those
of version 0.32."""

import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from hpc_router.net import protocol
from hpc_router.router.replicas.replica import RoutingState
from hpc_router.router.worker.rust_frontend import is_constrained
from hpc_router.state.registry import EngineInfo
from tests.router.fakes import Act, FakeReplica, a_deployment, a_router, a_run, answer, fake_replica
from tests.router.support import all_gauges_zero, chat, post, ready
from tests.router.support import relay as relay
from tests.support.waiting import eventually

RUST = EngineInfo(kind="vllm", version="0.32.0", frontend="rust")
PYTHON = EngineInfo(kind="vllm", version="0.32.0", frontend="python")
ENGINE = "the engine of 'math' (vllm, Rust front end) "
NO_SUCH_PROMPT = (
    "Failed to deserialize the JSON body into the target type: prompt: data did not match any variant of untagged enum "
    "Prompt at line 1 column 56"
)
ONLY_ONE = "Only n=1 is supported."
NO_PARSER = "failed to submit chat request: tool parsing is disabled by frontend configuration"
INTERNAL = "Internal server error"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
NAMED_TOOL: dict[str, Any] = {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "add"}}}


def say(status: int, message: str) -> Act:
    """An error of the front end."""
    kind = "server_error" if status == 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": kind}

    async def act(fake: FakeReplica, request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"error": error}, status=status)

    return act


REFUSED: list[tuple[str, dict[str, Any], Act, str, str]] = [
    (protocol.COMPLETIONS, {"prompt": ["a", "b"]}, say(400, NO_SUCH_PROMPT), "prompt", "takes one prompt per request"),
    (protocol.COMPLETIONS, {"prompt": [[1], [2]]}, say(400, NO_SUCH_PROMPT), "prompt", "takes one prompt per request"),
    (
        protocol.COMPLETIONS,
        {"prompt": "a", "n": 2},
        say(400, ONLY_ONE),
        "n",
        "makes one answer per request, and not n=2",
    ),
    (protocol.CHAT, {"n": 3}, say(400, ONLY_ONE), "n", "makes one answer per request, and not n=3"),
    (protocol.CHAT, {"tools": [TOOL]}, say(500, NO_PARSER), "tools", "was started without a tool parser"),
]
refused = pytest.mark.parametrize(("path", "fields", "act", "param", "what"), REFUSED)


@refused
@pytest.mark.parametrize("stream", [False, True])
async def test_what_it_cannot_serve_is_named(
    tmp_path: Path, path: str, fields: dict[str, Any], act: Act, param: str, what: str, stream: bool
) -> None:
    """All its replicas would say the same, so none is asked again."""
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", act, engine=RUST) as one,
        fake_replica(run, "math-1.g1", act, engine=RUST) as other,
        a_router(run, a_deployment("math", eject_errors=1)) as router,
    ):
        await ready(router, 2)
        status, value, headers = await post(router, chat("math", **fields, stream=stream), path=path)
        assert (status, headers["x-expert"], value["error"]["param"]) == (400, "math", param)
        assert value["error"]["code"] == "unsupported_value"
        assert value["error"]["message"].startswith(ENGINE + what)
        assert len(one.bodies) + len(other.bodies) == 1
        assert {(r.state, r.recent_error) for r in router.gateway.table.all()} == {(RoutingState.READY, False)}
        await eventually(lambda: all_gauges_zero(router))


@refused
async def test_another_front_end_of_the_expert_may_serve_it(
    tmp_path: Path, path: str, fields: dict[str, Any], act: Act, param: str, what: str
) -> None:
    """As while a deployment changes from one to the other."""
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", act, engine=RUST) as rust,
        fake_replica(run, "math-1.g1", engine=PYTHON),
        a_router(run, a_deployment("math", pin_bound=None)) as router,
    ):
        await ready(router, 2)
        while not rust.bodies:
            status, _, headers = await post(router, chat("math", **fields), path=path)
            assert (status, headers["x-replica"]) == (200, "math-1.g1")
        assert not any(r.recent_error for r in router.gateway.table.all())


@pytest.mark.parametrize(
    ("engine", "fields", "act"),
    [
        (PYTHON, {"prompt": ["a", "b"]}, say(400, NO_SUCH_PROMPT)),
        (PYTHON, {"n": 2}, say(400, ONLY_ONE)),
        (RUST, {"prompt": [1, 2, 3]}, say(400, "prompt is too long")),
        (RUST, {"prompt": "a", "n": 1, "suffix": "b"}, say(400, "suffix is not supported.")),
        (RUST, {"n": True}, say(400, "n: invalid type")),
    ],
)
async def test_any_other_400_is_the_engines_own(
    tmp_path: Path, engine: EngineInfo, fields: dict[str, Any], act: Act
) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", act, engine=engine),
        a_router(run, a_deployment("math")) as router,
    ):
        await ready(router)
        status, value, headers = await post(router, chat("math", **fields), path=protocol.COMPLETIONS)
        assert (status, value["error"]["code"], headers["x-replica"]) == (400, "invalid_request_error", "math-0.g1")


async def test_a_path_that_it_lacks_is_a_404_that_names_it(tmp_path: Path) -> None:
    """Its own response is empty."""
    run = a_run(tmp_path)

    async def act(fake: FakeReplica, request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=404)

    async with fake_replica(run, "math-0.g1", act, engine=RUST), a_router(run, a_deployment("math")) as router:
        await ready(router)
        for path in (protocol.RESPONSES, protocol.MESSAGES, protocol.EMBEDDINGS):
            status, value, _ = await post(router, {"model": "math", "input": "x"}, path=path)
            assert (status, value["error"]["message"]) == (404, f"{ENGINE}does not serve POST {path} (404)")


CONSTRAINED: list[dict[str, Any]] = [
    NAMED_TOOL,
    {"tools": [TOOL], "tool_choice": "required"},
    {"response_format": {"type": "json_object"}},
    {"structured_outputs": {"choice": ["yes", "no"]}},
]
FREE: list[dict[str, Any]] = [{}, {"tools": [TOOL], "tool_choice": "auto"}, {"response_format": {"type": "text"}}]


@pytest.mark.parametrize(("fields", "constrained"), [*((f, True) for f in CONSTRAINED), *((f, False) for f in FREE)])
async def test_what_an_earlier_request_decided_is_no_mark_on_a_replica(
    tmp_path: Path, fields: dict[str, Any], constrained: bool
) -> None:
    """Its first constrained request decides which forms it can serve. Another replica's first one was another."""
    assert is_constrained(fields) == constrained
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", say(500, INTERNAL), engine=RUST) as one,
        fake_replica(run, "math-1.g1", answer, engine=RUST),
        a_router(run, a_deployment("math", eject_errors=1, eject_s=60, pin_bound=None)) as router,
    ):
        await ready(router, 2)
        known = router.gateway.table.get("math-0.g1")
        assert known is not None
        while not one.bodies:
            assert (await post(router, chat("math", **fields)))[0] == 200
        if not constrained:
            await eventually(lambda: known.state is RoutingState.EJECTED)
        assert (await post(router, chat("math", **fields)))[0] == 200
        assert (known.state, known.recent_error) == (
            (RoutingState.READY, False) if constrained else (RoutingState.EJECTED, True)
        )


async def test_an_error_of_a_constrained_request_counts_with_other_front_ends(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", say(500, INTERNAL), engine=PYTHON) as one,
        fake_replica(run, "math-1.g1", answer, engine=RUST),
        a_router(run, a_deployment("math", eject_errors=1, eject_s=60, pin_bound=None)) as router,
    ):
        await ready(router, 2)
        known = router.gateway.table.get("math-0.g1")
        assert known is not None
        while not one.bodies:
            assert (await post(router, chat("math", **NAMED_TOOL)))[0] == 200
        await eventually(lambda: known.state is RoutingState.EJECTED)


async def test_its_error_within_a_stream_is_the_clients(tmp_path: Path) -> None:
    """A constraint that cannot be compiled is found after the first event. The front end ends such a stream in good
    form, with the error as an event."""
    run = a_run(tmp_path)
    error = {"message": INTERNAL, "type": "server_error", "param": None, "code": "server_error"}
    events = [b"data: %b\n\n" % data for data in (b'{"choices":[]}', json.dumps({"error": error}).encode(), b"[DONE]")]

    async def act(fake: FakeReplica, request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=b"".join(events), content_type="text/event-stream")

    async with fake_replica(run, "math-0.g1", act, engine=RUST), a_router(run, a_deployment("math")) as router:
        await ready(router)
        status, value, _ = await post(router, chat("math", **CONSTRAINED[3], stream=True))
        assert status == 200
        assert INTERNAL in str(value)
