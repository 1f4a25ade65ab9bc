"""Relays a response as it arrives: its bytes are neither buffered nor searched.

The agent relays its engine's responses in this way, and `connect` those of the router. An incomplete response must
never look complete, so the caller must abort the client's connection if the upstream fails within the response.
"""

from collections.abc import Callable

from hpc_router.relay.downstream.interface import SHORT_BYTES, DownstreamGoneError, Request, Response
from hpc_router.relay.headers import NOT_DOWNSTREAM, crossing
from hpc_router.relay.upstream.interface import CHUNK_ENDS, ChunkWriter, UpstreamResponse


async def relay_unchanged(
    request: Request, upstream: UpstreamResponse, *, on_progress: Callable[[], None]
) -> Response | None:
    """Relays the upstream's response to the client. Returns it if it is short and complete already; None if it was
    streamed. `on_progress` is called for every chunk. Raises UpstreamError if the response breaks off."""
    head = crossing(upstream.headers, drop=NOT_DOWNSTREAM)
    if (whole := upstream.complete_body) is not None and len(whole) <= SHORT_BYTES:
        on_progress()
        return Response(upstream.status, head, whole)
    try:
        request.start_response(upstream.status, head, length=upstream.length)
        await upstream.stream_to(_ClientSink(request, on_progress))
    except DownstreamGoneError:
        pass  # the handler is about to be cancelled
    return None


class _ClientSink:
    """A sink that writes the chunks of the response to the client."""

    def __init__(self, request: Request, on_progress: Callable[[], None]) -> None:
        self._request = request
        self._on_progress = on_progress
        self._write_chunk = request.write_chunk
        self._chunk_writer = None if self._write_chunk is None else ChunkWriter(self._pass, CHUNK_ENDS)

    def write(self, data: bytes) -> bool:
        self._on_progress()
        return self._request.write(data)

    def chunk_writer(self) -> ChunkWriter | None:
        return self._chunk_writer

    def _pass(self, chunk: bytes) -> bool:
        assert self._write_chunk is not None
        self._on_progress()
        return self._write_chunk(chunk)

    async def drain(self) -> None:
        await self._request.drain()
