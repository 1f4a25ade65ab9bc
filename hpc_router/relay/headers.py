"""Header fields, and the rules for which of them are forwarded.

Fields are kept as the received bytes, so that forwarding a field is only a copy. Hop-by-hop headers (RFC 9110, section
7.6.1) are never forwarded. A request sent upstream loses the client's credentials, and its `Accept-Encoding` becomes
`identity`, because compressed events could not be split. A response loses the engine's `Server`, `Date` and cookies.

The router alone decides which web pages may read a response. So `Origin` is not sent upstream, and the engine's own
CORS headers (by default vLLM allows every page) are not sent downstream.
"""

from collections.abc import Mapping
from typing import Any, Final, overload

from hpc_router.net.protocol import ON_BEHALF_HEADER, PRIORITY_HEADER, REQUEST_ID_HEADER, WAIT_HEADER

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
    b"access-control-request-headers",
    b"access-control-request-method",
    b"authorization",
    b"content-length",
    b"cookie",
    b"expect",
    b"host",
    b"origin",
    b"x-api-key",
    ON_BEHALF_HEADER.encode(),
    PRIORITY_HEADER.encode(),
    WAIT_HEADER.encode(),
}
MAX_RETRY_AFTER_S: Final = 59
"""Maximum of a forwarded `Retry-After` in seconds. Official clients sleep for that time without a log line, even beyond
their own timeout, and the AI SDK ignores values from 60 (see docs/clients.md)."""
REQUEST_ID: Final = REQUEST_ID_HEADER.encode()
NOT_DOWNSTREAM: Final = HOP_BY_HOP | {
    b"access-control-allow-credentials",
    b"access-control-allow-headers",
    b"access-control-allow-methods",
    b"access-control-allow-origin",
    b"access-control-expose-headers",
    b"access-control-max-age",
    b"content-length",
    b"date",
    b"server",
    b"set-cookie",
}


class Headers:
    """The fields of one message in order, names in lower case. Immutable. `cached`: results that other code has
    computed from these fields. Messages with the same cached head share one object (see `head_cache`)."""

    __slots__ = ("_last", "cached", "content_type", "fields")

    def __init__(self, fields: list[tuple[bytes, bytes]]) -> None:
        self.fields = fields
        self._last = dict(fields)
        self.content_type = self.get(b"content-type", b"").partition(b";")[0].strip().lower()
        self.cached: dict[object, Any] = {}

    @overload
    def get(self, name: bytes) -> bytes | None: ...

    @overload
    def get(self, name: bytes, default: bytes) -> bytes: ...

    def get(self, name: bytes, default: bytes | None = None) -> bytes | None:
        """Returns the value of the field; the last one if it occurs several times."""
        return self._last.get(name, default)

    def text(self, name: str) -> str:
        """Returns the value as text (invalid UTF-8 becomes surrogates); empty if the field is missing."""
        return self._last.get(name.encode(), b"").decode("utf-8", "surrogateescape")

    def all(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.fields if key == name]

    def __contains__(self, name: bytes) -> bool:
        return name in self._last


def without_id(fields: list[tuple[bytes, bytes]]) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Returns the fields except `x-request-id`, and the last value of `x-request-id`; that value is empty if the field
    is missing."""
    ids = [value for name, value in fields if name == REQUEST_ID]
    return ([field for field in fields if field[0] != REQUEST_ID], ids[-1]) if ids else (fields, b"")


def crossing(headers: Headers, *, drop: frozenset[bytes]) -> bytes:
    """Returns the header lines to forward: all fields except those in `drop` and those that the field `Connection`
    names. `Retry-After` is limited to `MAX_RETRY_AFTER_S`. If `drop` is NOT_UPSTREAM, the lines also ask for an
    uncompressed response."""
    joined: bytes | None = headers.cached.get(drop)
    if joined is None:
        joined = headers.cached[drop] = _crossing(headers, drop)
    return joined


def _crossing(headers: Headers, drop: frozenset[bytes]) -> bytes:
    own = b"accept-encoding: identity\r\n" if drop is NOT_UPSTREAM else b""
    if b"connection" in headers:
        options = b",".join(headers.all(b"connection")).lower().split(b",")
        drop |= {option.strip() for option in options}
    fields = headers.fields
    if b"retry-after" in headers or b"retry-after-ms" in headers:
        fields = [(name, _limited(name, value)) for name, value in fields]
    return own + b"".join([b"%b: %b\r\n" % field for field in fields if field[0] not in drop])


def _limited(name: bytes, value: bytes) -> bytes:
    """Returns the value to forward for the field `name`. In `Retry-After` and OpenAI's `retry-after-ms`, a value above
    `MAX_RETRY_AFTER_S` or an HTTP date becomes that limit. Any other value is returned unchanged."""
    limit = {b"retry-after": MAX_RETRY_AFTER_S, b"retry-after-ms": 1000 * MAX_RETRY_AFTER_S}.get(name)
    if limit is None:
        return value
    try:
        within = float(value) <= limit
    except ValueError:
        within = False
    return value if within else b"%d" % limit


def lines(fields: Mapping[str, str]) -> bytes:
    """Returns these fields as header lines. Raises ValueError for a control character that would end a line."""
    text = "".join([f"{name}: {value}\r\n" for name, value in fields.items()])
    if not text.count("\n") == text.count("\r") == len(fields) or "\0" in text:
        raise ValueError("a control character in a header")
    return text.encode("utf-8", "surrogateescape")
