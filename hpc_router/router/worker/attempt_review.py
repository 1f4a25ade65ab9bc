"""Decides what follows a failed attempt or an error status: another replica is tried, or the client gets an error. Also
decides whether the replica is reported as unhealthy.

Backpressure (429, or 503 with `Retry-After`) is no evidence of bad health. An error is evidence against a replica only
if another replica of the same expert serves the same request.
"""

import errno
import json
import logging
from dataclasses import dataclass
from typing import Final, Protocol

from hpc_router.errors import UpstreamConnectError, UpstreamError
from hpc_router.net import protocol
from hpc_router.relay.api_formats import ErrorReply
from hpc_router.relay.downstream.interface import Response, json_response
from hpc_router.relay.upstream.interface import UpstreamResponse
from hpc_router.router.metrics import Metrics
from hpc_router.router.replicas.replica import Event, Replica, Reservation
from hpc_router.router.worker import rust_frontend
from hpc_router.router.worker.routed_request import MISSING_STATUSES, RETRY_STATUSES, RequestResult, RoutedRequest
from hpc_router.state.registry import RecordKind

logger = logging.getLogger(__name__)

_REFUSED: Final = 400
_BUSY: Final = 429
_AWAY: Final = 503
_FAILED: Final = 500
_LOST: Final = 502
"""Status that an agent sends with the "starting" header if the engine had received the request and ended before its
response."""
_LOCAL_ERRNOS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM})
"""Errors of failed connections whose cause is this machine, so that they say nothing about the replica."""
MAX_ENGINES_LOST: Final = 2
"""Maximum number of attempts whose engine or connection may end before the response begins. The request may be the
cause, and must neither crash all engines of its expert nor be generated again and again."""
_MAX_ERROR_BYTES: Final = 2**20
_BARE_PHRASES: Final = ("Not Found", "Method Not Allowed")
_MAX_QUOTED_BYTES: Final = 200
"""Maximum number of bytes of an engine's error that a message of the router quotes."""


class HealthReporter(Protocol):
    """Receives what a worker's requests show about the health of replicas. Implemented by `ControlClient`."""

    def connect_failed(self, replica: Replica, trouble: str) -> None:
        """Records that no connection to the replica could be made. `trouble`: text of the failure."""

    def request_failed(self, replica: Replica, trouble: str) -> None:
        """Records that the replica failed a request that another replica of the expert served. `trouble`: text of the
        failure."""

    def request_succeeded(self, replica: Replica) -> None:
        """Records that the replica served a request, after an earlier request to it had failed."""

    def state_reported(self, replica: Replica, event: Event) -> None:
        """Records the state that the replica reported in the header of a response."""

    def recheck(self, replica: Replica) -> None:
        """Requests a probe of the replica, because a request failed and the replica may be the cause."""


class RetryError(Exception):
    """An attempt failed before anything was sent to the client, and may be followed by another one. The failure is
    recorded already. `begun`: whether the engine may have begun the request."""

    def __init__(self, *, begun: bool) -> None:
        super().__init__()
        self.begun = begun


