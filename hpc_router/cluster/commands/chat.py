"""Streams one answer of the deployment, for `hpc-router chat`."""

import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from hpc_router.cluster.commands.router_access import RouterAccess
from hpc_router.errors import HpcRouterError
from hpc_router.net.http_client import session, tls_option
from hpc_router.net.protocol import CHAT
from hpc_router.relay.sse import DONE, EventSplitter, EventTooLargeError, UnfinishedEventError, payloads

IDLE_S: Final = 600.0
"""Time limit in seconds between two parts of an answer."""
Message = dict[str, str]


class ChatError(HpcRouterError):
    """The request failed, or its stream was incomplete."""


@dataclass(frozen=True, slots=True)
class Head:
    """The expert and the replica that answer, and why the router chose the expert."""

    expert: str | None
    replica: str | None
    reason: str | None


async def chat(access: RouterAccess, messages: Sequence[Message], *, model: str) -> AsyncGenerator[Head | str, None]:
    """Yields the head, then the parts of the answer's text. `model`: an expert, or `auto`. Raises ChatError."""
    body = {"model": model, "messages": list(messages), "stream": True}
    headers = {"Authorization": f"Bearer {access.token}"}
    limits = aiohttp.ClientTimeout(total=None, sock_read=IDLE_S)
    try:
        async with (
            session(timeout_s=None) as client,
            client.post(
                access.url + CHAT, json=body, headers=headers, timeout=limits, ssl=tls_option(access.certificate)
            ) as response,
        ):
            if response.status != 200:
                raise ChatError(_message(await response.text(errors="replace"), status=response.status))
            head = response.headers
            yield Head(head.get("x-expert"), head.get("x-replica"), head.get("x-route-reason"))
            splitter = EventSplitter()
            async for received in response.content.iter_any():
                for text in filter(None, map(_text_of, payloads(splitter.feed(received)))):
                    yield text
            for text in filter(None, map(_text_of, payloads(splitter.end()))):
                yield text
    except (EventTooLargeError, UnfinishedEventError) as error:
        raise ChatError(f"the router at {access.url} sent a broken stream: {error}") from error
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise ChatError(f"the router at {access.url} broke the stream off: {error or type(error).__name__}") from error


def _text_of(data: bytes) -> str:
    """Returns the text in one SSE event."""
    if data == DONE:
        return ""
    try:
        event: Any = json.loads(data)
    except ValueError:
        return ""
    if isinstance(event, dict) and event.get("error"):
        raise ChatError(_message(data.decode("utf-8", "replace"), status=200))
    choices = event.get("choices") if isinstance(event, dict) else None
    delta = choices[0].get("delta") or {} if choices else {}
    return str(delta.get("content") or "")


def _message(text: str, *, status: int) -> str:
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return f"status {status}: {text[:300]}"
