"""Two experts at once on each real engine, with tiny random models and the same tests. On vLLM, two more experts are
LoRA adapters on one of these."""

import json
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import anthropic
import openai
import pytest

from hpc_router.net.auth import replica_key
from launch import tiny_model
from tests.e2e.deployment import Deployed, deployed, kill
from tests.support.needs import ROOT, VLLM_ENV, engine_python
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.e2e

TOKENS = 1900
QUESTION = "A shop sells 12 apples for 3 dollars. How many dollars do 20 apples cost?"
SUED = "The tenant sued the landlord for breach of contract. Can the plaintiff recover damages?"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
ADAPTERS = ("law", "medicine")
TOPOLOGY = {"transformers": "pair", "vllm": "pair_lora"}
OPTIONS = {
    "transformers": ["device=cpu"],
    "vllm": ["device=cpu", "dtype=bfloat16", "max_model_len=2048", "extra.enforce-eager=true"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    python, folder = engine_python("transformers"), tmp_path_factory.mktemp("models")
    for words in (("code", "math"), (*ADAPTERS, "--adapter-of", "math")):
        subprocess.run([python, tiny_model.__file__, *words], cwd=folder, check=True)
    return folder


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("transformers", marks=pytest.mark.transformers),
        pytest.param("vllm", marks=pytest.mark.vllm),
    ],
)
def pair(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    engine = request.param
    environment = {"PAIR_MODELS": str(models), "PAIR_ENGINE": engine, "PAIR_PYTHON": str(engine_python(engine))}
    options = [f"experts.{e}.engine.options.{o}" for e in ("code", "math") for o in OPTIONS[engine]]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        chosen = ["--config-dir", str(ROOT / "tests/e2e/conf"), f"topology={TOPOLOGY[engine]}"]
        overrides = [*chosen, "cluster.reconcile_s=0.3", f"cluster.env={VLLM_ENV}", *options]
        with deployed(tmp_path_factory.mktemp(engine), *overrides) as one:
            yield one


def test_prompts_are_routed_and_answered(pair: Deployed) -> None:
    with pair.client() as client:
        for prompt, expert in {QUESTION: "math", "Write a Python function that reverses a list.": "code"}.items():
            raw = client.chat.completions.with_raw_response.create(
                model="auto", messages=[{"role": "user", "content": prompt}], max_tokens=8
            )
            assert raw.headers["x-expert"] == expert
            done = raw.parse()
            assert done.choices[0].message.content
            assert done.usage is not None
            assert done.usage.completion_tokens == 8


def test_adapters_answer_under_their_names_and_differ_from_their_base(pair: Deployed) -> None:
    """Their random weights are as large as the model's, so greedy decoding gives each a different text."""
    if engine_of(pair) != "vllm":
        pytest.skip("transformers serve has no adapters")

    def answer_of(client: openai.OpenAI, model: str, prompt: str) -> tuple[str, str, str | None]:
        raw = client.chat.completions.with_raw_response.create(
            model=model, messages=[{"role": "user", "content": prompt}], max_tokens=12, temperature=0.0
        )
        done = raw.parse()
        return raw.headers["x-expert"], done.model, done.choices[0].message.content

    with pair.client() as client:
        answers = {name: answer_of(client, name, SUED) for name in ("math", *ADAPTERS)}
        assert {name: (expert, model) for name, (expert, model, _) in answers.items()} == {n: (n, n) for n in answers}
        assert len({text for _, _, text in answers.values()}) == 3
        assert answer_of(client, "auto", SUED) == answers["law"]
        assert {m.id for m in client.models.list()} == {"auto", "code", "math", *ADAPTERS}
    served = {r["replica"]: set(r["serves"]) for r in records(pair) if r["kind"] == "expert"}
    assert served == {"code-0.g1": {"code"}, "math-0.g1": {"math", *ADAPTERS}}


def test_streams_arrive_token_by_token_with_usage(pair: Deployed) -> None:
    with pair.client() as client:
        chunks = list(
            client.chat.completions.create(
                model="math", messages=MESSAGES, max_tokens=8, stream=True, stream_options={"include_usage": True}
            )
        )
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert len(pieces) > 2
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == 8


def test_completions_and_named_experts(pair: Deployed) -> None:
    with pair.client() as client:
        for name in ("code", "math"):
            raw = client.completions.with_raw_response.create(model=name, prompt="once", max_tokens=4)
            assert raw.headers["x-expert"] == name
            assert raw.parse().choices[0].text


def test_responses_and_their_continuation(pair: Deployed) -> None:
    """transformers accepts `previous_response_id` and ignores it, so the router refuses such a request.

    It also streams if the request does not say whether to.
    """
    with pair.client().with_options(default_headers={"x-session-id": "s1"}) as client:
        first = client.responses.create(model="auto", input=QUESTION, max_output_tokens=8, stream=False)
        assert first.output_text
        assert first.usage is not None
        events = list(client.responses.create(model="math", input=QUESTION, max_output_tokens=8, stream=True))
        assert events[-1].type == "response.completed"
        assert any(e.type == "response.output_text.delta" for e in events)
        if engine_of(pair) == "vllm":
            then = client.responses.create(
                model="auto", input="Why?", max_output_tokens=8, previous_response_id=first.id
            )
            assert then.usage is not None
            assert then.usage.input_tokens > first.usage.input_tokens
            with pytest.raises(openai.NotFoundError, match="resp_0"):
                client.responses.create(model="math", input="Why?", previous_response_id="resp_0")
        else:
            with pytest.raises(openai.BadRequestError, match="keeps no responses") as caught:
                client.responses.create(model="auto", input="Why?", previous_response_id=first.id)
            assert caught.value.code == "previous_response_not_found"


def test_messages_where_the_engine_has_them(pair: Deployed) -> None:
    with anthropic.Anthropic(base_url=pair.url, api_key=pair.token, max_retries=0, timeout=60) as client:
        if engine_of(pair) != "vllm":
            with pytest.raises(anthropic.NotFoundError, match="does not serve POST /v1/messages"):
                client.messages.create(model="auto", max_tokens=8, messages=MESSAGES)
            return
        told = client.messages.create(model="auto", max_tokens=8, messages=MESSAGES)
        assert (told.stop_reason, told.usage.output_tokens) == ("max_tokens", 8)
        with client.messages.stream(model="math", max_tokens=8, messages=MESSAGES) as stream:
            assert stream.get_final_message().usage.output_tokens == 8


def test_tools_and_fields_reach_the_engine(pair: Deployed) -> None:
    """The engine reads the tools: they make its prompt longer."""
    tool: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    with pair.client() as client:
        plain = client.chat.completions.create(model="math", messages=MESSAGES, max_tokens=2)
        tooled = client.chat.completions.create(
            model="math", messages=MESSAGES, max_tokens=2, tools=[tool], tool_choice="none"
        )
    assert plain.usage is not None
    assert tooled.usage is not None
    assert tooled.usage.prompt_tokens >= plain.usage.prompt_tokens


def test_the_engines_errors_are_the_clients_exceptions(pair: Deployed) -> None:
    """vLLM refuses a temperature that is not a number, transformers a field that it does not know."""
    wrong = {"temperature": "warm"} if engine_of(pair) == "vllm" else {"no_such_field": 1}
    with pair.client() as client, pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="math", messages=MESSAGES, extra_body=wrong)
    assert caught.value.status_code in (400, 422)


