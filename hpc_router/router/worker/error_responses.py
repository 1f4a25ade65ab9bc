"""Turns errors into HTTP responses in the format of the request's API. `STATUS` has the HTTP status of each error."""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from hpc_router.errors import (
    AnswerTimeoutError,
    BadRequestError,
    BatchNotFoundError,
    BodyTooLargeError,
    ExpertForbiddenError,
    HpcRouterError,
    MethodNotAllowedError,
    OriginNotAllowedError,
    OverloadedError,
    OwnerOnlyError,
    QuotaExceededError,
    RateLimitedError,
    RequestTimeoutError,
    ResponseNotFoundError,
    RoutingError,
    ScaledToZeroError,
    ShedError,
    StoredFileNotFoundError,
    UnauthorizedError,
    UnavailableError,
    UnknownModelError,
    UnknownPathError,
    UnsupportedEncodingError,
    UpstreamError,
)
from hpc_router.net import protocol
from hpc_router.relay.downstream.interface import Request, Response, error_response
from hpc_router.relay.headers import MAX_RETRY_AFTER_S
from hpc_router.router.metrics import Metrics

logger = logging.getLogger(__name__)

STATUS: Final[Mapping[type[HpcRouterError], tuple[int, str]]] = {
    UnsupportedEncodingError: (415, "invalid_request_error"),
    BadRequestError: (400, "invalid_request_error"),
    UnauthorizedError: (401, "authentication_error"),
    OriginNotAllowedError: (403, "permission_error"),
    OwnerOnlyError: (403, "permission_error"),
    ExpertForbiddenError: (403, "permission_error"),
    QuotaExceededError: (403, "permission_error"),
    UnknownModelError: (404, "invalid_request_error"),
    UnknownPathError: (404, "invalid_request_error"),
    ResponseNotFoundError: (404, "invalid_request_error"),
    StoredFileNotFoundError: (404, "invalid_request_error"),
    BatchNotFoundError: (404, "invalid_request_error"),
    MethodNotAllowedError: (405, "invalid_request_error"),
    RequestTimeoutError: (408, "invalid_request_error"),
    BodyTooLargeError: (413, "invalid_request_error"),
    OverloadedError: (429, "rate_limit_error"),
    RateLimitedError: (429, "rate_limit_error"),
    UpstreamError: (502, "upstream_error"),
    UnavailableError: (503, "service_unavailable"),
    AnswerTimeoutError: (504, "timeout_error"),
}
"""HTTP status and error type by class of the error. The first class that matches applies."""
RETRY_AFTER_S: Final = 2.0
"""Value of Retry-After in seconds for errors whose duration cannot be estimated."""


class DrainingError(UnavailableError):
    """A new request came to a router that drains; the router's successor accepts it."""


@dataclass(slots=True)
class ErrorResponses:
    """Makes, counts and logs error responses."""

    metrics: Metrics

    def response_to(self, error: Exception, request: Request, request_id: str) -> Response:
        """Returns the response to `error`, and logs the error. An HpcRouterError is counted in the metrics. Any other
        error is a bug of the router: it is logged with a traceback, and the response is a 500."""
        if not isinstance(error, HpcRouterError):
            logger.error("%s: %s %r failed", request_id, request.method, request.path[:200], exc_info=error)
            failure = RoutingError("the router failed; its log says why")
            return _error_response(500, "internal_error", failure, request_id, path=request.path)
        status, kind = next(((s, k) for e, (s, k) in STATUS.items() if isinstance(error, e)), (500, "internal_error"))
        logger.info("%s: %s %r refused with %d: %s", request_id, request.method, request.path[:200], status, error)
        self.metrics.requests.add("", "", status)
        if isinstance(error, RateLimitedError | ExpertForbiddenError):
            self.metrics.limit_refusals.add("experts" if isinstance(error, ExpertForbiddenError) else error.param)
        elif isinstance(error, ShedError):
            self.metrics.shed.add(error.limit)
        response = _error_response(status, kind, error, request_id, path=request.path)
        if isinstance(error, DrainingError):
            response.add(protocol.DRAINING_HEADER, "1")
        return response


def _error_response(status: int, kind: str, error: HpcRouterError, request_id: str, *, path: str) -> Response:
    param, retry_after_s = getattr(error, "param", None), getattr(error, "retry_after_s", None)
    response = error_response(status, kind=kind, code=error_code(error), message=str(error), param=param, path=path)
    response.add(protocol.REQUEST_ID_HEADER, request_id)
    if retry_after_s is not None:
        response.add("retry-after", str(min(max(1, math.ceil(retry_after_s)), MAX_RETRY_AFTER_S)))
    if isinstance(error, MethodNotAllowedError):
        response.add("allow", ", ".join(error.allowed))
    too_large = isinstance(error, RateLimitedError) and retry_after_s is None
    if too_large or isinstance(error, AnswerTimeoutError | ScaledToZeroError):
        response.add("x-should-retry", "false")  # obeyed by the openai and anthropic clients
    return response


def error_code(error: Exception) -> str:
    """Returns the error code for an error's class: `unknown_model` for `UnknownModelError`; for an error that is no
    HpcRouterError, `internal_error`."""
    if not isinstance(error, HpcRouterError):
        return "internal_error"
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__.removesuffix("Error")).lower()
