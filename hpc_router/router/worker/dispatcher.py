"""Dispatches one API request, from its decoded body to the last byte of its response.

The dispatcher acquires a replica of the request's experts and relays the response. Until the first body byte is
received, a failed attempt is retried on another replica: for `auto` on replicas of the chosen expert, of the runner-up
and of the fallback, otherwise only on replicas of the named expert. A request waits for a replica up to
`router.queue_timeout_s`, and longer while one starts (`cold_start`). A budget limits the retries.

A request that was begun by callbacks (`routed_request`) continues here from its state: with its reservation, its
connection, and the part of a stream that the client has already.
"""

import asyncio
import logging
import time
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from typing import Final

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
from hpc_router.relay.api_formats import ErrorReply
from hpc_router.relay.downstream.interface import (
    DownstreamGoneError,
    Response,
)
from hpc_router.relay.in_flight import InFlight
from hpc_router.relay.response_relay import RelayLimits, ResponseRelay
from hpc_router.relay.upstream.interface import (
    Upstream,
    UpstreamResponse,
    UpstreamTimeouts,
)
from hpc_router.router.metrics import Metrics
from hpc_router.router.replicas.replica import Replica, Reservation, RoutingState
from hpc_router.router.replicas.sessions import not_found
from hpc_router.router.replicas.table import QueueFullError, ReplicaLostError, ReplicaTable
from hpc_router.router.worker.attempt_review import (
    MAX_ENGINES_LOST,
    AttemptReview,
    HealthReporter,
    RetryError,
    error_result,
)
from hpc_router.router.worker.cold_start import ColdStartWait
from hpc_router.router.worker.error_responses import RETRY_AFTER_S, ErrorResponses, error_code
from hpc_router.router.worker.request_records import ANSWERED, BROKEN, CANCELLED, REFUSED, RequestRecords
from hpc_router.router.worker.retry_budget import RetryBudget
from hpc_router.router.worker.routed_request import REVIEWED_STATUSES, RequestResult, RoutedRequest

logger = logging.getLogger(__name__)

MAX_ATTEMPTS: Final = 6
"""Maximum number of attempts for one request."""
_NOTEWORTHY_S: Final = 0.001
"""Minimum delay in seconds before an attempt that is recorded. The statistics subtract recorded delays from the
replica's time to the first byte."""


def stream_timeouts_of(config: RouterConfig) -> UpstreamTimeouts:
    """Returns the configured timeouts for streamed responses."""
    return UpstreamTimeouts(config.connect_timeout_s, config.first_byte_timeout_s, config.idle_timeout_s)


