"""The differences between the relayed APIs: the field that contains the prompt, the error format and the mark of an
abort.

The same code serves OpenAI's paths and Anthropic's `/v1/messages`; the table in this module holds all differences. An
error has two forms: a response body, and an event that ends a stream, which the official clients raise as an exception.
No I/O.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from hpc_router.net import protocol
from hpc_router.relay import aborted_responses, sse


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """An error with OpenAI's fields. `status`: the HTTP status of the response; in a stream, the status that the
    response would have."""

    status: int
    kind: str
    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class ApiFormat:
    """The format of one API. `prompt_field`: the request field in which the prompt is looked for first. `error_body`,
    `error_event`: make the two forms of an error. `abort_detector`: detects aborted responses. `delta_mark`: bytes that
    each event with generated text contains."""

    prompt_field: str
    error_body: Callable[[ErrorReply], dict[str, Any]]
    error_event: Callable[[ErrorReply], bytes]
    abort_detector: type[aborted_responses.AbortDetector]
    delta_mark: bytes = b'"delta":'


def api_format_of(path: str) -> ApiFormat:
    """Returns the format of the API at `path`. Any other path gets the format of chat completions, which is then used
    only for errors."""
    found = _FORMATS.get(path)
    if found is None and path.startswith(protocol.MESSAGES + "/"):
        return _ANTHROPIC
    if found is None and path.startswith(protocol.RESPONSES + "/"):
        return _STORED_RESPONSE
    return found or _FORMATS[protocol.CHAT]


def _openai_error(error: ErrorReply) -> dict[str, Any]:
    return {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}


def _openai_body(error: ErrorReply) -> dict[str, Any]:
    return {"error": _openai_error(error)}


def _openai_event(error: ErrorReply) -> bytes:
    return sse.error_event(_openai_error(error))


def _responses_event(error: ErrorReply) -> bytes:
    """Returns an error as an event of `/v1/responses`. It has a `type`, like all events of this API, and a key `error`,
    which makes the openai client raise an exception."""
    flat = {"code": error.code, "message": error.message, "param": error.param}
    return _named_event({"type": "error", **flat, "error": _openai_error(error)})


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


def _anthropic_body(error: ErrorReply) -> dict[str, Any]:
    other = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = _ANTHROPIC_KINDS.get(error.status, other)
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def _anthropic_event(error: ErrorReply) -> bytes:
    return _named_event(_anthropic_body(error))


def _named_event(data: dict[str, Any]) -> bytes:
    return b"event: error\ndata: " + json.dumps(data).encode() + b"\n\n"


_DELTA: Final = b'.delta"'  # the end of `type` of the events of /v1/responses
_ANTHROPIC: Final = ApiFormat(
    "messages", _anthropic_body, _anthropic_event, aborted_responses.MessagesAbortDetector, b'"content_block_delta"'
)
_STORED_RESPONSE: Final = ApiFormat(
    "input", _openai_body, _responses_event, aborted_responses.ChoicesAbortDetector, _DELTA
)
"""The format for requests with the id of a response in their path. A response that was cancelled before it was stored
is not an aborted response to such a request."""
_FORMATS: Final[Mapping[str, ApiFormat]] = {
    protocol.CHAT: ApiFormat("messages", _openai_body, _openai_event, aborted_responses.ChoicesAbortDetector),
    protocol.COMPLETIONS: ApiFormat(
        "prompt", _openai_body, _openai_event, aborted_responses.ChoicesAbortDetector, b'"text":'
    ),
    protocol.EMBEDDINGS: ApiFormat("input", _openai_body, _openai_event, aborted_responses.ChoicesAbortDetector),
    protocol.RESPONSES: ApiFormat(
        "input", _openai_body, _responses_event, aborted_responses.ResponsesAbortDetector, _DELTA
    ),
    protocol.MESSAGES: _ANTHROPIC,
}
