"""The errors of the package, one class for each reaction of a caller.

A message says what is wrong, where, and what is valid. Exceptions of libraries are translated at the boundary with
`raise ... from`. This module does not know HTTP status codes.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Final

MAX_SUGGEST_CHARS: Final = 64
"""Maximum length in characters of a name for which a similar valid name is searched. The time of the search grows with
the square of the length."""


class HpcRouterError(Exception):
    """Base of all errors with a message for the user; the command line prints it without a traceback."""


class ConfigError(HpcRouterError):
    """The user must change a value. The command line exits with status 2. `key`: the config key of the value; None if
    the value has no key."""

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class RegistryError(HpcRouterError):
    """A run directory or a registry file cannot be used."""


class LaunchError(HpcRouterError):
    """A job could not be submitted or did not start."""


class StagingError(HpcRouterError):
    """A model could not be copied to the node's disk; the engine then loads it from the folder of `model`."""


class ArtefactError(HpcRouterError):
    """A trained classifier (its folder, the artefact) is missing, damaged or of another version."""


def suggest(name: str, valid: Iterable[str]) -> str:
    """Returns the end of an error message: the valid name most similar to `name`, if any is similar, and all valid
    names."""
    names = sorted(set(valid))
    near = get_close_matches(name, names, n=1, cutoff=0.5) if len(name) <= MAX_SUGGEST_CHARS else ()
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"{hint} (valid: {', '.join(names) or 'none'})"


class RoutingError(HpcRouterError):
    """A request cannot be served. `param`: the field of the request that is wrong, if any; `retry_after_s`: seconds for
    the header Retry-After, if any."""

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after_s = retry_after_s


class BadRequestError(RoutingError):
    """The request is wrong; sending it again does not help."""


class UnsupportedEncodingError(BadRequestError):
    """The body of the request is compressed."""


class PreviousResponseNotFoundError(BadRequestError):
    """The response of `previous_response_id` is not available; the client can send the whole conversation instead."""


class UnauthorizedError(RoutingError):
    """The request has no token or a wrong one."""


class OwnerOnlyError(RoutingError):
    """The path is for the deployment's owner, and the request has the token of another user."""


class ExpertForbiddenError(RoutingError):
    """The token may not use this expert."""


class RateLimitedError(RoutingError):
    """The request would exceed a limit of its token; `param` names the limit: requests, tokens or concurrency.
    `retry_after_s` is None if the request alone exceeds the limit, so that sending it again does not help."""


class OriginNotAllowedError(RoutingError):
    """The request comes from a web page whose origin is not in `router.allowed_origins`; such a page may not read
    responses."""


class UnknownModelError(RoutingError):
    """No replica of the deployment serves this `model`."""


class UnknownPathError(RoutingError):
    """The router does not serve this path."""


class MethodNotAllowedError(RoutingError):
    """The router serves this path, but not with this method."""

    def __init__(self, message: str, *, allowed: Iterable[str]) -> None:
        super().__init__(message)
        self.allowed = tuple(allowed)


class ResponseNotFoundError(RoutingError):
    """No replica has a stored response with this id."""


class StoredFileNotFoundError(RoutingError):
    """The user has no stored file with this id."""


class BatchNotFoundError(RoutingError):
    """The user has no batch with this id."""


class QuotaExceededError(RoutingError):
    """The user's files or unfinished batches would exceed a limit of `router.batch`."""


class BodyTooLargeError(RoutingError):
    """The body is larger than `router.max_body_mb`, or an uploaded file larger than `router.batch.max_file_mb`."""


class RequestTimeoutError(RoutingError):
    """The body of the request did not arrive within the time limit."""


class OverloadedError(RoutingError):
    """The router has `router.max_in_flight` requests in flight and takes no more."""


class UnavailableError(RoutingError):
    """No replica could serve the request within the time limit."""


class ShedError(UnavailableError):
    """The router is overloaded and refuses this request, because it is of the lowest class. `limit`: the key of the
    router's config whose limit is reached: max_waiting or max_in_flight."""

    def __init__(self, message: str, *, limit: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.limit = limit


class ColdStartError(UnavailableError):
    """The expert has no ready replica, and the request asks not to wait for one."""


class ScaledToZeroError(UnavailableError):
    """The expert has no replicas, because it was scaled to 0. Sending the request again does not help."""


class AnswerTimeoutError(RoutingError):
    """A live replica did not respond within the time limit. The request is not retried, because another replica would
    probably take as long."""


class UpstreamError(RoutingError):
    """A replica failed before the first byte of the response body; another replica may be tried."""


class UpstreamConnectError(UpstreamError):
    """The router could not connect to the replica: at its address there is no process, or one that is not this replica.
    `sent`: whether the request was sent before on an open connection that then broke, so that the engine may have begun
    to process it."""

    sent = False


class UpstreamTimeoutError(UpstreamError):
    """The replica did not begin its response, or did not continue it, within the time limit."""


class UpstreamAbortedError(UpstreamError):
    """The engine ended the response early but in correct form, as vLLM does when it is stopped."""

    def __init__(self) -> None:
        super().__init__("its engine was stopped and cut the answer")
