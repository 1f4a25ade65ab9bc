"""The API over raw HTTP and through the official client."""

import asyncio
import base64
import io
import json
import struct
from dataclasses import replace
from pathlib import Path

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from hpc_router.errors import ConfigError, LaunchError
from hpc_router.sim.config import SimConfig
from hpc_router.sim.server import SimServer
from tests.sim.calls import INSTANT, at, chat, client, decoded, events, post, stream, until
from tests.sim.support import Start

CHAT = "/v1/chat/completions"
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]


def contents(chunks: list[str]) -> str:
    return "".join(str(at(choice, "delta").get("content") or "") for choice in _choices(chunks))  # type: ignore[attr-defined]


def _choices(chunks: list[str]) -> list[object]:
    bodies = [decoded(chunk) for chunk in chunks if chunk != "[DONE]"]
    return [choice for body in bodies for choice in at(body, "choices")]  # type: ignore[attr-defined]


async def test_a_stream_says_what_the_body_says(start: Start) -> None:
    """Text and usage are the same, and the events come in vLLM's order: role, content, finish, usage, [DONE]."""
    _, session = await start(INSTANT)
    _, body = await post(session, CHAT, chat(max_tokens=5))
    chunks = await stream(session, chat(max_tokens=5, stream=True, stream_options={"include_usage": True}))
    assert contents(chunks) == at(body, "choices", 0, "message", "content")
    assert at(decoded(chunks[0]), "choices", 0, "delta") == {"role": "assistant", "content": ""}
    assert [at(choice, "finish_reason") for choice in _choices(chunks)] == [None] * 6 + ["length"]
    assert at(decoded(chunks[-2]), "choices") == []
    assert at(decoded(chunks[-2]), "usage") == body["usage"]
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
    assert chunks[-1] == "[DONE]"


@pytest.mark.parametrize(("value", "streams"), [(1, True), ("On", True), ("1", True), (0, False), ("no", False)])
async def test_truth_values_are_read_as_vllm_reads_them(start: Start, value: object, streams: bool) -> None:
    _, session = await start(INSTANT)
    async with session.post(CHAT, json=chat(max_tokens=1, stream=value)) as response:
        assert (response.status, response.content_type == "text/event-stream") == (200, streams)


