"""Parses requests: bytes to head, body chunks and end. No I/O.

llhttp (through httptools) does the parsing. It is strict by default and refuses bare LF, two lengths, a length together
with chunks, folded or malformed headers, and bad chunk sizes. This module also rejects other protocol versions and
transfer codings, and limits the size of heads and bodies and the number of pipelined requests.
"""

import re
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar
from urllib.parse import unquote, urlsplit

import httptools

from hpc_router.errors import BadRequestError, BodyTooLargeError, RoutingError
from hpc_router.relay.head_cache import ID_LINE, HeadCache
from hpc_router.relay.headers import REQUEST_ID, Headers, without_id

MAX_HEAD_BYTES: Final = 2**16
"""Maximum length of a head in bytes. The limit also applies to chunk extensions and trailers."""
MAX_FIELDS: Final = 256
"""Maximum number of header fields."""
MAX_WAITING: Final = 64
"""Maximum number of pipelined requests on one connection."""
MAX_CHUNKS: Final = 256
"""Maximum number of chunks in which a body is kept. More are merged into one."""
MAX_STREAMED_BYTES: Final = 2**18
"""Maximum number of bytes of a streamed body that wait for its reader; then the connection is not read."""
_SLASHES: Final = re.compile("/{2,}")
_VERSIONS: Final = frozenset({"1.0", "1.1"})


