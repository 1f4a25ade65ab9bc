"""What router and agent see of a client: its request, and the way of the answer back to it.

Two implementations stand behind these types and pass the same tests: `server`, which serves, and `server_aiohttp`, the
reference it is compared with. Short answers are returned whole, as a `Response`; a stream is begun and written through
the request itself, where its bytes arrive.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from hpc_router.errors import BadRequestError, HpcRouterError
from hpc_router.relay.api_formats import ErrorReply, dialect_of
from hpc_router.relay.headers import Headers, lines

KEEP_ALIVE_S: Final = 75.0
"""How long a client may take to send a request's headers, after it has connected or had its last answer."""
SHORT_BYTES: Final = 2**16
"""What a server may be left to send at its leisure; a client's place is held until it has taken most of more."""
JSON: Final = b"content-type: application/json\r\n"


class DownstreamGoneError(HpcRouterError):
    """The client has closed its connection, or reads no more."""


@dataclass(slots=True)
class Response:
    """A whole answer. `head`: its header lines but for those of framing and connection."""

    status: int
    head: bytes = b""
    body: bytes = b""

    def add(self, name: str, value: str) -> None:
        self.head += lines({name: value})


class Request(ABC):
    """`path` is decoded; `target` is path and query as they came. `keep_alive`: whether the client may ask again over
    this connection; a handler may take that back before it answers. `request_id`: what its `x-request-id` says, which
    is not among the headers, since it is all that many requests differ in.

    To answer piece by piece: `begin`, then `write`, with a `drain` after each one that returned False, and return None.
    """

    __slots__ = ("begun_work", "headers", "keep_alive", "method", "path", "query", "quiet", "request_id", "target")

    method: str
    target: str
    path: str
    query: str
    headers: Headers
    request_id: bytes
    keep_alive: bool
    begun_work: object
    """What `express` left for the handler; None else."""
    quiet: bool
    """Nothing was written since this was set."""

    def ready(self) -> bytes | None:
        """The whole body, where that is known already; None: `read` it."""
        return None

    @abstractmethod
    async def read(self, *, limit_s: float | None = None) -> bytes:
        """The whole body. Raises BadRequestError, BodyTooLargeError, or RequestTimeoutError after `limit_s` seconds."""

    def answer(self, status: int, head: bytes, body: bytes) -> None:
        """The end of what `express` began, as in `Response`."""
        raise NotImplementedError

    def resume(self) -> None:
        """Let the handler go on with what `express` began; it finds it in `begun_work`."""
        raise NotImplementedError

    @property
    @abstractmethod
    def begun(self) -> bool:
        """The head of an answer has been sent."""

    @abstractmethod
    async def begin(self, status: int, head: bytes, *, length: int | None) -> None:
        """Send the head. `length` of the body; None: its end will show."""

    @abstractmethod
    def write(self, data: bytes) -> bool:
        """A piece of the body. False: `drain` before the next one. Raises DownstreamGoneError."""

    @property
    def write_chunk(self) -> Callable[[bytes], bool] | None:
        """The same for a piece in the framing of HTTP/1.1's chunks; None where this answer has another one."""
        return None

    @abstractmethod
    async def drain(self, *, limit_s: float | None = None) -> None:
        """Until the client has taken most of what was written. One that takes nothing for so long has gone as well:
        it holds a place on a replica. Raises DownstreamGoneError."""

    @abstractmethod
    def abort(self) -> None:
        """Break the connection: the only way to say that a body without events is incomplete."""


Handler = Callable[[Request], Awaitable[Response | None]]
"""Answers a request; None when the answer went through the request. A client that leaves cancels it."""


class Work(ABC):
    """A request that is being served without a task."""

    @abstractmethod
    def cancel(self) -> None:
        """Its client has left."""


Express = Callable[[Request], Work | None]
"""Begins to serve a request at once, where nothing has to be waited for: then `Request.answer` is called later, or
`Request.resume` for the handler to take over. None: the handler's from the beginning."""


def check_encoding(headers: Headers) -> None:
    """Raises BadRequestError for a body that would have to be decompressed."""
    if b"content-encoding" in headers and any(e.lower() != b"identity" for e in headers.all(b"content-encoding")):
        raise BadRequestError("compressed request bodies are not supported")


def json_response(value: Any, *, status: int = 200) -> Response:
    return Response(status, JSON, json.dumps(value).encode())


def error_response(
    status: int, *, kind: str, code: str, message: str, param: str | None = None, path: str = ""
) -> Response:
    """An error as the clients of the API at `path` read it; OpenAI's, where that says nothing."""
    response = json_response(dialect_of(path).body(ErrorReply(status, kind, code, message, param)), status=status)
    if status == 401:
        response.add("www-authenticate", "Bearer")
    return response
