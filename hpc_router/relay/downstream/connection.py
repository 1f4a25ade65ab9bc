"""One client's connection: one request after another, each with its answer.

One task takes requests as their heads are complete and writes answers into the transport. Reading goes on meanwhile, so
that a client that leaves is noticed at once: its handler is cancelled. Pipelined requests wait their turn, a bounded
number of them. A request that `express` begins needs no task, unless it is handed back to it.
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
    Express,
    Request,
    Response,
    Work,
    check_encoding,
    error_response,
)
from hpc_router.relay.downstream.request_parser import ParsedRequest, RefusedError, RequestParser

if TYPE_CHECKING:
    from hpc_router.relay.downstream.server import Server

logger = logging.getLogger(__name__)

LINGER_S: Final = 5.0
"""How long a client that still sends is let finish, so that it reads the answer before the connection breaks."""
_REASONS: Final = {status.value: status.phrase.encode() for status in HTTPStatus}
_WITHOUT_BODY: Final = frozenset({204, 304})


@lru_cache(maxsize=1)
def _date(at: int) -> bytes:
    return formatdate(at, usegmt=True).encode()


class ClientRequest(Request):
    __slots__ = ("_begun", "_chunked", "_connection", "_message", "_silent", "answered")

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
        self.begun_work = None
        self.answered = False
        self._begun = False
        self._chunked = False
        self._silent = head.method == "HEAD"

    @property
    def begun(self) -> bool:
        return self._begun

    @property
    def quiet(self) -> bool:
        return self._connection.quiet

    @quiet.setter
    def quiet(self, yes: bool) -> None:
        self._connection.quiet = yes

    @property
    def whole(self) -> bool:
        """All of it has come."""
        return self._message.complete

    def ready(self) -> bytes | None:
        message = self._message
        if not message.complete or len(message.pieces) != 1 or b"content-encoding" in self.headers:
            return None
        return b"".join(message.pieces)

    async def read(self, *, limit_s: float | None = None) -> bytes:
        message = self._message
        check_encoding(self.headers)
        if not message.complete:
            if message.head.expects and not message.pieces and message.failure is None:
                self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            try:
                async with asyncio.timeout(limit_s):
                    while not message.complete and message.failure is None:
                        await self._connection.news()
            except TimeoutError as error:
                raise RequestTimeoutError(f"the body did not arrive within {limit_s:g} s") from error
            if message.failure is not None:
                raise message.failure
        return b"".join(message.pieces)

    async def begin(self, status: int, head: bytes, *, length: int | None) -> None:
        self.send(status, head, length)

    def send(self, status: int, head: bytes, length: int | None, body: bytes = b"") -> None:
        """The head and what is known of the body."""
        self._begun = True
        message = self._message
        if not message.keep_alive or not message.complete:
            self.keep_alive = False
        if status in _WITHOUT_BODY:
            self._silent, framing = True, b""
        elif length is not None:
            framing = b"content-length: %d\r\n" % length
        elif message.head.http_1_0:
            self.keep_alive, framing = False, b""  # its end is the connection's
        else:
            self._chunked, framing = not self._silent, b"transfer-encoding: chunked\r\n"
        if not self.keep_alive:
            framing += b"connection: close\r\n"
        elif message.head.http_1_0:
            framing += b"connection: keep-alive\r\n"
        self._connection.write(
            b"HTTP/1.1 %d %b\r\n%b%bdate: %b\r\n\r\n%b"
            % (status, _REASONS.get(status, b""), head, framing, _date(int(time.time())), b"" if self._silent else body)
        )

    def write(self, data: bytes) -> bool:
        if self._chunked and data:  # an empty chunk would be the last one
            return self._connection.write(b"%x\r\n%b\r\n" % (len(data), data))
        return self._connection.write(b"" if self._silent else data)

    @property
    def write_chunk(self) -> Callable[[bytes], bool] | None:
        return self._connection.write if self._chunked else None

    async def drain(self, *, limit_s: float | None = None) -> None:
        await self._connection.drain(limit_s)

    def abort(self) -> None:
        self._connection.abort()

    def answer(self, status: int, head: bytes, body: bytes) -> None:
        self._connection.answer(self, status, head, body)

    def resume(self) -> None:
        self._connection.resume(self)

    def finish(self, response: Response | None) -> None:
        """After the handler."""
        self.answered = True
        if response is not None:
            if self._begun:
                raise AssertionError("the handler has returned a second answer")
            self.send(response.status, response.head, len(response.body), response.body)
        elif not self._begun:
            raise AssertionError("the handler has neither answered nor returned an answer")
        elif self._chunked:
            self._connection.write(b"0\r\n\r\n")


class ClientConnection(asyncio.Protocol):
    __slots__ = (
        "_alarm", "_deadline", "_framer", "_lingering", "_loop", "_refusal", "_resumed", "_server", "_task",
        "_transport", "_waiter", "_work", "_writable", "quiet",
    )  # fmt: skip

    def __init__(self, server: "Server") -> None:
        self._server = server
        self._loop = server.loop
        self._framer = RequestParser(max_body=server.max_body)
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._deadline: float | None = None  # for the next request's head; None: a request is being handled
        self._refusal: RefusedError | None = None
        self._work: Work | None = None  # what is under way without a task
        self._resumed: ClientRequest | None = None  # for the task to go on with
        self._writable = True
        self._lingering = False
        self.quiet = False  # nothing was written since this was set

    # The server's side.

    def stop(self) -> None:
        """No request after the present one."""
        if self._deadline is not None and self._transport is not None:
            self._transport.close()  # when the last answer is out

    @property
    def task(self) -> "asyncio.Task[None] | None":
        return self._task

    async def _serve(self) -> None:
        try:
            while (request := await self._next()) is not None:
                if not request.answered:
                    response = await self._server.handler(request)
                    if self._server.stopping:
                        request.keep_alive = False
                    request.finish(response)
                if not self._writable:
                    await self.drain(self._server.keep_alive_s)
                if not request.keep_alive:
                    await self._end(linger=not request.whole)
                    return
                request = response = None  # or the bodies would be kept until the next one comes
            if self._refusal is not None:
                self._refuse(self._refusal)
                await self._end(linger=True)
        except DownstreamGoneError:
            pass
        except Exception:
            logger.exception("a connection failed")
        finally:
            if self._transport is not None and not self._transport.is_closing():
                self._transport.abort()

    async def _next(self) -> ClientRequest | None:
        """None: there will be no other one."""
        waiting = self._framer.waiting
        if self._work is None:
            self._deadline = self._loop.time() + self._server.keep_alive_s
        while self._resumed is None and (self._work is not None or not self._anything_waits):
            await self.news()
        self._deadline = None
        if self._resumed is not None:
            request, self._resumed, self._work = self._resumed, None, None
            return request
        return ClientRequest(waiting.popleft(), self) if waiting else None

    @property
    def _anything_waits(self) -> bool:
        return bool(self._framer.waiting) or self._refusal is not None or self._server.stopping

    def _refuse(self, error: RefusedError) -> None:
        response = error_response(error.status, kind="invalid_request_error", code="bad_request", message=str(error))
        self.write(
            b"HTTP/1.1 %d %b\r\n%bcontent-length: %d\r\nconnection: close\r\n\r\n%b"
            % (response.status, _REASONS[response.status], response.head, len(response.body), response.body)
        )

    async def _end(self, *, linger: bool) -> None:
        """Close once the answer is out. A client that still sends would lose it to a reset, so that is let finish."""
        if self._transport is None or self._transport.is_closing():
            return
        if linger:
            self._lingering = True
            if self._transport.can_write_eof():
                self._transport.write_eof()
            with suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    await self.news()  # none comes; that it has left cancels us
        self._deadline = self._loop.time() + self._server.keep_alive_s  # to take what is left
        self._transport.close()

    # The request's side.

    def answer(self, request: ClientRequest, status: int, head: bytes, body: bytes) -> None:
        self._work = None
        if self._server.stopping:
            request.keep_alive = False
        request.answered = True
        try:
            request.send(status, head, len(body), body)
        except DownstreamGoneError:
            return
        self._deadline = self._loop.time() + self._server.keep_alive_s
        if not request.keep_alive or not self._writable:
            self._resumed = request
        if self._resumed is not None or self._anything_waits:
            self._wake()

    def resume(self, request: ClientRequest) -> None:
        self._resumed = request
        self._wake()

    def news(self) -> asyncio.Future[None]:
        """Awaited by the connection's task: something has happened."""
        self._waiter = waiter = self._loop.create_future()
        return waiter

    def write(self, data: bytes) -> bool:
        transport = self._transport
        if transport is None or transport.is_closing():
            raise DownstreamGoneError("the client has gone")
        self.quiet = False
        transport.write(data)
        return self._writable

    async def drain(self, limit_s: float | None) -> None:
        try:
            async with asyncio.timeout(limit_s):
                while not self._writable and self._transport is not None:
                    await self.news()
        except TimeoutError as error:
            self.abort()
            raise DownstreamGoneError("the client reads no more") from error
        if self._transport is None:
            raise DownstreamGoneError("the client has gone")

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # The event loop's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._server.connections.add(self)
        self._deadline = self._loop.time() + self._server.keep_alive_s
        self._alarm = self._loop.call_at(self._deadline, self._ring)
        self._task = self._loop.create_task(self._serve())

    def data_received(self, data: bytes) -> None:
        if self._lingering or self._refusal is not None:
            return
        try:
            self._framer.feed(data)
        except RefusedError as refusal:
            self._refusal = refusal
        if self._work is not None or self._resumed is not None:
            return  # its turn comes
        if self._deadline is not None and self._server.express is not None and self._begin(self._server.express):
            return
        self._wake()

    def _begin(self, express: Express) -> bool:
        """Without the task, which waits for a request."""
        waiting = self._framer.waiting
        if not waiting or not waiting[0].complete:
            return False
        request = ClientRequest(waiting.popleft(), self)
        self._work = express(request)
        if self._work is None:
            self._resumed = request
        else:
            self._deadline = None
        return self._work is not None

    def eof_received(self) -> None:
        """The transport closes, once it is rid of what was written; a client that has left takes none of that."""
        if self._deadline is None and not self._lingering:
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._server.left(self)
        self._framer.release()
        if self._alarm is not None:
            self._alarm.cancel()
        if self._work is not None:
            self._work.cancel()
        self._work = self._resumed = None
        task, self._task = self._task, None  # a cancelled task knows its frames, and they us
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

    def _ring(self) -> None:
        """A deadline is only noted, since it moves with every request; the alarm, when too early, is set again."""
        now = self._loop.time()
        if self._deadline is not None and now >= self._deadline:
            self.abort()
            return
        self._alarm = self._loop.call_at(self._deadline or now + self._server.keep_alive_s, self._ring)
