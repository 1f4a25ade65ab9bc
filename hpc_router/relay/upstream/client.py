"""HTTP client for upstream servers, with pooled connections.

aiohttp's client is not used because it costs more CPU than all other work of a relayed request. Here the events of a
stream go from the upstream socket to the sink in one step, without waking a task. Every failure is raised as an
`UpstreamError`, whether it occurs before the response, in its head or in its body. This module does not know replicas.
"""

import asyncio
import math
import ssl
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Final, Self

from hpc_router.errors import UpstreamConnectError, UpstreamError, UpstreamTimeoutError
from hpc_router.relay.upstream.awaited_exchange import MAX_SINGLE_WRITE_BYTES
from hpc_router.relay.upstream.connection import Connection
from hpc_router.relay.upstream.exchange import Exchange
from hpc_router.relay.upstream.interface import (
    Address,
    PendingRequest,
    ResponseCallback,
    UpstreamTimeouts,
    request_line,
)
from hpc_router.relay.upstream.timeouts import IdleTimer

KEEP_ALIVE_S: Final = 4.0
"""Maximum time in seconds that an idle connection stays in the pool. It is shorter than the 5 s after which uvicorn,
the server of both real engines, closes an idle connection."""
STALE_S: Final = 1.0
"""Maximum duration in seconds of a failed exchange for which the failure means that the server had closed the pooled
connection. After more time, the server may have started to process the request."""
_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})


