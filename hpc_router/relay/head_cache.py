"""Heads seen before: found by their bytes, so that they need not be parsed again.

The heads that one client or one engine sends differ in hardly more than their content length, those of the router in
the request's id. So a head is looked up without its length's digits and the id, and what was once made of the same
bytes, and says nothing of either, holds again. Only
a message that came in one piece, head and body, is answered from here; everything else goes to the parser, which also
judges what is a message at all. A head is parsed for the table when it comes for the second time, with its body, so
that the parser has said where that ends; many come only once. The table is bounded.
"""

import itertools
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from hpc_router.relay.headers import REQUEST_ID

MAX_HEADS: Final = 512
MAX_HEAD_BYTES: Final = 2**11
"""Bytes; a longer head is not looked for."""
_LENGTH: Final = b"ength: "
_LENGTH_BEGINS: Final = frozenset({b"\r\n%bontent-%b" % pair for pair in itertools.product((b"C", b"c"), (b"L", b"l"))})
_MAX_DIGITS: Final = 15
ID_LINE: Final = b"\r\n%b: " % REQUEST_ID
"""The only spelling of an id that is cut out of a head."""
_MAX_ID_BYTES: Final = 128
H = TypeVar("H")


class HeadCache(Generic[H]):
    """`parse` makes something of the head of a whole message, or None of what is not exactly one message, or not to be
    answered from here. `ids`: an `x-request-id` is cut out, of letters, digits and `-`; `parse` leaves it out as well.
    """

    __slots__ = ("_ids", "_known", "_once", "_parse")

    def __init__(self, parse: Callable[[bytes], H | None], *, ids: bool = False) -> None:
        self._parse = parse
        self._ids = ids
        self._known: dict[bytes, H | None] = {}
        self._once: set[bytes] = set()

    def whole(self, data: bytes) -> tuple[H, bytes, bytes] | None:
        """The head, the body and the id of a message, when `data` is exactly that; None: ask the parser."""
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
            key = data[:first] + data[last : end - 1]  # no head ends so: it is no other head's key
        request_id = b""
        if self._ids and (at := key.find(ID_LINE)) >= 0:
            first = at + len(ID_LINE)
            request_id = key[first : key.find(b"\r", first)]
            if len(request_id) > _MAX_ID_BYTES or not request_id.replace(b"-", b"").isalnum():
                return None
            key = key[:first] + key[first + len(request_id) :]
        try:
            head = self._known[key]
        except KeyError:
            head = self._meet(key, data)
        return None if head is None else (head, data[end:], request_id)

    def _meet(self, key: bytes, data: bytes) -> H | None:
        if key not in self._once:
            if len(self._once) >= MAX_HEADS:
                self._once.clear()
            self._once.add(key)
            return None
        self._once.discard(key)
        if len(self._known) >= MAX_HEADS:
            self._known.clear()
        made = self._known[key] = self._parse(data)
        return made
