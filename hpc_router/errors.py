"""What can go wrong, sorted by what the caller can do about it.

A message says what is wrong, where, and what would have been valid. Libraries' exceptions are translated at the
boundary with `raise ... from`. HTTP status codes are not known here: `router.app` holds the one table.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class HpcRouterError(Exception):
    """Any failure this project describes in words; the command line prints it without a traceback."""


class ConfigError(HpcRouterError):
    """A value the user must edit: exit code 2. `key`: the config key it stands at, where there is one."""

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class RegistryError(HpcRouterError):
    """A run directory or a registry file that cannot be used."""


class LaunchError(HpcRouterError):
    """A job that could not be submitted, or that did not come up."""


class ArtefactError(HpcRouterError):
    """A classifier artefact that is missing, damaged or of another version."""


def suggest(name: str, valid: Iterable[str]) -> str:
    """The end of an error message: the nearest valid name, if any is near, and the whole list."""
    names = sorted(set(valid))
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"{hint} (valid: {', '.join(names) or 'none'})"


class RoutingError(HpcRouterError):
    """A request that cannot be served; `param` is the request field to look at, `retry_after_s` when to come again."""

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after_s = retry_after_s


class BadRequestError(RoutingError):
    """The request itself is wrong; sending it again will not help."""


class PreviousResponseNotFoundError(BadRequestError):
    """What `previous_response_id` refers to is out of reach; the whole conversation would do."""


class UnauthorizedError(RoutingError):
    """No token, or not the right one."""


class UnknownModelError(RoutingError):
    """A `model` that nobody here serves."""


class UnknownPathError(RoutingError):
    """No such path, or not with this method."""


class BodyTooLargeError(RoutingError):
    """More bytes than `router.max_body_mb` admits."""


class RequestTimeoutError(RoutingError):
    """A body that does not arrive."""


class OverloadedError(RoutingError):
    """As many requests as this router takes are in flight."""


class UnavailableError(RoutingError):
    """No replica could serve the request in time."""


class AnswerTimeoutError(RoutingError):
    """A replica is alive and did not answer in time. Another attempt would take as long, so there is none."""


class UpstreamError(RoutingError):
    """A replica failed before the first body byte; another one may be tried."""


class UpstreamConnectError(UpstreamError):
    """Nobody listens at the replica's address, or a stranger does. `sent`: over an earlier connection, which broke, the
    request had been sent, so it may have been begun."""

    sent = False


class UpstreamTimeoutError(UpstreamError):
    """The replica did not send a first byte, or fell silent, for too long."""


class UpstreamAbortedError(UpstreamError):
    """The engine cut the answer and ended it in good form, as vLLM does when it is stopped."""

    def __init__(self) -> None:
        super().__init__("its engine was stopped and cut the answer")