async def test_everything_is_labelled_simulated(start: Start) -> None:
    _, session = await start(INSTANT)
    for method, path, body in (
        ("POST", CHAT, chat()),
        ("POST", "/v1/completions", {"prompt": "x"}),
        ("POST", "/v1/embeddings", {"input": "x"}),
        ("POST", "/v1/responses", {"input": "x"}),
        ("POST", "/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}),
        ("POST", "/v1/messages", {}),
        ("POST", CHAT, {}),
        ("GET", "/v1/models", None),
        ("GET", "/health", None),
        ("GET", "/nowhere", None),
    ):
        async with session.request(method, path, json=body) as response:
            raw = await response.read()
            assert response.headers["x-simulated"] == "true", path
            assert not raw or decoded(raw)["simulated"] is True, path
    for chunk in (await stream(session, chat(stream=True)))[:-1]:
        assert decoded(chunk)["simulated"] is True
        assert decoded(chunk)["system_fingerprint"] == "simulated"


async def test_both_names_are_served_and_the_first_is_the_engines_own(start: Start) -> None:
    _, session = await start(replace(INSTANT, served_model_names=("math", "auto")))
    async with session.get("/v1/models") as response:
        models = decoded(await response.read())
    assert [at(model, "id") for model in at(models, "data")] == ["math", "auto"]  # type: ignore[attr-defined]
    assert at(models, "data", 1, "owned_by") == "hpc_router-sim"
    _, body = await post(session, CHAT, {**chat(), "model": "auto"})
    assert body["model"] == "math"
    assert str(at(body, "choices", 0, "message", "content")).startswith("math simulated answer")


async def test_choices_prompts_and_stops(start: Start) -> None:
    _, session = await start(INSTANT)
    asked = {"prompt": ["a b", [1, 2, 3]], "n": 2, "max_tokens": 8, "ignore_eos": True}
    _, body = await post(session, "/v1/completions", asked)
    texts = [at(body, "choices", index, "text") for index in range(4)]
    assert len(set(texts)) == 4
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 32, "total_tokens": 37}
    chunks = await stream(session, {**asked, "stream": True}, path="/v1/completions")
    for index in range(4):
        mine = [str(at(choice, "text")) for choice in _choices(chunks) if at(choice, "index") == index]
        assert "".join(mine) == texts[index]
    _, stopped = await post(session, "/v1/completions", {"prompt": "a", "stop": " answer"})
    assert at(stopped, "choices", 0, "text") == "sim simulated"
    assert at(stopped, "usage", "completion_tokens") == 3


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        (CHAT, b"{", 400, "not valid JSON"),
        (CHAT, b"\xff", 400, "not valid JSON"),
        (CHAT, b"[" * 100_000, 400, "not valid JSON"),
        (CHAT, b"[]", 400, "must be a JSON object"),
        (CHAT, b"{}", 400, "'messages' must be a non-empty list"),
        (CHAT, {"messages": []}, 400, "'messages' must be a non-empty list"),
        (CHAT, {"messages": ["hi"]}, 400, "'messages[0]' must be an object with a 'role'"),
        (CHAT, {"messages": [{"role": "user", "content": 7}]}, 400, "messages[0].content"),
        (CHAT, chat(model="maths"), 404, "The model `maths` does not exist"),
        (CHAT, chat(model=7), 400, "'model' must be a string"),
        (CHAT, chat(stream="maybe"), 400, "'stream' must be true or false"),
        (CHAT, chat(temperature=3), 400, "temperature must be in [0, 2], got 3.0."),
        (CHAT, chat(temperature=-0.1), 400, "temperature must be non-negative, got -0.1."),
        (CHAT, b'{"temperature": NaN}', 400, "temperature must be a finite number, got nan."),
        (CHAT, chat(temperature=10**400), 400, "'temperature' is too large"),
        (CHAT, chat(temperature="hot"), 400, "'temperature' must be a number"),
        (CHAT, chat(top_p=0), 400, "top_p must be in (0, 1], got 0.0."),
        (CHAT, chat(top_k=-2), 400, "top_k must be 0 (disable), or at least 1, got -2."),
        (CHAT, chat(min_p=1.5), 400, "min_p must be in [0, 1], got 1.5."),
        (CHAT, chat(presence_penalty=-3), 400, "presence_penalty must be in [-2, 2], got -3.0."),
        (CHAT, chat(frequency_penalty=2.5), 400, "frequency_penalty must be in [-2, 2], got 2.5."),
        (CHAT, chat(repetition_penalty=0), 400, "repetition_penalty must be greater than zero, got 0.0."),
        ("/v1/completions", {"prompt": "x", "top_p": 2}, 400, "top_p must be in (0, 1], got 2.0."),
        (CHAT, chat(max_tokens=0), 400, "'max_tokens' must be at least 1"),
        (CHAT, chat(max_tokens=True), 400, "'max_tokens' must be an integer"),
        (CHAT, chat(max_completion_tokens=2.5), 400, "'max_completion_tokens' must be an integer"),
        (CHAT, chat(n=129), 400, "'n' must be at least 1 and at most 128"),
        (CHAT, chat(stop=[""]), 400, "'stop' must be"),
        (CHAT, chat(stream_options={}), 400, "only be defined when `stream=True`"),
        (CHAT, chat(stream=True, stream_options=1), 400, "'stream_options' must be an object"),
        (CHAT, chat(tools=7), 400, "'tools' must be a list"),
        (CHAT, chat(tools=[7]), 400, "'tools[0]'"),
        (CHAT, chat(tool_choice="required"), 400, "`tools` must be set"),
        (CHAT, chat(tools=TOOLS, tool_choice={"function": {"name": "x"}}), 400, "'tool_choice' must be"),
        (CHAT, chat(max_tokens=51), 400, "max_tokens=51 cannot be greater than max_model_len=50"),
        (CHAT, chat("word " * 51), 400, "your prompt contains 51 input tokens"),
        (CHAT, chat(sim_fault={"kind": "dye"}), 400, "did you mean 'die'"),
        (CHAT, chat(sim_fault={"kind": "cut"}), 400, "cannot be injected into an answer of this form"),
        ("/v1/completions", {}, 400, "'prompt' must be"),
        ("/v1/completions", {"prompt": [[["a"]]]}, 400, "'prompt' must be"),
        ("/v1/embeddings", {"input": []}, 400, "'input' must be"),
        ("/v1/embeddings", {"input": "x", "encoding_format": "hex"}, 400, "'float' or 'base64'"),
        ("/v1/nothing", {}, 404, "Not Found"),
        ("/v1/models", {}, 405, "Method Not Allowed"),
        ("/sim/faults", b'[{"kind": "dye"}]', 400, "did you mean 'die'"),
    ],
)
async def test_bad_requests_are_refused_in_openais_shape(
    start: Start, path: str, body: bytes | dict[str, object], status: int, says: str
) -> None:
    engine, session = await start(replace(INSTANT, max_model_len=50))
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with session.post(path, data=raw) as response:
        error = at(decoded(await response.read()), "error")
        assert response.status == at(error, "code") == status
    assert says in str(at(error, "message"))
    assert str(at(error, "type")).endswith("Error")
    assert engine.counts.running == engine.counts.waiting == 0


