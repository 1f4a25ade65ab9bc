"""Dispatches one API request, from its decoded body to the last byte of its response.

Select an expert -> acquire a replica -> relay. Until the first body byte, a failed attempt is retried on another
replica: `auto` on replicas of its expert, of the runner-up and of the fallback; a named expert only on its own
replicas, for which it waits up to `router.queue_timeout_s`. The `HealthReporter` gets what a request observed of a
replica. Backpressure (429, or 503 with `Retry-After`) is no evidence of bad health, and an error is evidence only if
another replica of the same expert serves the same request. Retries have a budget.
"""

import asyncio
import errno
import logging
import time
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from hpc_router.config.schema import RouterConfig
from hpc_router.errors import (
    AnswerTimeoutError,
    OverloadedError,
    UnavailableError,
    UpstreamAbortedError,
    UpstreamConnectError,
    UpstreamError,
    UpstreamTimeoutError,
)
from hpc_router.net import protocol
from hpc_router.relay.api_formats import ErrorReply
from hpc_router.relay.downstream.interface import (
    DownstreamGoneError,
    Response,
    error_response,
    json_response,
)
from hpc_router.relay.in_flight import InFlight
from hpc_router.relay.response_relay import RelayLimits, ResponseRelay
from hpc_router.relay.upstream.interface import (
    Upstream,
    UpstreamResponse,
    UpstreamTimeouts,
)
from hpc_router.router.metrics import Metrics
from hpc_router.router.replicas.replica import Event, Replica, Reservation, RoutingState
from hpc_router.router.replicas.sessions import not_found
from hpc_router.router.replicas.table import QueueFullError, ReplicaLostError, ReplicaTable
from hpc_router.router.worker.error_responses import RETRY_AFTER_S, ErrorResponses
from hpc_router.router.worker.retry_budget import RetryBudget
from hpc_router.router.worker.routed_request import RETRY_STATUSES, REVIEWED_STATUSES, RequestResult, RoutedRequest
from hpc_router.state.registry import RecordKind

logger = logging.getLogger(__name__)

MAX_ATTEMPTS: Final = 6
_BUSY: Final = 429
_AWAY: Final = 503
_FAILED: Final = 500
_LOST: Final = 502
"""With the "starting" header: the engine had received the request and went away."""
_LOCAL_ERRNOS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM})
"""Local causes of failed connections, which say nothing about the replica."""
_MAX_ENGINES_LOST: Final = 2
"""Engines that a request may lose: it may be the cause, and must not crash all engines of its expert."""
_MAX_ERROR_BYTES: Final = 2**20


def stream_timeouts_of(config: RouterConfig) -> UpstreamTimeouts:
    return UpstreamTimeouts(config.connect_timeout_s, config.first_byte_timeout_s, config.idle_timeout_s)


class HealthReporter(Protocol):
    """Gets what requests observe of replicas."""

    def connect_failed(self, replica: Replica, trouble: str) -> None:
        """No connection could be made."""

    def request_failed(self, replica: Replica, trouble: str) -> None:
        """It failed a request that another replica served."""

    def request_succeeded(self, replica: Replica) -> None:
        """It served a request after it had failed one."""

    def state_reported(self, replica: Replica, event: Event) -> None:
        """It reported its own state in a response."""

    def recheck(self, replica: Replica) -> None:
        """A request failed, possibly because of the replica: probe it."""


class _RetryError(Exception):
    """This attempt failed before anything was sent to the client; the failure is recorded."""


