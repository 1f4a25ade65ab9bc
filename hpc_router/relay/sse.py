"""Server-sent events, cut only where they end.

A stream that breaks in mid-event must not reach the client as half an event, so bytes are passed on up to the last
blank line and the tail is kept. Rules of the format: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import json
from typing import Any, Final

CONTENT_TYPE: Final = b"text/event-stream"
MAX_EVENT_BYTES: Final = 16 * 2**20
PING: Final = b": ping\n\n"
"""A comment, which readers of events skip: proxies and clients see that the connection lives."""
EVENT_ENDS: Final = (b"\n\n", b"\r\n\r\n", b"\r\r")


class EventTooLargeError(ValueError):
    """An event without an end within MAX_EVENT_BYTES."""


class EventSplitter:
    """Collects chunks and gives back whole events. `tail`: what has come of an event that has not ended."""

    __slots__ = ("tail",)

    def __init__(self) -> None:
        self.tail = b""

    def feed(self, chunk: bytes) -> bytes:
        """Every byte up to the end of the last whole event; empty when none ended yet."""
        if chunk.endswith(EVENT_ENDS):  # as nearly every chunk does
            data, self.tail = self.tail + chunk, b""
            return data
        data = self.tail + chunk if self.tail else chunk
        new = max(0, len(self.tail) - 3)  # the tail holds no end, but may hold the beginning of one
        end = max(at + len(mark) if (at := data.rfind(mark, new)) >= 0 else 0 for mark in EVENT_ENDS)
        self.tail = data[end:]
        if len(self.tail) > MAX_EVENT_BYTES:
            raise EventTooLargeError(f"an event of more than {MAX_EVENT_BYTES} bytes")
        return data[:end]


def error_event(error: dict[str, Any]) -> bytes:
    """The event that ends a failed stream; the openai client raises on its `error` key."""
    return b"data: " + json.dumps({"error": error}).encode() + b"\n\n"
