"""What the supervisor tells a child: JSON objects, a way to another process with some of them.

`drain`: take nothing new, finish what there is. `end`: all others are gone. `reload`: look again at what may have
changed. `attach`: a way to another process. `note`: what has become of the others.
"""

import asyncio
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

logger = logging.getLogger(__name__)

MAX_COMMAND_BYTES: Final = 2**16


def send_command(sock: socket.socket, order: Mapping[str, Any], way: socket.socket | None = None) -> None:
    """Never blocks. Raises OSError where the child is gone or takes nothing."""
    descriptors = [] if way is None else [way.fileno()]
    flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
    socket.send_fds(sock, [json.dumps(order).encode()], descriptors, flags)


def receive_command(sock: socket.socket) -> tuple[dict[str, Any], socket.socket | None] | None:
    """None: the supervisor is gone. Raises BlockingIOError when nothing has come."""
    data, descriptors, _, _ = socket.recv_fds(sock, MAX_COMMAND_BYTES, 1)
    if not data:
        return None
    return json.loads(data), socket.socket(fileno=descriptors[0]) if descriptors else None


Attach = Callable[[int | None, socket.socket], Awaitable[None]]


@dataclass(slots=True)
class CommandReader:
    """A child's side, as `async with`. What it may be told again and again is called, the rest are events."""

    sock: socket.socket
    attach: Attach
    on_note: Callable[[Mapping[str, Any]], None] | None = None
    on_reload: Callable[[], None] | None = None
    drain: asyncio.Event = field(default_factory=asyncio.Event)
    end: asyncio.Event = field(default_factory=asyncio.Event)
    _attaching: set[asyncio.Future[None]] = field(default_factory=set)

    async def __aenter__(self) -> Self:
        self.sock.setblocking(False)
        asyncio.get_running_loop().add_reader(self.sock, self._read)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        asyncio.get_running_loop().remove_reader(self.sock)

    def _read(self) -> None:
        try:
            taken = receive_command(self.sock)
        except BlockingIOError:
            return
        if taken is None:  # the kernel ends us, too
            asyncio.get_running_loop().remove_reader(self.sock)
            self.drain.set()
            self.end.set()
            return
        order, way = taken
        match order["do"]:
            case "attach" if way is not None:
                task = asyncio.ensure_future(self.attach(order["worker"], way))
                self._attaching.add(task)
                task.add_done_callback(self._attaching.discard)
            case "drain":
                self.drain.set()
            case "end":
                self.end.set()
            case "note" if self.on_note is not None:
                self.on_note(order)
            case "reload" if self.on_reload is not None:
                self.on_reload()
            case other:
                logger.warning("unknown command ignored: %s", other)
