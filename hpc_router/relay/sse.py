"""Splits streams of server-sent events at event boundaries.

A client must not receive a part of an event when a stream breaks, so bytes are forwarded up to the last blank line and
the rest is kept. Specification: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import json
import re
from collections.abc import Iterator
from typing import Any, Final

CONTENT_TYPE: Final = b"text/event-stream"
DONE: Final = b"[DONE]"
MAX_EVENT_BYTES: Final = 16 * 2**20
"""Maximum length of an event in bytes."""
PING: Final = b": ping\n\n"
"""A comment, which parsers ignore. It shows clients and proxies that the connection is alive."""
EVENT_ENDS: Final = (b"\n\n", b"\n\r\n", b"\r\r", b"\n\r", b"\r\r\n")
"""The bytes that end an event: a blank line after each line end of the standard (LF, CRLF, CR). The LF of a CRLF may
arrive after its CR; it then counts as one more blank line, which parsers ignore."""
_LINE_END: Final = re.compile(rb"\r\n|\r|\n")
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_WITHOUT_CONTENT: Final = (b":", b"retry:")
"""The first bytes of lines that no event needs: comments, and the pause before a reconnection."""


class EventTooLargeError(ValueError):
    """An event is longer than `MAX_EVENT_BYTES`."""


class UnfinishedEventError(ValueError):
    """The stream ended inside an event."""


class EventSplitter:
    """Turns the chunks of a stream into complete events. `tail`: the received part of an incomplete event."""

    tail = b""

    def feed(self, chunk: bytes) -> bytes:
        """Adds a chunk and returns all bytes up to the end of the last complete event; empty if no event is complete.
        Raises EventTooLargeError."""
        if chunk.endswith(EVENT_ENDS):  # the usual case
            data, self.tail = self.tail + chunk, b""
            return data
        data = self.tail + chunk if self.tail else chunk
        new = max(0, len(self.tail) - 2)  # the tail has no event end, but may have the beginning of one
        end = max(at + len(mark) if (at := data.rfind(mark, new)) >= 0 else 0 for mark in EVENT_ENDS)
        self.tail = data[end:]
        if len(self.tail) > MAX_EVENT_BYTES:
            raise EventTooLargeError(f"an event of more than {MAX_EVENT_BYTES} bytes")
        return data[:end]

    def end(self) -> bytes:
        """Returns the bytes that are left at the regular end of a stream. Adds the last event's blank line if it is
        missing, because parsers drop an event without one. Raises UnfinishedEventError if that event is incomplete: it
        has lines with content, but its data is neither `[DONE]` nor valid JSON."""
        tail, self.tail = self.tail, b""
        lines = _lines(tail)
        if any(line and not line.startswith(_WITHOUT_CONTENT) for line in lines):
            data = next(payloads(tail + b"\n\n"), b"")
            if data.strip() != DONE and not _is_json(data):
                raise UnfinishedEventError("the stream ended inside an event")
        elif not any(lines):
            return tail
        last = _LINE_END.findall(tail[-2:]) if not lines[-1] else []
        return tail + (last[-1] if last else b"\n\n")


def payloads(events: bytes) -> Iterator[bytes]:
    """Yields the data of each complete event that has data."""
    data: list[bytes] = []
    for line in _lines(events):
        if line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
        elif not line and data:
            yield b"\n".join(data)
            data.clear()


def _lines(events: bytes) -> list[bytes]:
    """Returns the lines of `events`, without the byte order mark that may start a stream."""
    return _LINE_END.split(events.removeprefix(_BYTE_ORDER_MARK))


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def error_event(error: dict[str, Any]) -> bytes:
    """Returns the event that ends a failed stream. The openai client raises an exception because of its `error` key."""
    return b"data: " + json.dumps({"error": error}).encode() + b"\n\n"