@dataclass(slots=True)
class Dispatcher:
    table: ReplicaTable
    health: HealthReporter
    client: Upstream
    metrics: Metrics
    config: RouterConfig
    in_flight: InFlight
    errors: ErrorResponses = field(init=False)
    relay_limits: RelayLimits = field(init=False)
    stream_timeouts: UpstreamTimeouts = field(init=False)
    response_timeouts: UpstreamTimeouts = field(init=False)
    retries: RetryBudget = field(init=False)

    def __post_init__(self) -> None:
        self.errors = ErrorResponses(self.metrics)
        self.configure(self.config)

    def configure(self, config: RouterConfig) -> None:
        """Apply to later requests; running ones keep their limits."""
        self.config = config
        self.client.limits = self.stream_timeouts = stream_timeouts_of(config)
        self.response_timeouts = replace(self.stream_timeouts, first_byte_s=config.answer_timeout_s)
        self.retries = RetryBudget(share=config.retry_share, least_per_s=config.retry_least_per_s)
        self.relay_limits = RelayLimits(
            buffer_bytes=int(config.hold_mb * 2**20), write_s=config.idle_timeout_s, ping_s=config.ping_s
        )

    async def respond(self, routed: RoutedRequest) -> Response | None:
        """Serve `routed` in a task. Raises only DownstreamGoneError."""
        if self.in_flight.closing:
            routed.request.keep_alive = False
        try:
            result = await self._attempts(routed)
        except asyncio.CancelledError:
            self.metrics.cancelled.add(routed.phase)
            raise
        except DownstreamGoneError:
            raise
        except Exception as error:  # noqa: BLE001  # logged and reported to the client
            return self.errors.response_to(error, routed.request, routed.request_id)
        self.metrics.requests.add(result.expert, result.reason.value, result.status)
        return result.response

    async def _attempts(self, routed: RoutedRequest) -> RequestResult:
        deadline = routed.started + self.config.queue_timeout_s
        attempts = 0
        while attempts < MAX_ATTEMPTS:
            reservation, routed.reservation = routed.reservation, None
            if reservation is None:
                reservation = self.table.acquire(
                    routed.experts, avoid=routed.avoid, only=routed.only, affinity_slot=routed.slot
                )
            if reservation is None and routed.error_result is not None:
                return routed.error_result
            if reservation is None:
                routed.phase = "queued"
                reservation = await self._wait(routed, deadline)
            with reservation:
                attempts += 1
                try:
                    return await self._attempt(routed, reservation)
                except _RetryError as error:
                    broken = isinstance(error.__cause__, UpstreamError)
                    if not (attempts == 1 and broken) and not self._may_retry(reservation.replica):
                        break
        if routed.error_result is not None:
            return routed.error_result
        times = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        where = ", ".join(sorted(replica.name for replica in routed.avoid))
        raise UnavailableError(f"{times} failed, on {where}", retry_after_s=RETRY_AFTER_S)

    def _may_retry(self, replica: Replica) -> bool:
        """Whether the retry budget allows a retry. After the loss of the replica it is free, because that replica is
        not used again."""
        if replica.state is not RoutingState.READY:
            return True
        if self.retries.try_retry(time.monotonic(), requests=self.table.acquired_total):
            return True
        self.metrics.retries_refused.add()
        return False

    async def _wait(self, routed: RoutedRequest, deadline: float) -> Reservation:
        started = time.perf_counter()
        try:
            async with asyncio.timeout(deadline - started):
                reservation = await self.table.wait(routed.experts, avoid=routed.avoid, only=routed.only)
        except ReplicaLostError as error:
            raise not_found(str(error)) from error
        except QueueFullError as error:
            kind = OverloadedError if error.serves else UnavailableError
            raise kind(str(error), retry_after_s=self.table.wait_s(error.expert)) from error
        except TimeoutError as error:
            waited = f"within {self.config.queue_timeout_s:g} s"
            raise UnavailableError(
                f"no replica of {' or '.join(routed.experts)} could take the request {waited}",
                retry_after_s=max(map(self.table.wait_s, routed.experts)),
            ) from error
        self.metrics.queued.add(time.perf_counter() - started, reservation.expert)
        return reservation

    def _exchange(
        self, routed: RoutedRequest, reservation: Reservation
    ) -> AbstractAsyncContextManager[UpstreamResponse]:
        head, body = routed.request_for(reservation)
        sent, routed.sent = routed.sent, None
        return self.client.request(
            "POST", reservation.replica.address, routed.endpoint.target, head=head, body=body, watch=reservation.watch,
            started=sent, limits=routed.timeouts(),
        )  # fmt: skip

    async def _attempt(self, routed: RoutedRequest, reservation: Reservation) -> RequestResult:
        replica, expert = reservation.replica, reservation.expert
        reason = routed.reason_at(expert)
        begun, routed.relay = routed.relay, None
        relay = begun or routed.new_relay()
        routed.phase = "before_first_byte" if begun is None else "streaming"

        try:
            async with self._exchange(routed, reservation) as upstream:
                if begun is not None:
                    await relay.relay_events(upstream)
                else:
                    if upstream.status in REVIEWED_STATUSES:
                        error = await self._review_status(routed, reservation, upstream)
                        if error is not None:
                            return error
                    await relay.relay(upstream, routed.accept(reservation, upstream.status, upstream.headers))
        except DownstreamGoneError:
            self.metrics.cancelled.add("streaming")
        except UpstreamTimeoutError as error:
            if reservation.lost and not relay.committed:
                self._record_failure(routed, reservation, error)
                raise _RetryError from error
            timeout = self._timeout_error(routed, replica, answered=relay.status != 0)
            if not relay.committed:
                raise timeout from error
            await self._end_with_error(
                routed, expert, relay, ErrorReply(504, "timeout_error", "answer_timeout", str(timeout))
            )
        except UpstreamError as error:
            if not relay.committed:
                self._record_failure(routed, reservation, error)
                if isinstance(error, UpstreamAbortedError):  # the next attempt may fail in the same way
                    response = json_response(
                        routed.endpoint.api_format.error_body(_failure_reply(replica, error)), status=502
                    )
                    response.add(protocol.REQUEST_ID_HEADER, routed.request_id)
                    routed.error_result = RequestResult(502, expert, reason, response)
                raise _RetryError from error
            self.health.recheck(replica)
            await self._end_with_error(routed, expert, relay, _failure_reply(replica, error))
        return RequestResult(relay.status, expert, reason, relay.response)

    async def _review_status(
        self, routed: RoutedRequest, reservation: Reservation, upstream: UpstreamResponse
    ) -> RequestResult | None:
        """Check an error status, before anything is sent to the client. Raises _RetryError if another replica should be
        tried; otherwise returns the result, or None to relay the response."""
        replica, status, headers = reservation.replica, upstream.status, upstream.headers
        external = replica.record.kind is RecordKind.EXTERNAL
        if status == 401 and external:  # the client's own token is valid
            routed.avoid |= {replica}
            self.metrics.failovers.add(replica.name, status)
            routed.error_result = self._wants_token(routed, reservation)
            raise _RetryError
        if status == 401 and replica.key is not None:
            raise UpstreamConnectError("the replica refused the router's key")
        if status not in RETRY_STATUSES:
            return None
        routed.avoid |= {replica}
        if protocol.DRAINING_HEADER.encode() in headers:
            self.metrics.failovers.add(replica.name, "draining")
            # At the address of an external endpoint a new server may start.
            self.health.state_reported(replica, Event.SAYS_STARTING if external else Event.SAYS_DRAINING)
        elif protocol.STARTING_HEADER.encode() in headers:
            self.metrics.failovers.add(replica.name, "starting")
            self.health.state_reported(replica, Event.SAYS_STARTING)
            routed.engines_lost += status == _LOST
            if routed.engines_lost >= _MAX_ENGINES_LOST:
                return await self._error_response(routed, reservation, upstream)
        elif status == _BUSY or (status == _AWAY and b"retry-after" in headers):
            self.metrics.failovers.add(replica.name, _BUSY if status == _BUSY else "busy")
            routed.error_result = await self._error_response(routed, reservation, upstream)
        else:
            self.metrics.failovers.add(replica.name, status)
            routed.error_result = await self._error_response(routed, reservation, upstream)
            if status == _FAILED and any(seen == _FAILED for _, _, seen in routed.failed_attempts):
                return routed.error_result  # two replicas fail in the same way: the request is the cause
            routed.failed_attempts += ((replica, reservation.expert, status),)
        raise _RetryError

    def report_failures(self, routed: RoutedRequest, expert: str) -> None:
        """A replica of this expert has served the request: report the replicas of the expert that failed it."""
        for replica, of, seen in routed.failed_attempts:
            if of == expert:
                self.health.request_failed(
                    replica, f"{replica.record.url} answered {seen}" if isinstance(seen, int) else seen
                )
        routed.failed_attempts = ()

    def _wants_token(self, routed: RoutedRequest, reservation: Reservation) -> RequestResult:
        message = f"{reservation.replica.record.url} answered 401: `hpc-router register` it again with --token-file"
        reason, path = routed.reason_at(reservation.expert), routed.endpoint.path
        response = error_response(502, kind="upstream_error", code="endpoint_unauthorized", message=message, path=path)
        response.add(protocol.REQUEST_ID_HEADER, routed.request_id)
        response.head += routed.routing_headers(reservation)
        return RequestResult(502, reservation.expert, reason, response)

    async def _error_response(
        self, routed: RoutedRequest, reservation: Reservation, upstream: UpstreamResponse
    ) -> RequestResult:
        body = await upstream.read(_MAX_ERROR_BYTES)
        response = Response(upstream.status, routed.response_head(reservation, upstream.headers), body)
        return RequestResult(upstream.status, reservation.expert, routed.reason_at(reservation.expert), response)

    def _record_failure(self, routed: RoutedRequest, reservation: Reservation, error: UpstreamError) -> None:
        replica, expert = reservation.replica, reservation.expert
        logger.warning("%s: %s failed before its first byte: %s", routed.request_id, replica.name, error)
        self.metrics.failovers.add(replica.name, type(error).__name__)
        routed.avoid |= {replica}
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in _LOCAL_ERRNOS:
            return
        if isinstance(error, UpstreamConnectError):
            self.health.connect_failed(replica, f"{replica.record.url}: {error}")
        else:
            routed.failed_attempts += ((replica, expert, str(error)),)
            self.health.recheck(replica)

    def _timeout_error(self, routed: RoutedRequest, replica: Replica, *, answered: bool) -> AnswerTimeoutError:
        """The error for a timeout. It is no evidence against the replica, whose probes succeed."""
        if answered:
            key, limit_s, what = "idle_timeout_s", self.config.idle_timeout_s, "paused for longer than"
        elif routed.call.fields.get("stream"):
            key, limit_s, what = "first_byte_timeout_s", self.config.first_byte_timeout_s, "did not begin within"
        else:
            key, limit_s, what = "answer_timeout_s", self.config.answer_timeout_s, "was not complete within"
        advice = "raise that key, or ask for less" + (", or stream it" if key == "answer_timeout_s" else "")
        return AnswerTimeoutError(f"the response of {replica.name} {what} router.{key}={limit_s:g}: {advice}")

    async def _end_with_error(
        self, routed: RoutedRequest, expert: str, relay: ResponseRelay, fault: ErrorReply
    ) -> None:
        logger.warning("%s: broken off: %s", routed.request_id, fault.message)
        self.metrics.broken.add(expert)
        try:
            await relay.end_with_error(routed.endpoint.api_format.error_event(fault))
        except DownstreamGoneError:
            self.metrics.cancelled.add("streaming")


def _failure_reply(replica: Replica, error: UpstreamError) -> ErrorReply:
    message = f"{replica.name} failed before it had finished: {error}"
    return ErrorReply(502, "upstream_error", "replica_failed", message)
