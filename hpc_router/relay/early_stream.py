"""Starts a stream before its first event: the client gets the head of the response, then SSE comments.

The comments say what the request waits for, and keep the connection alive at proxies with an idle limit. As long as no
event was sent, the request can still be retried on another replica; but its status is 200, so a failure must end the
stream with an error event.
"""

import asyncio
import json
from contextlib import suppress
from typing import Final

from hpc_router.relay.api_formats import ApiFormat, ErrorReply
from hpc_router.relay.downstream.interface import DownstreamGoneError, Request, Response
from hpc_router.relay.sse import CONTENT_TYPE, PING

HEAD: Final = b"content-type: %b; charset=utf-8\r\ncache-control: no-cache\r\n" % CONTENT_TYPE
_NO_STREAM: Final = "the engine answered a request for a stream with a response that is not a stream"


class EarlyStream:
    """The start of one stream. `started`: whether its head was sent before the replica's. `head`: header lines of the
    response besides `HEAD`. `ping_s`: interval in seconds between comments."""

    __slots__ = ("_head", "_ping_s", "_request", "_said", "_timer", "started")

    def __init__(self, request: Request, head: bytes, *, ping_s: float) -> None:
        self._request, self._head, self._ping_s = request, HEAD + head, ping_s
        self._said = ""
        self._timer: asyncio.TimerHandle | None = None
        self.started = False

    def start_after(self, delay_s: float) -> None:
        """Starts the stream after `delay_s` seconds, unless `stop` is called before."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._ping)

    def say(self, text: str) -> None:
        """Sends `text` as a comment, unless it was the last comment. Starts the stream if necessary."""
        if text != self._said:
            self._said = text
            self._send(b": %b\n\n" % text.encode())

    def stop(self) -> None:
        """Sends no further comment. If the stream has not started, it is not started any more."""
        if self._timer is not None:
            self._timer.cancel()

    def end_with(self, response: Response, api_format: ApiFormat) -> None:
        """Sends the event that ends the started stream with the error in `response`, a complete response in the format
        `api_format`. A response that is no error becomes one. Raises DownstreamGoneError."""
        self._request.write(api_format.error_event(_error_in(response)))

    def _ping(self) -> None:
        self._send(PING)

    def _send(self, comment: bytes) -> None:
        self.stop()
        self._timer = asyncio.get_running_loop().call_later(self._ping_s, self._ping)
        with suppress(DownstreamGoneError):  # the end of the connection cancels the request
            if not self.started:
                self.started = True
                self._request.start_response(200, self._head, length=None)
            self._request.write(comment)


def _error_in(response: Response) -> ErrorReply:
    """Returns the error in the body of a response. A body in another format is quoted."""
    if response.status < 400:
        return ErrorReply(502, "upstream_error", "no_stream", _NO_STREAM)
    try:
        value = json.loads(response.body)
    except (ValueError, RecursionError):
        value = response.body[:200].decode(errors="replace")
    error = value.get("error", value) if isinstance(value, dict) else value
    if not isinstance(error, dict):
        return ErrorReply(response.status, "upstream_error", "upstream_error", str(error))
    kind, code, message = (str(error.get(key) or "") for key in ("type", "code", "message"))
    param = error.get("param")
    return ErrorReply(response.status, kind, code, message, param if isinstance(param, str) else None)
