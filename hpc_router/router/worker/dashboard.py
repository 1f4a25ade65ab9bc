"""The dashboard: a page without data, open to everyone, and the overviews that it fetches with the owner's token.

The page uses no files of other servers. Its content security policy allows only the page's own script and style, and
connections only to this router, so text in the data cannot run as a script or be sent elsewhere.
"""

import asyncio
import base64
import hashlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from hpc_router.errors import HpcRouterError
from hpc_router.relay.downstream.interface import Request, Response

PERIOD_S: Final = 2.0
"""Interval between two overviews of a stream, in seconds."""
STALLED_S: Final = 30.0
"""Time in seconds after which a page that reads nothing is disconnected."""
_PAGE: Final = Path(__file__).with_name("dashboard.html").read_bytes()
_STREAM_HEAD: Final = b"content-type: application/x-ndjson\r\ncache-control: no-store\r\n"


def _hash_of(tag: bytes) -> str:
    """Returns the hash of the content of the page's only `tag` element, as the content security policy lists it to
    allow that content."""
    content = _PAGE.partition(b"<%b>" % tag)[2].partition(b"</%b>" % tag)[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"


_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        f"script-src {_hash_of(b'script')}",
        f"style-src {_hash_of(b'style')}",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_PAGE_HEAD: Final = (
    "content-type: text/html; charset=utf-8\r\ncache-control: no-store\r\nx-content-type-options: nosniff\r\n"
    f"referrer-policy: no-referrer\r\ncontent-security-policy: {_POLICY}\r\n"
).encode()


def page() -> Response:
    """Returns the response with the dashboard's page, which contains no data of the deployment."""
    return Response(200, _PAGE_HEAD, _PAGE)


async def follow(
    request: Request, overview: Callable[[], Awaitable[dict[str, Any]]], draining: Callable[[], bool]
) -> None:
    """Sends a line with the overview every `PERIOD_S` seconds until the router drains. While the control process does
    not answer, the line is `{"error": TEXT}`. Raises DownstreamGoneError when the client leaves."""
    request.start_response(200, _STREAM_HEAD, length=None)
    while True:
        try:
            value = await overview()
        except HpcRouterError as error:
            value = {"error": str(error)}
        if not request.write(json.dumps(value).encode() + b"\n"):
            await request.drain(limit_s=STALLED_S)
        if draining():
            return
        await asyncio.sleep(PERIOD_S)
