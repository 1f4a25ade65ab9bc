"""HTTP requests of commands and the control loop: short, with a time limit, and never through a proxy.

aiohttp is loaded by the first request, because it takes half of the start of a command that sends none.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hpc_router.net.tls import client_context

if TYPE_CHECKING:
    import aiohttp

DEFAULT_TIMEOUT_S: Final = 2.0
MAX_CONNECTIONS: Final = 100
MAX_RESPONSE_BYTES: Final = 2**20


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """Status and body of a response. `body`: the parsed JSON; if the body is not JSON, its text."""

    status: int
    body: Any

    @property
    def message(self) -> str:
        """The error message in the body if it has OpenAI's format; otherwise the status and the start of the body."""
        error = self.body.get("error") if isinstance(self.body, dict) else None
        if isinstance(error, dict) and error.get("message"):
            return str(error["message"])
        return f"HTTP {self.status}: {str(self.body)[:300]}"


class Unreachable(Exception):
    """No response was received within the time limit, or the response is longer than `MAX_RESPONSE_BYTES`."""


@asynccontextmanager
async def session(
    *,
    timeout_s: float | None = DEFAULT_TIMEOUT_S,
    connect_s: float = DEFAULT_TIMEOUT_S,
    connections: int = MAX_CONNECTIONS,
) -> AsyncIterator["aiohttp.ClientSession"]:
    """Yields a client session with at most `connections` connections. Time limits in seconds: `timeout_s` of a request
    with its response, None for none; `connect_s` of making a connection, without the wait for a free one."""
    import aiohttp

    limits = aiohttp.ClientTimeout(total=timeout_s, sock_connect=connect_s)
    connector = aiohttp.TCPConnector(limit=connections)
    jar = aiohttp.DummyCookieJar()
    async with aiohttp.ClientSession(timeout=limits, trust_env=False, connector=connector, cookie_jar=jar) as client:
        yield client


async def call(
    client: "aiohttp.ClientSession",
    method: str,
    url: str,
    *,
    token: str | None = None,
    body: Mapping[str, Any] | None = None,
    certificate: str | None = None,
) -> HttpResponse:
    """Sends one request and returns the response, whatever its status. `certificate`: the only certificate, in PEM,
    that an https server may have; None: any that the system's authorities have signed. Raises Unreachable."""
    import aiohttp

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        async with client.request(
            method, url, headers=headers, json=body, allow_redirects=False, ssl=tls_option(certificate)
        ) as response:
            text = (await bounded_body(response)).decode(errors="replace")
            return HttpResponse(response.status, _parsed(text))
    except (aiohttp.ClientError, TimeoutError, ValueError, OSError) as error:
        raise Unreachable(str(error) or type(error).__name__) from error


def tls_option(certificate: str | None) -> ssl.SSLContext | bool:
    """Returns the `ssl` argument of aiohttp's requests. Raises ValueError if `certificate` (see `call`) is not one."""
    return True if certificate is None else client_context(certificate)


async def bounded_body(response: "aiohttp.ClientResponse") -> bytes:
    """Returns the body of a response. Raises ValueError if it is longer than `MAX_RESPONSE_BYTES`."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_RESPONSE_BYTES:
            raise ValueError(f"the response is longer than {MAX_RESPONSE_BYTES} bytes")
    return bytes(body)


def call_blocking(
    method: str,
    url: str,
    *,
    token: str | None = None,
    body: Mapping[str, Any] | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    certificate: str | None = None,
) -> HttpResponse:
    """Like `call`, for code without an event loop: blocks until the response is received."""

    async def once() -> HttpResponse:
        async with session(timeout_s=timeout_s) as client:
            return await call(client, method, url, token=token, body=body, certificate=certificate)

    return asyncio.run(once())


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
