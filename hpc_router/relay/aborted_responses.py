"""Detects a response that the engine aborted but ended with valid framing.

vLLM ends its running responses in this way when it is stopped. Clients are not the cause: a client that cancels a
request closes its connection, so if the client is still connected, the engine itself aborted the response.

An aborted response is recognised by its JSON, depending on the API: a choice has the `finish_reason` `abort`; a
response has the `status` `cancelled`; a message has no `stop_reason`. Each part of a response is searched for a few
bytes of this JSON (the mark), and JSON is decoded only if they are found. The mark contains quotes, which are escaped
inside JSON strings, so generated text never contains it.
"""

import json
import re
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Final

from hpc_router.errors import UpstreamAbortedError
from hpc_router.relay.sse import DONE, payloads

_ABORT: Final = b'"abort"'
_ABORTED_CHOICE: Final = re.compile(rb'"finish_reason"\s*:\s*"abort"')
_NO_TOKENS: Final = re.compile(rb'"output_tokens"\s*:\s*0')
_FINAL_TYPES: Final = frozenset({"message_stop", "response.completed", "response.incomplete", "response.failed"})
"""Types of the events that end a stream of an API without `[DONE]`."""
_OVERLAP_BYTES: Final = 64
"""Number of bytes kept of the previous chunk, to find a mark that is split between two chunks. A mark is shorter."""


class AbortDetector(ABC):
    """Detects aborted responses of one API. One object serves one response, because the end of a response may consist
    of several events. `event_mark`: bytes that every event about the end of a response contains."""

    event_mark: ClassVar[bytes]

    @staticmethod
    @abstractmethod
    def may_be_aborted(body: bytes | bytearray) -> bool:
        """Returns whether a complete body contains the bytes that every aborted response contains. If not, the response
        was not aborted; otherwise `is_abort` decides on the decoded body."""

    @abstractmethod
    def is_abort(self, value: dict[str, Any]) -> bool:
        """Returns whether `value`, a decoded event or a complete body, ends an aborted response."""

    def check_events(self, events: bytes) -> None:
        """Checks complete events, in their order, of which at least one contains `event_mark`. Raises
        UpstreamAbortedError if they end an aborted response."""
        for data in payloads(events):
            if data.rfind(self.event_mark) >= 0:
                self._check(data)

    def check_body(self, body: bytes | bytearray) -> None:
        """Checks a complete body. Raises UpstreamAbortedError if the response was aborted."""
        if self.may_be_aborted(body):
            self._check(body)

    def _check(self, data: bytes | bytearray) -> None:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return
        if isinstance(value, dict) and self.is_abort(value):
            raise UpstreamAbortedError


class ChoicesAbortDetector(AbortDetector):
    """The detector for chat completions, text completions and every other response with `choices`."""

    event_mark = _ABORT

    @staticmethod
    def may_be_aborted(body: bytes | bytearray) -> bool:
        return body.rfind(_ABORT) >= 0

    def is_abort(self, value: dict[str, Any]) -> bool:
        choices = value.get("choices")
        return isinstance(choices, list) and any(
            isinstance(choice, dict) and choice.get("finish_reason") == "abort" for choice in choices
        )


class ResponsesAbortDetector(AbortDetector):
    """The detector for `/v1/responses`. vLLM gives most aborted responses of this API the status `completed`, so they
    cannot be detected. Detected are those of requests that vLLM rejects while it stops: they are empty and have 0
    output tokens, while a normal response has at least the end token."""

    event_mark = b'"response.completed"'

    @staticmethod
    def may_be_aborted(body: bytes | bytearray) -> bool:
        return body.rfind(b'"cancelled"') >= 0 or _NO_TOKENS.search(body) is not None

    def is_abort(self, value: dict[str, Any]) -> bool:
        match value.get("response", value):
            case {"status": "cancelled"}:
                return True
            case {"status": "completed", "usage": {"output_tokens": 0}, "output": [*items]}:
                return not any(map(_has_text, items))
        return False


def _has_text(item: object) -> bool:
    """Returns whether an item in the `output` of a response contains anything."""
    match item:
        case {"type": "message", "content": [*parts]}:
            return any(isinstance(part, dict) and bool(part.get("text")) for part in parts)
    return True


class MessagesAbortDetector(AbortDetector):
    """The detector for `/v1/messages`. In a stream, `message_delta` events contain the stop reason, and `message_stop`
    is the end."""

    event_mark = b'"message_'

    def __init__(self) -> None:
        self._reason: object = ""  # None if the engine sent null

    @staticmethod
    def may_be_aborted(body: bytes | bytearray) -> bool:
        return body.rfind(b'"stop_reason":null') >= 0 or body.rfind(b'"stop_reason": null') >= 0

    def is_abort(self, value: dict[str, Any]) -> bool:
        match value:
            case {"type": "message_delta", "delta": {"stop_reason": reason}}:
                self._reason = self._reason or reason
            case {"type": "message_stop"}:
                return self._reason is None
            case {"type": "message"}:
                return value.get("stop_reason", "") is None
        return False


def ends_stream(events: bytes) -> bool:
    """Returns whether the last of these complete events is the one with which every complete stream of its API ends."""
    last = b""
    for data in payloads(events):
        last = data
    try:
        value = json.loads(last)
    except (ValueError, RecursionError):
        return last.strip() == DONE
    return isinstance(value, dict) and value.get("type") in _FINAL_TYPES


class UnbufferedAbortDetector:
    """Searches a body of unknown format, which is relayed without buffering, for the mark of an aborted choice."""

    __slots__ = ("_overlap",)

    def __init__(self) -> None:
        self._overlap = b""

    def check(self, data: bytes) -> None:
        """Searches the next chunk of the body, together with the end of the previous one. Raises UpstreamAbortedError
        if it has the mark."""
        overlap = self._overlap + data[:_OVERLAP_BYTES]
        if (_ABORT in data and _ABORTED_CHOICE.search(data)) or (_ABORT in overlap and _ABORTED_CHOICE.search(overlap)):
            raise UpstreamAbortedError
        self._overlap = (overlap if len(data) < _OVERLAP_BYTES else data)[-_OVERLAP_BYTES:]
