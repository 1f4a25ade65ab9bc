"""Notifications and calls between the control process and one worker, over a pair of connected sockets.

Each message (`messages`) is sent after its length. If the receiver does not read, further notifications to it are
dropped once `MAX_UNREAD_BYTES` are buffered; it gets the current state when it is attached again. This module does not
know the meaning of the messages.
"""

import asyncio
import inspect
import itertools
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar, cast

from hpc_router.errors import UnavailableError
from hpc_router.router.ipc.messages import Call, Failure, Message, Reply, decode, encode, reply_value

logger = logging.getLogger(__name__)

MAX_UNREAD_BYTES: Final = 2**25
"""Maximum number of outgoing bytes that are buffered for a peer."""
_LENGTH_BYTES: Final = 4

R = TypeVar("R")


class ChannelClosedError(UnavailableError):
    """The process at the other end of the channel has ended, or does not answer in time."""


Handler = Callable[[Message], Awaitable[Any] | Any]
"""Handles a message. For a call, the result (or the awaited result) is the reply. For a notification it must not be
awaitable."""


class RpcPeer(asyncio.Protocol):
    """One end of the connection. `on_end` is called when the connection is lost. No message arrives before `open` is
    called, so the owner can first store this object where the handler of its messages finds it."""

    def __init__(self, handler: Handler, on_end: Callable[[], None]) -> None:
        self._handler, self._on_end = handler, on_end
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._numbers = itertools.count(1)
        self._calls: dict[int, asyncio.Future[Reply]] = {}
        self._answering: set[asyncio.Task[None]] = set()

    async def open(self, sock: socket.socket) -> None:
        """Connects this end to `sock`, one of a pair of connected unix sockets."""
        sock.setblocking(False)
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=sock)

    def notify(self, message: Message) -> None:
        self._send(message, None)

    async def call(self, call: Call[R], *, timeout_s: float) -> R:
        """Sends a call and returns the peer's reply. Raises ChannelClosedError if the peer has ended, fails, or does
        not answer within `timeout_s` seconds."""
        number = next(self._numbers)
        self._calls[number] = reply = asyncio.get_running_loop().create_future()
        try:
            self._send(call, number)
            async with asyncio.timeout(timeout_s):
                return reply_value(call, await reply)
        except TimeoutError as error:
            raise ChannelClosedError(f"no reply to {type(call).__name__} within {timeout_s:g} s") from error
        finally:
            self._calls.pop(number, None)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transport is not derived from this class

    def data_received(self, data: bytes) -> None:
        self._received += data
        at = 0
        while len(self._received) - at >= _LENGTH_BYTES:
            end = at + _LENGTH_BYTES + int.from_bytes(self._received[at : at + _LENGTH_BYTES])
            if len(self._received) < end:
                break
            message, number = decode(self._received[at + _LENGTH_BYTES : end])
            at = end
            self._receive(message, number)
        del self._received[:at]

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        for reply in self._calls.values():
            if not reply.done():
                reply.set_exception(ChannelClosedError("the peer has ended"))
        for task in self._answering:
            task.cancel()
        self._on_end()

    def _receive(self, message: Message, number: int | None) -> None:
        if isinstance(message, Reply | Failure):
            reply = self._calls.get(number or 0)
            if reply is not None and not reply.done():
                if isinstance(message, Reply):
                    reply.set_result(message)
                else:
                    reply.set_exception(ChannelClosedError(message.error))
            return
        if number is not None:
            task = asyncio.ensure_future(self._answer(message, number))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)
            return
        try:
            result = self._handler(message)
            assert not inspect.isawaitable(result), "a notification is handled at once"
        except Exception:
            logger.exception("%s could not be handled", type(message).__name__)

    async def _answer(self, message: Message, number: int) -> None:
        try:
            result = self._handler(message)
            if inspect.isawaitable(result):
                result = await result
            self._send(Reply(result), number)
        except ChannelClosedError:
            pass
        except Exception as error:
            logger.exception("%s could not be answered", type(message).__name__)
            self._send(Failure(f"{type(error).__name__}: {error}"), number)

    def _send(self, message: Message, number: int | None) -> None:
        transport = self._transport
        if transport is None and number is not None:
            raise ChannelClosedError("the peer has ended")
        if transport is None or transport.is_closing():  # `connection_lost` fails the pending calls
            return
        if transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            logger.warning("%s was not sent: the other process does not read", type(message).__name__)
            return
        content = encode(message, number)
        transport.write(len(content).to_bytes(_LENGTH_BYTES) + content)
