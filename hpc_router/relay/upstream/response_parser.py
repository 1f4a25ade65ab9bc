"""One response, from bytes to head, body pieces and end. No I/O.

llhttp (through httptools) does the parsing and is strict by default: bare LF, two lengths, a length beside chunks,
folded or malformed headers and bad chunk sizes are errors. What it leaves open is refused here: other protocol versions
and transfer codings, protocol switches, and heads, trailers or chunk extensions without end.
"""

from functools import lru_cache
from typing import Final, NamedTuple

import httptools

from hpc_router.errors import UpstreamError
from hpc_router.relay.head_cache import HeadCache
from hpc_router.relay.headers import Headers

MAX_HEAD_BYTES: Final = 2**16
"""Also for all that may stand between two pieces of a body."""
_WITHOUT_BODY: Final = frozenset({204, 304})
_NO_HEADERS: Final = Headers([])
_VERSIONS: Final = frozenset({"1.0", "1.1"})


class ResponseParser:
    """Feed it until `complete`. `status` is 0 until the final response's head has come; interim ones are skipped.

    Body pieces gather in `pieces` (one list for ever: the parser appends to it itself), for the owner to clear.
    `between`: what has come ends with a chunk, so another may begin. `keep_alive`: whether the connection may carry
    another exchange, once this one is complete.
    """

    __slots__ = (
        "_bare", "_chunk_ended", "_fields", "_head_only", "_interim", "_parser", "_until_close", "between", "complete",
        "headers", "keep_alive", "length", "on_body", "pieces", "status",
    )  # fmt: skip

    def __init__(self, *, head_only: bool = False) -> None:
        self.status = 0
        self.headers = _NO_HEADERS
        self.length: int | None = None  # of the body, where the head tells
        self.pieces: list[bytes] = []
        self.on_body = self.pieces.append
        self.complete = False
        self.between = False
        self.keep_alive = False
        self._head_only = head_only  # the answer to HEAD: its length tells of a body that does not come
        self._fields: list[tuple[bytes, bytes]] = []
        self._interim = False
        self._until_close = False
        self._chunk_ended = False
        self._bare = 0  # bytes since the beginning or the last body piece
        self._parser: httptools.HttpResponseParser | None = None  # until it is needed

    @property
    def untouched(self) -> bool:
        """Not a byte has come."""
        return not self.status and not self._bare

    def feed(self, data: bytes) -> None:
        """Raises UpstreamError; what came before the error is there all the same."""
        if self._parser is None:
            if self.complete:
                self.keep_alive = False  # the answer is whole, what follows it is not ours
                return
            if not self._head_only and (found := whole_answer(data)) is not None:
                head, body, _ = found
                self.status, self.headers, self.keep_alive = head
                self.length = len(body)
                if body:
                    self.pieces.append(body)
                self.complete = True
                return
        self.parse(data)

    def parse(self, data: bytes) -> None:
        """Feed it to the parser, whatever is known of its head."""
        if self._parser is None:
            self._parser = httptools.HttpResponseParser(self)
        before = len(self.pieces)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if not self.complete:
                cause = error.__context__ if isinstance(error.__context__, UpstreamError) else error
                raise UpstreamError(f"the replica's answer is malformed: {cause}") from error
            self.keep_alive = False  # the answer is whole, what follows it is not ours
        self.between = self._chunk_ended and data.endswith(b"\r\n")
        if len(self.pieces) > before:
            self._bare = 0
            if self._head_only:
                self.pieces.clear()
        else:
            self._bare += len(data)
            if self._bare > MAX_HEAD_BYTES and not self.complete:
                raise UpstreamError(f"the replica sent more than {MAX_HEAD_BYTES} bytes of headers")

    def feed_eof(self) -> None:
        """The peer has closed in good order. Raises UpstreamError where that is no end."""
        if self.complete:
            return
        if not self.status:
            raise UpstreamError("the replica closed the connection without an answer")
        if not self._until_close:
            raise UpstreamError("the replica closed the connection inside its answer")
        self.complete = True

    def release(self) -> None:
        """Parser and framer know each other; without this they would wait for the garbage collector."""
        self._parser = None

    # The parser's side.

    def on_message_begin(self) -> None:
        if self.complete:
            raise UpstreamError("there is data after its end")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.status:  # else it is a trailer
            self._fields.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        version = self._parser.get_http_version()
        if version not in _VERSIONS:
            raise UpstreamError(f"HTTP/{version} is not supported")
        if status == 101:
            raise UpstreamError("it switches protocols without being asked")
        if status < 200:
            self._interim = True
            self._fields.clear()
            return
        if sum([len(name) + len(value) for name, value in self._fields]) > MAX_HEAD_BYTES:
            raise UpstreamError(f"more than {MAX_HEAD_BYTES} bytes of headers")
        headers = Headers(self._fields)
        length = headers.get(b"content-length")
        self.length = None if length is None else int(length)
        coding = b",".join(headers.all(b"transfer-encoding")).lower() if b"transfer-encoding" in headers else b""
        if coding and (coding != b"chunked" or version == "1.0"):
            raise UpstreamError(f"transfer-encoding {coding[:40]!r} in HTTP/{version}")
        # The parser takes what follows the answer to HEAD for its body, so nobody can tell whether anything does.
        self.keep_alive = self._parser.should_keep_alive() and not self._head_only
        self._until_close = not (coding or length is not None or status in _WITHOUT_BODY)
        self.headers, self.status = headers, status
        self.complete = self._head_only

    def on_chunk_header(self) -> None:
        self._chunk_ended = False

    def on_chunk_complete(self) -> None:
        self._chunk_ended = True

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
        else:
            self.complete = True


class _Head(NamedTuple):
    status: int
    headers: Headers
    keep_alive: bool


def _known_head(data: bytes) -> _Head | None:
    """Of a whole response whose body is as long as it says, if that is all there is to know about it."""
    framer = ResponseParser()
    try:
        framer.parse(data)
    except UpstreamError:
        return None
    finally:
        framer.release()
    if not framer.complete or framer.status in _WITHOUT_BODY or framer.length is None:
        return None
    fields = [field for field in framer.headers.fields if field[0] != b"content-length"]  # the next one's is another
    return _Head(framer.status, Headers(fields), framer.keep_alive)


_HEADS: Final = HeadCache(_known_head)
whole_answer: Final = _HEADS.whole
"""Status, headers and whether the connection may be kept, and the body, where the head is known and all is there."""


@lru_cache(maxsize=2**14)
def chunk_prefix(length: int) -> bytes:
    """What a chunk of so many bytes in all begins with, as servers write it; never what the last one begins with."""
    for digits in range(1, 8):
        size = length - digits - 4
        prefix = b"%x\r\n" % max(0, size)
        if size > 0 and len(prefix) == digits + 2:
            return prefix
    return b"\0"  # no chunk begins so
