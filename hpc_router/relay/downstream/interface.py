"""Interface between the server and its handlers, in the router and in the agent: requests in, responses out.

There are two implementations, which pass the same tests: `server`, and the aiohttp reference in the tests. A handler
returns a short response as a `Response`, and writes a stream through the request object.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from hpc_router.errors import (
    BadRequestError,
    BodyTooLargeError,
    HpcRouterError,
    RequestTimeoutError,
    UnsupportedEncodingError,
)
from hpc_router.relay.api_formats import ErrorReply, api_format_of
from hpc_router.relay.headers import Headers, lines

KEEP_ALIVE_S: Final = 75.0
"""Maximum time in seconds for the next request's head, from the connect or the end of the previous response."""
SHORT_BYTES: Final = 2**16
"""Maximum length in bytes of a response that the handler only puts into the send buffer. After a longer one, the
handler waits until the client has read most of it."""
JSON: Final = b"content-type: application/json\r\n"
_UNREADABLE: Final = {
    UnsupportedEncodingError: (415, "unsupported_encoding"),
    BodyTooLargeError: (413, "body_too_large"),
    RequestTimeoutError: (408, "request_timeout"),
    BadRequestError: (400, "bad_request"),
}
"""HTTP status and error code for each error of `Request.read`."""


class DownstreamGoneError(HpcRouterError):
    """The client has closed its connection or does not read."""


@dataclass(slots=True)
class Response:
    """A complete response. `head`: header lines, except those for framing and connection."""

    status: int
    head: bytes = b""
    body: bytes = b""

    def add(self, name: str, value: str) -> None:
        """Adds a header line."""
        self.head += lines({name: value})


class Request(ABC):
    """A request of a client, and the methods that send its response.

    `path` is decoded; `target` is path and query as received; neither has doubled slashes in the path. `request_id`:
    the value of `x-request-id`. It is not among the headers, so that heads that differ only in this value share one
    `Headers` object. `keep_alive`: whether the connection stays open after the response; a handler may set it to False
    before it responds.

    To stream a response, a handler calls `start_response`, then `write`, with a `drain` after each `write` that
    returned False, and returns None.
    """

    method: str
    target: str
    path: str
    query: str
    headers: Headers
    request_id: bytes
    keep_alive: bool
    response_started: bool
    """Whether the head of a response has been sent."""
    idle: bool
    """Whether nothing was written since a caller set this to True. Each write sets it to False."""

    def complete_body(self) -> bytes | None:
        """Returns the body if all of it has been received. If it returns None, the handler must await `read`."""
        return None

    @abstractmethod
    async def read(self, *, limit_s: float | None = None) -> bytes:
        """Waits for the complete body and returns it. Raises BadRequestError or BodyTooLargeError if it is not valid,
        and RequestTimeoutError after `limit_s` seconds."""

    async def body_chunks(self, *, limit_s: float | None = None) -> AsyncIterator[bytes]:
        """Yields the body in parts while it arrives. If the server's `streams_body` is true of this request, the body
        may be longer than `max_body`, and the client is read no faster than the caller takes the parts. Raises what
        `read` raises; `limit_s` is the time limit in seconds for each part."""
        yield await self.read(limit_s=limit_s)

    def respond(self, status: int, head: bytes, body: bytes) -> None:
        """Sends the complete response of a `PendingResponse`. The arguments are those of `Response`."""
        raise NotImplementedError

    def end(self) -> None:
        """Ends the streamed response of a `PendingResponse`."""
        raise NotImplementedError

    def resume(self) -> None:
        """Starts the task in which a `PendingResponse` continues."""
        raise NotImplementedError

    @abstractmethod
    def start_response(self, status: int, head: bytes, *, length: int | None) -> None:
        """Sends the head of the response. `length`: length of the body; None if it is unknown: the body is then sent in
        HTTP chunks."""

    @abstractmethod
    def write(self, data: bytes) -> bool:
        """Sends a part of the body. Returns False if `drain` must be called before the next part. Raises
        DownstreamGoneError."""

    @property
    def write_chunk(self) -> Callable[[bytes], bool] | None:
        """Returns a function that sends data which is already framed as HTTP/1.1 chunks, and otherwise behaves like
        `write`. Returns None if the response is not sent in chunks."""
        return None

    @abstractmethod
    async def drain(self, *, limit_s: float | None = None) -> None:
        """Waits until the client has read most of the written data. Raises DownstreamGoneError. A client that takes
        longer than `limit_s` seconds is disconnected, because its request occupies a replica."""

    @abstractmethod
    def abort(self) -> None:
        """Aborts the connection, by which the client sees that the body is incomplete if it can get no error event."""


class PendingResponse:
    """A request that is served by callbacks.

    It ends with `Request.respond` or `Request.end`, or continues in a task after `Request.resume`. The class is not
    abstract, because `isinstance` takes several times as long with an abstract class.
    """

    __slots__ = ()

    def cancel(self) -> None:
        """Cancels the request because the client has disconnected. Not called once `run` has started."""
        raise NotImplementedError

    async def run(self) -> Response | None:
        """Continues the request in a task. Returns what the coroutine of a `Handler` returns: the response, or None if
        it was streamed. Is cancelled when the client disconnects."""
        raise NotImplementedError


Handler = Callable[[Request], PendingResponse | Coroutine[Any, Any, Response | None]]
"""Responds to a request.

A handler returns a `PendingResponse`, or a coroutine that a task runs and that is cancelled when the client
disconnects. The coroutine returns the response; None if it was written through the request.
"""


def check_encoding(headers: Headers) -> None:
    """Raises UnsupportedEncodingError if the headers say that the body is compressed."""
    if b"content-encoding" in headers and any(e.lower() != b"identity" for e in headers.all(b"content-encoding")):
        raise UnsupportedEncodingError("request bodies must not be compressed: send them without Content-Encoding")


def json_response(value: Any, *, status: int = 200) -> Response:
    return Response(status, JSON, json.dumps(value).encode())


def error_response(
    status: int, *, kind: str, code: str, message: str, param: str | None = None, path: str = ""
) -> Response:
    """Returns an error response in the format of the API at `path`; for any other path, in OpenAI's format."""
    response = json_response(
        api_format_of(path).error_body(ErrorReply(status, kind, code, message, param)), status=status
    )
    if status == 401:
        response.add("www-authenticate", "Bearer")
    elif status == 415:
        response.add("accept-encoding", "identity")  # RFC 9110, section 15.5.16
    return response


def unreadable_response(error: BadRequestError | BodyTooLargeError | RequestTimeoutError, *, path: str) -> Response:
    """Returns the response to a request whose body could not be read. `error`: what `Request.read` has raised."""
    status, code = next(answer for kind, answer in _UNREADABLE.items() if isinstance(error, kind))
    return error_response(status, kind="invalid_request_error", code=code, message=str(error), path=path)