async def test_a_prompt_and_answer_that_just_fit_are_served(start: Start) -> None:
    _, session = await start(replace(INSTANT, max_model_len=50))
    status, _ = await post(session, CHAT, chat("word " * 49, max_tokens=1))
    assert status == 200
    _, body = await post(session, CHAT, chat("word " * 45, ignore_eos=True))
    assert at(body, "usage", "total_tokens") == 50


async def test_embeddings_come_as_floats_and_as_base64_of_the_same_numbers(start: Start) -> None:
    _, session = await start(INSTANT)
    asked = {"input": ["one", "two", "one"], "dimensions": 8}
    _, floats = await post(session, "/v1/embeddings", asked)
    _, packed = await post(session, "/v1/embeddings", {**asked, "encoding_format": "base64"})
    for index in range(3):
        vector = at(floats, "data", index, "embedding")
        raw = base64.b64decode(str(at(packed, "data", index, "embedding")))
        assert list(struct.unpack("<8f", raw)) == vector
    assert at(floats, "data", 0, "embedding") == at(floats, "data", 2, "embedding")
    assert at(floats, "data", 0, "embedding") != at(floats, "data", 1, "embedding")
    assert at(floats, "usage", "prompt_tokens") == 3


async def test_an_adapter_answers_as_a_model_of_its_own(start: Start) -> None:
    """An alias answers as the engine's own model."""
    names = replace(INSTANT, served_model_names=("base", "alias"), adapters=("math",))
    _, session = await start(names)
    async with session.get("/v1/models") as response:
        assert [card["id"] for card in (await response.json())["data"]] == ["base", "alias", "math"]
    said = {}
    for name in ("base", "alias", "math"):
        _, body = await post(session, CHAT, chat(max_tokens=5) | {"model": name})
        said[name] = (at(body, "model"), at(body, "choices", 0, "message", "content"))
    assert said["alias"] == said["base"]
    assert (said["base"][0], said["math"][0]) == ("base", "math")
    assert said["math"][1] != said["base"][1]
    vectors = [
        at((await post(session, "/v1/embeddings", {"model": name, "input": "one"}))[1], "data", 0, "embedding")
        for name in ("base", "math")
    ]
    assert vectors[0] != vectors[1]


@pytest.mark.parametrize("adapters", [("base",), ("a", "a"), ("",)])
def test_an_adapter_has_a_name_of_its_own(adapters: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="adapters: each needs a name"):
        SimConfig(served_model_names=("base",), adapters=adapters)


async def test_received_requests_can_be_read_back_byte_for_byte(start: Start) -> None:
    engine, session = await start(INSTANT)
    raw = b'{"prompt": "h\\u00e9",  "unknown":\t[1.0e3], "max_tokens":1}'
    headers = {"X-Custom-Case": "a", "content-encoding": "identity"}
    async with session.post("/v1/completions?q=%20x", data=raw, headers=headers) as response:
        assert response.status == 200
    (received,) = engine.recent.last()
    assert (received.method, received.path, received.body) == ("POST", "/v1/completions?q=%20x", raw)
    assert (b"X-Custom-Case", b"a") in received.headers
    assert received.header("x-custom-case") == "a"
    assert received.header("authorization") is None
    async with session.get("/sim/last?n=5") as response:
        told = decoded(await response.read())
    assert base64.b64decode(str(at(told, "requests", 0, "body_base64"))) == raw
    async with session.get("/sim/last?n=x") as response:
        assert response.status == 400


