"""Which headers cross the relay.

Hop-by-hop headers (RFC 9110, section 7.6.1) never do. Upstream the client's credentials stay behind, and compressed
answers are not asked for, so that events can be told apart. Downstream the router speaks for itself about the server.
"""

from collections.abc import Iterator, Mapping
from typing import Final

from multidict import CIMultiDict, CIMultiDictProxy

HOP_BY_HOP: Final = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
_NOT_UPSTREAM: Final = HOP_BY_HOP | {
    "accept-encoding",
    "authorization",
    "content-length",
    "cookie",
    "expect",
    "host",
    "x-api-key",
}
_NOT_DOWNSTREAM: Final = HOP_BY_HOP | {"content-length", "date", "server", "set-cookie"}


def upstream_headers(client: CIMultiDictProxy[str], *, add: Mapping[str, str]) -> CIMultiDict[str]:
    return _crossing(client, drop=_NOT_UPSTREAM, add=add)


def downstream_headers(upstream: CIMultiDictProxy[str], *, add: Mapping[str, str]) -> CIMultiDict[str]:
    return _crossing(upstream, drop=_NOT_DOWNSTREAM, add=add)


def _crossing(headers: CIMultiDictProxy[str], *, drop: frozenset[str], add: Mapping[str, str]) -> CIMultiDict[str]:
    if "connection" in headers:
        drop |= _connection_options(headers)
    kept = CIMultiDict([field for field in headers.items() if field[0].lower() not in drop])
    kept.update(add)
    return kept


def _connection_options(headers: CIMultiDictProxy[str]) -> frozenset[str]:
    """Headers that `Connection:` declares to be hop-by-hop."""

    def options() -> Iterator[str]:
        for value in headers.getall("connection", ()):
            yield from (option.strip().lower() for option in value.split(","))

    return frozenset(options())
