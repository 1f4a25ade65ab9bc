"""Finds out how many tokens a response has. Its `usage` states the number; without it, the events of a stream that
contain generated text are counted.

The `usage` of a stream is near its end, so the data of the last two writes is kept and searched for it. `usage` must be
a key of the response itself: text or arguments that a model has generated may contain the same word.
"""

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final, NamedTuple

import orjson

from hpc_router.relay.sse import payloads


class TokenUsage(NamedTuple):
    """The numbers of tokens of a response, as it states them or as they are known otherwise: tokens of the prompt,
    generated tokens, and tokens of the prompt that were in the engine's prefix cache. None: unknown."""

    prompt: int | None
    generated: int | None
    cached: int | None = None


@dataclass(slots=True, eq=False)
class StreamSummary:
    """The data about one response from which its tokens are counted. `accepted`: whether its status is 2xx; `streamed`:
    whether it consists of events; `usage`: the numbers that it states; for a stream only after a call of `stated`.
    `chunks`: number of events with generated text; `delta_mark`: see `ApiFormat`.

    If `exact`, the content of each event decides whether it is counted. Otherwise an HTTP chunk that is forwarded
    without a look at its content counts as one event, which is cheaper: `Connection.data_received` counts these chunks
    in `unread`, and keeps the last two in `last` and `before_last`.
    """

    delta_mark: bytes
    exact: bool
    accepted: bool = False
    streamed: bool = False
    chunks: int = 0
    unread: int = 0  # HTTP chunks since the last `add`
    last: bytes = b""
    before_last: bytes = b""
    usage: TokenUsage | None = None

    def add(self, events: bytes) -> None:
        """Counts events that are written to the client; their bytes may have the framing of HTTP chunks."""
        if self.unread:
            self.generated()
        self.chunks += events.count(self.delta_mark)
        self.before_last, self.last = self.last, events

    def counting(self, write: Callable[[bytes], bool]) -> Callable[[bytes], bool]:
        """Returns a function that counts events and then passes them to `write`."""
        mark = self.delta_mark

        def write_counted(events: bytes) -> bool:  # as `add`, without its call
            self.chunks += events.count(mark)
            self.before_last, self.last = self.last, events
            return write(events)

        return write_counted

    def stated(self) -> TokenUsage | None:
        """Returns the numbers of tokens that the response states, which must be complete; None if it states none."""
        if self.usage is None and (self.last.rfind(_USAGE) >= 0 or self.before_last.rfind(_USAGE) >= 0):
            stated = [stated_usage(data) for data in payloads(self.before_last + self.last) if _USAGE in data]
            self.usage = next((usage for usage in reversed(stated) if usage is not None), None)
        return self.usage

    def generated(self) -> int:
        """Returns the number of events with generated text, which is taken as the number of generated tokens."""
        unread, mark = self.unread, self.delta_mark
        if unread:  # the end of a stream has no text
            count = unread - (mark not in self.last)
            if unread > 1:
                count -= mark not in self.before_last
            self.chunks += count
            self.unread = 0
        return self.chunks


_USAGE: Final = b'"usage"'
_KEY: Final = b'"usage":'
_loads: Final = orjson.loads
_tokens_of: Final = itemgetter("prompt_tokens", "completion_tokens")
new_usage: Final = tuple.__new__  # written in C, while a named tuple's own constructor is Python code


def stated_usage(data: bytes | bytearray) -> TokenUsage | None:
    """Returns the numbers of tokens in the `usage` of `data`, the JSON of a complete response or of an event; None if
    it has no `usage`."""
    at = data.rfind(_KEY)
    if at > 0:
        # If the rest is a complete object, `usage` is a key of the response itself, and its start need not be decoded.
        # Inside a string, the quotes would be escaped.
        try:
            usage = _loads(b"{" + data[at:])["usage"]
            prompt, generated = _tokens_of(usage)
            if type(prompt) is type(generated) is int and prompt >= 0 <= generated:  # the usual case
                details = usage.get("prompt_tokens_details")
                cached = None if details is None else _count(details.get("cached_tokens"))
                return new_usage(TokenUsage, (prompt, generated, cached))
        except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError):
            pass
    elif data.find(_USAGE) < 0:
        return None
    try:
        value = _loads(data)
    except orjson.JSONDecodeError:
        return None
    if type(value) is not dict:
        return None
    usage = value.get("usage")
    if usage is None and type(response := value.get("response")) is dict:
        usage = response.get("usage")
    return _usage_of(usage) if type(usage) is dict else None


def _usage_of(usage: dict[str, Any]) -> TokenUsage:
    """Returns the numbers of tokens in `usage`, the value of that key in a response of any API."""
    prompt, details = usage.get("prompt_tokens"), usage.get("prompt_tokens_details")
    if prompt is None:
        prompt, details = usage.get("input_tokens"), usage.get("input_tokens_details")
    generated = usage.get("completion_tokens")
    if generated is None:
        generated = usage.get("output_tokens", 0 if "prompt_tokens" in usage else None)
    cached = details.get("cached_tokens") if type(details) is dict else usage.get("cache_read_input_tokens")
    return TokenUsage(_count(prompt), _count(generated), _count(cached))


def _count(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None
