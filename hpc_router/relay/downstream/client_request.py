"""One request of a client, and its response in HTTP/1.1: head, framing and end."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from hpc_router.errors import RequestTimeoutError
from hpc_router.relay.downstream.interface import DownstreamGoneError, Request, Response, check_encoding
from hpc_router.relay.downstream.request_parser import ParsedRequest

if TYPE_CHECKING:
    from hpc_router.relay.downstream.connection import ClientConnection

REASONS: Final = {status.value: status.phrase.encode() for status in HTTPStatus}
_WITHOUT_BODY: Final = frozenset({204, 304})


@lru_cache(maxsize=1)
def _date(at: int) -> bytes:
    return formatdate(at, usegmt=True).encode()


class ClientRequest(ParsedRequest, Request):
    """A parsed request of a client, and the methods that write its response to `connection`."""

    connection: "ClientConnection"
    response_started = False
    _chunked = False
    _without_body = False

    @property
    def idle(self) -> bool:
        return self.connection.idle

    @idle.setter
    def idle(self, yes: bool) -> None:
        self.connection.idle = yes

    async def read(self, *, limit_s: float | None = None) -> bytes:
        check_encoding(self.headers)
        if not self.complete:
            self._continue()
            try:
                async with asyncio.timeout(limit_s):
                    while not self.complete and self.failure is None:
                        await self.connection.wait_for_event()
            except TimeoutError as error:
                raise RequestTimeoutError(f"the body did not arrive within {limit_s:g} s") from error
            if self.failure is not None:
                raise self.failure
        return b"".join(self.chunks)

    async def body_chunks(self, *, limit_s: float | None = None) -> AsyncIterator[bytes]:
        check_encoding(self.headers)
        if not self.complete:
            self._continue()
        while True:
            if self.chunks:
                part = b"".join(self.chunks)
                self.chunks.clear()
                self.size = 0
                self.connection.resume_reading()
                yield part
            elif self.complete:
                return
            elif self.failure is not None:
                raise self.failure
            else:
                try:
                    async with asyncio.timeout(limit_s):
                        await self.connection.wait_for_event()
                except TimeoutError as error:
                    raise RequestTimeoutError(f"no part of the body arrived for {limit_s:g} s") from error

    def _continue(self) -> None:
        """Tells a client that waits for it to send the body."""
        if self.head.expects and not self.chunks and self.failure is None:
            self.connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def start_response(self, status: int, head: bytes, *, length: int | None) -> None:
        self.send(status, head, length)

    def send(self, status: int, head: bytes, length: int | None, body: bytes = b"") -> None:
        """Sends the head and the first part of the body, `body`, which may be all of it. `length`: length of the whole
        body; None if it is unknown."""
        self.response_started = True
        if not self.complete:
            self.keep_alive = False
        self._without_body = status in _WITHOUT_BODY or self.method == "HEAD"
        if status in _WITHOUT_BODY:
            framing = b""
        elif length is not None:
            framing = b"content-length: %d\r\n" % length
        elif self.head.http_1_0:
            self.keep_alive, framing = False, b""  # closing the connection ends the body
        else:
            self._chunked, framing = not self._without_body, b"transfer-encoding: chunked\r\n"
        if not self.keep_alive:
            framing += b"connection: close\r\n"
        elif self.head.http_1_0:
            framing += b"connection: keep-alive\r\n"
        cross_origin = self.connection.cross_origin
        if cross_origin.origins:
            framing += cross_origin.lines(self.headers)
        self.connection.write(
            b"HTTP/1.1 %d %b\r\n%b%bdate: %b\r\n\r\n%b"
            % (
                status,
                REASONS.get(status, b""),
                head,
                framing,
                _date(int(time.time())),
                b"" if self._without_body else body,
            )
        )

    def write(self, data: bytes) -> bool:
        if self._chunked and data:  # an empty chunk would end the body
            return self.connection.write(b"%x\r\n%b\r\n" % (len(data), data))
        return self.connection.write(b"" if self._without_body else data)

    @property
    def write_chunk(self) -> Callable[[bytes], bool] | None:
        return self.connection.write if self._chunked else None

    async def drain(self, *, limit_s: float | None = None) -> None:
        await self.connection.drain(limit_s)

    def abort(self) -> None:
        self.connection.abort()

    def respond(self, status: int, head: bytes, body: bytes) -> None:
        connection = self.connection
        connection.pending = None
        if connection.server.stopping:
            self.keep_alive = False
        try:
            self.send(status, head, len(body), body)
        except DownstreamGoneError:
            pass
        else:
            connection.responded(self)

    def end(self) -> None:
        connection = self.connection
        connection.pending = None
        if connection.server.stopping:
            self.keep_alive = False
        try:
            self.finish(None)
        except DownstreamGoneError:
            pass
        else:
            connection.responded(self)

    def resume(self) -> None:
        self.connection.run_pending()

    def finish(self, response: Response | None) -> None:
        """Completes the response after the handler has returned. `response`: what the handler returned; None if it has
        streamed the response."""
        if response is not None:
            if self.response_started:
                raise AssertionError("the handler has returned a second response")
            self.send(response.status, response.head, len(response.body), response.body)
        elif not self.response_started:
            raise AssertionError("the handler has neither sent nor returned a response")
        elif self._chunked:
            self.connection.write(b"0\r\n\r\n")
