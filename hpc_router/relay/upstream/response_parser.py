"""Parses one response: bytes to head, body chunks and end. No I/O.

llhttp (through httptools) does the parsing. It is strict by default and refuses bare LF, two lengths, a length together
with chunks, folded or malformed headers, and bad chunk sizes. This module also rejects other protocol versions, other
transfer codings and protocol switches, and limits the size of heads, trailers and chunk extensions.
"""

from functools import lru_cache
from typing import Final, NamedTuple

import httptools

from hpc_router.errors import UpstreamError
from hpc_router.relay.head_cache import HeadCache
from hpc_router.relay.headers import Headers

MAX_HEAD_BYTES: Final = 2**16
"""Maximum length of a head in bytes. The limit also applies to the bytes between two body chunks."""
_WITHOUT_BODY: Final = frozenset({204, 304})
_NO_HEADERS: Final = Headers([])
_VERSIONS: Final = frozenset({"1.0", "1.1"})


class ResponseParser:
    """The parser of one response. The owner calls `feed` until `complete`.

    `status` is 0 until the head of the final response is parsed; interim responses are skipped. Body data is appended
    to the list `chunks`. The owner clears this list and never replaces it, because the HTTP parser appends to it
    directly. `at_chunk_boundary`: whether the received data ends with a complete HTTP chunk. `keep_alive`: whether the
    connection may be used again after this response.
    """

    __slots__ = (
        "_bytes_since_progress", "_chunk_ended", "_fields", "_head_only", "_interim", "_parser", "_until_close",
        "at_chunk_boundary", "chunks", "complete", "headers", "keep_alive", "length", "on_body", "status",
    )  # fmt: skip

    def __init__(self, *, head_only: bool = False) -> None:
        self.status = 0
        self.headers = _NO_HEADERS
        self.length: int | None = None  # length of the body, from the head
        self.chunks: list[bytes] = []
        self.on_body = self.chunks.append
        self.complete = False
        self.at_chunk_boundary = False
        self.keep_alive = False
        self._head_only = head_only  # the response to HEAD has a length but no body
        self._fields: list[tuple[bytes, bytes]] = []
        self._interim = False
        self._until_close = False
        self._chunk_ended = False
        self._bytes_since_progress = 0  # bytes received since the start or the last body chunk
        self._parser: httptools.HttpResponseParser | None = None  # created when needed

    @property
    def nothing_received(self) -> bool:
        """Whether no byte of the response has been received."""
        return not self.status and not self._bytes_since_progress

    def feed(self, data: bytes) -> None:
        """Parses the next received bytes. Raises UpstreamError; data before the error remains in `chunks`."""
        if self._parser is None:
            if self.complete:
                self.keep_alive = False  # the data after the response does not belong to it
                return
            if not self.status and not self._head_only:
                if (cached := cached_response(data)) is not None:
                    self.take(*cached)
                    return
                data = self.take_cached_start(data)
            if self.status and self._take_chunk(data):
                return
        self.parse(data)

    def take(self, head: "CachedHead", body: bytes, _id: bytes = b"") -> None:
        """Stores a complete response: its `head`, which was found in the cache, and its `body`."""
        self.status, self.headers, self.keep_alive = head
        self.length = len(body)
        if body:
            self.chunks.append(body)
        self.complete = True

    def take_cached_start(self, data: bytes) -> bytes:
        """Stores the head of a chunked response if it is cached, and returns the data after the head. Returns all of
        `data` if the head is not cached."""
        start = _CHUNKED_HEADS.lookup_start(data)
        if start is None:
            return data
        (self.status, self.headers, self.keep_alive), size = start
        self.at_chunk_boundary = True
        return data[size:]

    def _take_chunk(self, data: bytes) -> bool:
        """Stores the data after a cached head, without the HTTP parser, if it is one complete chunk, the last chunk, or
        both. Returns False, and stores nothing, for any other data."""
        size = len(data)
        if data.endswith(_LAST_CHUNK) and (size == len(_LAST_CHUNK) or data[size - 7 : size - 5] == b"\r\n"):
            size -= len(_LAST_CHUNK)
        if size:
            prefix = chunk_prefix(size)
            if not data.startswith(prefix) or data[size - 2 : size] != b"\r\n":
                return False
            self.chunks.append(data[len(prefix) : size - 2])
        self.complete = size < len(data)
        return True

    def parse(self, data: bytes) -> None:
        """Passes `data` to the HTTP parser, without the head cache. Raises UpstreamError."""
        if self._parser is None:
            self._parser = httptools.HttpResponseParser(self)
            if self.status:  # the head was cached; the HTTP parser needs only the framing from it
                self._parser.feed_data(_CHUNKED)
                self._chunk_ended = True
        before = len(self.chunks)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if not self.complete:
                cause = error.__context__ if isinstance(error.__context__, UpstreamError) else error
                raise UpstreamError(f"the replica's response is malformed: {cause}") from error
            self.keep_alive = False  # the data after the response does not belong to it
        self.at_chunk_boundary = self._chunk_ended and data.endswith(b"\r\n")
        if len(self.chunks) > before:
            self._bytes_since_progress = 0
            if self._head_only:
                self.chunks.clear()
        else:
            self._bytes_since_progress += len(data)
            if self._bytes_since_progress > MAX_HEAD_BYTES and not self.complete:
                raise UpstreamError(f"the replica sent more than {MAX_HEAD_BYTES} bytes of headers")

    def feed_eof(self) -> None:
        """Handles the end of the connection, which may end the body. Raises UpstreamError if the response is
        incomplete."""
        if self.complete:
            return
        if not self.status:
            raise UpstreamError("the replica closed the connection without a response")
        if not self._until_close:
            raise UpstreamError("the replica closed the connection within its response")
        self.complete = True

    def release(self) -> None:
        """Breaks the reference cycle with the HTTP parser, so that both are freed without the garbage collector."""
        self._parser = None

    # Callbacks of the HTTP parser.

    def on_message_begin(self) -> None:
        if self.complete:
            raise UpstreamError("there is data after its end")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.status:  # otherwise it is a trailer
            self._fields.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        if self.status:
            return  # the head came from the cache
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
        # llhttp parses data after the response to HEAD as its body, so the end of the response is unknown.
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


