"""Sends requests to the mock engine with HTTP clients that are not part of this project."""

import http.client
import json
import socket
from pathlib import Path

import openai
from openai.types.chat import ChatCompletionMessageParam

from hpc_router.bench.load.native.engine import NAMES, Lateness, mock_engine


def test_the_openai_client_accepts_it(tmp_path: Path) -> None:
    with mock_engine(tmp_path, rate=1000) as engine:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{engine.port}/v1", api_key="none", max_retries=0)
        with client:
            assert tuple(model.id for model in client.models.list()) == NAMES
            messages: list[ChatCompletionMessageParam] = [
                {"role": "user", "content": 'hello "stream":false "max_tokens":9'}
            ]
            answer = client.chat.completions.create(model="math", messages=messages)
            assert "mock engine" in str(answer.choices[0].message.content)
            stream = client.chat.completions.create(model="math", messages=messages, stream=True, max_tokens=3)
            assert [chunk.choices[0].delta.content for chunk in stream] == [" token"] * 3
        assert engine.lateness().requests == 2
        assert engine.lateness().events == 3


def test_every_event_contains_its_send_time(tmp_path: Path) -> None:
    with mock_engine(tmp_path, rate=1000) as engine:
        connection = http.client.HTTPConnection("127.0.0.1", engine.port or 0, timeout=30)
        for _ in range(2):  # both on one connection
            connection.request("POST", "/v1/chat/completions", b'{"stream": true, "max_completion_tokens": 5}')
            answer = connection.getresponse()
            assert answer.getheader("content-type", "").startswith("text/event-stream")
            *events, done, rest = answer.read().decode().split("\n\n")
            assert (done, rest) == ("data: [DONE]", "")
            stamps = [json.loads(event.removeprefix("data: "))["t"] for event in events]
            assert len(stamps) == 5
            assert stamps == sorted(stamps)
            assert all(len(event) in range(140, 200) for event in events)
        connection.close()


def test_a_request_in_pieces_and_two_pipelined_ones(tmp_path: Path) -> None:
    request = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 17\r\n\r\n" + b'{"stream": false}'
    with mock_engine(tmp_path, rate=1) as engine, socket.create_connection(("127.0.0.1", engine.port or 0)) as sock:
        sock.settimeout(30)
        for i in range(len(request)):
            sock.sendall(request[i : i + 1])
        sock.sendall(request * 2)
        got = b""
        while got.count(b"HTTP/1.1 200 OK") < 3 or not got.endswith(b"}}"):
            got += sock.recv(65536)
        assert got.count(b'"finish_reason":"stop"') == 3


def test_unknown_paths_and_methods(tmp_path: Path) -> None:
    with mock_engine(tmp_path, rate=1) as engine:
        for method, path, status in (("GET", "/nope", 404), ("PUT", "/v1/models", 405), ("GET", "/health?x=1", 200)):
            connection = http.client.HTTPConnection("127.0.0.1", engine.port or 0, timeout=30)
            connection.request(method, path)
            assert connection.getresponse().status == status
            connection.close()
        connection = http.client.HTTPConnection("127.0.0.1", engine.port or 0, timeout=30)
        connection.request("POST", "/v1/chat/completions", iter([b"{}"]), encode_chunked=True)
        assert connection.getresponse().status == 411
        connection.close()


def test_lateness_is_an_upper_bound() -> None:
    late = Lateness(1, 100, (0, 50, 49, 0, 0, 1))
    assert late.within_ms(0.5) == 0.004
    assert late.within_ms(0.99) == 0.008
    assert late.within_ms(1.0) == 0.064
    assert late.since(Lateness(0, 50, (0, 50, 0, 0, 0, 0))) == Lateness(1, 50, (0, 0, 49, 0, 0, 1))
