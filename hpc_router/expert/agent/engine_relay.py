"""Relays one request to the engine and its response to the client, bytes unchanged.

A failure before the response is raised, and the HTTP API turns it into an error response. A failure within the response
breaks the client's connection, because a response that was cut must never look complete. The router in front turns that
into an error event.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Final

from hpc_router.errors import UpstreamError
from hpc_router.relay.downstream.interface import SHORT_BYTES, DownstreamGoneError, PendingResponse, Request, Response
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
    request_line,
)

logger = logging.getLogger(__name__)

_DAY_S: Final = 86_400.0
ENGINE_LIMITS: Final = UpstreamTimeouts(connect_s=5.0, first_byte_s=_DAY_S, idle_s=_DAY_S)
"""The router limits how long a response may take; when it gives up, it closes the connection, which cancels here."""
ENGINE: Final = address_of("http://engine")


class FastRelay(PendingResponse, ResponseCallback):
    """A request to the engine that no task awaits, as long as its response may be received in one read. `respond`
    continues it in a task."""

    __slots__ = ("_in_flight", "_on_progress", "_relayed", "_request", "_respond", "started")

    started: PendingRequest

    def __init__(
        self,
        request: Request,
        in_flight: InFlight,
        relayed: set[Request],
        on_progress: Callable[[], None],
        respond: Callable[[Request, PendingRequest], Awaitable[Response | None]],
    ) -> None:
        self._request = request
        self._respond = respond
        self._in_flight = in_flight
        self._relayed = relayed
        self._on_progress = on_progress

    def begin(self, client: Upstream, body: bytes) -> bool:
        """Send the request; False if that is not possible at once: then the handler serves it."""
        request = self._request
        start = request_line(request.method, ENGINE, request.target) + _head(request)
        started = client.start(ENGINE, b"%bcontent-length: %d\r\n\r\n%b" % (start, len(body), body), self)
        if started is None:
            return False
        self.started = started
        self._in_flight.enter()
        self._relayed.add(request)
        return True

    async def run(self) -> Response | None:
        try:
            return await self._respond(self._request, self.started)
        finally:
            self._end()

    def cancel(self) -> None:
        self.started.cancel()
        self._end()

    def _end(self) -> None:
        self._in_flight.leave()
        self._relayed.discard(self._request)

    def on_response(self, status: int, headers: Headers, body: bytes) -> bool:
        if headers.content_type == CONTENT_TYPE or len(body) > SHORT_BYTES:
            return False
        request = self._request
        self._on_progress()
        self._end()
        request.respond(status, crossing(headers, drop=NOT_DOWNSTREAM), body)
        return True

    def on_incomplete(self) -> None:
        self._request.resume()


async def relay_request(
    request: Request, client: Upstream, *, on_progress: Callable[[], None], started: PendingRequest | None = None
) -> Response | None:
    """The response to `request`; None if it was streamed to the client. `on_progress` is called for every chunk.
    `started` is the request that `FastRelay` has already sent.

    Raises UpstreamError if the engine sends no response or fails within one (the client's connection is then already
    broken), and the errors of `Request.read`.
    """
    body = request.complete_body()
    if body is None:
        body = await request.read()
    head = _head(request)
    try:
        async with client.request(
            request.method, ENGINE, request.target, head=head, body=body or None, started=started
        ) as answer:
            head = crossing(answer.headers, drop=NOT_DOWNSTREAM)
            if (whole := answer.complete_body) is not None and len(whole) <= SHORT_BYTES:
                on_progress()
                return Response(answer.status, head, whole)
            request.start_response(answer.status, head, length=answer.length)
            await answer.stream_to(_ClientSink(request, on_progress))
    except DownstreamGoneError:
        pass  # the handler is about to be cancelled
    except UpstreamError as error:
        if request.response_started:
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
        self._chunk_writer = None if self._write_chunk is None else ChunkWriter(self._pass, CHUNK_ENDS)

    def write(self, data: bytes) -> bool:
        self._on_progress()
        return self._request.write(data)

    def chunk_writer(self) -> ChunkWriter | None:
        return self._chunk_writer

    def _pass(self, chunk: bytes) -> bool:
        assert self._write_chunk is not None
        self._on_progress()
        return self._write_chunk(chunk)

    async def drain(self) -> None:
        await self._request.drain()