async def test_the_metrics_count_tokens_and_ends(start: Start) -> None:
    _, session = await start(replace(INSTANT, capacity=4))
    await post(session, CHAT, chat(max_tokens=7))
    streamed = len(await stream(session, chat(stream=True))) - 3
    async with session.get("/metrics") as response:
        assert response.content_type == "text/plain"
        families = text_string_to_metric_families(await response.text())
        values = {
            (sample.name, sample.labels.get("finished_reason", "")): sample.value
            for family in families
            for sample in family.samples
        }
    assert values["vllm:prompt_tokens_total", ""] == 10
    assert values["vllm:generation_tokens_total", ""] == 7 + streamed
    assert values["vllm:request_success_total", "length"] == 1
    assert values["vllm:request_success_total", "stop"] == 1
    assert values["vllm:num_requests_running", ""] == 0


async def test_faults_are_set_and_read_at_run_time(start: Start) -> None:
    _, session = await start(INSTANT)
    rule = {"kind": "status", "status": 429, "retry_after_s": 2, "times": 1}
    async with session.post("/sim/faults", json=[rule]) as response:
        assert decoded(await response.read())["faults"] == [{**rule, "seen": 0, "hits": 0}]
    async with session.post(CHAT, json=chat()) as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "2")
    async with session.post(CHAT, json=chat()) as response:
        assert response.status == 200
    async with session.get("/sim/faults") as response:
        assert at(decoded(await response.read()), "faults", 0, "hits") == 1


async def test_over_a_unix_socket_and_the_socket_file_goes_away(tmp_path: Path) -> None:
    path = tmp_path / "engine.sock"
    async with SimServer(INSTANT, uds=path) as engine, client(engine) as session:
        assert engine.address == f"unix:{path}"
        async with session.get("/health") as response:
            assert response.status == 200
    assert not path.exists()


async def test_an_address_that_cannot_be_used_is_named() -> None:
    async with SimServer(INSTANT) as engine:
        port = int(engine.address.rpartition(":")[2])
        with pytest.raises(LaunchError, match=f"cannot listen on http://127.0.0.1:{port}"):
            await SimServer(INSTANT, port=port).__aenter__()
    with pytest.raises(ConfigError, match="longer than 107 bytes"):
        SimServer(INSTANT, uds=Path("/tmp/" + "x" * 103))


@pytest.mark.parametrize("settings", [{"ttft_s": -1.0}, {"jitter": float("nan")}, {"capacity": 0}])
def test_invalid_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        SimConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="served_model_names"):
        SimConfig(served_model_names=())


async def test_while_loading_it_answers_503_if_it_listens() -> None:
    class Gate:
        opened = asyncio.Event()

        def now_s(self) -> float:
            return 0.0

        def unix_s(self) -> float:
            return 0.0

        async def sleep(self, delay_s: float) -> None:
            await self.opened.wait()

    gate = Gate()
    config = replace(INSTANT, load_s=60.0, listen_while_loading=True)
    async with SimServer(config, clock=gate) as engine, client(engine) as session:
        async with session.get("/health") as response:
            assert response.status == 503
        gate.opened.set()
        async with session.get("/health") as response:
            assert response.status == 200


async def test_requests_beyond_the_capacity_wait(start: Start) -> None:
    engine, session = await start(replace(INSTANT, capacity=1))
    first = asyncio.create_task(stream(session, chat(stream=True, sim_fault={"kind": "hang"})))
    await until(lambda: engine.counts.running == 1)
    second = asyncio.create_task(post(session, CHAT, chat()))
    await until(lambda: engine.counts.waiting == 1)
    assert not second.done()
    first.cancel()
    assert (await second)[0] == 200
    await engine.idle()
    assert engine.counts.aborted == {"before_first_token": 1}


# ---- the official client


def official(engine: SimServer) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0)


