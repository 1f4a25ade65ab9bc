"""One request to the engine, its answer to the caller, bytes unchanged.

A failure before the answer is raised, for the gate to put in words. One in its midst breaks the caller's connection:
an answer that was cut must never look complete. The router in front turns that into an error event.
"""

import logging
from collections.abc import Callable
from typing import Final

from hpc_router.errors import UpstreamError
from hpc_router.relay.downstream import SHORT_BYTES, DownstreamGoneError, Request, Response
from hpc_router.relay.exchange import Limits, Upstream, address_of
from hpc_router.relay.headers import NOT_DOWNSTREAM, NOT_UPSTREAM, crossing

logger = logging.getLogger(__name__)

_A_DAY_S: Final = 86_400.0
ENGINE_LIMITS: Final = Limits(connect_s=5.0, first_byte_s=_A_DAY_S, idle_s=_A_DAY_S)
"""How long an answer may take is the router's to say; when it gives up, it leaves, and so do we."""
ENGINE: Final = address_of("http://engine")


async def pass_through(request: Request, client: Upstream, *, heard: Callable[[], None]) -> Response | None:
    """Answers `request`; None: what came went to the caller as it came. Calls `heard` for every piece of the answer.

    Raises UpstreamError when the engine gives no answer, and what `Request.read` raises.
    """
    body = request.ready()
    if body is None:
        body = await request.read()
    head = crossing(request.headers, drop=NOT_UPSTREAM)
    try:
        async with client.request(request.method, ENGINE, request.target, head=head, body=body or None) as answer:
            head = crossing(answer.headers, drop=NOT_DOWNSTREAM)
            if (whole := answer.whole) is not None and len(whole) <= SHORT_BYTES:
                heard()
                return Response(answer.status, head, whole)
            await request.begin(answer.status, head, length=answer.length)
            await answer.flow(_Copy(request, heard))
    except DownstreamGoneError:
        pass  # its handler is about to be cancelled
    except UpstreamError as error:
        if not request.begun:
            raise
        logger.warning("the engine failed in the midst of an answer: %s", error)
        request.abort()
    return None


class _Copy:
    """A sink that writes what it is given."""

    def __init__(self, request: Request, heard: Callable[[], None]) -> None:
        self._request = request
        self._heard = heard
        self._write_chunk = request.write_chunk

    def take(self, data: bytes) -> bool:
        self._heard()
        return self._request.write(data)

    def take_chunk(self, chunk: bytes) -> bool | None:
        self._heard()
        return None if self._write_chunk is None else self._write_chunk(chunk)

    async def make_room(self) -> None:
        await self._request.drain()