@dataclass(slots=True)
class AttemptReview:
    """Reviews failed attempts and error statuses in one worker. Reports to `health` and counts in `metrics`."""

    health: HealthReporter
    metrics: Metrics

    async def review_status(
        self, routed: RoutedRequest, reservation: Reservation, upstream: UpstreamResponse
    ) -> RequestResult | None:
        """Decides what to do with a response that has an error status, before anything is sent to the client. Returns
        the result that the client gets instead, or None if the response of the replica is to be relayed. Raises
        RetryError if another replica should be tried."""
        replica, status, headers = reservation.replica, upstream.status, upstream.headers
        external = replica.record.kind is RecordKind.EXTERNAL
        if status == 401 and external:  # the router's token for the endpoint is wrong; the client's own token is valid
            routed.avoid |= {replica}
            self._failed_at(routed, replica, status)
            message = f"{replica.record.url} answered 401: `hpc-router register` it again with --token-file"
            fault = ErrorReply(502, "upstream_error", "endpoint_unauthorized", message)
            routed.error_result = error_result(routed, reservation, fault)
            raise RetryError(begun=False)
        if status == 401 and replica.key is not None:
            raise UpstreamConnectError("the replica refused the router's key")
        if status in MISSING_STATUSES:
            return await self._review_missing(routed, reservation, upstream)
        if status == _REFUSED:
            return await self._review_refused(routed, reservation, upstream)
        if status not in RETRY_STATUSES:
            return None
        routed.avoid |= {replica}
        begun = False
        if protocol.DRAINING_HEADER.encode() in headers:
            self._failed_at(routed, replica, "draining")
            # A new server may start at the address of an external endpoint, so it can become ready again.
            self.health.state_reported(replica, Event.SAYS_STARTING if external else Event.SAYS_DRAINING)
        elif protocol.STARTING_HEADER.encode() in headers:
            self._failed_at(routed, replica, "starting")
            self.health.state_reported(replica, Event.SAYS_STARTING)
            begun = status == _LOST
            routed.engines_lost += begun
            if routed.engines_lost >= MAX_ENGINES_LOST:
                return await self._error_response(routed, reservation, upstream)
        elif status == _BUSY or (status == _AWAY and b"retry-after" in headers):
            self._failed_at(routed, replica, _BUSY if status == _BUSY else "busy")
            routed.error_result = await self._error_response(routed, reservation, upstream)
        else:
            self._failed_at(routed, replica, status)
            routed.error_result = result = await self._error_response(routed, reservation, upstream)
            unsupported = self._unsupported_field(routed, reservation, result)
            if unsupported is not None:
                return unsupported
            if status == _FAILED and any(seen == _FAILED for _, _, seen in routed.failed_attempts):
                return routed.error_result  # two replicas fail in the same way: the request is the cause
            routed.failed_attempts += ((replica, reservation.expert, status),)
            begun = True
        raise RetryError(begun=begun)

    def _failed_at(self, routed: RoutedRequest, replica: Replica, cause: str | int) -> None:
        """Counts a failed attempt, and stores it for the request's record. `cause`: status or kind of failure."""
        self.metrics.failovers.add(replica.name, cause)
        routed.failovers += ((replica.name, cause),)

    async def _review_missing(
        self, routed: RoutedRequest, reservation: Reservation, upstream: UpstreamResponse
    ) -> RequestResult:
        """Returns the result for a 404 or 405 of an engine: its own response if the body is an error in the format of
        the API. With any other body, the engine does not serve the path. Then raises RetryError if the expert has
        another ready replica, which may run another engine; otherwise returns an error that names the path."""
        replica = reservation.replica
        if replica.recent_error:
            self.health.request_succeeded(replica)
        result = await self._error_response(routed, reservation, upstream)
        assert result.response is not None
        if _is_api_error(result.response.body):
            return result
        said = result.response.body[:_MAX_QUOTED_BYTES].decode(errors="replace")
        answered = f"{result.status}: {said}" if said else str(result.status)
        what = f"does not serve {routed.method} {routed.endpoint.path} ({answered})"
        fault = ErrorReply(404, "invalid_request_error", "unsupported_operation", f"{_engine_of(reservation)} {what}")
        return self._unsupported(routed, reservation, fault)

    async def _review_refused(
        self, routed: RoutedRequest, reservation: Reservation, upstream: UpstreamResponse
    ) -> RequestResult | None:
        """Returns the result for a 400 of an engine, or None to relay the response. Raises RetryError if vLLM's Rust
        front end cannot serve a field of the request, and another replica of the expert can be tried."""
        replica = reservation.replica
        if replica.recent_error:
            self.health.request_succeeded(replica)
        if not rust_frontend.has_rust_frontend(replica.record.engine):
            return None
        result = await self._error_response(routed, reservation, upstream)
        return self._unsupported_field(routed, reservation, result) or result

    def _unsupported_field(
        self, routed: RoutedRequest, reservation: Reservation, result: RequestResult
    ) -> RequestResult | None:
        """Returns the result for an error whose cause is a field that the Rust front end cannot serve; None if the
        error in `result` has another cause. Raises RetryError if another replica of the expert can be tried."""
        if result.response is None or not rust_frontend.has_rust_frontend(reservation.replica.record.engine):
            return None
        refused = rust_frontend.refused_field(routed.call.fields, status=result.status, body=result.response.body)
        if refused is None:
            return None
        param, what = refused
        message = f"{_engine_of(reservation)} {what}"
        fault = ErrorReply(400, "invalid_request_error", "unsupported_value", message, param)
        return self._unsupported(routed, reservation, fault)

    def _unsupported(self, routed: RoutedRequest, reservation: Reservation, fault: ErrorReply) -> RequestResult:
        """Returns the error `fault` as the result for a request that the engine cannot serve. But if another replica of
        the expert, which may run another engine, can be tried, raises RetryError."""
        replica, expert, table = reservation.replica, reservation.expert, routed.dispatcher.table
        result = error_result(routed, reservation, fault)
        routed.avoid |= {replica}
        if rust_frontend.has_rust_frontend(replica.record.engine):
            routed.avoid |= {
                other for other in table.of(expert) if rust_frontend.has_rust_frontend(other.record.engine)
            }
        if routed.only is None and table.has_ready(expert, routed.avoid):
            routed.error_result = result
            raise RetryError(begun=False)
        return result

    def report_failures(self, routed: RoutedRequest, expert: str) -> None:
        """Reports the replicas of `expert` that failed this request. Called once another replica of the expert has
        served it. A 500 of a Rust front end to a constrained request is not reported: earlier constrained requests
        cause it (see `rust_frontend.is_constrained`), and the replica serves all other requests."""
        constrained = rust_frontend.is_constrained(routed.call.fields)
        for replica, of, seen in routed.failed_attempts:
            excused = constrained and seen == _FAILED and rust_frontend.has_rust_frontend(replica.record.engine)
            if of == expert and not excused:
                what = f" answered {seen}" if isinstance(seen, int) else f": {seen}"
                self.health.request_failed(replica, f"{replica.record.url}{what}")
        routed.failed_attempts = ()

    async def _error_response(
        self, routed: RoutedRequest, reservation: Reservation, upstream: UpstreamResponse
    ) -> RequestResult:
        body = await upstream.read(_MAX_ERROR_BYTES)
        response = Response(upstream.status, routed.response_head(reservation, upstream.headers), body)
        return RequestResult(upstream.status, reservation.expert, routed.reason_at(reservation.expert), response)

    def record_failure(self, routed: RoutedRequest, reservation: Reservation, error: UpstreamError) -> None:
        """Records an attempt that failed before the first byte of its response. Later attempts of the request avoid the
        replica."""
        replica, expert = reservation.replica, reservation.expert
        logger.warning("%s: %s failed before its first byte: %s", routed.request_id, replica.name, error)
        self._failed_at(routed, replica, type(error).__name__)
        routed.avoid |= {replica}
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in _LOCAL_ERRNOS:
            return
        if isinstance(error, UpstreamConnectError):
            self.health.connect_failed(replica, f"{replica.record.url}: {error}")
        else:
            routed.failed_attempts += ((replica, expert, str(error)),)
            self.health.recheck(replica)


def error_result(routed: RoutedRequest, reservation: Reservation, fault: ErrorReply) -> RequestResult:
    """Returns a result with `fault`, an error made by the router, as the response. Its headers name the reserved
    replica."""
    response = json_response(routed.endpoint.api_format.error_body(fault), status=fault.status)
    response.add(protocol.REQUEST_ID_HEADER, routed.request_id)
    response.head += routed.routing_headers(reservation)
    return RequestResult(fault.status, reservation.expert, routed.reason_at(reservation.expert), response)


def _engine_of(reservation: Reservation) -> str:
    """Returns a description of the reserved replica's engine for an error message: expert and kind of the engine."""
    record = reservation.replica.record
    kind = record.engine.kind or record.url
    kind += f", {rust_frontend.NAME}" if rust_frontend.has_rust_frontend(record.engine) else ""
    return f"the engine of {reservation.expert!r} ({kind})"


def _is_api_error(body: bytes) -> bool:
    """Returns whether the body of an error response is an error that the API itself reports, such as an unknown model.
    A server that does not have the requested path sends only the phrase of the status ("Not Found"), or no JSON."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return False
    error = value.get("error", value) if isinstance(value, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return bool(message) and message not in _BARE_PHRASES
