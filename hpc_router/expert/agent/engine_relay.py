"""Relays one request to the engine and its response to the client, with unchanged bytes.

If the engine fails before its response begins, an exception is raised, which the HTTP API turns into an error response.
If it fails during the response, the client's connection is closed, so that a response that was cut never looks
complete. If that client is the router, the router sends an error event to its own client.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Final

from hpc_router.errors import UpstreamError
from hpc_router.relay.downstream.interface import SHORT_BYTES, PendingResponse, Request, Response
from hpc_router.relay.headers import NOT_DOWNSTREAM, NOT_UPSTREAM, Headers, crossing
from hpc_router.relay.in_flight import InFlight
from hpc_router.relay.sse import CONTENT_TYPE
from hpc_router.relay.unchanged_response import relay_unchanged
from hpc_router.relay.upstream.interface import (
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
"""Time limits for the engine. The router limits the duration of a response, and closes the connection to cancel it."""
ENGINE: Final = address_of("http://engine")


class FastRelay(PendingResponse, ResponseCallback):
    """A request to the engine that is relayed without an asyncio task if its response is received in one read.
    Otherwise a task continues it (`respond`)."""

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
        """Sends the request with this body to the engine. Returns False, and sends nothing, if it would have to wait
        for a connection; the request then needs a task."""
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
    """Returns the engine's response to `request`; None if it was streamed to the client.

    `on_progress` is called for every chunk of the response. `started`: the request, if `FastRelay` has already sent it.
    Raises the errors of `Request.read`, and UpstreamError if the engine sends no response or fails during the response.
    In the last case, the client's connection is closed first.
    """
    body = request.complete_body()
    if body is None:
        body = await request.read()
    head = _head(request)
    try:
        async with client.request(
            request.method, ENGINE, request.target, head=head, body=body or None, started=started
        ) as answer:
            return await relay_unchanged(request, answer, on_progress=on_progress)
    except UpstreamError as error:
        if request.response_started:
            logger.warning("the engine failed during a response: %s", error)
            request.abort()
        raise


def _head(request: Request) -> bytes:
    lines = crossing(request.headers, drop=NOT_UPSTREAM)
    return b"%bx-request-id: %b\r\n" % (lines, request.request_id) if request.request_id else lines
