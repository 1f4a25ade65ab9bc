"""Where the APIs differ for those who pass them on: which field holds the conversation, and what an error looks like.

OpenAI's paths and Anthropic's `/v1/messages` are served alike; this table is all that differs. An error has two forms:
the body of a refusal, and the event that ends a stream that failed, on which the official clients raise. Pure: it
knows the paths, and nothing of who sends what.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from hpc_router.net import protocol
from hpc_router.relay import aborted_responses, sse


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """What went wrong, in OpenAI's words. `status`: that of the response, or what it would have been."""

    status: int
    kind: str
    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Dialect:
    """`conversation`: the field of a body that is read first. `ending`: how an answer says that it was cut."""

    conversation: str
    body: Callable[[ErrorReply], dict[str, Any]]
    event: Callable[[ErrorReply], bytes]
    ending: type[aborted_responses.Ending]


def dialect_of(path: str) -> Dialect:
    """OpenAI's chat for what is no path of the table, where errors are all that is ever said."""
    return _DIALECTS.get(path) or (_ANTHROPIC if path.startswith(protocol.MESSAGES + "/") else _DIALECTS[protocol.CHAT])


def _openai_error(fault: ErrorReply) -> dict[str, Any]:
    return {"message": fault.message, "type": fault.kind, "param": fault.param, "code": fault.code}


def _openai_body(fault: ErrorReply) -> dict[str, Any]:
    return {"error": _openai_error(fault)}


def _openai_event(fault: ErrorReply) -> bytes:
    return sse.error_event(_openai_error(fault))


def _responses_event(fault: ErrorReply) -> bytes:
    """Typed, as all events of this API are; the openai client raises on the `error` key."""
    flat = {"code": fault.code, "message": fault.message, "param": fault.param}
    return _named_event({"type": "error", **flat, "error": _openai_error(fault)})


_ANTHROPIC_KINDS: Final[Mapping[int, str]] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def _anthropic_body(fault: ErrorReply) -> dict[str, Any]:
    other = "api_error" if fault.status >= 500 else "invalid_request_error"
    kind = _ANTHROPIC_KINDS.get(fault.status, other)
    return {"type": "error", "error": {"type": kind, "message": fault.message}}


def _anthropic_event(fault: ErrorReply) -> bytes:
    return _named_event(_anthropic_body(fault))


def _named_event(data: dict[str, Any]) -> bytes:
    return b"event: error\ndata: " + json.dumps(data).encode() + b"\n\n"


_ANTHROPIC: Final = Dialect("messages", _anthropic_body, _anthropic_event, aborted_responses.MessagesEnding)
_DIALECTS: Final[Mapping[str, Dialect]] = {
    protocol.CHAT: Dialect("messages", _openai_body, _openai_event, aborted_responses.ChoicesEnding),
    protocol.COMPLETIONS: Dialect("prompt", _openai_body, _openai_event, aborted_responses.ChoicesEnding),
    protocol.EMBEDDINGS: Dialect("input", _openai_body, _openai_event, aborted_responses.ChoicesEnding),
    protocol.RESPONSES: Dialect("input", _openai_body, _responses_event, aborted_responses.ResponsesEnding),
    protocol.MESSAGES: _ANTHROPIC,
}