@dataclass
class Counts:
    """vLLM's metrics of one expert's requests, read through its agent."""

    url: str
    key: str

    def __call__(self, name: str, label: str = "") -> float:
        request = urllib.request.Request(f"{self.url}/metrics", headers={"authorization": f"Bearer {self.key}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(x.rpartition(" ")[2]) for x in lines if x.startswith(f"vllm:{name}{{") and label in x)

    def finished(self) -> float:
        return self("request_success_total")


def counts_of(one: Deployed, replica: str) -> Counts:
    (record,) = (r for r in records(one) if r["replica"] == replica)
    return Counts(record["url"], replica_key((one.run / "secret").read_text().strip(), record["nonce"]))


@contextmanager
def asking(one: Deployed, *, stream: bool, tokens: int = TOKENS) -> Iterator[BinaryIO]:
    """A long request on a connection that is closed at the end of the block."""
    body = json.dumps({
        "model": "math", "messages": MESSAGES, "stream": stream, "max_tokens": tokens, "ignore_eos": True,
    }).encode()  # fmt: skip
    host, _, port = one.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=60) as sock:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {one.token}\r\n"
        head += "content-type: application/json\r\n"
        sock.sendall(head.encode() + b"content-length: %d\r\n\r\n%b" % (len(body), body))
        with sock.makefile("rb") as answer:
            yield answer


@pytest.mark.parametrize("phase", ["at once", "before the answer", "before the first event", "in mid-stream"])
def test_a_client_that_leaves_aborts_the_engines_work(pair: Deployed, phase: str) -> None:
    """The engine's own metrics show it. transformers completes a non-streaming answer, and has no metrics."""
    if engine_of(pair) != "vllm":
        pytest.skip("transformers serve has no metrics of aborted requests")
    counts = counts_of(pair, "math-0.g1")
    finished, tokens = counts.finished(), counts("generation_tokens_total")
    with asking(pair, stream=phase != "before the answer") as answer:
        if phase == "in mid-stream":
            while not answer.readline().startswith(b"data:"):
                pass
        elif phase != "at once":
            eventually_sync(lambda: counts("num_requests_running") == 1)
    if phase == "at once":  # the router may not have read the request; the next request is not affected
        with pair.client() as client:
            client.completions.create(model="math", prompt="once", max_tokens=2)
        finished += 1
    eventually_sync(lambda: not counts("num_requests_running"), within_s=5)
    assert counts.finished() == finished, "vLLM counts no request as finished that was aborted"
    assert counts("generation_tokens_total") - tokens < TOKENS


def test_a_client_that_leaves_at_the_end_harms_no_later_request(pair: Deployed) -> None:
    """The client closes the connection after the stream's last event, before the response ends."""
    if engine_of(pair) != "vllm":
        pytest.skip("transformers serve has no metrics of finished requests")
    counts = counts_of(pair, "math-0.g1")
    finished = counts.finished()
    with asking(pair, stream=True, tokens=2) as answer:
        while b"[DONE]" not in answer.readline():
            pass
    eventually_sync(lambda: counts.finished() == finished + 1 and not counts("num_requests_running"), within_s=5)
    with pair.client() as client:
        assert client.completions.create(model="math", prompt="once", max_tokens=2).choices[0].text


def records(one: Deployed) -> list[dict[str, Any]]:
    return list(json.loads((one.run / "registry.json").read_text())["records"])


def engines(one: Deployed) -> list[dict[str, Any]]:
    return [r["engine"] for r in records(one) if r["kind"] == "expert"]


def engine_of(one: Deployed) -> str:
    (kind,) = {e["kind"] for e in engines(one)}
    return str(kind)


def test_the_registry_describes_the_engine(pair: Deployed) -> None:
    assert len(engines(pair)) == 2
    assert all(e["version"] and e["tensor_parallel_size"] == 1 for e in engines(pair))
    vllm = engine_of(pair) == "vllm"
    facts = {(e["max_model_len"], e["priority"], e["prefix_caching"]) for e in engines(pair)}
    assert facts == {(2048, False, True) if vllm else (None, False, False)}
    loaded = {r["replica"]: (r["load_s"], r["accepts"]) for r in records(pair) if r["kind"] == "expert"}
    for expert in ("code", "math"):
        [shown] = [r for r in pair.replicas(expert) if r["replica"] == f"{expert}-0.g1"]
        load_s, accepts = loaded[shown["replica"]]
        assert (shown["load_s"], accepts) == (load_s, None)
        assert 1 < load_s < 240
    with pair.client() as client:
        cards = {m.id: m.model_dump() for m in client.models.list()}
    assert {card["max_model_len"] for card in cards.values()} == {2048 if vllm else None}


def test_paths_beside_generation_are_the_engines_or_a_clear_404(pair: Deployed) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/tokenize": {"prompt": QUESTION},
        "/detokenize": {"tokens": [1, 2, 3]},
        "/v1/messages/count_tokens": {"messages": MESSAGES},
        "/v1/score": {"text_1": "a", "text_2": "b"},
        "/v1/rerank": {"query": "a", "documents": ["b"]},
    }
    vllm = engine_of(pair) == "vllm"
    for path, fields in bodies.items():
        status, body = call(pair, "POST", path, {"model": "math", **fields})
        if vllm and "score" not in path and "rerank" not in path:  # a generative model has no scores
            assert status == 200, (path, body)
        else:
            message = body["error"]["message"]
            assert (status, path in message, "does not serve" in message) == (404, True, True), body
    if vllm:
        _, told = call(pair, "POST", "/tokenize", {"model": "math", "prompt": QUESTION})
        assert told["count"] == len(told["tokens"]) > 0
        _, back = call(pair, "POST", "/detokenize", {"model": "math", "tokens": told["tokens"]})
        assert QUESTION in back["prompt"]


def test_a_stored_response_is_read_again_where_it_is_kept(pair: Deployed) -> None:
    """vLLM has no DELETE, and the engine of the other expert stores nothing."""
    with pair.client() as client:
        made = client.responses.create(model="math", input=QUESTION, max_output_tokens=8, stream=False)
        if engine_of(pair) != "vllm":
            with pytest.raises(openai.NotFoundError, match="no ready replica has it"):
                client.responses.retrieve(made.id)
            return
        raw = client.responses.with_raw_response.retrieve(made.id)
        assert raw.parse().output_text == made.output_text
        assert (raw.headers["x-replica"], raw.headers["x-expert"]) == ("math-0.g1", "math")
        with pytest.raises(openai.NotFoundError, match="does not serve DELETE"):
            client.responses.delete(made.id)
        with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
            client.responses.cancel(made.id)
        running = client.responses.create(model="math", input=QUESTION, max_output_tokens=1500, background=True)
        assert running.status in ("queued", "in_progress")
        assert client.responses.cancel(running.id).status == "cancelled"
        assert client.responses.retrieve(running.id).status == "cancelled"
        for call_again in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
            with pytest.raises(openai.NotFoundError, match="no ready replica has it"):
                call_again("resp_none")


def call(one: Deployed, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    headers = {"authorization": f"Bearer {one.token}", "content-type": "application/json"}
    request = urllib.request.Request(one.url + path, json.dumps(body).encode(), headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_a_killed_engine_fails_its_streams_and_comes_back(pair: Deployed) -> None:
    """Its stream gets an error event, the other expert serves on, and the capacity returns without action."""
    with pair.client() as client:
        chunks = client.chat.completions.create(model="math", messages=MESSAGES, max_tokens=TOKENS, stream=True)
        next(chunks)
        kill(int(pair.progress("math-0.g1")["engine_pid"]))
        with pytest.raises(openai.APIError, match="failed before it had finished"):
            list(chunks)
        assert client.completions.create(model="code", prompt="once", max_tokens=2).choices[0].text
        eventually_sync(lambda: pair.progress("math-0.g1")["restarts"] == 1)
        eventually_sync(lambda: pair.ready("math"), within_s=180)
        assert client.completions.create(model="math", prompt="once", max_tokens=2).choices[0].text
