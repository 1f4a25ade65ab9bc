"""Applies a fault to a connection or to the whole engine.

`inject` returns only for a hang, at its end; for every other fault it raises. `ConnectionBroken` means that the fault
closed the connection, so nothing more can be sent. It is raised in the same step of the event loop in which the
transport is closed. The request therefore counts as failed by the fault, not as aborted by its client.
"""

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Final, NoReturn, cast

from aiohttp import web

from hpc_router.sim.api_error import ApiError
from hpc_router.sim.faults import Fault, FaultKind
from hpc_router.sim.latency import Clock

GARBAGE: Final = b"\x00\xff\xfe simulated garbage, not HTTP \r\n\r\n\x00" * 4

Crash = Callable[[int | None], None]


class ConnectionBroken(Exception):
    """A fault closed the connection."""


class StreamFault(Exception):
    """Raised by `inject` for a fault that happens within a stream. The handler that writes the stream catches it and
    carries the fault out."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.kind)
        self.fault = fault


async def inject(fault: Fault, request: web.BaseRequest, *, crash: Crash, clock: Clock) -> None:
    """Applies the fault to a request. `crash`: function that ends the engine with an exit status."""
    # Yields once, because uvloop sends earlier output at the end of the loop's iteration.
    await clock.sleep(0.0)
    match fault.kind:
        case FaultKind.STATUS:
            retry_after = {} if fault.retry_after_s is None else {"Retry-After": f"{fault.retry_after_s:g}"}
            raise ApiError(fault.message, status=fault.status, headers=retry_after)
        case FaultKind.HANG:
            if fault.for_s is None:
                await asyncio.get_running_loop().create_future()
            else:
                await clock.sleep(fault.for_s)
        case FaultKind.DIE:
            crash(fault.exit_code)
            raise ConnectionBroken
        case FaultKind.RESET:
            if request.transport is not None:
                reset_connection(request.transport)
            raise ConnectionBroken
        case FaultKind.GARBAGE:
            break_connection(request, last_bytes=GARBAGE)
        case FaultKind.ERROR_EVENT | FaultKind.CUT:
            raise StreamFault(fault)
        case _:
            raise AssertionError(f"{fault.kind} cannot be injected at a token")


def break_connection(request: web.BaseRequest, *, last_bytes: bytes = b"") -> NoReturn:
    """Sends the pending output and `last_bytes`, then closes the connection without a regular end of the response."""
    if request.transport is not None:
        request.transport.write(last_bytes)
        request.transport.close()
    raise ConnectionBroken


def reset_connection(transport: asyncio.BaseTransport) -> None:
    """Resets the connection: with a RST over TCP; a unix socket can only be closed."""
    raw = transport.get_extra_info("socket")
    if raw is not None and raw.family != socket.AF_UNIX:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    cast(asyncio.Transport, transport).abort()


class ResetOnAccept(asyncio.Protocol):
    """A protocol that resets each connection as soon as it is accepted."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        reset_connection(transport)
