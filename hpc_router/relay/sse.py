"""Server-sent events, cut only where they end.

A stream that breaks in mid-event must not reach the client as half an event, so bytes are passed on up to the last
blank line and the tail is kept. Rules of the format: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import json
import re
from collections.abc import Iterator
from typing import Any, Final

CONTENT_TYPE: Final = b"text/event-stream"
DONE: Final = b"[DONE]"
MAX_EVENT_BYTES: Final = 16 * 2**20
PING: Final = b": ping\n\n"
"""A comment, which readers of events skip: proxies and clients see that the connection lives."""
EVENT_ENDS: Final = (b"\n\n", b"\n\r\n", b"\r\r", b"\n\r", b"\r\r\n")
"""A blank line after any of the standard's line ends (LF, CRLF, CR). Where CR comes first, the LF of the same line end
may follow; on its own it is one more blank line, which readers of events skip."""
_LINE_END: Final = re.compile(rb"\r\n|\r|\n")


class EventTooLargeError(ValueError):
    """An event without an end within MAX_EVENT_BYTES."""


class UnfinishedEventError(ValueError):
    """The stream ended inside an event."""


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
        new = max(0, len(self.tail) - 2)  # the tail holds no end, but may hold the beginning of one
        end = max(at + len(mark) if (at := data.rfind(mark, new)) >= 0 else 0 for mark in EVENT_ENDS)
        self.tail = data[end:]
        if len(self.tail) > MAX_EVENT_BYTES:
            raise EventTooLargeError(f"an event of more than {MAX_EVENT_BYTES} bytes")
        return data[:end]

    def end(self) -> bytes:
        """What remains at the clean end of a stream, closed by the blank line that it lacks; readers drop an event
        without one. A last event is whole if its data is `[DONE]` or JSON that parses; comments need no data.

        Raises UnfinishedEventError.
        """
        tail, self.tail = self.tail, b""
        lines = _LINE_END.split(tail)
        if any(line and not line.startswith(b":") for line in lines):
            data = next(payloads(tail + b"\n\n"), b"")
            if data != DONE and not _is_json(data):
                raise UnfinishedEventError("the stream ended inside an event")
        elif not any(lines):
            return tail
        last = _LINE_END.findall(tail[-2:]) if not lines[-1] else []
        return tail + (last[-1] if last else b"\n\n")


def payloads(events: bytes) -> Iterator[bytes]:
    """The data of each whole event that has any."""
    data: list[bytes] = []
    for line in _LINE_END.split(events):
        if line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
        elif not line and data:
            yield b"\n".join(data)
            data.clear()


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def error_event(error: dict[str, Any]) -> bytes:
    """The event that ends a failed stream; the openai client raises on its `error` key."""
    return b"data: " + json.dumps({"error": error}).encode() + b"\n\n"
