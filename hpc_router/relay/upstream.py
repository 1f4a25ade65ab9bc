"""One request to an upstream server and its response, over aiohttp's client.

Every failure comes out as an `UpstreamError`: before the response, while waiting for its first byte, or in its midst.
Leaving the context early closes the connection, which is how an engine learns that its client has gone.
"""

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import aiohttp
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from hpc_router.errors import UpstreamConnectError, UpstreamError, UpstreamTimeoutError

_KEEP_ALIVE_S: Final = 4.0
"""Shorter than the 5 s after which uvicorn, the server of both real engines, closes an idle connection."""
_IN_ONE_PIECE: Final = 2**20
"""A longer request body is written in pieces, so that it does not hold up the event loop."""
_NO_AUTO_HEADERS: Final = ("Accept", "Accept-Encoding", "User-Agent", "Content-Type")


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds to wait: for a connection, for the first byte of the answer, between two chunks."""

    connect_s: float
    first_byte_s: float
    idle_s: float


class UpstreamResponse:
    """Status and headers, then the body in chunks as they come."""

    def __init__(self, response: aiohttp.ClientResponse, timeout: asyncio.Timeout, limits: Limits) -> None:
        self._response = response
        self._timeout = timeout
        self._limits = limits
        self.status = response.status
        self.headers: CIMultiDictProxy[str] = response.headers
        self.content_type = response.content_type

    async def chunks(self) -> AsyncIterator[bytes]:
        """The clock runs only while the upstream is waited for, so a slow client does not make it look silent."""
        loop = asyncio.get_running_loop()
        read = self._response.content.readany
        while chunk := await read():
            self._timeout.reschedule(None)
            yield chunk
            self._timeout.reschedule(loop.time() + self._limits.idle_s)

    async def read(self, limit: int) -> bytes:
        """The whole body; raises UpstreamError when it is longer than `limit` bytes."""
        body = bytearray()
        async for chunk in self.chunks():
            body += chunk
            if len(body) > limit:
                raise UpstreamError(f"the replica's answer is longer than {limit} bytes")
        return bytes(body)


class UpstreamClient:
    """Connections to upstream servers, kept between requests."""

    def __init__(self, limits: Limits, *, socket_path: str | None = None) -> None:
        self._limits = limits
        connector: aiohttp.BaseConnector = (
            aiohttp.UnixConnector(socket_path, limit=0, keepalive_timeout=_KEEP_ALIVE_S)
            if socket_path
            else aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=limits.connect_s),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            skip_auto_headers=_NO_AUTO_HEADERS,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._session.close()

    @asynccontextmanager
    async def request(
        self, method: str, url: URL, *, headers: CIMultiDict[str] | None = None, body: bytes | None = None
    ) -> AsyncIterator[UpstreamResponse]:
        """Raises UpstreamConnectError, UpstreamTimeoutError or UpstreamError, also from within the block."""
        data = io.BytesIO(body) if body is not None and len(body) > _IN_ONE_PIECE else body
        try:
            async with (
                asyncio.timeout(self._limits.first_byte_s) as timeout,
                self._session.request(method, url, headers=headers, data=data, allow_redirects=False) as response,
            ):
                yield UpstreamResponse(response, timeout, self._limits)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise UpstreamConnectError(f"cannot connect to the replica: {type(error).__name__}") from error
        except TimeoutError as error:
            raise UpstreamTimeoutError("the replica fell silent") from error
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError(f"the replica broke off: {type(error).__name__}") from error