class RefusedError(BadRequestError):
    """The received bytes are not a request that any handler could serve. The client gets a response with the status
    `status`, and the connection is closed."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class RequestHead:
    """The request line and headers of a request.

    `path` is decoded; `target` is path and query as received. In both, one slash replaces each run of slashes in the
    path, because clients double a slash if their base URL ends with one.
    """

    __slots__ = ("encoded", "expects", "headers", "http_1_0", "keep_alive", "method", "path", "query", "target")

    def __init__(self, method: str, target: str, headers: Headers, *, http_1_0: bool, keep_alive: bool) -> None:
        self.method = method
        self.target = target if target.startswith("/") else origin_form(target)
        if "//" in self.target:
            self.target = single_slashes(self.target)
        self.path, _, self.query = self.target.partition("?")
        if "%" in self.path:
            self.path = unquote(self.path)
        self.headers = headers
        self.encoded = b"content-encoding" in headers
        self.http_1_0 = http_1_0
        self.keep_alive = keep_alive
        self.expects = not http_1_0 and headers.get(b"expect", b"").lower() == b"100-continue"  # waits for 100 Continue


class ParsedRequest:
    """One request, whose body may not be complete yet. `failure`: why it never will be; None otherwise."""

    __slots__ = (
        "chunks", "complete", "failure", "head", "headers", "keep_alive", "method", "path", "query", "request_id",
        "size", "target",
    )  # fmt: skip

    def __init__(self, head: RequestHead, chunks: list[bytes | bytearray], request_id: bytes, complete: bool) -> None:
        self.head = head
        self.method = head.method
        self.target = head.target
        self.path = head.path
        self.query = head.query
        self.headers = head.headers
        self.request_id = request_id  # the head does not have it, because several requests may share a head
        self.keep_alive = head.keep_alive
        self.chunks = chunks
        self.size = 0
        self.complete = complete
        self.failure: RoutingError | None = None

    def complete_body(self) -> bytes | None:
        """Returns the body if all of it has been received. See `Request.complete_body`."""
        if not self.complete or len(self.chunks) != 1 or self.head.encoded:
            return None
        body = self.chunks[0]
        return body if type(body) is bytes else bytes(body)


R = TypeVar("R", bound=ParsedRequest)


class RequestParser(Generic[R]):
    """The parser of one connection. `feed` appends each request whose head is complete to `waiting`; the body of the
    last request may be incomplete. `max_body`: maximum length of a body in bytes, except for requests of which
    `streams_body` is true; `pause` is called while more than `MAX_STREAMED_BYTES` of such a body wait for a reader."""

    __slots__ = (
        "_bytes_since_progress", "_current", "_ended", "_fields", "_max_body", "_parser", "_pause", "_request_type",
        "_streamed", "_streams_body", "_target", "waiting",
    )  # fmt: skip

    def __init__(
        self,
        *,
        max_body: int,
        request_type: type[R],
        streams_body: Callable[[RequestHead], bool] | None = None,
        pause: Callable[[], None] = lambda: None,
    ) -> None:
        self.waiting: deque[R] = deque()
        self._request_type = request_type
        self._max_body = max_body
        self._streams_body, self._pause = streams_body, pause
        self._streamed = False  # whether the body that is being received is streamed
        self._current: R | None = None  # the request whose body is being received
        self._ended = False  # all further bytes are ignored
        self._target = b""
        self._fields: list[tuple[bytes, bytes]] = []
        self._bytes_since_progress = 0  # bytes received since the last body chunk or end of a request
        self._parser: httptools.HttpRequestParser | None = None  # created when needed

    def feed(self, data: bytes) -> None:
        """Parses the next received bytes. Raises RefusedError once, for bytes that are no request; earlier requests
        remain in `waiting`."""
        if self._ended:
            return
        if (
            not self._bytes_since_progress
            and self._current is None
            and len(data) <= self._max_body
            and not self.waiting
        ):
            cached = _HEADS.lookup(data)
            if cached is not None:
                head, body, request_id = cached
                self.waiting.append(self._request_type(head, [body], request_id, True))
                return
        self.parse(data)

    def parse(self, data: bytes) -> None:
        """Passes `data` to the HTTP parser, without the head cache. Raises RefusedError."""
        if self._parser is None:
            self._parser = httptools.HttpRequestParser(self)
        self._bytes_since_progress += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(cause if isinstance(cause, RefusedError) else RefusedError("this is no HTTP request"))
        else:
            if self._bytes_since_progress > MAX_HEAD_BYTES:
                self._refuse(RefusedError(f"more than {MAX_HEAD_BYTES} bytes of headers", status=431))

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Parses a request with an `Upgrade` header again without that header, because llhttp does not parse the body
        of such a request. `rest`: the data after the head."""
        message = self.waiting[-1]
        if message.head.method == "CONNECT":  # the following bytes are not HTTP
            message.keep_alive = False
            self._ended = True
            return
        self.waiting.pop()
        head = message.head
        fields = [b"%b: %b\r\n" % field for field in head.headers.fields if field[0] != b"upgrade"]
        if message.request_id:
            fields.append(b"x-request-id: %b\r\n" % message.request_id)
        line = f"{head.method} {head.target} HTTP/{'1.0' if head.http_1_0 else '1.1'}\r\n".encode()
        self._parser = httptools.HttpRequestParser(self)
        self._bytes_since_progress = 0
        self.parse(b"%b%b\r\n%b" % (line, b"".join(fields), rest))

    def _refuse(self, refusal: RefusedError) -> None:
        """Ends the request whose body is being received with an error. If there is none, raises `refusal`."""
        self._ended = True
        if self._current is None:
            raise refusal
        self._fail(BadRequestError("the body cannot be read"))

    def _fail(self, error: RoutingError) -> None:
        """Stores `error` as the reason why the request whose body is being received will never be complete."""
        assert self._current is not None
        self._current.failure = error
        self._current.keep_alive = False
        self._current.chunks.clear()
        self._current = None
        self._ended = True

    @property
    def partial_headers(self) -> Headers:
        """Returns the headers received so far of the request whose head is not complete."""
        return Headers(self._fields)

    def release(self) -> None:
        """Breaks the reference cycle with the HTTP parser, so that both are freed without the garbage collector."""
        self._parser = None

    # Callbacks of the HTTP parser.

    def on_message_begin(self) -> None:
        if len(self.waiting) >= MAX_WAITING:
            raise RefusedError(f"more than {MAX_WAITING} requests before the first was answered", status=429)
        if self.waiting and sum([message.size for message in self.waiting]) > self._max_body:
            raise RefusedError("too much was sent before the first request was answered", status=429)
        self._bytes_since_progress = self._bytes_since_progress or 1  # not 0: the next bytes belong to this request
        self._target, self._fields = b"", []

    def on_url(self, part: bytes) -> None:
        self._target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._current is None and not self._ended:  # otherwise it is a trailer
            self._fields.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        version = self._parser.get_http_version()
        if version not in _VERSIONS:
            raise RefusedError("only HTTP/1.1 is supported", status=505)
        if len(self._fields) > MAX_FIELDS or self._head_bytes() > MAX_HEAD_BYTES:
            raise RefusedError(f"more than {MAX_FIELDS} headers or {MAX_HEAD_BYTES} bytes of them", status=431)
        fields, request_id = without_id(self._fields)
        headers = Headers(fields)
        if version == "1.1" and len(headers.all(b"host")) != 1:
            raise RefusedError("HTTP/1.1 requires one Host header")
        if b"transfer-encoding" in headers:
            codings = headers.all(b"transfer-encoding")
            if version == "1.0" or len(codings) != 1 or codings[0].lower() != b"chunked":
                raise RefusedError("the only supported transfer encoding is chunked, in HTTP/1.1", status=501)
        head = RequestHead(
            self._parser.get_method().decode(),
            self._target.decode("utf-8", "surrogateescape"),
            headers,
            http_1_0=version == "1.0",
            keep_alive=self._parser.should_keep_alive(),
        )
        message = self._request_type(head, [], request_id, False)
        self.waiting.append(message)
        self._current = message
        self._bytes_since_progress = 0
        self._streamed = self._streams_body is not None and self._streams_body(head)
        length = headers.get(b"content-length")
        if length is not None and int(length) > self._max_body and not self._streamed:
            self._too_large()

    def on_body(self, chunk: bytes) -> None:
        if (message := self._current) is None:
            return
        self._bytes_since_progress = 0
        message.chunks.append(chunk)
        message.size += len(chunk)
        if len(message.chunks) > MAX_CHUNKS:  # a list of tiny chunks takes many times their size
            merged = message.chunks[0]
            merged = merged if isinstance(merged, bytearray) else bytearray(merged)
            merged += b"".join(message.chunks[1:])
            message.chunks[:] = [merged]
        if self._streamed:
            if message.size > MAX_STREAMED_BYTES:
                self._pause()
        elif message.size > self._max_body:
            self._too_large()

    def on_message_complete(self) -> None:
        self._bytes_since_progress = 0
        if self._current is not None:
            self._current.complete = True
            self._current = None

    def _too_large(self) -> None:
        self._fail(BodyTooLargeError("the body is larger than router.max_body_mb"))

    def _head_bytes(self) -> int:
        return len(self._target) + sum([len(name) + len(value) for name, value in self._fields])


