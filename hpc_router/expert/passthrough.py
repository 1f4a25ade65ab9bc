"""One request to the engine, its answer to the caller, bytes unchanged.

A failure before the answer is raised, for the gate to put in words. One in its midst breaks the caller's connection:
an answer that was cut must never look complete. The router in front turns that into an error event.
"""

import logging
from collections.abc import Callable
from typing import Final

from aiohttp import hdrs, web
from yarl import URL

from hpc_router.errors import UpstreamError
from hpc_router.relay.delivery import Delivery, DownstreamGoneError
from hpc_router.relay.exchange import Limits, Upstream, UpstreamResponse
from hpc_router.relay.headers import downstream_headers, upstream_headers

logger = logging.getLogger(__name__)

_A_DAY_S: Final = 86_400.0
ENGINE_LIMITS: Final = Limits(connect_s=5.0, first_byte_s=_A_DAY_S, idle_s=_A_DAY_S)
"""How long an answer may take is the router's to say; when it gives up, it leaves, and so do we."""
_ENGINE: Final = URL("http://engine")


async def pass_through(request: web.BaseRequest, client: Upstream, *, heard: Callable[[], None]) -> web.StreamResponse:
    """Calls `heard` for every piece of the answer.

    Raises UpstreamError when the engine gives no answer, HTTPRequestEntityTooLarge for the body's size.
    """
    body = await request.read() if request.body_exists else None
    headers = upstream_headers(request.headers, add={})
    response: web.StreamResponse | None = None
    delivery = Delivery(request)
    try:
        async with client.request(request.method, engine_url(request.path_qs), headers=headers, body=body) as answer:
            response = _response(answer)
            await delivery.begin(response)
            await answer.flow(_Copy(delivery, heard))
    except DownstreamGoneError:
        pass  # its handler is about to be cancelled
    except UpstreamError as error:
        if not delivery.begun:
            raise
        logger.warning("the engine failed in the midst of an answer: %s", error)
        delivery.abort()
    assert response is not None
    return response


def engine_url(path: str) -> URL:
    return _ENGINE.join(URL(path, encoded=True))


def _response(answer: UpstreamResponse) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status, headers=downstream_headers(answer.headers, add={}))
    if (length := answer.headers.get(hdrs.CONTENT_LENGTH)) is not None:
        response.content_length = int(length)
    return response


class _Copy:
    """A sink that writes what it is given."""

    def __init__(self, delivery: Delivery, heard: Callable[[], None]) -> None:
        self._delivery = delivery
        self._heard = heard

    def take(self, data: bytes) -> bool:
        self._heard()
        return self._delivery.write(data)

    async def make_room(self) -> None:
        await self._delivery.drain()
