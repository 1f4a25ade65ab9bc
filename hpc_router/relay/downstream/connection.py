"""One connection of a client, which serves one request after another.

A connection is either idle (then `_deadline` is set) or serves a request: first by callbacks (`pending`), and in a task
(`task`) once something has to be awaited. When an idle connection receives a request, it calls the handler at once,
without a task. If the handler returns a coroutine, a task is started for it at once; if it returns a `PendingResponse`,
only when that is resumed. The connection keeps reading while it serves a request: a disconnect cancels the request, and
further requests wait in the parser, up to a limit.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, cast

from hpc_router.relay.downstream.client_request import REASONS, ClientRequest
from hpc_router.relay.downstream.interface import (
    DownstreamGoneError,
    PendingResponse,
    Response,
    error_response,
)
from hpc_router.relay.downstream.request_parser import RefusedError, RequestParser

if TYPE_CHECKING:
    from hpc_router.relay.downstream.server import Server

logger = logging.getLogger(__name__)

LINGER_S: Final = 5.0
"""Time in seconds for a client that is still sending to read the response before the connection is closed."""


class ClientConnection(asyncio.Protocol):
    """One connection of a client to `server`."""

    __slots__ = (
        "_deadline",
        "_lingering",
        "_loop",
        "_parser",
        "_paused",
        "_refusal",
        "_request",
        "_timer",
        "_transport",
        "_waiter",
        "_writable",
        "cross_origin",
        "idle",
        "pending",
        "server",
        "task",
    )  # fmt: skip

    def __init__(self, server: "Server") -> None:
        self.server = server
        self.cross_origin = server.cross_origin
        self._loop = server.loop
        self._parser = RequestParser(
            max_body=server.max_body, request_type=ClientRequest, streams_body=server.streams_body,
            pause=self.pause_reading,
        )  # fmt: skip
        self._paused = False  # whether the connection is not read, because the reader of a streamed body is slower
        self._transport: asyncio.Transport | None = None
        self._request: ClientRequest | None = None  # the request that is being served
        self.pending: PendingResponse | Coroutine[Any, Any, Response | None] | None = None
        self.task: asyncio.Task[None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._deadline: float | None = None  # deadline of the next request's head; None while a request is served
        self._refusal: RefusedError | None = None
        self._writable = True
        self._lingering = False
        self.idle = False  # see `Request.idle`

    # Called by the server.

    def stop(self) -> None:
        """Closes the connection at once if it is idle. Otherwise it closes itself after its current request, because
        `Server.stopping` is set."""
        if self._deadline is not None and self._transport is not None:
            self._transport.close()  # after the last response has been sent

    # From one request to the next.

    def _start_next(self) -> None:
        """Starts the next request if it has been received; else sets the deadline by which it must arrive. Called while
        the connection serves no request."""
        waiting = self._parser.waiting
        if waiting:
            self._deadline = None
            self._request = request = waiting.popleft()
            request.connection = self
            self.pending = self.server.handler(request)
            if not isinstance(self.pending, PendingResponse):
                self.run_pending()
        elif self._refusal is not None:
            self._run(self._refuse, self._refusal)
        else:
            self._deadline = self._loop.time() + self.server.keep_alive_s

    def run_pending(self) -> None:
        """Continues the pending request in a task."""
        self._run(self._serve)

    def _run(self, step: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        self._deadline = None
        self.task = self._loop.create_task(self._to_end(step, *args))

    async def _serve(self) -> None:
        request, pending = self._request, self.pending
        assert request is not None
        assert pending is not None
        self.pending = None
        response = await (pending.run() if isinstance(pending, PendingResponse) else pending)
        if self.server.stopping:
            request.keep_alive = False
        request.finish(response)
        await self._end(request)

    def responded(self, request: ClientRequest) -> None:
        """Called when the response to a pending request has been sent. Starts the next request or waits for it. Before
        that, if the client reads slowly or the connection is to be closed, a task runs `_end`."""
        if not request.keep_alive or not self._writable:
            self._run(self._end, request)
        elif self._parser.waiting or self._refusal is not None:
            self._start_next()
        else:
            self._request = None  # frees the body
            self._deadline = self._loop.time() + self.server.keep_alive_s

    async def _end(self, request: ClientRequest) -> None:
        """Waits until the client has read the complete response, and closes the connection unless it is kept alive."""
        if not self._writable:
            await self.drain(self.server.keep_alive_s)
        if not request.keep_alive:
            await self._close(linger=not request.complete)

    async def _refuse(self, error: RefusedError) -> None:
        """Responds with `error` to bytes that are not a request, and closes the connection."""
        response = error_response(error.status, kind="invalid_request_error", code="bad_request", message=str(error))
        if self.cross_origin.origins:
            response.head += self.cross_origin.lines(self._parser.partial_headers)
        self.write(
            b"HTTP/1.1 %d %b\r\n%bcontent-length: %d\r\nconnection: close\r\n\r\n%b"
            % (response.status, REASONS[response.status], response.head, len(response.body), response.body)
        )
        await self._close(linger=True)

    async def _close(self, *, linger: bool) -> None:
        """Closes the connection after the response. `linger`: whether the client may still be sending; the rest is then
        read first, because closing at once would reset the connection, so that the client could lose the response."""
        if self._transport is None or self._transport.is_closing():
            return
        if linger:
            self._lingering = True
            self.resume_reading()
            if self._transport.can_write_eof():
                self._transport.write_eof()
            with suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    await self.wait_for_event()  # a disconnect cancels this task
        self._deadline = self._loop.time() + self.server.keep_alive_s  # for reading the rest of the response
        self._transport.close()

    async def _to_end(self, step: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        """Runs `step(*args)` as the connection's task, then starts the next request. An error closes the connection."""
        try:
            await step(*args)
        except DownstreamGoneError:
            self.abort()
        except BaseException as error:
            self.abort()
            if not isinstance(error, Exception):
                raise
            logger.exception("a connection failed")
        if self._transport is not None and not self._transport.is_closing():
            self.task = self._request = None  # frees the bodies
            self.resume_reading()  # the handler may have left a part of a streamed body
            self._start_next()

    # Called by requests.

    def wait_for_event(self) -> asyncio.Future[None]:
        """Returns a future that the next event of the connection completes. The connection's task awaits it."""
        self._waiter = waiter = self._loop.create_future()
        return waiter

    def pause_reading(self) -> None:
        if not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    def write(self, data: bytes) -> bool:
        """Sends `data`. Returns False if `drain` must be called before the next `write`. Raises DownstreamGoneError."""
        transport = self._transport
        if transport is None or transport.is_closing():
            raise DownstreamGoneError("the client has gone")
        self.idle = False
        transport.write(data)
        return self._writable

    async def drain(self, limit_s: float | None) -> None:
        """Waits until the client has read most of the data. Raises DownstreamGoneError if the client disconnects or
        takes longer than `limit_s` seconds."""
        try:
            async with asyncio.timeout(limit_s):
                while not self._writable and self._transport is not None:
                    await self.wait_for_event()
        except TimeoutError as error:
            self.abort()
            raise DownstreamGoneError("the client does not read") from error
        if self._transport is None:
            raise DownstreamGoneError("the client has gone")

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.server.connections.add(self)
        self._deadline = self._loop.time() + self.server.keep_alive_s
        self._timer = self._loop.call_at(self._deadline, self._check_deadline)

    def data_received(self, data: bytes) -> None:
        if self._lingering or self._refusal is not None:
            return
        try:
            self._parser.feed(data)
        except RefusedError as refusal:
            self._refusal = refusal
        if self._deadline is None:
            self._wake()  # the body of the current request may be complete
        elif self._parser.waiting or self._refusal is not None:
            self._start_next()

    def eof_received(self) -> None:
        """Called when the client has ended its side of the connection. During a request, this counts as a disconnect,
        and the connection is aborted. Otherwise the transport closes the connection after writing its buffer."""
        if self._deadline is None and not self._lingering:
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self.server.left(self)
        self._parser.release()
        if self._timer is not None:
            self._timer.cancel()
        pending, self.pending, self._request = self.pending, None, None
        if isinstance(pending, PendingResponse):
            pending.cancel()
        elif pending is not None:
            pending.close()
        task, self.task = self.task, None  # a cancelled task refers to its frames, and they to this object
        if task is not None:
            task.cancel()

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _check_deadline(self) -> None:
        """Closes the connection if it is still idle at its deadline. A new request only stores another deadline; if the
        timer then fires too early, it is scheduled again."""
        now = self._loop.time()
        if self._deadline is not None and now >= self._deadline:
            self.abort()
            return
        self._timer = self._loop.call_at(self._deadline or now + self.server.keep_alive_s, self._check_deadline)
