"""Decides what follows from the response to a line's request: its result, or another attempt. No I/O.

A request is sent again, until the batch expires, after what another attempt can cure: the router or the replica was
lost, no replica is ready, a limit is reached. A request that fails with 500, 502 or 504 again and again may itself be
the cause, so it gets `MAX_FAILURES` attempts. Any other response is the line's result.
"""

import json
from dataclasses import dataclass
from typing import Any, Final

import orjson

from hpc_router import backoff
from hpc_router.router.batches.journal import Result
from hpc_router.router.batches.stored_files import new_id

MAX_FAILURES: Final = 10
"""Number of attempts of a request to which the router responds with 500, 502 or 504."""
FIRST_PAUSE_S: Final = 0.5
MAX_PAUSE_S: Final = 60.0
_TRANSIENT: Final = frozenset({408, 409, 425, 429, 503})
_FAILURES: Final = frozenset({500, 502, 504})


@dataclass(frozen=True, slots=True)
class LineResponse:
    """The response to a line's request. `status`: HTTP status; None if the connection was lost. `retry_after_s`: value
    of `Retry-After`; 0 without it. `final`: whether the router says that another attempt does not help."""

    status: int | None
    body: bytes = b""
    request_id: str = ""
    retry_after_s: float = 0.0
    final: bool = False


@dataclass(frozen=True, slots=True)
class Retry:
    """The request is sent again after `pause_s` seconds. `failures`: attempts that count for `MAX_FAILURES`."""

    pause_s: float
    failures: int


def judge(index: int, custom_id: str, response: LineResponse, *, attempt: int, failures: int) -> Result | Retry:
    """Returns the result of the request `index`, or that it is to be sent again. `attempt`: number of earlier attempts;
    `failures`: those of them that count for `MAX_FAILURES`."""
    status = response.status
    if status is None or (status in _TRANSIENT and not response.final):
        return Retry(_pause_s(attempt, response), failures)
    if status in _FAILURES and not response.final and failures + 1 < MAX_FAILURES:
        return Retry(_pause_s(attempt, response), failures + 1)
    return Result(index, status == 200, _result_line(custom_id, status, response))


def error_line(custom_id: str, code: str, message: str) -> bytes:
    """Returns the line of the error file for a request that got no response."""
    return _line(custom_id, "null", {"code": code, "message": message})


def _pause_s(attempt: int, response: LineResponse) -> float:
    pause_s = backoff.pause_s(attempt, first_s=FIRST_PAUSE_S, max_s=MAX_PAUSE_S)
    return max(pause_s, min(response.retry_after_s, MAX_PAUSE_S))


def _result_line(custom_id: str, status: int, response: LineResponse) -> bytes:
    """Returns the line for a response. Its JSON stays as it was received; only line breaks between its values become
    spaces."""
    try:
        text = response.body.decode("utf-8")
        orjson.loads(response.body)
        body = text.replace("\r", " ").replace("\n", " ")
    except ValueError:
        body = json.dumps(response.body.decode("utf-8", "replace"))
    request_id = json.dumps(response.request_id)
    return _line(custom_id, f'{{"status_code": {status}, "request_id": {request_id}, "body": {body}}}', None)


def _line(custom_id: str, response: str, error: dict[str, Any] | None) -> bytes:
    head = json.dumps({"id": new_id("batch_req_"), "custom_id": custom_id})
    return f'{head[:-1]}, "response": {response}, "error": {json.dumps(error)}}}'.encode()