def origin_form(target: str) -> str:
    """Returns path and query of a request target, also if the target is a whole URL (absolute form)."""
    parts = urlsplit(target)
    return f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"


def single_slashes(target: str) -> str:
    """Returns `target` with one slash in place of each run of slashes in its path."""
    path, mark, query = target.partition("?")
    return _SLASHES.sub("/", path) + mark + query


def _cacheable_head(data: bytes) -> RequestHead | None:
    """Returns the head of `data` if the data is one complete request and may be cached; else None."""
    parser = RequestParser(max_body=2**63, request_type=ParsedRequest)
    try:
        parser.parse(data)
    except RefusedError:
        return None
    finally:
        parser.release()
    if len(parser.waiting) != 1 or not parser.waiting[0].complete:
        return None
    ids = data.lower().count(REQUEST_ID)
    if ids > 1 or ids != data.count(ID_LINE):  # the cache cannot remove such an id
        return None
    (message,) = parser.waiting
    head = message.head
    if head.method == "CONNECT" or head.expects or b"transfer-encoding" in head.headers or b"upgrade" in head.headers:
        return None
    # Content-Length differs between messages with the same head.
    fields = [field for field in head.headers.fields if field[0] != b"content-length"]
    return RequestHead(head.method, head.target, Headers(fields), http_1_0=head.http_1_0, keep_alive=head.keep_alive)


_HEADS: Final = HeadCache(_cacheable_head, ids=True)
