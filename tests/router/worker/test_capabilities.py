"""A request for `auto` goes to an expert that accepts it: pictures, sound, tools, length."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from hpc_router.config.schema import Deployment
from hpc_router.config.validation import check
from hpc_router.errors import ConfigError
from hpc_router.router.worker.request_body import decode, needs_of
from hpc_router.state.registry import EngineInfo
from hpc_router.state.run_directory import RunDir
from tests.router.fakes import a_deployment, a_router, a_run, fake_replica
from tests.router.support import chat, post, ready
from tests.router.support import relay as relay
from tests.routing.samples import artefact

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
QUESTION = "What is the derivative of x^2 + 3*x?"


def user(*parts: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION}, *parts]}]}


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({"messages": [{"role": "user", "content": "x"}]}, []),
        (user(), []),
        (user(PICTURE), ["image"]),
        (user({"type": "input_audio", "input_audio": {}}, PICTURE), ["audio", "image"]),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, ["image"]),
        ({"input": [{"type": "function_call_output", "output": [{"type": "input_image"}]}]}, ["image"]),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, ["image"]),
        (user({"type": "tool_result", "content": [{"type": "image", "source": {}}]}), ["image"]),
        (user({"type": "tool_result", "content": "text"}), []),
        ({"messages": [], "tools": [TOOL]}, ["tools"]),
        ({"messages": [], "tools": [TOOL], "tool_choice": "auto"}, ["tools"]),
        ({"messages": [], "tools": [TOOL], "tool_choice": {"type": "auto"}}, ["tools"]),
        ({"messages": [], "tools": [TOOL], "tool_choice": "none"}, []),
        ({"messages": [], "tools": [TOOL], "tool_choice": "required"}, []),
        ({"messages": [], "tools": [TOOL], "tool_choice": {"type": "function", "function": {}}}, []),
        ({"messages": [], "tools": []}, []),
        ({"messages": [], "functions": [{}]}, ["tools"]),
        ({"messages": {}, "input": [3, None, {"content": [5, {"type": []}, {"content": [[]]}]}]}, []),
        ({"prompt": "x"}, []),
    ],
)
def test_what_a_request_needs(fields: dict[str, Any], needs: list[str]) -> None:
    assert sorted(needs_of(fields)) == needs
    body = json.dumps({"model": "auto", **fields})
    escaped = body.replace('"type"', '"\\u0074ype"').replace('"tools"', '"to\\u006fls"')
    for raw in (body.encode(), body.encode("utf-16"), body.encode("utf-32"), escaped.encode()):
        assert sorted(decode(raw).needs()) == needs


def a_classified_run(folder: Path) -> RunDir:
    run = a_run(folder)
    artefact().write(run.path / "classifier")
    return run


def a_site(*, fallback: str | None = None, accepts: dict[str, list[str]] | None = None) -> Deployment:
    deployment = a_deployment("code", "math", "medicine", policy="classifier", fallback=fallback)
    for name, expert in deployment.experts.items():
        expert.accepts = (accepts or {}).get(name)
    return deployment


def engine(length: int) -> EngineInfo:
    return EngineInfo(kind="fake", max_model_len=length)


@pytest.mark.parametrize(
    ("fields", "expert", "reason"),
    [
        (user(), "math", "classified"),
        (user(PICTURE), "medicine", "capability"),
        (user() | {"tools": [TOOL]}, "code", "capability"),
        (user() | {"tools": [TOOL], "tool_choice": "none"}, "math", "classified"),
        (user() | {"max_tokens": 5000}, "code", "capability"),
        (user({"type": "text", "text": "x " * 20_000}) | {"max_tokens": 5}, "code", "capability"),
        (user() | {"max_tokens": 900}, "math", "classified"),
        (user() | {"max_tokens": 10**6}, "code", "capability"),
    ],
    ids=repr,
)
async def test_auto_leads_to_an_expert_that_accepts_the_request(
    tmp_path: Path, fields: dict[str, Any], expert: str, reason: str
) -> None:
    """The question belongs to `math`, which takes text alone and has a short context."""
    run = a_classified_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", accepts=("text",), engine=engine(1000)),
        fake_replica(run, "code-0.g1", accepts=("text", "tools"), engine=engine(20_000)),
        fake_replica(run, "medicine-0.g1", accepts=("text", "image"), engine=engine(2000)),
        a_router(run, a_site()) as router,
    ):
        await ready(router, 3)
        status, value, headers = await post(router, chat("auto") | fields)
        assert (status, headers["x-expert"], headers["x-route-reason"]) == (200, expert, reason), value
        explained = (await post(router, fields, path="/route"))[1]
        assert (explained["expert"], explained["reason"]) == (expert, reason)
        assert (await post(router, chat("math") | fields))[2]["x-expert"] == "math", "a named expert is not checked"


async def test_what_the_configuration_says_counts_more_than_the_engine(tmp_path: Path) -> None:
    """An engine that reports nothing gets every request, unless the configuration limits its expert."""
    run = a_classified_run(tmp_path)
    site = a_site(accepts={"math": ["text", "tools"], "code": ["text"]}, fallback="code")
    async with (
        fake_replica(run, "math-0.g1", accepts=("text", "image")),
        fake_replica(run, "code-0.g1"),
        fake_replica(run, "medicine-0.g1"),
        a_router(run, site) as router,
    ):
        await ready(router, 3)
        assert (await post(router, chat("auto") | user(PICTURE)))[2]["x-expert"] == "medicine"
        assert (await post(router, chat("auto") | user() | {"tools": [TOOL]}))[2]["x-route-reason"] == "classified"
        nothing_known = chat("auto") | {"messages": [{"role": "user", "content": [PICTURE]}]}
        assert (await post(router, nothing_known))[2]["x-expert"] == "medicine", "the fallback takes no pictures"


async def test_without_an_expert_that_accepts_it_the_request_is_refused(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", accepts=("text",)),
        a_router(run, a_deployment("math", policy="round_robin")) as router,
    ):
        await ready(router)
        status, value, _ = await post(router, chat("auto") | user(PICTURE) | {"tools": [TOOL]})
        assert status == 400
        assert "none accepts image and tools" in value["error"]["message"]


@pytest.mark.parametrize("policy", ["round_robin", "least_in_flight", "model_field"])
async def test_every_policy_leads_to_an_expert_that_accepts_the_request(tmp_path: Path, policy: Any) -> None:
    """Without exemplars, too, as an expert for pictures may have none."""
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", accepts=("text",)),
        fake_replica(run, "vision-0.g1", accepts=("text", "image")),
        a_router(run, a_deployment("math", "vision", policy=policy, fallback="math")) as router,
    ):
        await ready(router, 2)
        for _ in range(3):
            assert (await post(router, chat("auto") | user(PICTURE)))[2]["x-expert"] == "vision"


def test_an_unknown_kind_of_input_is_refused() -> None:
    deployment = a_deployment("math")
    deployment.experts["math"] = dataclasses.replace(deployment.experts["math"], accepts=["text", "pictures"])
    with pytest.raises(ConfigError, match=r"experts.math.accepts=pictures: no kind of input.*image"):
        check(deployment)
