"""The upstream side over aiohttp's client: the reference that `upstream` is compared with, by test.

It is slower per request and per event, has no sink that is served without a task, and does not notice garbage in a
chunked body before the idle limit.
"""

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Final, Self

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from hpc_router.errors import UpstreamConnectError, UpstreamError, UpstreamTimeoutError
from hpc_router.net import protocol
from hpc_router.relay.headers import Headers
from hpc_router.relay.upstream.interface import Address, PendingRequest, UpstreamResponse, UpstreamTimeouts
from hpc_router.relay.upstream.timeouts import IdleTimer

_KEEP_ALIVE_S: Final = 4.0
"""Shorter than the 5 s after which uvicorn, the server of both real engines, closes an idle connection."""
_IN_ONE_PIECE: Final = 2**20
"""A longer request body is written in pieces, so that it does not hold up the event loop."""
_NO_AUTO_HEADERS: Final = ("Accept", "Accept-Encoding", "User-Agent", "Content-Type")


class AiohttpResponse(UpstreamResponse):
    def __init__(self, response: aiohttp.ClientResponse, idle_timer: IdleTimer, limits: UpstreamTimeouts) -> None:
        headers = Headers([(name.lower(), value) for name, value in response.raw_headers])
        super().__init__(response.status, headers, response.content_length)
        self._response = response
        self._idle_timer = idle_timer
        self._limits = limits

    async def chunks(self) -> AsyncIterator[bytes]:
        while chunk := await self._read():
            self._idle_timer.pause()
            yield chunk
            self._idle_timer.restart(self._limits.idle_s)

    async def _read(self) -> bytes:
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise UpstreamError(f"the connection to the replica broke: {type(error).__name__}") from error


class AiohttpClient:
    """Connections to upstream servers, kept between requests."""

    def __init__(self, limits: UpstreamTimeouts, *, socket_path: str | None = None) -> None:
        self.limits = limits
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

    def start(self, *request: object, **rest: object) -> None:
        """Nothing goes without a task here."""

    @asynccontextmanager
    async def request(
        self,
        method: str,
        address: Address,
        target: str,
        *,
        head: bytes = b"",
        body: bytes | None = None,
        watch: Callable[[IdleTimer], None] | None = None,
        started: PendingRequest | None = None,
        limits: UpstreamTimeouts | None = None,
    ) -> AsyncIterator[UpstreamResponse]:
        """See `exchange.Upstream`."""
        limits = limits or self.limits
        scheme = "https" if address.tls else "http"
        url = URL(f"{scheme}://{address.header.decode()}{protocol.path_at(address.base_path, target)}", encoded=True)
        headers = fields_of(head)
        data = io.BytesIO(body) if body is not None and len(body) > _IN_ONE_PIECE else body
        try:
            async with asyncio.timeout(None) as timeout:
                idle_timer = IdleTimer(lambda: timeout.reschedule(asyncio.get_running_loop().time()))
                idle_timer.restart(limits.first_byte_s)
                if watch is not None:
                    watch(idle_timer)
                try:
                    async with self._session.request(
                        method, url, headers=headers, data=data, allow_redirects=False
                    ) as response:
                        yield AiohttpResponse(response, idle_timer, limits)
                finally:
                    idle_timer.end()
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise UpstreamConnectError(f"cannot connect to the replica: {type(error).__name__}") from error
        except TimeoutError as error:
            raise UpstreamTimeoutError("the replica sent nothing within the timeout") from error
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError(f"the connection to the replica broke: {type(error).__name__}") from error


def fields_of(head: bytes) -> CIMultiDict[str]:
    """Header lines as aiohttp wants them."""
    pairs = (line.partition(": ") for line in head.decode("utf-8", "surrogateescape").split("\r\n") if line)
    return CIMultiDict([(name, value) for name, _, value in pairs])
