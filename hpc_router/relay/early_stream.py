"""Starts the response to a streaming request before its first event: the client gets the head, then SSE comments.

The comments say what the request waits for, and keep the connection alive at proxies with an idle limit. As long as no
event was sent, the request can be retried on another replica. But the client has the status 200 already, so a failure
can only be reported by an error event at the end of the stream.
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
    """Sends the beginning of one stream to the client of `request`. `head`: header lines besides those in `HEAD`.
    `ping_s`: interval in seconds between comments. `started`: whether it has sent the head."""

    __slots__ = ("_head", "_ping_s", "_request", "_said", "_timer", "started")

    def __init__(self, request: Request, head: bytes, *, ping_s: float) -> None:
        self._request, self._head, self._ping_s = request, HEAD + head, ping_s
        self._said = ""
        self._timer: asyncio.TimerHandle | None = None
        self.started = False

    def start_after(self, delay_s: float) -> None:
        """Sends the head and a first comment after `delay_s` seconds, unless `stop` is called before."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._ping)

    def say(self, text: str) -> None:
        """Sends `text` as a comment, unless it is the same as last time. Sends the head first if necessary."""
        if text != self._said:
            self._said = text
            self._send(b": %b\n\n" % text.encode())

    def stop(self) -> None:
        """Sends no further comments. If the head has not been sent yet, it will not be."""
        if self._timer is not None:
            self._timer.cancel()

    def end_with(self, response: Response, api_format: ApiFormat) -> None:
        """Ends the started stream with an error event: the error in `response`, a complete response in the format
        `api_format`. If that is a success, the error is that it is no stream. Raises DownstreamGoneError."""
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
    """Returns the error that a response's body contains; if it is in no known format, an error that quotes the body."""
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
