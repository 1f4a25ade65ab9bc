"""One streamed chat request, watched: when each piece came, who answered, what went wrong.

An answer counts only when it is whole: an error event, a cut, a stream without an end or without content is an error
of its kind. The clock is read once per chunk, before anything in it is parsed.
"""

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from hpc_router.bench.config import BenchConfig
from hpc_router.bench.prompts import Prompt
from hpc_router.relay.sse import CONTENT_TYPE, EventSplitter, EventTooLargeError
from hpc_router.wire import CHAT

CONNECT_S: Final = 30.0
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Target:
    """The router under test."""

    url: str
    token: str = field(repr=False)


@dataclass(slots=True)
class Answer:
    """Filled while it arrives, so that one which is cut off has told what came before. Times are the clock's."""

    content_at: list[float] = field(default_factory=list)
    tokens: int | None = None
    status: int | None = None
    expert: str | None = None
    replica: str | None = None
    reason: str | None = None
    error: str | None = None
    finished: bool = False


class _Broken(Exception):
    """The stream says or is something that no good answer would; the message is the error's kind."""


@asynccontextmanager
async def session(target: Target, *, timeout_s: float) -> AsyncIterator[aiohttp.ClientSession]:
    """As many connections as there are users, no proxies, no cookies, no limit but for silence."""
    limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=timeout_s)
    async with aiohttp.ClientSession(
        target.url,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=limits,
        trust_env=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Authorization": f"Bearer {target.token}", "Accept-Encoding": "identity"},
    ) as client:
        yield client


def request_body(config: BenchConfig, prompt: Prompt) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": config.model,
        "messages": [{"role": "user", "content": prompt.text}],
        "max_tokens": config.max_tokens,
        "stream": True,
    }
    if config.usage:
        body["stream_options"] = {"include_usage": True}
    return body | config.extra


async def ask(client: aiohttp.ClientSession, body: Mapping[str, Any], answer: Answer, *, clock: Clock) -> None:
    """Returns when the answer has ended, well or badly; `answer.error` tells."""
    try:
        async with client.post(CHAT, json=body, allow_redirects=False) as response:
            headers = response.headers
            answer.status = response.status
            answer.expert, answer.replica = headers.get("x-expert"), headers.get("x-replica")
            answer.reason = headers.get("x-route-reason")
            if response.status != 200:
                raise _Broken(f"http_{response.status}")
            if response.content_type != CONTENT_TYPE.decode():
                raise _Broken("not_a_stream")
            splitter = EventSplitter()
            async for chunk in response.content.iter_any():
                now = clock()
                for event in _events(splitter.feed(chunk)):
                    _take(event, answer, now)
        if not answer.finished:
            raise _Broken("unfinished")
        if not answer.content_at:
            raise _Broken("no_content")
    except _Broken as error:
        answer.error = str(error)
    except EventTooLargeError:
        answer.error = "bad_event"
    except aiohttp.ClientConnectorError:
        answer.error = "connect"
    except TimeoutError:
        answer.error = "timeout"
    except (aiohttp.ClientError, OSError):
        answer.error = "disconnected"


def _events(whole: bytes) -> Iterator[bytes]:
    """The data of each event."""
    for block in whole.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n\n"):
        lines = [line[5:].removeprefix(b" ") for line in block.split(b"\n") if line.startswith(b"data:")]
        if lines:
            yield b"\n".join(lines)


def _take(data: bytes, answer: Answer, now: float) -> None:
    if data.strip() == b"[DONE]":
        answer.finished = True
        return
    try:
        event: Any = json.loads(data)
        if "error" in event:
            raise _Broken("stream_error")
        for choice in event.get("choices") or ():
            if (choice.get("delta") or {}).get("content"):
                answer.content_at.append(now)
            if choice.get("finish_reason") is not None:
                answer.finished = True
        if event.get("usage"):
            answer.tokens = int(event["usage"]["completion_tokens"])
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise _Broken("bad_event") from error
