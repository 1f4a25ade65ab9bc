"""Finds out how many tokens a response has. Its `usage` states the number; without it, the events of a stream that
contain generated text are counted.

The `usage` of a stream is near its end, so the data of the last two writes is kept and searched for it. `usage` must be
a key of the response itself: text or arguments that a model has generated may contain the same word.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import orjson

from hpc_router.relay.sse import payloads


class TokenUsage(NamedTuple):
    """The numbers of tokens of a response, as it states them or as they are known otherwise: tokens of the prompt,
    generated tokens, and tokens of the prompt that were in the engine's prefix cache. None: unknown."""

    prompt: int | None
    generated: int | None
    cached: int | None = None


@dataclass(eq=False)
class StreamSummary:
    """The data about one response from which its tokens are counted. `accepted`: whether its status is 2xx; `streamed`:
    whether it consists of events; `usage`: the numbers that it states; for a stream only after a call of `stated`.
    `chunks`: number of events with generated text; `delta_mark`: see `ApiFormat`.

    If `exact`, the content of each event decides whether it is counted. Otherwise an HTTP chunk that is forwarded
    without a look at its content counts as one event, which is cheaper: `Connection.data_received` counts these chunks
    in `unread`, and keeps the last one in `last`. Most fields are class attributes until they are set, which saves time
    per request.
    """

    delta_mark: bytes
    exact: bool
    accepted: bool = field(default=False, init=False)
    streamed: bool = field(default=False, init=False)
    chunks: int = field(default=0, init=False)
    unread: int = field(default=0, init=False)  # HTTP chunks since the last `add`
    last: bytes = field(default=b"", init=False)  # the last data
    before_last: bytes = field(default=b"", init=False)  # the data of the `add` before, if `last` is that of an `add`
    usage: TokenUsage | None = field(default=None, init=False)

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
        if self.usage is None:
            self.usage = _last_usage(self.last) or _last_usage(self.before_last)
        return self.usage

    def shorten(self) -> None:
        """Reads the end of a complete stream, so that its bytes need not be kept."""
        self.stated()
        self.generated()
        self.last = self.before_last = b""

    def generated(self) -> int:
        """Returns the number of events with generated text, which is taken as the number of generated tokens."""
        if self.unread:  # the last event of a stream besides `[DONE]` has no text
            self.chunks += self.unread - (self.delta_mark not in self.last)
            self.unread = 0
        return self.chunks


_USAGE: Final = b'"usage"'
_KEY: Final = b'"usage":'
_loads: Final = orjson.loads
_new_tuple: Final = tuple.__new__  # written in C, while a named tuple's own constructor is Python code
_Counts = tuple[int, int, int | None]


def _last_usage(events: bytes) -> TokenUsage | None:
    """Returns the numbers of tokens that the last of the complete events with a `usage` states; None if no event has
    one."""
    at = events.rfind(_KEY)
    if at >= 0:
        usage = _usage_from(events[at : events.find(b"\n", at)])  # the usual case: the event's data is one line
        if usage is not None:
            return usage
    elif events.rfind(_USAGE) < 0:
        return None
    stated = [stated_usage(data) for data in payloads(events) if _USAGE in data]
    return next((usage for usage in reversed(stated) if usage is not None), None)


def stated_usage(data: bytes | bytearray) -> TokenUsage | None:
    """Returns the numbers of tokens in the `usage` of `data`, the JSON of a complete response or of an event; None if
    it has no `usage`."""
    at = data.rfind(_KEY)
    if at > 0:
        usage = _usage_from(data[at:])
        if usage is not None:
            return usage
    elif data.find(_USAGE) < 0:
        return None
    try:
        value = _loads(data)
    except orjson.JSONDecodeError:
        return None
    if type(value) is not dict:
        return None
    stated = value.get("usage")
    if stated is None and type(response := value.get("response")) is dict:
        stated = response.get("usage")
    return _usage_of(stated) if type(stated) is dict else None


def stated_usages(bodies: Sequence[bytes]) -> list[TokenUsage | _Counts | None]:
    """Returns the result of `stated_usage` for each of the complete responses, most as a plain tuple. The ends of all
    of them are decoded in one call, which takes half of the time."""
    ends = [body[body.rfind(_KEY) :] for body in bodies]  # the last byte of a body without the key
    try:
        values = _loads(b"[{%b]" % b",{".join(ends))
    except orjson.JSONDecodeError:
        values = []
    if len(values) != len(bodies):  # one of them is not in the usual form
        return [stated_usage(body) for body in bodies]
    return [_usual_form(value.get("usage")) or stated_usage(body) for value, body in zip(values, bodies, strict=True)]


def _usage_from(end: bytes | bytearray) -> TokenUsage | None:
    """Returns the numbers of tokens in `end`, the JSON of an object from its key `usage` on; None if they are not in
    the usual form, or if `end` is anything else.

    If `end` after an opening brace is a complete object, `usage` is a key of the response itself, and what comes before
    it need not be decoded. Inside a string, the quotes would be escaped.
    """
    try:
        counts = _usual_form(_loads(b"{" + end).get("usage"))
    except orjson.JSONDecodeError:
        return None
    return None if counts is None else _new_tuple(TokenUsage, counts)


def _usual_form(usage: Any) -> _Counts | None:
    """Returns the numbers of tokens in `usage`, the value of that key in a response, in the order of `TokenUsage`, if
    it has those of OpenAI's chat completions; else None."""
    try:
        prompt, generated = usage["prompt_tokens"], usage["completion_tokens"]
        if type(prompt) is type(generated) is int and prompt >= 0 <= generated:
            details = usage.get("prompt_tokens_details")
            return prompt, generated, None if details is None else _count(details.get("cached_tokens"))
    except (LookupError, TypeError, AttributeError):
        pass
    return None


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
