"""Interface between the server and its handlers, in the router and in the agent: requests in, responses out.

Two implementations pass the same tests: `server`, and the aiohttp reference in the tests. A handler returns a short
response as a `Response`; it writes a stream through the request object.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
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
"""Time limit for the next request's head, from the connect or the end of the previous response."""
SHORT_BYTES: Final = 2**16
"""A response up to this size is left to the send buffer; for a longer one the handler waits until the client has read
most of it."""
JSON: Final = b"content-type: application/json\r\n"
_UNREADABLE: Final = {
    UnsupportedEncodingError: (415, "unsupported_encoding"),
    BodyTooLargeError: (413, "body_too_large"),
    RequestTimeoutError: (408, "request_timeout"),
    BadRequestError: (400, "bad_request"),
}
"""Status and code of the errors of `Request.read`."""


class DownstreamGoneError(HpcRouterError):
    """The client has closed its connection or does not read."""


@dataclass(slots=True)
class Response:
    """A complete response. `head`: header lines without those of framing and connection."""

    status: int
    head: bytes = b""
    body: bytes = b""

    def add(self, name: str, value: str) -> None:
        self.head += lines({name: value})


class Request(ABC):
    """`path` is decoded; `target` is path and query as received; neither has doubled slashes in the path. `keep_alive`:
    whether the connection stays open after the response; a handler may set it to False before it responds.
    `request_id`: the value of `x-request-id`, which is not among the headers, because heads that differ in nothing else
    share them.

    To stream a response: `start_response`, then `write`, with a `drain` after each `write` that returned False; then
    return None.
    """

    method: str
    target: str
    path: str
    query: str
    headers: Headers
    request_id: bytes
    keep_alive: bool
    response_started: bool
    """The head of a response has been sent."""
    idle: bool
    """True while nothing has been written since it was set to True."""

    def complete_body(self) -> bytes | None:
        """The body, if all of it has been received; None: `read` it."""
        return None

    @abstractmethod
    async def read(self, *, limit_s: float | None = None) -> bytes:
        """Wait for the complete body. Raises BadRequestError, BodyTooLargeError, or RequestTimeoutError after `limit_s`
        s."""

    def respond(self, status: int, head: bytes, body: bytes) -> None:
        """Send the complete response of a `PendingResponse`. Arguments as in `Response`."""
        raise NotImplementedError

    def end(self) -> None:
        """End the streamed response of a `PendingResponse`."""
        raise NotImplementedError

    def resume(self) -> None:
        """Continue a `PendingResponse` in a task."""
        raise NotImplementedError

    @abstractmethod
    def start_response(self, status: int, head: bytes, *, length: int | None) -> None:
        """Send the head. `length` of the body; None: unknown, the body is chunked."""

    @abstractmethod
    def write(self, data: bytes) -> bool:
        """Send a part of the body. False: call `drain` before the next part. Raises DownstreamGoneError."""

    @property
    def write_chunk(self) -> Callable[[bytes], bool] | None:
        """Like `write`, for data that already has the framing of HTTP/1.1 chunks; None if the response is not
        chunked."""
        return None

    @abstractmethod
    async def drain(self, *, limit_s: float | None = None) -> None:
        """Wait until the client has read most of what was written. A client that reads nothing for `limit_s` seconds is
        disconnected, because it occupies a replica. Raises DownstreamGoneError."""

    @abstractmethod
    def abort(self) -> None:
        """Abort the connection, which is how a client learns that a body without events is incomplete."""


class PendingResponse:
    """A request that is served by callbacks. It ends with `Request.respond` or `Request.end`, or continues in a task
    after `Request.resume`. Not abstract, because `isinstance` takes several times as long with an abstract class."""

    __slots__ = ()

    def cancel(self) -> None:
        """The client has disconnected. Not called once `run` has started."""
        raise NotImplementedError

    async def run(self) -> Response | None:
        """Continue in a task. Result and cancellation as for a handler's coroutine."""
        raise NotImplementedError


Handler = Callable[[Request], PendingResponse | Coroutine[Any, Any, Response | None]]
"""Responds to a request. It returns a `PendingResponse`, or a coroutine that a task runs and that is cancelled when the
client disconnects. The result None: the response was written through the request."""


def check_encoding(headers: Headers) -> None:
    """Raises UnsupportedEncodingError for a compressed body."""
    if b"content-encoding" in headers and any(e.lower() != b"identity" for e in headers.all(b"content-encoding")):
        raise UnsupportedEncodingError("request bodies must not be compressed: send them without Content-Encoding")


def json_response(value: Any, *, status: int = 200) -> Response:
    return Response(status, JSON, json.dumps(value).encode())


def error_response(
    status: int, *, kind: str, code: str, message: str, param: str | None = None, path: str = ""
) -> Response:
    """An error in the format of the API at `path`; OpenAI's format for other paths."""
    response = json_response(
        api_format_of(path).error_body(ErrorReply(status, kind, code, message, param)), status=status
    )
    if status == 401:
        response.add("www-authenticate", "Bearer")
    elif status == 415:
        response.add("accept-encoding", "identity")  # RFC 9110, section 15.5.16
    return response


def unreadable_response(error: BadRequestError | BodyTooLargeError | RequestTimeoutError, *, path: str) -> Response:
    """The response to a request whose body `Request.read` could not return."""
    status, code = next(answer for kind, answer in _UNREADABLE.items() if isinstance(error, kind))
    return error_response(status, kind="invalid_request_error", code=code, message=str(error), path=path)
