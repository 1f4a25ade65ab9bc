"""`launch.bench`, `vllm bench serve` and guidellm, unmodified, on the same deployment: they agree in what they count,
and differ where docs/bench.md says so. No assertion on speed; the figures are printed side by side (`pytest -s`)."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Final

import pytest

from tests.clients.endpoint import Endpoint, served
from tests.clients.load_tools import TOOLS, Load, ToolFigures, measure
from tests.support.waiting import eventually_sync

pytestmark = [pytest.mark.e2e, pytest.mark.long]

REQUESTS, TOKENS = 80, 32
LOADS: Final[Mapping[str, Mapping[str, Any]]] = {"8 users": {"users": 8}, "8 requests per second": {"rate": 8.0}}
MORE_GAPS: Final = {"launch.bench": -1, "vllm bench serve": 1, "guidellm": -1}
"""Gaps of an answer less its tokens. `vllm bench serve` counts the event with the role and the closing one as well."""
ROLE_AHEAD_S: Final = 5.0
"""Time between the event with the role and the first token of `EarlyRole`."""


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with served(tmp_path_factory.mktemp("load_tools"), topology="load_tools") as one:
        yield one


def measured(steady: Endpoint, load: Load, folder: Path, tokenizer: Path) -> dict[str, ToolFigures]:
    return {name: measure(name, steady, load, folder / name.replace(" ", "_"), tokenizer) for name in TOOLS}


def table(found: Mapping[str, ToolFigures]) -> str:
    values = [asdict(found[name]) for name in TOOLS]
    lines = [f"| figure | {' | '.join(TOOLS)} |", f"|---|{'---|' * len(TOOLS)}"]
    lines += [f"| {key} | {' | '.join(f'{one[key]:.5g}' for one in values)} |" for key in values[0]]
    return "\n".join(lines)


@pytest.mark.parametrize("shape", LOADS)
def test_all_tools_send_and_count_the_same(steady: Endpoint, tokenizer: Path, tmp_path: Path, shape: str) -> None:
    prompts = ["one more word " * n for n in range(1, REQUESTS + 1)]
    words = 3 * sum(range(1, REQUESTS + 1))
    found = measured(steady, Load(prompts=prompts, tokens=TOKENS, **LOADS[shape]), tmp_path, tokenizer)
    print(f"\n{shape}, {REQUESTS} requests of {TOKENS} tokens\n{table(found)}")
    (tmp_path / "figures.md").write_text(table(found))
    for name, one in found.items():
        assert one.failed == 0, name
        assert one.output_tokens == one.succeeded * TOKENS, name
        assert one.gaps == one.succeeded * (TOKENS + MORE_GAPS[name]), name
        if "users" in shape or name != "launch.bench":
            assert (one.succeeded, one.prompt_tokens) == (REQUESTS, words), name


class EarlyRole(BaseHTTPRequestHandler):
    """An engine that opens each stream at once with an event with the role alone, as vLLM does not."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = json.dumps({"object": "list", "data": [{"id": "early-role", "object": "model"}]}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        with suppress(ConnectionError):  # a tool ends, and leaves requests that it does not measure
            self._stream()

    def _stream(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        tokens = asked.get("max_completion_tokens") or asked["max_tokens"]
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self._send(json.dumps(_chunk({"role": "assistant", "content": ""})))
        time.sleep(ROLE_AHEAD_S)
        for _ in range(tokens):
            self._send(json.dumps(_chunk({"content": "word "})))
        self._send(json.dumps(_chunk({}, finish_reason="length")))
        usage = {"prompt_tokens": 2, "completion_tokens": tokens, "total_tokens": 2 + tokens}
        self._send(json.dumps({"id": "1", "object": "chat.completion.chunk", "choices": [], "usage": usage}))
        self._send("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _send(self, data: str) -> None:
        event = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))

    def log_message(self, *_: object) -> None:
        """Logs nothing."""


def _chunk(delta: Mapping[str, str], *, finish_reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"id": "1", "object": "chat.completion.chunk", "model": "early-role", "choices": [choice]}


@pytest.fixture
def early_role(steady: Endpoint) -> Iterator[str]:
    """The name of an expert whose only replica is an `EarlyRole`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), EarlyRole) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        steady.one.verb("register", "--expert", "early-role", "--url", f"http://127.0.0.1:{server.server_port}/v1")
        with steady.one.client() as client:
            eventually_sync(lambda: "early-role" in {model.id for model in client.models.list()})
        yield "early-role"
        steady.one.verb("unregister", "--expert", "early-role")
        server.shutdown()


def test_only_vllm_bench_serve_takes_the_role_for_the_first_token(
    steady: Endpoint, early_role: str, tokenizer: Path, tmp_path: Path
) -> None:
    load = Load(prompts=["a question", "another"], tokens=TOKENS, model=early_role, users=2)
    found = measured(steady, load, tmp_path, tokenizer)
    assert {name for name, one in found.items() if one.ttft_p50_ms < ROLE_AHEAD_S * 1e3} == {"vllm bench serve"}
    assert all(one.e2e_p50_ms >= ROLE_AHEAD_S * 1e3 for one in found.values())
