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
from hpc_router.relay.headers import downstream_headers, upstream_headers
from hpc_router.relay.upstream import Limits, UpstreamClient, UpstreamResponse

logger = logging.getLogger(__name__)

_A_DAY_S: Final = 86_400.0
ENGINE_LIMITS: Final = Limits(connect_s=5.0, first_byte_s=_A_DAY_S, idle_s=_A_DAY_S)
"""How long an answer may take is the router's to say; when it gives up, it leaves, and so do we."""
_ENGINE: Final = URL("http://engine")


async def pass_through(
    request: web.BaseRequest, client: UpstreamClient, *, heard: Callable[[], None]
) -> web.StreamResponse:
    """Calls `heard` for every piece of the answer.

    Raises UpstreamError when the engine gives no answer, HTTPRequestEntityTooLarge for the body's size.
    """
    body = await request.read() if request.body_exists else None
    headers = upstream_headers(request.headers, add={})
    response: web.StreamResponse | None = None
    try:
        async with client.request(request.method, engine_url(request.path_qs), headers=headers, body=body) as answer:
            response = _begin(answer)
            await _copy(request, answer, response, heard=heard)
    except UpstreamError as error:
        if response is None or not response.prepared:
            raise
        logger.warning("the engine failed in the midst of an answer: %s", error)
        if request.transport is not None:
            request.transport.abort()
    assert response is not None
    return response


def engine_url(path: str) -> URL:
    return _ENGINE.join(URL(path, encoded=True))


def _begin(answer: UpstreamResponse) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status, headers=downstream_headers(answer.headers, add={}))
    if (length := answer.headers.get(hdrs.CONTENT_LENGTH)) is not None:
        response.content_length = int(length)
    return response


async def _copy(
    request: web.BaseRequest, answer: UpstreamResponse, response: web.StreamResponse, *, heard: Callable[[], None]
) -> None:
    try:
        await response.prepare(request)
    except ConnectionError:
        return  # the caller has gone; its handler is about to be cancelled
    async for chunk in answer.chunks():
        heard()
        try:
            await response.write(chunk)
        except ConnectionError:
            return
