"""Finds how many tokens a response has: its `usage` states the number; without it, the events of a stream that have
generated text are counted.

Only requests whose tokens are limited have a summary. Each event is searched for a few bytes (`ApiFormat.delta_mark`),
and the last two writes are kept; their JSON is decoded once, at the end. Because it is decoded, generated text that
looks like a `usage` is not mistaken for one.
"""

from collections.abc import Callable

import orjson

from hpc_router.relay.sse import payloads


class StreamSummary:
    """The data about one response from which its tokens are counted. `accepted`: whether its status is 2xx; `streamed`:
    whether it consists of events; `chunks`: number of events with generated text; `body`: the complete response if it
    is not a stream. `delta_mark`: see `ApiFormat`."""

    __slots__ = ("_delta_mark", "_last", "_second_last", "accepted", "body", "chunks", "streamed")

    def __init__(self, delta_mark: bytes) -> None:
        self._delta_mark = delta_mark
        self.accepted = self.streamed = False
        self.chunks = 0
        self.body: bytes | bytearray | None = None
        self._last = self._second_last = b""

    def add(self, events: bytes) -> None:
        """Counts events as they are written to the client, with or without the framing of HTTP chunks."""
        self.chunks += events.count(self._delta_mark)
        self._second_last, self._last = self._last, events

    def counting(self, write: Callable[[bytes], bool]) -> Callable[[bytes], bool]:
        """Returns a function that counts events and passes them to `write`."""
        mark = self._delta_mark

        def write_counted(events: bytes) -> bool:  # as `add`, without its call
            self.chunks += events.count(mark)
            self._second_last, self._last = self._last, events
            return write(events)

        return write_counted

    def stated_tokens(self) -> int | None:
        """Returns the number of generated tokens that the response states; None if it states none."""
        if self.body is not None:
            return stated_tokens(self.body)
        stated = [stated_tokens(data) for data in payloads(self._second_last + self._last) if b'"usage"' in data]
        return next((count for count in reversed(stated) if count is not None), None)


def stated_tokens(data: bytes | bytearray) -> int | None:
    """Returns the number of generated tokens in the `usage` of `data`, the JSON of a complete response or of an event;
    None if it has none."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    if type(value) is not dict:
        return None
    usage = value.get("usage")
    if usage is None and type(response := value.get("response")) is dict:
        usage = response.get("usage")
    if type(usage) is not dict:
        return None
    count = usage.get("completion_tokens")
    if count is None:
        count = usage.get("output_tokens", 0 if "prompt_tokens" in usage else None)
    return count if type(count) is int and count >= 0 else None
