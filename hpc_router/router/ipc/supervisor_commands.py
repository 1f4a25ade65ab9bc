"""Commands from the supervisor to its children, sent over a SOCK_SEQPACKET pair in the encoding of `messages`.

An `AttachCommand` carries the socket of a channel to another process. Sending never blocks the supervisor.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from hpc_router.router.ipc import messages

logger = logging.getLogger(__name__)

MAX_COMMAND_BYTES: Final = 2**16


def send_command(sock: socket.socket, command: messages.Message, channel: socket.socket | None = None) -> None:
    """Sends a command, and the socket `channel` with it. Never blocks. Raises OSError if the child has ended or its
    buffer is full."""
    descriptors = [] if channel is None else [channel.fileno()]
    flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
    socket.send_fds(sock, [messages.encode(command)], descriptors, flags)


def receive_command(sock: socket.socket) -> tuple[messages.Message, socket.socket | None] | None:
    """Returns the next command and the socket that came with it; None if the supervisor has ended. Raises
    BlockingIOError if there is no command."""
    data, descriptors, _, _ = socket.recv_fds(sock, MAX_COMMAND_BYTES, 1)
    if not data:
        return None
    return messages.decode(data)[0], socket.socket(fileno=descriptors[0]) if descriptors else None


@dataclass(slots=True)
class CommandReader:
    """A child's end of the command socket, used with `async with`. A DrainCommand sets `drain`, an EndCommand sets
    `end`, and any other command is passed to its callback. When the supervisor ends, `drain` and `end` are set."""

    sock: socket.socket
    on_attach: Callable[[int | None, socket.socket], Awaitable[None]]
    on_processes: Callable[[messages.ProcessesChanged], None] | None = None
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
            received = receive_command(self.sock)
        except BlockingIOError:
            return
        if received is None:  # the kernel ends this process as well
            asyncio.get_running_loop().remove_reader(self.sock)
            self.drain.set()
            self.end.set()
            return
        command, channel = received
        match command:
            case messages.AttachCommand(worker) if channel is not None:
                task = asyncio.ensure_future(self.on_attach(worker, channel))
                self._attaching.add(task)
                task.add_done_callback(self._attaching.discard)
            case messages.DrainCommand():
                self.drain.set()
            case messages.EndCommand():
                self.end.set()
            case messages.ProcessesChanged() if self.on_processes is not None:
                self.on_processes(command)
            case messages.ReloadCommand() if self.on_reload is not None:
                self.on_reload()
            case _:
                logger.warning("unexpected command ignored: %s", type(command).__name__)
