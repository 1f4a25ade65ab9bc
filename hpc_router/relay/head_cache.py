"""A cache of parsed HTTP heads, by their bytes.

All heads from one client are equal except for the digits of `Content-Length`, and so are all heads from one engine. The
heads that the router sends to its replicas also differ in `x-request-id`. The key in the cache is the head without
these two values, and the parsed head contains neither. A head is cached when it occurs for the second time, because
many heads occur only once. The size of the cache is bounded.

Two kinds of message are looked up: one that is received completely in one read, head and body (`lookup`), and one
without `Content-Length` whose head is received in one read (`lookup_start`). Every other message goes to the HTTP
parser, which alone decides what is valid.
"""

import itertools
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from hpc_router.relay.headers import REQUEST_ID

MAX_HEADS: Final = 512
"""Maximum number of cached heads; the cache is cleared when it is full."""
MAX_HEAD_BYTES: Final = 2**11
"""Maximum length in bytes of a head that is looked up."""
_LENGTH: Final = b"ength: "
_LENGTH_BEGINS: Final = frozenset({b"\r\n%bontent-%b" % pair for pair in itertools.product((b"C", b"c"), (b"L", b"l"))})
_MAX_DIGITS: Final = 15
ID_LINE: Final = b"\r\n%b: " % REQUEST_ID
"""The only supported spelling of the field name of the request id. Heads with another spelling are not cached."""
_MAX_ID_BYTES: Final = 128
H = TypeVar("H")


class HeadCache(Generic[H]):
    """A cache of parsed heads.

    `parse` parses a head for the cache; it is called with a complete message by `lookup`, with a head alone by
    `lookup_start`. It returns None for any other bytes, and for a head that must not be cached. `ids`: whether an
    `x-request-id` of letters, digits and `-` is left out of the key and of the parsed head.
    """

    __slots__ = ("_heads", "_ids", "_last", "_last_whole", "_parse", "_seen_once")

    def __init__(self, parse: Callable[[bytes], H | None], *, ids: bool = False) -> None:
        self._parse = parse
        self._ids = ids
        self._heads: dict[bytes, H | None] = {}
        self._last: tuple[bytes, bytes, H | None] = b"", b"", None  # bytes before and after the length's digits
        self._last_whole: tuple[bytes, H | None] = b"", None
        self._seen_once: set[bytes] = set()

    def lookup(self, data: bytes) -> tuple[H, bytes, bytes] | None:
        """Returns head, body and request id if `data` is exactly one message whose head is cached; None if the HTTP
        parser must parse it."""
        before, after, last_head = self._last
        if last_head is not None and data.startswith(before):  # the same head again, which is the usual case
            first = len(before)
            last = data.find(b"\r\n", first, first + _MAX_DIGITS + 2)
            digits, end = data[first:last], last + len(after)
            if digits.isdigit() and data.startswith(after, last) and int(digits) == len(data) - end:
                return last_head, data[end:], b""
        end = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES) + 4
        if end < 4:
            return None
        at = data.find(_LENGTH, 0, end)
        if at < 0:
            if len(data) != end:
                return None
            key = data
        else:
            first = at + len(_LENGTH)
            last = data.find(b"\r\n", first, first + _MAX_DIGITS + 2)
            digits = data[first:last]
            if data[at - 11 : at] not in _LENGTH_BEGINS or not digits.isdigit() or int(digits) != len(data) - end:
                return None
            key = data[:first] + data[last : end - 1]  # one byte less, so that it equals no key of the other branch
        request_id = b""
        if self._ids and (line := key.find(ID_LINE)) >= 0:
            begin = line + len(ID_LINE)
            request_id = key[begin : key.find(b"\r", begin)]
            if len(request_id) > _MAX_ID_BYTES or not request_id.replace(b"-", b"").isalnum():
                return None
            key = key[:begin] + key[begin + len(request_id) :]
        try:
            head = self._heads[key]
        except KeyError:
            head = self._add(key, data)
        if head is None:
            return None
        if at >= 0 and not request_id:
            self._last = data[:first], data[last:end], head
        return head, data[end:], request_id

    def lookup_start(self, data: bytes) -> tuple[H, int] | None:
        """Returns the head and its size in bytes if `data` starts with a cached head without `Content-Length`; None if
        the HTTP parser must parse it."""
        last, last_head = self._last_whole
        if last_head is not None and data.startswith(last):
            return last_head, len(last)
        end = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES) + 4
        if end < 4 or data.find(_LENGTH, 0, end) >= 0:
            return None
        key = data[:end]
        try:
            head = self._heads[key]
        except KeyError:
            head = self._add(key, key)
        if head is None:
            return None
        self._last_whole = key, head
        return head, end

    def _add(self, key: bytes, data: bytes) -> H | None:
        """Counts an occurrence of `key`. At the second one, parses `data`, caches the head and returns it. Returns None
        at the first one, and if the head must not be cached."""
        if key not in self._seen_once:
            if len(self._seen_once) >= MAX_HEADS:
                self._seen_once.clear()
            self._seen_once.add(key)
            return None
        self._seen_once.discard(key)
        if len(self._heads) >= MAX_HEADS:
            self._heads.clear()
        made = self._heads[key] = self._parse(data)
        return made
