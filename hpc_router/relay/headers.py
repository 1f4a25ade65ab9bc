"""Header fields, and which of them cross the relay.

Fields stay the bytes that came, so that those which cross cost no more than a copy. Hop-by-hop headers (RFC 9110,
section 7.6.1) never cross. Upstream the client's credentials stay behind, and compressed answers are not asked for, so
that events can be told apart. Downstream the router speaks for itself about the server.
"""

from collections.abc import Mapping
from typing import Any, Final, overload

from hpc_router.net.protocol import REQUEST_ID_HEADER

HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
NOT_UPSTREAM: Final = HOP_BY_HOP | {
    b"accept-encoding",
    b"authorization",
    b"content-length",
    b"cookie",
    b"expect",
    b"host",
    b"x-api-key",
}
MAX_RETRY_AFTER_S: Final = 60
"""Official clients sleep for whatever an answer says, silently and beyond their own timeout (see docs/clients.md)."""
REQUEST_ID: Final = REQUEST_ID_HEADER.encode()
NOT_DOWNSTREAM: Final = HOP_BY_HOP | {b"content-length", b"date", b"server", b"set-cookie"}


class Headers:
    """The fields of one message in their order, names in lower case. They never change.

    `notes`: what has been made of them, for messages that share them (see `heads`).
    """

    __slots__ = ("_last", "content_type", "fields", "notes")

    def __init__(self, fields: list[tuple[bytes, bytes]]) -> None:
        self.fields = fields
        self._last = dict(fields)
        self.content_type = self.get(b"content-type", b"").partition(b";")[0].strip().lower()
        self.notes: dict[object, Any] = {}

    @overload
    def get(self, name: bytes) -> bytes | None: ...

    @overload
    def get(self, name: bytes, default: bytes) -> bytes: ...

    def get(self, name: bytes, default: bytes | None = None) -> bytes | None:
        """The value; of several the last one."""
        return self._last.get(name, default)

    def text(self, name: str) -> str:
        """The value, whatever bytes a stranger sends; empty where there is none."""
        return self._last.get(name.encode(), b"").decode("utf-8", "surrogateescape")

    def all(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.fields if key == name]

    def __contains__(self, name: bytes) -> bool:
        return name in self._last


def without_id(fields: list[tuple[bytes, bytes]]) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """The fields but for `x-request-id`, and its value; of several the last one, of none nothing."""
    ids = [value for name, value in fields if name == REQUEST_ID]
    return ([field for field in fields if field[0] != REQUEST_ID], ids[-1]) if ids else (fields, b"")


def crossing(headers: Headers, *, drop: frozenset[bytes]) -> bytes:
    """The lines of all fields but those in `drop` and those that `Connection:` declares to be hop-by-hop. `Retry-After`
    is at most `MAX_RETRY_AFTER_S`."""
    made: bytes | None = headers.notes.get(drop)
    if made is None:
        made = headers.notes[drop] = _crossing(headers, drop)
    return made


def _crossing(headers: Headers, drop: frozenset[bytes]) -> bytes:
    if b"connection" in headers:
        options = b",".join(headers.all(b"connection")).lower().split(b",")
        drop |= {option.strip() for option in options}
    fields = headers.fields
    if b"retry-after" in headers or b"retry-after-ms" in headers:
        fields = [(name, _bounded(name, value)) for name, value in fields]
    return b"".join([b"%b: %b\r\n" % field for field in fields if field[0] not in drop])


def _bounded(name: bytes, value: bytes) -> bytes:
    """`Retry-After` holds seconds or an HTTP date, which counts as far away; OpenAI's `retry-after-ms` milliseconds."""
    most = {b"retry-after": MAX_RETRY_AFTER_S, b"retry-after-ms": 1000 * MAX_RETRY_AFTER_S}.get(name)
    if most is None:
        return value
    try:
        near = float(value) <= most
    except ValueError:
        near = False
    return value if near else b"%d" % most


def lines(fields: Mapping[str, str]) -> bytes:
    """These fields as lines. Raises ValueError for what would break out of its line."""
    text = "".join([f"{name}: {value}\r\n" for name, value in fields.items()])
    if not text.count("\n") == text.count("\r") == len(fields) or "\0" in text:
        raise ValueError("a control character in a header")
    return text.encode("utf-8", "surrogateescape")
