"""Two experts at once on each real engine, with tiny random models and the same tests: transformers, vLLM, and vLLM
behind its Rust front end. On vLLM, two more experts are LoRA adapters on one of these. Beside the Rust front end, the
expert for code runs on transformers, which starts in a tenth of the time."""

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
TOPOLOGY = {"transformers": "pair", "vllm": "pair_lora", "rust": "pair"}
VLLM = ["device=cpu", "dtype=bfloat16", "max_model_len=2048", "extra.enforce-eager=true"]
OPTIONS = {
    "transformers": ["device=cpu"],
    "vllm": VLLM,
    "rust": [*VLLM, "frontend=rust", "extra.tool-call-parser=hermes"],
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
        pytest.param("rust", marks=pytest.mark.vllm),
    ],
)
def pair(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    engine = request.param
    kind, beside = ("vllm", "transformers") if engine == "rust" else (engine, engine)
    environment = {"PAIR_MODELS": str(models), "PAIR_ENGINE": kind, "PAIR_PYTHON": str(engine_python(kind))}
    options = [f"experts.{e}.engine.options.{o}" for e, on in (("code", beside), ("math", engine)) for o in OPTIONS[on]]
    options += [f"experts.code.engine.kind={beside}", f"experts.code.engine.python={engine_python(beside)}"]
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
        pytest.skip("transformers serve has no adapters, and `plan` refuses them with the Rust front end")

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

    It also streams if the request does not say whether to. The Rust front end has no such path.
    """
    if engine_of(pair) == "rust":
        with (
            pair.client() as client,
            pytest.raises(openai.NotFoundError, match=r"Rust front end\) does not serve POST"),
        ):
            client.responses.create(model="auto", input=QUESTION, max_output_tokens=8)
        return
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


def test_the_form_of_an_answer_can_be_given(pair: Deployed) -> None:
    """A named tool constrains the answer in another way than a schema does. A Rust front end serves only the way of its
    engine's first constrained request; it answers 500 to the other, and its replica stays in use."""
    if engine_of(pair) == "transformers":
        pytest.skip("transformers serve ignores schemas")
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    arguments = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
    tool: Any = {"type": "function", "function": {"name": "add", "parameters": arguments}}
    named: Any = {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "add"}}}
    with pair.client() as client:
        for stream in (False, True):
            text = answer_of(client, stream=stream, max_tokens=8, response_format=form)
            assert json.loads(text) in ("yes", "no")
        # The Python front end wants a parser of tool calls, which this expert does not have.
        kind = openai.InternalServerError if engine_of(pair) == "rust" else openai.BadRequestError
        with pytest.raises(kind):
            answer_of(client, max_tokens=8, **named)
        assert answer_of(client, max_tokens=8)
    [replica] = pair.replicas("math")
    assert (replica["state"], replica["sick"]) == ("ready", None)


def answer_of(client: openai.OpenAI, *, stream: bool = False, **fields: Any) -> str:
    """The text of the expert for math."""
    made: Any = client.chat.completions.create(model="math", messages=MESSAGES, stream=stream, **fields)
    if stream:
        return "".join(c.choices[0].delta.content or "" for c in made if c.choices)
    return str(made.choices[0].message.content or "")


def test_what_the_front_end_cannot_serve_is_a_clear_error(pair: Deployed) -> None:
    if engine_of(pair) != "rust":
        pytest.skip("the other front end serves it")
    with pair.client() as client:
        with pytest.raises(openai.BadRequestError, match="takes one prompt per request") as caught:
            client.completions.create(model="math", prompt=["a", "b"], max_tokens=2)
        assert (caught.value.code, caught.value.param) == ("unsupported_value", "prompt")
        for ask in (client.completions.create, client.chat.completions.create):
            prompt = {"prompt": "a"} if ask == client.completions.create else {"messages": MESSAGES}
            with pytest.raises(openai.BadRequestError, match="makes one answer per request, and not n=2"):
                ask(model="math", max_tokens=2, n=2, **prompt)
        for path, fields in {
            "/v1/embeddings": {"input": "a"},
            "/v1/messages": {"messages": MESSAGES, "max_tokens": 2},
        }.items():
            status, body = call(pair, "POST", path, {"model": "math", **fields})
            assert (status, f"does not serve POST {path} (404)" in body["error"]["message"]) == (404, True), body