@dataclass(slots=True)
class Dispatcher:
    """Serves the routed requests of one worker that need a task."""

    table: ReplicaTable
    health: HealthReporter
    client: Upstream
    metrics: Metrics
    config: RouterConfig
    in_flight: InFlight
    records: RequestRecords
    errors: ErrorResponses = field(init=False)
    review: AttemptReview = field(init=False)
    relay_limits: RelayLimits = field(init=False)
    stream_timeouts: UpstreamTimeouts = field(init=False)
    response_timeouts: UpstreamTimeouts = field(init=False)
    retries: RetryBudget = field(init=False)

    def __post_init__(self) -> None:
        self.errors = ErrorResponses(self.metrics)
        self.review = AttemptReview(self.health, self.metrics)
        self.configure(self.config)

    def configure(self, config: RouterConfig) -> None:
        """Applies the config to later requests; running requests keep their limits."""
        self.config = config
        self.client.limits = self.stream_timeouts = stream_timeouts_of(config)
        self.response_timeouts = replace(self.stream_timeouts, first_byte_s=config.answer_timeout_s)
        self.retries = RetryBudget(share=config.retry_share, least_per_s=config.retry_least_per_s)
        self.relay_limits = RelayLimits(
            buffer_bytes=int(config.hold_mb * 2**20), write_s=config.idle_timeout_s, ping_s=config.ping_s
        )

    async def respond(self, routed: RoutedRequest) -> Response | None:
        """Serves `routed` in a task and returns the response; None if it was streamed. Raises only
        DownstreamGoneError."""
        if self.in_flight.closing:
            routed.request.keep_alive = False
        if self.config.early_headers_s is not None:
            routed.begin_early(self.config.early_headers_s)
        try:
            result = await self._attempts(routed)
        except asyncio.CancelledError:
            self.metrics.cancelled.add(routed.phase)
            routed.left = True
            routed.record(routed.status, CANCELLED)
            raise
        except DownstreamGoneError:
            routed.record(routed.status, CANCELLED)
            raise
        except Exception as error:  # noqa: BLE001  # logged and reported to the client
            response = self.errors.response_to(error, routed.request, routed.request_id)
            routed.record(response.status, REFUSED, error=error_code(error))
            return self._after_early(routed, response)
        finally:
            if routed.early is not None:
                routed.early.stop()
            if routed.charge is not None:
                routed.settle()
        outcome = CANCELLED if routed.left else BROKEN if routed.broken else ANSWERED
        if outcome is not ANSWERED:  # `record` counts the others
            self.metrics.requests.add(result.expert, result.reason.value, result.status)
        routed.record(result.status, outcome, expert=result.expert)
        return self._after_early(routed, result.response)

    def _after_early(self, routed: RoutedRequest, response: Response | None) -> Response | None:
        """Returns the response. But if the head of a stream was sent early, before the first event, the status of
        `response` cannot be sent any more: sends it as an event that ends the stream, and returns None."""
        early = routed.early
        if response is None or early is None or not early.started:
            return response
        self.metrics.broken.add(routed.experts[0])
        early.end_with(response, routed.endpoint.api_format)
        return None

    async def _attempts(self, routed: RoutedRequest) -> RequestResult:
        """Tries replicas until one serves the request, and returns the result. Raises a RoutingError if none does."""
        routed.queue_until = routed.started + self.config.queue_timeout_s
        attempts = routed.attempts = 0
        while attempts < MAX_ATTEMPTS:
            reservation, routed.reservation = routed.reservation, None
            if reservation is None:
                mode = routed.endpoint.wait or self.config.cold_start
                routed.experts = self.table.without_fallback(routed.experts, mode, avoid=routed.avoid)
                reservation = self.table.acquire(
                    routed.experts,
                    avoid=routed.avoid,
                    only=routed.only,
                    prefix=routed.prefix,
                    needed_s=routed.needed_s,
                    request_class=routed.endpoint.request_class,
                )
            if reservation is None and routed.error_result is not None:
                return routed.error_result
            if reservation is None:
                routed.phase = "queued"
                reservation = await self._wait(routed)
            if reservation.expert != routed.experts[0]:
                routed.count_cold("fell_back")
            with reservation:
                attempts += 1
                routed.attempts, routed.tried = attempts, reservation
                try:
                    result = await self._attempt(routed, reservation)
                    routed.measure(reservation)
                    return result
                except RetryError as error:
                    if error.begun and not routed.repeatable:
                        lost = _unknown_outcome(reservation.replica, routed.method)
                        routed.error_result = routed.error_result or error_result(routed, reservation, lost)
                        break
                    broken = isinstance(error.__cause__, UpstreamError)
                    if not (attempts == 1 and broken) and not self._may_retry(reservation.replica):
                        break
        if routed.error_result is not None:
            return routed.error_result
        times = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        where = ", ".join(sorted(replica.name for replica in routed.avoid))
        raise UnavailableError(f"{times} failed, on {where}", retry_after_s=RETRY_AFTER_S)

    def _may_retry(self, replica: Replica) -> bool:
        """Returns whether the request may be tried again after a failed attempt on `replica`, and counts the retry in
        the retry budget. If `replica` is not ready any more, the retry is always allowed and not counted, because such
        a replica gets no further requests that could fail."""
        if replica.state is not RoutingState.READY:
            return True
        if self.retries.try_retry(time.monotonic(), requests=self.table.acquired_total):
            return True
        self.metrics.retries_refused.add()
        return False

    async def _wait(self, routed: RoutedRequest) -> Reservation:
        """Waits until `routed.queue_until` for a reservation, and returns it. Raises UnavailableError after that time,
        ColdStartError if no replica is ready and the request is not to wait for one, OverloadedError or ShedError if
        the queue is full, and a not-found error if the only replica that may serve the request is lost."""
        started = time.perf_counter()
        wait = ColdStartWait(routed, self.table, self.config)
        wait.check()
        try:
            async with wait:
                reservation = await self.table.wait(
                    routed.experts, avoid=routed.avoid, only=routed.only, flow=routed.flow()
                )
        except ReplicaLostError as error:
            raise (routed.lost_error or not_found)(str(error)) from error
        except QueueFullError as error:
            kind = OverloadedError if error.serves else UnavailableError
            raise kind(str(error), retry_after_s=self.table.wait_s(error.expert)) from error
        except TimeoutError as error:
            waited = f"within {round(routed.queue_until - routed.started, 2):g} s"
            raise UnavailableError(
                f"no replica of {' or '.join(routed.experts)} could take the request {waited}{wait.state()}",
                retry_after_s=max(map(self.table.wait_s, routed.experts)),
            ) from error
        self.table.place(reservation, routed.prefix)
        waited_s = time.perf_counter() - started
        routed.queued_s += waited_s
        self.metrics.queued.add(waited_s, reservation.expert)
        return reservation

    def _exchange(
        self, routed: RoutedRequest, reservation: Reservation
    ) -> AbstractAsyncContextManager[UpstreamResponse]:
        head, body = routed.request_for(reservation)
        sent, routed.sent = routed.sent, None
        return self.client.request(
            routed.method, reservation.replica.address, routed.endpoint.target, head=head, body=body or None,
            watch=reservation.watch, started=sent, limits=routed.timeouts(),
        )  # fmt: skip

    async def _attempt(self, routed: RoutedRequest, reservation: Reservation) -> RequestResult:
        """Sends the request to the reserved replica, relays its response to the client and returns the result. Raises
        RetryError if the attempt failed before anything was sent to the client. After a later failure, an error ends
        the client's response."""
        replica, expert = reservation.replica, reservation.expert
        reason = routed.reason_at(expert)
        begun, routed.relay = routed.relay, None
        relay = begun or routed.new_relay(reservation)
        routed.phase = "before_first_byte" if begun is None else "streaming"
        waited_s = 0.0 if begun is not None or routed.sent is not None else time.perf_counter() - routed.started

        try:
            async with self._exchange(routed, reservation) as upstream:
                if begun is not None:
                    await relay.relay_events(upstream)
                else:
                    if upstream.status in REVIEWED_STATUSES:
                        error = await self.review.review_status(routed, reservation, upstream)
                        if error is not None:
                            return error
                    if waited_s > _NOTEWORTHY_S:
                        self.metrics.before_attempt.add(waited_s, expert, replica.name)
                    await relay.relay(upstream, routed.accept(reservation, upstream.status, upstream.headers))
        except DownstreamGoneError:
            routed.left = True
            self.metrics.cancelled.add("streaming")
        except UpstreamTimeoutError as error:
            if reservation.lost and not relay.committed:
                self.review.record_failure(routed, reservation, error)
                raise RetryError(begun=True) from error
            timeout = self._timeout_error(routed, replica, answered=relay.status != 0)
            if not relay.committed:
                raise timeout from error
            fault = ErrorReply(504, "timeout_error", "answer_timeout", str(timeout))
            if reservation.lost:  # the limit was LOST_S, not a key of the config
                cause = replica.trouble or "its probes fail"
                fault = _failure_reply(replica, UpstreamError(f"it does not answer any more ({cause})"))
            await self._end_with_error(routed, expert, relay, fault)
        except UpstreamError as error:
            if not relay.committed:
                self.review.record_failure(routed, reservation, error)
                if isinstance(error, UpstreamAbortedError):  # the next attempt may fail in the same way
                    routed.error_result = error_result(routed, reservation, _failure_reply(replica, error))
                elif not isinstance(error, UpstreamConnectError) and routed.method != "GET":  # a GET generates nothing
                    routed.engines_lost += 1
                    if routed.engines_lost >= MAX_ENGINES_LOST:
                        return error_result(routed, reservation, _failure_reply(replica, error))
                raise RetryError(begun=not isinstance(error, UpstreamConnectError) or error.sent) from error
            self.health.recheck(replica)
            await self._end_with_error(routed, expert, relay, _failure_reply(replica, error))
        return RequestResult(relay.status, expert, reason, relay.response)

    def _timeout_error(self, routed: RoutedRequest, replica: Replica, *, answered: bool) -> AnswerTimeoutError:
        """Returns the error for a response that took too long. `answered`: whether its first byte was received: if so,
        the idle timeout has expired, else the timeout of the first byte. The timeout is not reported as a failure of
        the replica, because the replica's probes succeed."""
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
        routed.broken = True
        try:
            await relay.end_with_error(routed.endpoint.api_format.error_event(fault))
        except DownstreamGoneError:
            self.metrics.cancelled.add("streaming")


def _unknown_outcome(replica: Replica, method: str) -> ErrorReply:
    message = f"{replica.name} failed before its response, so the {method} may have taken effect"
    return ErrorReply(502, "upstream_error", "replica_failed", message)


def _failure_reply(replica: Replica, error: UpstreamError) -> ErrorReply:
    message = f"{replica.name} failed before it had finished: {error}"
    return ErrorReply(502, "upstream_error", "replica_failed", message)
