"""One request to an upstream server and its response, over aiohttp's client.

Every failure comes out as an `UpstreamError`: before the response, while waiting for its first byte, or in its midst.
Leaving the context early closes the connection, which is how an engine learns that its client has gone.
"""

import asyncio
import io
import math
from collections.abc import AsyncIterator, Callable
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


class Patience:
    """How long the upstream may stay silent. The clock runs only while it is waited for, so that a slow client does
    not make it look silent."""

    def __init__(self, timeout: asyncio.Timeout) -> None:
        self._timeout = timeout
        self._most_s = math.inf
        self._waiting = False

    def wait(self, limit_s: float) -> None:
        self._waiting = True
        self._timeout.reschedule(asyncio.get_running_loop().time() + min(limit_s, self._most_s))

    def rest(self) -> None:
        self._waiting = False
        self._timeout.reschedule(None)

    def end(self) -> None:
        """The exchange is over, whatever comes later."""
        self._waiting = False

    def shorten(self, limit_s: float) -> None:
        """From now on no silence longer than this, whatever was asked for."""
        self._most_s = limit_s
        if self._waiting and not self._timeout.expired():
            self.wait(limit_s)


class UpstreamResponse:
    """Status and headers, then the body in chunks as they come."""

    def __init__(self, response: aiohttp.ClientResponse, patience: Patience, limits: Limits) -> None:
        self._response = response
        self._patience = patience
        self._limits = limits
        self.status = response.status
        self.headers: CIMultiDictProxy[str] = response.headers
        self.content_type = response.content_type

    async def chunks(self) -> AsyncIterator[bytes]:
        read = self._response.content.readany
        while chunk := await read():
            self._patience.rest()
            yield chunk
            self._patience.wait(self._limits.idle_s)

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
        self,
        method: str,
        url: URL,
        *,
        headers: CIMultiDict[str] | None = None,
        body: bytes | None = None,
        watch: Callable[[Patience], None] | None = None,
    ) -> AsyncIterator[UpstreamResponse]:
        """Raises UpstreamConnectError, UpstreamTimeoutError or UpstreamError, also from within the block.

        `watch` is given the request's patience, for whoever learns that the upstream is lost.
        """
        data = io.BytesIO(body) if body is not None and len(body) > _IN_ONE_PIECE else body
        try:
            async with asyncio.timeout(None) as timeout:
                patience = Patience(timeout)
                patience.wait(self._limits.first_byte_s)
                if watch is not None:
                    watch(patience)
                try:
                    async with self._session.request(
                        method, url, headers=headers, data=data, allow_redirects=False
                    ) as response:
                        yield UpstreamResponse(response, patience, self._limits)
                finally:
                    patience.end()
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise UpstreamConnectError(f"cannot connect to the replica: {type(error).__name__}") from error
        except TimeoutError as error:
            raise UpstreamTimeoutError("the replica fell silent") from error
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError(f"the replica broke off: {type(error).__name__}") from error