def test_the_engines_errors_are_the_clients_exceptions(pair: Deployed) -> None:
    """vLLM refuses a temperature that is not a number, transformers a field that it does not know."""
    wrong = {"no_such_field": 1} if engine_of(pair) == "transformers" else {"temperature": "warm"}
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
        """The requests that were not aborted. Only the Rust front end counts the others, under a label of their own."""
        return self("request_success_total") - self("request_success_total", 'finished_reason="abort"')


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
    if engine_of(pair) == "transformers":
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
    assert counts.finished() == finished, "the request was not aborted"
    assert counts("generation_tokens_total") - tokens < TOKENS


def test_a_client_that_leaves_at_the_end_harms_no_later_request(pair: Deployed) -> None:
    """The client closes the connection after the stream's last event, before the response ends."""
    if engine_of(pair) == "transformers":
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
    """The engine of the expert for math: transformers, vllm or rust."""
    [(kind, frontend)] = [(e["kind"], e["frontend"]) for e in engines(one) if e["model"].endswith("/math")]
    return "rust" if frontend == "rust" else str(kind)


def test_the_registry_describes_the_engine(pair: Deployed) -> None:
    """The metrics of the Rust front end do not say whether prefixes are cached."""
    assert len(engines(pair)) == 2
    assert all(e["version"] and e["tensor_parallel_size"] == 1 for e in engines(pair))
    facts = {(e["max_model_len"], e["priority"], e["prefix_caching"]) for e in engines(pair)}
    of_transformers = (None, False, False)
    assert (
        facts
        == {
            "transformers": {of_transformers},
            "vllm": {(2048, False, True)},
            "rust": {(2048, False, None), of_transformers},
        }[engine_of(pair)]
    )
    loaded = {r["replica"]: (r["load_s"], r["accepts"]) for r in records(pair) if r["kind"] == "expert"}
    for expert in ("code", "math"):
        [shown] = [r for r in pair.replicas(expert) if r["replica"] == f"{expert}-0.g1"]
        load_s, accepts = loaded[shown["replica"]]
        assert (shown["load_s"], accepts) == (load_s, None)
        assert 1 < load_s < 240
    with pair.client() as client:
        cards = {m.id: m.model_dump() for m in client.models.list()}
    assert {card["max_model_len"] for card in cards.values()} >= {length for length, _, _ in facts}


def test_paths_beside_generation_are_the_engines_or_a_clear_404(pair: Deployed) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/tokenize": {"prompt": QUESTION},
        "/detokenize": {"tokens": [1, 2, 3]},
        "/v1/messages/count_tokens": {"messages": MESSAGES},
        "/v1/score": {"text_1": "a", "text_2": "b"},
        "/v1/rerank": {"query": "a", "documents": ["b"]},
    }
    vllm = engine_of(pair) != "transformers"
    served = {"vllm": ("/tokenize", "/detokenize", "/v1/messages/count_tokens"), "rust": ("/tokenize", "/detokenize")}
    for path, fields in bodies.items():
        status, body = call(pair, "POST", path, {"model": "math", **fields})
        if path in served.get(engine_of(pair), ()):  # a generative model has no scores
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
    if engine_of(pair) == "rust":
        pytest.skip("the Rust front end has no responses")
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
    endless = {} if engine_of(pair) == "transformers" else {"ignore_eos": True}
    with pair.client() as client:
        chunks = client.chat.completions.create(
            model="math", messages=MESSAGES, max_tokens=TOKENS, stream=True, extra_body=endless
        )
        next(chunks)
        kill(int(pair.progress("math-0.g1")["engine_pid"]))
        with pytest.raises(openai.APIError, match="failed before it had finished"):
            list(chunks)
        assert client.completions.create(model="code", prompt="once", max_tokens=2).choices[0].text
        eventually_sync(lambda: pair.progress("math-0.g1")["restarts"] == 1)
        eventually_sync(lambda: pair.ready("math"), within_s=180)
        assert client.completions.create(model="math", prompt="once", max_tokens=2).choices[0].text
