"""Messages between the control process and one worker, over a pair of sockets that nobody else can reach.

A message is a kind and a JSON value behind its length; it is told, or asked and answered. A peer that reads nothing
any more is told nothing more: what it misses, it is told again when it comes back.
"""

import asyncio
import inspect
import itertools
import json
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

from hpc_router.errors import UnavailableError

logger = logging.getLogger(__name__)

MAX_UNREAD_BYTES: Final = 2**25
"""Bytes that a peer may leave unread."""
_LENGTH: Final = 4
_ANSWER: Final = "="
_FAILURE: Final = "!"


class ChannelClosedError(UnavailableError):
    """The peer has ended, or does not answer in time."""


Handle = Callable[[str, Any], Awaitable[Any] | Any]
"""What to do with a message, by its kind; the result is the answer to one that asks."""


class RpcPeer(asyncio.Protocol):
    """Made at once, so that its owner has it before the first message comes; `open` connects it."""

    def __init__(self, handle: Handle, on_end: Callable[[], None]) -> None:
        self._handle, self._on_end = handle, on_end
        self._transport: asyncio.Transport | None = None
        self._came = bytearray()
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._answering: set[asyncio.Task[None]] = set()

    async def open(self, sock: socket.socket) -> None:
        """Over one of a pair of connected unix sockets."""
        sock.setblocking(False)
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=sock)

    def tell(self, kind: str, value: Any = None) -> None:
        self._send(kind, None, value)

    async def ask(self, kind: str, value: Any = None, *, limit_s: float) -> Any:
        """The answer. Raises ChannelClosedError."""
        number = next(self._numbers)
        self._asked[number] = answer = asyncio.get_running_loop().create_future()
        try:
            self._send(kind, number, value)
            async with asyncio.timeout(limit_s):
                return await answer
        except TimeoutError as error:
            raise ChannelClosedError(f"no answer to {kind!r} within {limit_s:g} s") from error
        finally:
            self._asked.pop(number, None)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not derived from it

    def data_received(self, data: bytes) -> None:
        self._came += data
        at = 0
        while len(self._came) - at >= _LENGTH:
            end = at + _LENGTH + int.from_bytes(self._came[at : at + _LENGTH])
            if len(self._came) < end:
                break
            kind, number, value = json.loads(self._came[at + _LENGTH : end])
            at = end
            self._take(kind, number, value)
        del self._came[:at]

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(ChannelClosedError("the peer has ended"))
        for task in self._answering:
            task.cancel()
        self._on_end()

    def _take(self, kind: str, number: int | None, value: Any) -> None:
        if kind in (_ANSWER, _FAILURE):
            answer = self._asked.get(number or 0)
            if answer is not None and not answer.done():
                if kind == _ANSWER:
                    answer.set_result(value)
                else:
                    answer.set_exception(ChannelClosedError(str(value)))
            return
        task = asyncio.ensure_future(self._act(kind, number, value)) if number is not None else None
        if task is not None:
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)
            return
        try:
            result = self._handle(kind, value)
            assert not inspect.isawaitable(result), "what is only told is done at once"
        except Exception:
            logger.exception("%r could not be taken", kind)

    async def _act(self, kind: str, number: int, value: Any) -> None:
        try:
            result = self._handle(kind, value)
            if inspect.isawaitable(result):
                result = await result
            self._send(_ANSWER, number, result)
        except ChannelClosedError:
            pass
        except Exception as error:
            logger.exception("%r could not be answered", kind)
            self._send(_FAILURE, number, f"{type(error).__name__}: {error}")

    def _send(self, kind: str, number: int | None, value: Any) -> None:
        transport = self._transport
        if transport is None and number is not None:
            raise ChannelClosedError("the peer has ended")
        if transport is None or transport.is_closing():  # who asks is told so with all others, in `connection_lost`
            return
        if transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            logger.warning("%r was not sent: the other process does not read", kind)
            return
        content = json.dumps([kind, number, value], separators=(",", ":")).encode()
        transport.write(len(content).to_bytes(_LENGTH) + content)
