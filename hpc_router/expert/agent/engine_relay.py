"""Relays one request to the engine and its response to the client, bytes unchanged.

A failure before the response is raised, and the HTTP API turns it into an error response. A failure within the response
breaks the client's connection, because a response that was cut must never look complete. The router in front turns that
into an error event.
"""

import logging
from collections.abc import Callable
from typing import Final

from hpc_router.errors import UpstreamError
from hpc_router.relay.downstream.interface import SHORT_BYTES, DownstreamGoneError, Request, Response, Work
from hpc_router.relay.headers import NOT_DOWNSTREAM, NOT_UPSTREAM, Headers, crossing
from hpc_router.relay.in_flight import InFlight
from hpc_router.relay.sse import CONTENT_TYPE
from hpc_router.relay.upstream.interface import (
    CHUNK_ENDS,
    ChunkWriter,
    PendingRequest,
    ResponseCallback,
    Upstream,
    UpstreamTimeouts,
    address_of,
)

logger = logging.getLogger(__name__)

_DAY_S: Final = 86_400.0
ENGINE_LIMITS: Final = UpstreamTimeouts(connect_s=5.0, first_byte_s=_DAY_S, idle_s=_DAY_S)
"""The router limits how long a response may take; when it gives up, it closes the connection, which cancels here."""
ENGINE: Final = address_of("http://engine")


class FastRelay(Work, ResponseCallback):
    """A request to the engine that needs no task, as long as its response arrives in one piece: the agent's part of the
    fast path (`express` in relay/downstream)."""

    __slots__ = ("_in_flight", "_on_progress", "_relayed", "_request", "started")

    started: PendingRequest

    def __init__(
        self, request: Request, in_flight: InFlight, relayed: set[Request], on_progress: Callable[[], None]
    ) -> None:
        self._request = request
        self._in_flight = in_flight
        self._relayed = relayed
        self._on_progress = on_progress

    def begin(self, client: Upstream, body: bytes) -> bool:
        """Send the request; False if that is not possible at once: then the handler serves it."""
        request = self._request
        started = client.start(request.method, ENGINE, request.target, head=_head(request), body=body, asker=self)
        if started is None:
            return False
        self.started = started
        self._in_flight.enter()
        self._relayed.add(request)
        return True

    def leave(self) -> None:
        """Remove the request from the counts."""
        self._in_flight.leave()
        self._relayed.discard(self._request)

    def cancel(self) -> None:
        self._request.begun_work = None
        self.started.abandon()
        self.leave()

    def on_answer(self, status: int, headers: Headers, body: bytes) -> bool:
        if headers.content_type == CONTENT_TYPE or len(body) > SHORT_BYTES:
            return False
        request = self._request
        request.begun_work = None
        self._on_progress()
        self.leave()
        request.answer(status, crossing(headers, drop=NOT_DOWNSTREAM), body)
        return True

    def on_news(self) -> None:
        self._request.resume()


async def relay_request(
    request: Request, client: Upstream, *, on_progress: Callable[[], None], started: PendingRequest | None = None
) -> Response | None:
    """The response to `request`; None if it was streamed to the client. `on_progress` is called for every chunk.
    `started` is the request that `FastRelay` has already sent.

    Raises UpstreamError if the engine sends no response or fails within one (the client's connection is then already
    broken), and the errors of `Request.read`.
    """
    body = request.ready()
    if body is None:
        body = await request.read()
    head = _head(request)
    try:
        async with client.request(
            request.method, ENGINE, request.target, head=head, body=body or None, started=started
        ) as answer:
            head = crossing(answer.headers, drop=NOT_DOWNSTREAM)
            if (whole := answer.whole) is not None and len(whole) <= SHORT_BYTES:
                on_progress()
                return Response(answer.status, head, whole)
            await request.begin(answer.status, head, length=answer.length)
            await answer.flow(_ClientSink(request, on_progress))
    except DownstreamGoneError:
        pass  # the handler is about to be cancelled
    except UpstreamError as error:
        if request.begun:
            logger.warning("the engine failed during a response: %s", error)
            request.abort()
        raise
    return None


def _head(request: Request) -> bytes:
    lines = crossing(request.headers, drop=NOT_UPSTREAM)
    return b"%bx-request-id: %b\r\n" % (lines, request.request_id) if request.request_id else lines


class _ClientSink:
    """Writes the chunks of the response to the client."""

    def __init__(self, request: Request, on_progress: Callable[[], None]) -> None:
        self._request = request
        self._on_progress = on_progress
        self._write_chunk = request.write_chunk
        self._passage = None if self._write_chunk is None else ChunkWriter(self._pass, CHUNK_ENDS)

    def take(self, data: bytes) -> bool:
        self._on_progress()
        return self._request.write(data)

    def passage(self) -> ChunkWriter | None:
        return self._passage

    def _pass(self, chunk: bytes) -> bool:
        assert self._write_chunk is not None
        self._on_progress()
        return self._write_chunk(chunk)

    async def make_room(self) -> None:
        await self._request.drain()
