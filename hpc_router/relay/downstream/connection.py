"""The connection of one client: one request after another, each followed by its response.

Each connection has one task, which calls the handler once a request's head is complete and writes the response. Reading
continues meanwhile, so that a disconnect is noticed at once and cancels the handler. Pipelined requests are queued up
to a limit. A request that the fast path accepts does not use the task unless it is resumed.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, cast

from hpc_router.errors import RequestTimeoutError
from hpc_router.relay.downstream.interface import (
    DownstreamGoneError,
    FastPath,
    PendingResponse,
    Request,
    Response,
    check_encoding,
    error_response,
)
from hpc_router.relay.downstream.request_parser import ParsedRequest, RefusedError, RequestParser

if TYPE_CHECKING:
    from hpc_router.relay.downstream.server import Server

logger = logging.getLogger(__name__)

LINGER_S: Final = 5.0
"""Time for a client that is still sending to read the response before the connection is closed."""
_REASONS: Final = {status.value: status.phrase.encode() for status in HTTPStatus}
_WITHOUT_BODY: Final = frozenset({204, 304})


@lru_cache(maxsize=1)
def _date(at: int) -> bytes:
    return formatdate(at, usegmt=True).encode()


class ClientRequest(Request):
    __slots__ = ("_chunked", "_connection", "_message", "_response_started", "_without_body", "responded")

    def __init__(self, message: ParsedRequest, connection: "ClientConnection") -> None:
        self._message = message
        self._connection = connection
        head = message.head
        self.method = head.method
        self.target = head.target
        self.path = head.path
        self.query = head.query
        self.headers = head.headers
        self.request_id = message.request_id
        self.keep_alive = message.keep_alive
        self.fast_path = None
        self.responded = False
        self._response_started = False
        self._chunked = False
        self._without_body = head.method == "HEAD"

    @property
    def response_started(self) -> bool:
        return self._response_started

    @property
    def idle(self) -> bool:
        return self._connection.idle

    @idle.setter
    def idle(self, yes: bool) -> None:
        self._connection.idle = yes

    @property
    def body_received(self) -> bool:
        """The complete body has been received."""
        return self._message.complete

    def complete_body(self) -> bytes | None:
        message = self._message
        if not message.complete or len(message.chunks) != 1 or b"content-encoding" in self.headers:
            return None
        return b"".join(message.chunks)

    async def read(self, *, limit_s: float | None = None) -> bytes:
        message = self._message
        check_encoding(self.headers)
        if not message.complete:
            if message.head.expects and not message.chunks and message.failure is None:
                self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            try:
                async with asyncio.timeout(limit_s):
                    while not message.complete and message.failure is None:
                        await self._connection.wait_for_event()
            except TimeoutError as error:
                raise RequestTimeoutError(f"the body did not arrive within {limit_s:g} s") from error
            if message.failure is not None:
                raise message.failure
        return b"".join(message.chunks)

    async def start_response(self, status: int, head: bytes, *, length: int | None) -> None:
        self.send(status, head, length)

    def send(self, status: int, head: bytes, length: int | None, body: bytes = b"") -> None:
        """Send the head and the known part of the body."""
        self._response_started = True
        message = self._message
        if not message.keep_alive or not message.complete:
            self.keep_alive = False
        if status in _WITHOUT_BODY:
            self._without_body, framing = True, b""
        elif length is not None:
            framing = b"content-length: %d\r\n" % length
        elif message.head.http_1_0:
            self.keep_alive, framing = False, b""  # closing the connection ends the body
        else:
            self._chunked, framing = not self._without_body, b"transfer-encoding: chunked\r\n"
        if not self.keep_alive:
            framing += b"connection: close\r\n"
        elif message.head.http_1_0:
            framing += b"connection: keep-alive\r\n"
        self._connection.write(
            b"HTTP/1.1 %d %b\r\n%b%bdate: %b\r\n\r\n%b"
            % (
                status,
                _REASONS.get(status, b""),
                head,
                framing,
                _date(int(time.time())),
                b"" if self._without_body else body,
            )
        )

    def write(self, data: bytes) -> bool:
        if self._chunked and data:  # an empty chunk would end the body
            return self._connection.write(b"%x\r\n%b\r\n" % (len(data), data))
        return self._connection.write(b"" if self._without_body else data)

    @property
    def write_chunk(self) -> Callable[[bytes], bool] | None:
        return self._connection.write if self._chunked else None

    async def drain(self, *, limit_s: float | None = None) -> None:
        await self._connection.drain(limit_s)

    def abort(self) -> None:
        self._connection.abort()

    def respond(self, status: int, head: bytes, body: bytes) -> None:
        self._connection.respond(self, status, head, body)

    def resume(self) -> None:
        self._connection.resume(self)

    def finish(self, response: Response | None) -> None:
        """Complete the response after the handler has returned."""
        self.responded = True
        if response is not None:
            if self._response_started:
                raise AssertionError("the handler has returned a second response")
            self.send(response.status, response.head, len(response.body), response.body)
        elif not self._response_started:
            raise AssertionError("the handler has neither sent nor returned a response")
        elif self._chunked:
            self._connection.write(b"0\r\n\r\n")


class ClientConnection(asyncio.Protocol):
    __slots__ = (
        "_deadline", "_lingering", "_loop", "_parser", "_pending", "_refusal", "_resumed", "_server", "_task", "_timer",
        "_transport", "_waiter", "_writable", "idle",
    )  # fmt: skip

    def __init__(self, server: "Server") -> None:
        self._server = server
        self._loop = server.loop
        self._parser = RequestParser(max_body=server.max_body)
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._deadline: float | None = None  # for the next request's head; None while a request is served
        self._refusal: RefusedError | None = None
        self._pending: PendingResponse | None = None  # the request on the fast path
        self._resumed: ClientRequest | None = None  # the request that the task has to continue
        self._writable = True
        self._lingering = False
        self.idle = False  # see `Request.idle`

    # Called by the server, and the task.

    def stop(self) -> None:
        """Serve no request after the current one."""
        if self._deadline is not None and self._transport is not None:
            self._transport.close()  # after the last response has been sent

    @property
    def task(self) -> "asyncio.Task[None] | None":
        return self._task

    async def _serve(self) -> None:
        try:
            while (request := await self._next()) is not None:
                if not request.responded:
                    response = await self._server.handler(request)
                    if self._server.stopping:
                        request.keep_alive = False
                    request.finish(response)
                if not self._writable:
                    await self.drain(self._server.keep_alive_s)
                if not request.keep_alive:
                    await self._end(linger=not request.body_received)
                    return
                request = response = None  # otherwise the bodies stay in memory until the next request
            if self._refusal is not None:
                self._send_refusal(self._refusal)
                await self._end(linger=True)
        except DownstreamGoneError:
            pass
        except Exception:
            logger.exception("a connection failed")
        finally:
            if self._transport is not None and not self._transport.is_closing():
                self._transport.abort()

    async def _next(self) -> ClientRequest | None:
        """Wait for the next request. None: there will be none."""
        waiting = self._parser.waiting
        if self._pending is None:
            self._deadline = self._loop.time() + self._server.keep_alive_s
        while self._resumed is None and (self._pending is not None or not self._has_next):
            await self.wait_for_event()
        self._deadline = None
        if self._resumed is not None:
            request, self._resumed, self._pending = self._resumed, None, None
            return request
        return ClientRequest(waiting.popleft(), self) if waiting else None

    @property
    def _has_next(self) -> bool:
        return bool(self._parser.waiting) or self._refusal is not None or self._server.stopping

    def _send_refusal(self, error: RefusedError) -> None:
        response = error_response(error.status, kind="invalid_request_error", code="bad_request", message=str(error))
        self.write(
            b"HTTP/1.1 %d %b\r\n%bcontent-length: %d\r\nconnection: close\r\n\r\n%b"
            % (response.status, _REASONS[response.status], response.head, len(response.body), response.body)
        )

    async def _end(self, *, linger: bool) -> None:
        """Close the connection after the response. `linger`: the client is still sending, and closing now would reset
        the connection and could discard the response."""
        if self._transport is None or self._transport.is_closing():
            return
        if linger:
            self._lingering = True
            if self._transport.can_write_eof():
                self._transport.write_eof()
            with suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    await self.wait_for_event()  # a disconnect cancels this task
        self._deadline = self._loop.time() + self._server.keep_alive_s  # for reading the rest of the response
        self._transport.close()

    # Called by requests.

    def respond(self, request: ClientRequest, status: int, head: bytes, body: bytes) -> None:
        self._pending = None
        if self._server.stopping:
            request.keep_alive = False
        request.responded = True
        try:
            request.send(status, head, len(body), body)
        except DownstreamGoneError:
            return
        self._deadline = self._loop.time() + self._server.keep_alive_s
        if not request.keep_alive or not self._writable:
            self._resumed = request
        if self._resumed is not None or self._has_next:
            self._wake()

    def resume(self, request: ClientRequest) -> None:
        self._resumed = request
        self._wake()

    def wait_for_event(self) -> asyncio.Future[None]:
        """A future that the next event of the connection completes. Awaited by the connection's task."""
        self._waiter = waiter = self._loop.create_future()
        return waiter

    def write(self, data: bytes) -> bool:
        transport = self._transport
        if transport is None or transport.is_closing():
            raise DownstreamGoneError("the client has gone")
        self.idle = False
        transport.write(data)
        return self._writable

    async def drain(self, limit_s: float | None) -> None:
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
        self._server.connections.add(self)
        self._deadline = self._loop.time() + self._server.keep_alive_s
        self._timer = self._loop.call_at(self._deadline, self._check_deadline)
        self._task = self._loop.create_task(self._serve())

    def data_received(self, data: bytes) -> None:
        if self._lingering or self._refusal is not None:
            return
        try:
            self._parser.feed(data)
        except RefusedError as refusal:
            self._refusal = refusal
        if self._pending is not None or self._resumed is not None:
            return  # the request waits for the current one
        if (
            self._deadline is not None
            and self._server.fast_path is not None
            and self._start_fast_path(self._server.fast_path)
        ):
            return
        self._wake()

    def _start_fast_path(self, fast_path: FastPath) -> bool:
        """Start the next request on the fast path, without waking the task. False: the task has to serve it."""
        waiting = self._parser.waiting
        if not waiting or not waiting[0].complete:
            return False
        request = ClientRequest(waiting.popleft(), self)
        self._pending = fast_path(request)
        if self._pending is None:
            self._resumed = request
        else:
            self._deadline = None
        return self._pending is not None

    def eof_received(self) -> None:
        """The transport closes after writing its buffer. During a request EOF means that the client has
        disconnected."""
        if self._deadline is None and not self._lingering:
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._server.left(self)
        self._parser.release()
        if self._timer is not None:
            self._timer.cancel()
        if self._pending is not None:
            self._pending.cancel()
        self._pending = self._resumed = None
        task, self._task = self._task, None  # a cancelled task refers to its frames, and they to this object
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
        """Every request only stores a new deadline; a timer that fires too early is scheduled again."""
        now = self._loop.time()
        if self._deadline is not None and now >= self._deadline:
            self.abort()
            return
        self._timer = self._loop.call_at(self._deadline or now + self._server.keep_alive_s, self._check_deadline)
