"""`hpc-router chat` reads a stream with any kind of line ends."""

import json

import pytest

from hpc_router.cluster.commands.chat import ChatError, Head, chat
from hpc_router.cluster.commands.router_access import RouterAccess
from hpc_router.state.registry import Record, RecordKind, State
from tests.relay.scripted import CHUNKED, Answer, chunked, head, scripted

EVENTS = head(CHUNKED, b"content-type: text/event-stream")


def delta(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode()


async def text_of(answer: Answer) -> list[str]:
    async with scripted(answer) as server:
        url = f"http://{server.address.header.decode()}"
        access = RouterAccess(Record(RecordKind.ROUTER, "router-0.g1", url, State.READY, {}), "t")
        return [piece async for piece in chat(access, [], model="auto") if not isinstance(piece, Head)]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("last", [2, 1, 0], ids=["closed", "a line end", "nothing"])
async def test_the_text_of_every_event(end: bytes, last: int) -> None:
    body = delta("a") + end * 2 + b": ping" + end + delta("b") + end * 2 + delta("c") + end * last
    assert await text_of([EVENTS, chunked(*[bytes([byte]) for byte in body])]) == ["a", "b", "c"]


@pytest.mark.parametrize("tail", [b"data: {", b'data: {"error": {"message": "failed before it had finished"}}\n\n'])
async def test_a_stream_that_fails_is_an_error(tail: bytes) -> None:
    with pytest.raises(ChatError, match=r"failed before it had finished|broken stream"):
        await text_of([EVENTS, chunked(delta("a") + b"\n\n", tail)])