async def test_the_openai_client_chats_streams_completes_embeds_and_lists(start: Start) -> None:
    engine, _ = await start(INSTANT)
    async with official(engine) as ai:
        answer = await ai.chat.completions.create(model="sim", messages=[{"role": "user", "content": "hi"}])
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.choices[0].finish_reason) == (1, "stop")
        chunks = await ai.chat.completions.create(
            model="sim",
            messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            stream=True,
            stream_options={"include_usage": True},
        )
        text, used = "", None
        async for chunk in chunks:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            used = chunk.usage or used
        assert text == answer.choices[0].message.content
        assert used == answer.usage
        completion = await ai.completions.create(model="sim", prompt="hi", max_tokens=2)
        assert completion.choices[0].text == "sim simulated"
        embedding = await ai.embeddings.create(model="sim", input=["a", "b"])
        assert [len(item.embedding) for item in embedding.data] == [64, 64]
        assert [model.id async for model in ai.models.list()] == ["sim"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look_up"}}])
async def test_the_openai_client_gets_a_tool_call_when_it_forces_one(start: Start, choice: object) -> None:
    engine, _ = await start(INSTANT)
    async with official(engine) as ai:
        asked = {"model": "sim", "messages": [{"role": "user", "content": "hi"}], "tools": TOOLS, "tool_choice": choice}
        answer = await ai.chat.completions.create(**asked)  # type: ignore[call-overload]
        (call,) = answer.choices[0].message.tool_calls
        assert (call.function.name, call.function.arguments) == ("look_up", "{}")
        assert answer.choices[0].finish_reason == "tool_calls"
        arguments, names = "", []
        async for chunk in await ai.chat.completions.create(**asked, stream=True):  # type: ignore[call-overload]
            for delta in chunk.choices[0].delta.tool_calls or []:
                arguments += delta.function.arguments or ""
                names += [delta.function.name] if delta.function.name else []
        assert (names, arguments) == (["look_up"], "{}")


async def test_tools_that_are_only_offered_are_answered_with_text(start: Start) -> None:
    _, session = await start(INSTANT)
    _, body = await post(session, CHAT, chat(tools=TOOLS, tool_choice="auto"))
    assert str(at(body, "choices", 0, "message", "content")).startswith("sim simulated")


async def test_the_openai_client_raises_its_own_exceptions(start: Start) -> None:
    engine, _ = await start(INSTANT)
    statuses: list[tuple[int, type[openai.APIStatusError]]] = [
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
    ]
    async with official(engine) as ai:
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await ai.chat.completions.create(model="other", messages=[{"role": "user", "content": "hi"}])
        with pytest.raises(openai.BadRequestError, match="non-empty list"):
            await ai.chat.completions.create(model="sim", messages=[])
        for status, kind in statuses:
            fault = {"sim_fault": {"kind": "status", "status": status}}
            with pytest.raises(kind, match="simulated fault"):
                await ai.completions.create(model="sim", prompt="hi", extra_body=fault)
        with pytest.raises(openai.APIError, match="lost"):
            async for _ in await ai.completions.create(
                model="sim",
                prompt="hi",
                stream=True,
                extra_headers={"x-sim-fault": '{"kind": "error_event", "at": 2, "message": "lost"}'},
            ):
                pass


async def test_old_clients_without_chunks_are_served(start: Start) -> None:
    engine, _ = await start(INSTANT)
    host, port = engine.address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps(chat(stream=True)).encode()
    writer.write(b"POST %b HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(body)) + body)
    raw = await reader.read()
    writer.close()
    await writer.wait_closed()
    head, _, rest = raw.partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert events(rest)[-1] == "[DONE]"


async def test_a_large_prompt_is_read_whole(start: Start) -> None:
    engine, session = await start(INSTANT)
    raw = json.dumps({"prompt": ("word" * 13 + " ") * 100_000, "max_tokens": 1}).encode()
    async with session.post("/v1/completions", data=io.BytesIO(raw)) as response:
        assert at(decoded(await response.read()), "usage", "prompt_tokens") == 100_000
    (received,) = engine.recent.last()
    assert received.body is None
    assert received.body_bytes > 5_000_000


async def test_a_connection_that_is_not_http_is_refused(start: Start) -> None:
    engine, session = await start(INSTANT)
    host, port = engine.address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
    assert b"400" in await reader.read()
    writer.close()
    await writer.wait_closed()
    assert (await post(session, CHAT, chat()))[0] == 200
