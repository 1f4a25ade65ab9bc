"""Pool of idle connections per address, with a limit for the idle time.

The connection with the shortest idle time is used first: the engine is least likely to have closed it, and connections
that the load does not need expire. A connection that the server closes is removed (`discard`).
"""

import asyncio
import time
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar


class Closable(Protocol):
    @property
    def usable(self) -> bool:
        """False once the peer has closed the connection."""

    def abort(self) -> None: ...


A = TypeVar("A", bound=Hashable)
C = TypeVar("C", bound=Closable)


class Pool(Generic[A, C]):
    """`keep_s`: maximum idle time of a connection."""

    def __init__(self, *, keep_s: float) -> None:
        self._keep_s = keep_s
        self._idle: dict[A, dict[C, float]] = {}  # connection -> expiry time, in order of expiry
        self._sweep: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return sum(map(len, self._idle.values()))

    def get(self, address: A) -> C | None:
        idle, now = self._idle.get(address), time.monotonic()
        while idle:
            connection, expires_at = idle.popitem()
            if now < expires_at and connection.usable:
                return connection
            connection.abort()
        return None

    def put(self, address: A, connection: C) -> None:
        expires_at = time.monotonic() + self._keep_s
        try:
            self._idle[address][connection] = expires_at
        except KeyError:
            self._idle[address] = {connection: expires_at}
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(self._keep_s, self._close_expired)

    def discard(self, connection: C) -> None:
        for idle in self._idle.values():
            idle.pop(connection, None)

    def close(self) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        for idle in self._idle.values():
            for connection in tuple(idle):
                connection.abort()
        self._idle.clear()

    def _close_expired(self) -> None:
        now = time.monotonic()
        for idle in self._idle.values():
            for connection in [c for c, expires_at in idle.items() if expires_at <= now]:
                del idle[connection]
                connection.abort()
        self._idle = {address: idle for address, idle in self._idle.items() if idle}
        next_at = min((at for idle in self._idle.values() for at in idle.values()), default=None)
        self._sweep = None
        if next_at is not None:
            self._sweep = asyncio.get_running_loop().call_later(max(0.0, next_at - now), self._close_expired)
