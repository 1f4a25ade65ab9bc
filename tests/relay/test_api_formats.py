"""Errors in the words of each API, checked against the official clients' own types."""

import json

import anthropic.types
import pytest
from openai.types.responses import ResponseErrorEvent

from hpc_router.net import protocol
from hpc_router.relay.api_formats import ErrorReply, api_format_of
from hpc_router.relay.sse import EventSplitter

LOST = ErrorReply(502, "upstream_error", "replica_failed", "lost")


@pytest.mark.parametrize("path", protocol.GENERATE_PATHS)
def test_every_path_has_one_whole_event_with_the_error_in_it(path: str) -> None:
    event = api_format_of(path).error_event(LOST)
    assert EventSplitter().feed(event) == event
    said = json.loads(event.rpartition(b"data: ")[2])
    assert said["error"]["message"] == "lost"


@pytest.mark.parametrize(
    "path", ["", "/v1/models", "/nowhere", protocol.CHAT, protocol.COMPLETIONS, protocol.EMBEDDINGS]
)
def test_openai_is_the_rule(path: str) -> None:
    error = {"message": "lost", "type": "upstream_error", "param": None, "code": "replica_failed"}
    assert api_format_of(path).error_body(LOST) == {"error": error}
    assert api_format_of(path).error_event(LOST) == b"data: " + json.dumps({"error": error}).encode() + b"\n\n"


def test_the_error_of_a_response_is_a_typed_event() -> None:
    assert api_format_of(protocol.RESPONSES).error_body(LOST) == api_format_of(protocol.CHAT).error_body(LOST)
    name, _, data = api_format_of(protocol.RESPONSES).error_event(LOST).partition(b"\ndata: ")
    assert name == b"event: error"
    event = ResponseErrorEvent.model_construct(**json.loads(data))
    assert (event.type, event.message, event.code, event.param) == ("error", "lost", "replica_failed", None)


@pytest.mark.parametrize("path", [protocol.MESSAGES, protocol.MESSAGES + "/", protocol.MESSAGES + "/count_tokens"])
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (408, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (502, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_anthropics_kinds(path: str, status: int, kind: str) -> None:
    body = api_format_of(path).error_body(ErrorReply(status, "any", "any", "lost", "model"))
    assert body == {"type": "error", "error": {"type": kind, "message": "lost"}}
    if kind != "request_too_large":  # its client knows that one by its status alone
        assert anthropic.types.ErrorResponse.model_validate({"request_id": None, **body}).error.type == kind


def test_anthropics_error_event() -> None:
    name, _, data = api_format_of(protocol.MESSAGES).error_event(LOST).partition(b"\ndata: ")
    assert name == b"event: error"
    assert json.loads(data) == {"type": "error", "error": {"type": "api_error", "message": "lost"}}