class CachedHead(NamedTuple):
    """A parsed head, without its `Content-Length`."""

    status: int
    headers: Headers
    keep_alive: bool


def _cacheable_head(data: bytes) -> CachedHead | None:
    """Returns the head of `data` if the data is one complete response and may be cached; else None."""
    parser = ResponseParser()
    try:
        parser.parse(data)
    except UpstreamError:
        return None
    finally:
        parser.release()
    if not parser.complete or parser.status in _WITHOUT_BODY or parser.length is None:
        return None
    # Content-Length differs between messages with the same head.
    fields = [field for field in parser.headers.fields if field[0] != b"content-length"]
    return CachedHead(parser.status, Headers(fields), parser.keep_alive)


def _cacheable_chunked_head(head: bytes) -> CachedHead | None:
    """Returns the parsed `head` if it is the head of a chunked response and may be cached; else None."""
    parser = ResponseParser()
    try:
        parser.parse(head)
        chunked = parser.status != 0 and b"transfer-encoding" in parser.headers and not parser.complete
        parser.parse(_LAST_CHUNK)
    except UpstreamError:
        return None
    finally:
        parser.release()
    if not chunked or not parser.complete or parser.status in _WITHOUT_BODY:
        return None
    return CachedHead(parser.status, parser.headers, parser.keep_alive)


_LAST_CHUNK: Final = b"0\r\n\r\n"
_CHUNKED: Final = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
_HEADS: Final = HeadCache(_cacheable_head)
_CHUNKED_HEADS: Final = HeadCache(_cacheable_chunked_head)

cached_response: Final = _HEADS.lookup
"""Returns head, body and an unused id if the data is one complete response with a cached head; else None."""


@lru_cache(maxsize=2**14)
def chunk_prefix(length: int) -> bytes:
    """Returns the size line of the HTTP chunk that has `length` bytes in all: size line, data and line breaks. No chunk
    with data has the size 0, so this line is never that of a body's last chunk."""
    for digits in range(1, 8):
        size = length - digits - 4
        prefix = b"%x\r\n" % max(0, size)
        if size > 0 and len(prefix) == digits + 2:
            return prefix
    return b"\0"  # no chunk starts with this byte