class UpstreamClient:
    """An HTTP client that pools its connections between requests.

    `socket_path`: path of a Unix socket that all connections use instead of the address. `tls`: the context for https;
    None: one with the system's certificates, loaded at first use; a change applies to later connections. `resend`:
    whether the client itself sends a request again if the server had closed the pooled connection; if not, the caller
    gets the error. `socket_options`: options of each TCP connection, as arguments of `setsockopt`.
    """

    def __init__(
        self,
        limits: UpstreamTimeouts,
        *,
        socket_path: str | None = None,
        tls: ssl.SSLContext | None = None,
        resend: bool = True,
        socket_options: Iterable[tuple[int, int, int]] = (),
    ) -> None:
        self.limits = limits
        self._resend = resend
        self._socket_options = tuple(socket_options)
        self._socket_path = socket_path
        self.tls = tls
        self._pool: dict[Address | str, list[Connection]] = {}  # idle connections in order of last use
        self._sweep: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        for idle in self._pool.values():
            for connection in tuple(idle):
                connection.abort()
        self._pool.clear()

    def request(
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
    ) -> "Exchange":
        """Returns the context manager of a request. See `interface.Upstream`."""
        assert started is None or isinstance(started, Connection)
        request = request_head(method, address, target, head, body)
        return Exchange(self, address, request, body, method == "HEAD", watch, started, limits or self.limits)

    def start(
        self, address: Address, message: bytes, callback: ResponseCallback, limits: UpstreamTimeouts | None = None
    ) -> Connection | None:
        """Sends a request over a pooled connection without a task. See `interface.Upstream`."""
        if len(message) > MAX_SINGLE_WRITE_BYTES or (connection := self._pooled(self._socket_path or address)) is None:
            return None
        connection.start(message, callback, limits or self.limits)
        return connection

    async def response_started(self, call: "Exchange") -> Connection:
        """Sends the request of `call`, waits for the head of the response, and returns the connection. If a pooled
        connection ends without a byte of the response, the server had probably closed it before it received the
        request; the request is then sent again over a new connection, unless `resend` is off."""
        pooled = call.started or self._pooled(self._socket_path or call.address)
        if pooled is not None:
            try:
                return await self._exchange_on(pooled, call, sent=call.started is not None)
            except UpstreamError:
                stale = pooled.nothing_received and not pooled.idle_timer.expired and pooled.exchange_age_s() <= STALE_S
                if not (stale and self._resend):
                    raise
        try:
            connection = await self.connect(call.address, watch=call.watch)
        except UpstreamConnectError as error:
            error.sent = pooled is not None
            raise
        return await self._exchange_on(connection, call)

    async def _exchange_on(self, connection: Connection, call: "Exchange", *, sent: bool = False) -> Connection:
        try:
            if not sent:
                connection.begin(call.limits, head_only=call.head_only)
                if call.watch is not None:
                    call.watch(connection.idle_timer)
                await connection.send(call.head, call.body)
            await connection.wait_for_head()
        except BaseException:
            connection.end()
            raise
        return connection

    async def connect(self, address: Address, *, watch: Callable[[IdleTimer], None] | None = None) -> Connection:
        """Returns a new connection. `watch` is called with its idle timer. Raises UpstreamConnectError if it cannot be
        made, and UpstreamTimeoutError if the timer was shortened meanwhile (`IdleTimer.tighten`) and has expired."""
        loop = asyncio.get_running_loop()
        made = Connection(self, self._socket_path or address)
        idle_timer = made.idle_timer
        try:
            async with asyncio.timeout(self.limits.connect_s) as limit:
                idle_timer.on_timeout = lambda: limit.reschedule(loop.time())
                idle_timer.begin(math.inf)  # connect_s applies unless the timer is tightened
                if watch is not None:
                    watch(idle_timer)
                if self._socket_path is not None:
                    await loop.create_unix_connection(lambda: made, self._socket_path)
                else:
                    tls = await self._tls_context() if address.tls else None
                    transport, _ = await loop.create_connection(lambda: made, address.host, address.port, ssl=tls)
                    for option in self._socket_options:
                        transport.get_extra_info("socket").setsockopt(*option)
        except BaseException as error:
            made.abort()
            idle_timer.end()
            if idle_timer.expired and isinstance(error, TimeoutError):
                raise UpstreamTimeoutError("the replica sent nothing within the timeout") from error
            if isinstance(error, OSError | UnicodeError):  # an invalid host name is a UnicodeError
                raise UpstreamConnectError(f"cannot connect to the replica: {type(error).__name__}") from error
            raise
        idle_timer.on_timeout = made.on_timeout
        return made

    @property
    def pooled(self) -> int:
        """Number of idle connections in the pool."""
        return sum(map(len, self._pool.values()))

    def _pooled(self, address: Address | str) -> Connection | None:
        """Removes the idle connection to `address` that was used last from the pool and returns it; None if there is
        none. The server is least likely to have closed that one. Connections beyond those that the load needs stay
        unused and expire."""
        idle = self._pool.get(address)
        while idle:
            connection = idle.pop()
            usable_until, connection.usable_until = connection.usable_until, 0.0
            if connection.usable and usable_until > time.monotonic():
                return connection
            connection.abort()
        return None

    def put(self, connection: Connection) -> None:
        """Returns a connection to the pool for another exchange."""
        connection.usable_until = time.monotonic() + KEEP_ALIVE_S
        try:
            self._pool[connection.address].append(connection)
        except KeyError:
            self._pool[connection.address] = [connection]
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(KEEP_ALIVE_S, self._close_expired)

    def discard(self, connection: Connection) -> None:
        """Removes a closed connection from the pool."""
        if connection.usable_until and self._pool:
            self._pool[connection.address].remove(connection)

    def _close_expired(self) -> None:
        now = time.monotonic()
        for idle in self._pool.values():
            expired = [connection for connection in idle if connection.usable_until <= now]
            del idle[: len(expired)]  # the expired connections come first
            for connection in expired:
                connection.usable_until = 0.0
                connection.abort()
        self._pool = {address: idle for address, idle in self._pool.items() if idle}
        next_at = min((idle[0].usable_until for idle in self._pool.values()), default=None)
        self._sweep = None
        if next_at is not None:
            self._sweep = asyncio.get_running_loop().call_later(max(0.0, next_at - now), self._close_expired)

    async def _tls_context(self) -> ssl.SSLContext:
        if self.tls is None:
            self.tls = await asyncio.to_thread(ssl.create_default_context)  # in a thread, because it reads files
        return self.tls


def request_head(method: str, address: Address, target: str, head: bytes, body: bytes | None) -> bytes:
    """Returns the request line and all header lines. Raises ValueError for a `target` that would end its line."""
    line = request_line(method, address, target)
    if body is None and method not in _WITH_BODY:
        return b"%b%b\r\n" % (line, head)
    return b"%b%bcontent-length: %d\r\n\r\n" % (line, head, len(body or b""))
