"""Decides which web pages may read responses: cross-origin resource sharing (CORS), as in the Fetch standard.

When a script of a page sends a request, the browser adds the page's origin. The script may read the response only if
the response allows this origin. Before a request with a token, the browser asks by a request of its own, a preflight.
Cookies are never allowed; the router has none.
"""

from dataclasses import dataclass
from typing import Final

from hpc_router.relay.headers import Headers

ANY: Final = b"*"
PREFLIGHT_MAX_AGE_S: Final = 600
"""Maximum time in seconds that a browser may keep the response to a preflight."""
_PREFLIGHT: Final = (
    b"access-control-allow-methods: GET, HEAD, POST, DELETE\r\naccess-control-max-age: %d\r\n" % PREFLIGHT_MAX_AGE_S
)
_EXPOSED: Final = b"x-request-id, x-expert, x-replica, x-route-reason, retry-after, x-should-retry"
"""Response headers that scripts may read, in addition to those that the standard always allows."""
_VARY: Final = b"vary: origin\r\n"
_REQUEST_METHOD: Final = b"access-control-request-method"


@dataclass(slots=True, eq=False)
class CrossOrigin:
    """The origins whose pages may read responses. `origins`: as browsers write them; CORS is off if there are none.
    `allow` changes them at any time."""

    origins: frozenset[bytes] = frozenset()

    def allow(self, origins: list[str]) -> None:
        """Replaces the allowed origins."""
        self.origins = frozenset(origin.encode() for origin in origins)

    def lines(self, headers: Headers) -> bytes:
        """Returns the CORS header lines of the response to a request with these headers."""
        if ANY in self.origins:
            return _allowing(ANY)
        origin = headers.get(b"origin", b"")
        return _VARY + _allowing(origin) if origin in self.origins else _VARY

    def is_preflight(self, method: str, headers: Headers) -> bool:
        """Returns whether CORS is on and the request is a preflight, which a browser sends before a page's request."""
        return bool(self.origins) and method == "OPTIONS" and _REQUEST_METHOD in headers

    def preflight_lines(self, headers: Headers) -> bytes | None:
        """Returns the header lines for the response to a preflight, in addition to `lines`; None if the origin is not
        allowed."""
        if ANY not in self.origins and headers.get(b"origin") not in self.origins:
            return None
        asked = headers.get(b"access-control-request-headers", b"authorization, content-type")
        return _PREFLIGHT + b"access-control-allow-headers: %b\r\n" % asked


OFF: Final = CrossOrigin()


def _allowing(origin: bytes) -> bytes:
    return b"access-control-allow-origin: %b\r\naccess-control-expose-headers: %b\r\n" % (origin, _EXPOSED)
