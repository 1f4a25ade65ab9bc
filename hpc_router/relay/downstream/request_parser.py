"""Requests, from bytes to head, body pieces and end. No I/O.

llhttp (through httptools) does the parsing and is strict by default: bare LF, two lengths, a length beside chunks,
folded or malformed headers and bad chunk sizes are errors. What it leaves open is refused here: other protocol
versions and transfer codings, and heads, bodies or queues of requests without end.
"""

from collections import deque
from typing import Final
from urllib.parse import unquote, urlsplit

import httptools

from hpc_router.errors import BadRequestError, BodyTooLargeError, RoutingError
from hpc_router.relay.head_cache import ID_LINE, HeadCache
from hpc_router.relay.headers import REQUEST_ID, Headers, without_id

MAX_HEAD_BYTES: Final = 2**16
"""Also for chunk extensions and trailers."""
MAX_FIELDS: Final = 256
MAX_WAITING: Final = 64
"""Requests that a client may have sent before the answer to the first."""
MAX_PIECES: Final = 256
_VERSIONS: Final = frozenset({"1.0", "1.1"})


class RefusedError(BadRequestError):
    """What is no request that could be answered by anybody; the connection ends with `status`."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class RequestHead:
    """Request line and headers. `path` is decoded; `target` is path and query as they came."""

    __slots__ = ("expects", "headers", "http_1_0", "keep_alive", "method", "path", "query", "target")

    def __init__(self, method: str, target: str, headers: Headers, *, http_1_0: bool, keep_alive: bool) -> None:
        self.method = method
        self.target = target if target.startswith("/") else origin_form(target)
        self.path, _, self.query = self.target.partition("?")
        if "%" in self.path:
            self.path = unquote(self.path)
        self.headers = headers
        self.http_1_0 = http_1_0
        self.keep_alive = keep_alive
        self.expects = not http_1_0 and headers.get(b"expect", b"").lower() == b"100-continue"  # to be told to go on


class ParsedRequest:
    """One request as far as it has come. `failure`: why its body will not be complete."""

    __slots__ = ("complete", "failure", "head", "keep_alive", "pieces", "request_id", "size")

    def __init__(self, head: RequestHead, *pieces: bytes, request_id: bytes, complete: bool = False) -> None:
        self.head = head
        self.request_id = request_id  # its own, where the head may be another's as well
        self.keep_alive = head.keep_alive
        self.pieces: list[bytes | bytearray] = list(pieces)
        self.size = 0
        self.complete = complete
        self.failure: RoutingError | None = None


class RequestParser:
    """Feed it; requests whose head is there stand in `waiting`, and the last of them may still grow."""

    __slots__ = ("_bare", "_current", "_ended", "_fields", "_max_body", "_parser", "_target", "waiting")

    def __init__(self, *, max_body: int) -> None:
        self.waiting: deque[ParsedRequest] = deque()
        self._max_body = max_body
        self._current: ParsedRequest | None = None  # whose body is being received
        self._ended = False  # nothing more can be understood
        self._target = b""
        self._fields: list[tuple[bytes, bytes]] = []
        self._bare = 0  # bytes since the last request's end or body piece
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)

    def feed(self, data: bytes) -> None:
        """Raises RefusedError, once; the requests before it are there all the same."""
        if self._ended:
            return
        if not self._bare and self._current is None and len(data) <= self._max_body and not self.waiting:
            found = _HEADS.whole(data)
            if found is not None:
                head, body, request_id = found
                self.waiting.append(ParsedRequest(head, body, request_id=request_id, complete=True))
                return
        self.parse(data)

    def parse(self, data: bytes) -> None:
        """Feed it to the parser, whatever is known of its head."""
        assert self._parser is not None
        self._bare += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._stay(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(cause if isinstance(cause, RefusedError) else RefusedError("this is no HTTP request"))
        else:
            if self._bare > MAX_HEAD_BYTES:
                self._refuse(RefusedError(f"more than {MAX_HEAD_BYTES} bytes of headers", status=431))

    def _stay(self, rest: bytes) -> None:
        """Another protocol was offered, and the parser has left a body to that. Begin again without the offer."""
        message = self.waiting[-1]
        if message.head.method == "CONNECT":  # nobody can tell what follows
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
        self._bare = 0
        self.parse(b"%b%b\r\n%b" % (line, b"".join(fields), rest))

    def _refuse(self, refusal: RefusedError) -> None:
        """Whoever waits for the rest of a body learns of it there; otherwise it is raised."""
        self._ended = True
        if self._current is None:
            raise refusal
        self._fail(BadRequestError("the body cannot be read"))

    def _fail(self, error: RoutingError) -> None:
        """The body that is being received will not be complete."""
        assert self._current is not None
        self._current.failure = error
        self._current.keep_alive = False
        self._current.pieces.clear()
        self._current = None
        self._ended = True

    def release(self) -> None:
        """Parser and framer know each other; without this they would wait for the garbage collector."""
        self._parser = None

    # The parser's side.

    def on_message_begin(self) -> None:
        if len(self.waiting) >= MAX_WAITING:
            raise RefusedError(f"more than {MAX_WAITING} requests before the first was answered", status=429)
        if self.waiting and sum([message.size for message in self.waiting]) > self._max_body:
            raise RefusedError("too much was sent before the first request was answered", status=429)
        self._bare = self._bare or 1  # whatever comes next belongs to this one
        self._target, self._fields = b"", []

    def on_url(self, piece: bytes) -> None:
        self._target += piece

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._current is None and not self._ended:  # else it is a trailer
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
        message = ParsedRequest(head, request_id=request_id)
        self.waiting.append(message)
        self._current = message
        self._bare = 0
        length = headers.get(b"content-length")
        if length is not None and int(length) > self._max_body:
            self._too_large()

    def on_body(self, piece: bytes) -> None:
        if (message := self._current) is None:
            return
        self._bare = 0
        message.pieces.append(piece)
        message.size += len(piece)
        if len(message.pieces) > MAX_PIECES:  # tiny chunks would cost many times their size
            whole = message.pieces[0]
            whole = whole if isinstance(whole, bytearray) else bytearray(whole)
            whole += b"".join(message.pieces[1:])
            message.pieces[:] = [whole]
        if message.size > self._max_body:
            self._too_large()

    def on_message_complete(self) -> None:
        self._bare = 0
        if self._current is not None:
            self._current.complete = True
            self._current = None

    def _too_large(self) -> None:
        self._fail(BodyTooLargeError("the body is larger than router.max_body_mb"))

    def _head_bytes(self) -> int:
        return len(self._target) + sum([len(name) + len(value) for name, value in self._fields])


def origin_form(target: str) -> str:
    """Path and query of a whole address, which a server may get as well."""
    parts = urlsplit(target)
    return f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"


def _known_head(data: bytes) -> RequestHead | None:
    """Of a whole request whose body is as long as it says, if that is all there is to know about it."""
    framer = RequestParser(max_body=2**63)
    try:
        framer.parse(data)
    except RefusedError:
        return None
    finally:
        framer.release()
    if len(framer.waiting) != 1 or not framer.waiting[0].complete:
        return None
    ids = data.lower().count(REQUEST_ID)
    if ids > 1 or ids != data.count(ID_LINE):  # the table does not cut such an id out
        return None
    (message,) = framer.waiting
    head = message.head
    if head.method == "CONNECT" or head.expects or b"transfer-encoding" in head.headers or b"upgrade" in head.headers:
        return None
    fields = [field for field in head.headers.fields if field[0] != b"content-length"]  # the next one's is another
    return RequestHead(head.method, head.target, Headers(fields), http_1_0=head.http_1_0, keep_alive=head.keep_alive)


_HEADS: Final = HeadCache(_known_head, ids=True)
