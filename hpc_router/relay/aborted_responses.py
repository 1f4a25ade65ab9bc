"""Finds the answer that an engine has cut and ended in good form, so that it is not taken for a complete one.

vLLM does this to running answers when it is stopped. A client that cancels its request has left and gets no answer, so
an abort that reaches a client is never one that the client asked for. The mark depends on the API: a choice's
`finish_reason` is `abort`; a response's `status` is `cancelled`; a message ends without a `stop_reason`. Each piece of
an answer is searched for a few bytes, and JSON is decoded only where they are found. The quotes within these bytes
cannot occur inside a JSON string, where quotes are escaped.
"""

import json
import re
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Final

from hpc_router.errors import UpstreamAbortedError
from hpc_router.relay.sse import payloads

_ABORT: Final = b'"abort"'
_FINISHED_SO: Final = re.compile(rb'"finish_reason"\s*:\s*"abort"')
_NO_TOKENS: Final = re.compile(rb'"output_tokens"\s*:\s*0')
_BORDER: Final = 64
"""Bytes that are kept from one piece of a body for the next; the pattern above is shorter in any real answer."""


class Ending(ABC):
    """How the answers of one API end. One object per answer, since the end of a stream may take several events.

    `event_mark`: an event without these bytes says nothing about the end.
    """

    event_mark: ClassVar[bytes]

    @staticmethod
    @abstractmethod
    def may_be_aborted(body: bytes | bytearray) -> bool:
        """False: this whole answer was not aborted. A search for bytes."""

    @abstractmethod
    def is_abort(self, value: dict[str, Any]) -> bool:
        """Whether this event, or this whole answer, says so."""

    def check_events(self, events: bytes) -> None:
        """Whole events, in order, of which one has the mark. Raises UpstreamAbortedError."""
        for data in payloads(events):
            if data.rfind(self.event_mark) >= 0:
                self._check(data)

    def check_whole(self, body: bytes | bytearray) -> None:
        """Raises UpstreamAbortedError."""
        if self.may_be_aborted(body):
            self._check(body)

    def _check(self, data: bytes | bytearray) -> None:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return
        if isinstance(value, dict) and self.is_abort(value):
            raise UpstreamAbortedError


class ChoicesEnding(Ending):
    """Chat and text completions, and whatever else has choices."""

    event_mark = _ABORT

    @staticmethod
    def may_be_aborted(body: bytes | bytearray) -> bool:
        return body.rfind(_ABORT) >= 0

    def is_abort(self, value: dict[str, Any]) -> bool:
        choices = value.get("choices")
        return isinstance(choices, list) and any(
            isinstance(choice, dict) and choice.get("finish_reason") == "abort" for choice in choices
        )


class ResponsesEnding(Ending):
    """`/v1/responses`. vLLM says `completed` of most that it cuts; one that it refuses while it stops is empty, without
    even the token that ends an answer."""

    event_mark = b'"response.completed"'

    @staticmethod
    def may_be_aborted(body: bytes | bytearray) -> bool:
        return body.rfind(b'"cancelled"') >= 0 or _NO_TOKENS.search(body) is not None

    def is_abort(self, value: dict[str, Any]) -> bool:
        match value.get("response", value):
            case {"status": "cancelled"}:
                return True
            case {"status": "completed", "usage": {"output_tokens": 0}, "output": [*items]}:
                return not any(map(_says_something, items))
        return False


def _says_something(item: object) -> bool:
    """An item of a response's output."""
    match item:
        case {"type": "message", "content": [*parts]}:
            return any(isinstance(part, dict) and bool(part.get("text")) for part in parts)
    return True


class MessagesEnding(Ending):
    """`/v1/messages`. In a stream `message_delta` events bring the reason, and `message_stop` is the end."""

    event_mark = b'"message_'

    def __init__(self) -> None:
        self._reason: object = ""  # None: a null was sent for it

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


class Unheld:
    """A body that is passed on as it comes, in a form that is not known: only what a choice says is looked for."""

    __slots__ = ("_border",)

    def __init__(self) -> None:
        self._border = b""

    def check(self, data: bytes) -> None:
        """The next piece. Raises UpstreamAbortedError."""
        border = self._border + data[:_BORDER]
        if (_ABORT in data and _FINISHED_SO.search(data)) or (_ABORT in border and _FINISHED_SO.search(border)):
            raise UpstreamAbortedError
        self._border = (border if len(data) < _BORDER else data)[-_BORDER:]
