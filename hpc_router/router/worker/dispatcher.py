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
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from functools import lru_cache
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
from hpc_router.relay.api_formats import ApiFormat, ErrorReply
from hpc_router.relay.downstream.interface import (
    SHORT_BYTES,
    DownstreamGoneError,
    PendingResponse,
    Request,
    Response,
    error_response,
    json_response,
)
from hpc_router.relay.headers import NOT_DOWNSTREAM, NOT_UPSTREAM, REQUEST_ID, Headers, crossing
from hpc_router.relay.in_flight import InFlight
from hpc_router.relay.response_relay import RelayLimits, ResponseRelay
from hpc_router.relay.sse import CONTENT_TYPE
from hpc_router.relay.upstream.interface import (
    PendingRequest,
    ResponseCallback,
    Upstream,
    UpstreamResponse,
    UpstreamTimeouts,
)
from hpc_router.router.metrics import Metrics
from hpc_router.router.replicas.balancing import KEY_CHARS, affinity_slot
from hpc_router.router.replicas.replica import Event, Replica, Reservation, RoutingState
from hpc_router.router.replicas.sessions import not_found
from hpc_router.router.replicas.table import QueueFullError, ReplicaLostError, ReplicaTable
from hpc_router.router.worker.error_responses import RETRY_AFTER_S, ErrorResponses
from hpc_router.router.worker.request_body import ApiCall
from hpc_router.router.worker.retry_budget import RetryBudget
from hpc_router.routing.policy import RouteReason
from hpc_router.routing.prompt_text import first_user_message
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
_RETRY_STATUSES: Final = frozenset({429, 500, 502, 503, 504})
_MAX_ENGINES_LOST: Final = 2
"""Engines that a request may lose: it may be the cause, and must not crash all engines of its expert."""
_REVIEWED_STATUSES: Final = _RETRY_STATUSES | {401}
_SESSION: Final = protocol.SESSION_HEADER.encode()
_MAX_ERROR_BYTES: Final = 2**20
_OWN_DOWNSTREAM: Final = NOT_DOWNSTREAM | {REQUEST_ID, b"x-expert", b"x-replica", b"x-route-reason"}


def stream_timeouts_of(config: RouterConfig) -> UpstreamTimeouts:
    return UpstreamTimeouts(config.connect_timeout_s, config.first_byte_timeout_s, config.idle_timeout_s)


class RoutedRequest(PendingResponse, ResponseCallback):
    """A request with its route, and the state of its dispatch. `experts`: tried in this order. `reason`: why the first
    of them was chosen. `only`: the only replica that may serve it. `on_success` is called with the replica of a 2xx
    response, before the client receives any of it.

    It counts as in flight from `start` until its end. It is served by callbacks if only the replica has to be awaited:
    an expert has a free replica, a connection is pooled, and a short response without an error is received in one read.
    Otherwise it continues in a task, from the current state. Rarely used fields are class attributes until they are
    set, which saves time per request.
    """

    only: Replica | None = None
    on_success: Callable[[Replica, str, RouteReason], None] | None = None
    phase = "queued"
    reservation: Reservation | None = None
    sent: PendingRequest | None = None
    """The request to the reserved replica, once it is sent without a task."""
    avoid: frozenset[Replica] = frozenset()
    error_result: "RequestResult | None" = None
    """The last error response of a replica, which the client gets if no other replica serves the request."""
    failed_attempts: tuple[tuple[Replica, str, int | str], ...] = ()
    """Failed attempts: replica, expert, and status or connection error. Reported as evidence of bad health only if
    another replica of the same expert serves the request."""
    engines_lost = 0
    """Number of engines that went away while they had this request."""

    def __init__(
        self,
        dispatcher: "Dispatcher",
        request: Request,
        request_id: str,
        call: ApiCall,
        api_format: ApiFormat,
        target: str,
        experts: tuple[str, ...],
        reason: RouteReason,
        started: float,
    ) -> None:
        self.dispatcher = dispatcher
        self.request = request
        self.request_id = request_id
        self.call = call
        self.api_format = api_format
        self.target = target
        self.experts = experts
        self.reason = reason
        self.started = started

    def start(self) -> None:
        """Send the request if that is possible without waiting; otherwise continue in a task."""
        dispatcher = self.dispatcher
        dispatcher.in_flight.enter()
        self.reservation = reservation = dispatcher.table.acquire(self.experts, affinity_slot=self.slot)
        if reservation is None:
            self.request.resume()
            return
        try:
            head, body = dispatcher.request_for(self, reservation)
            self.sent = sent = dispatcher.client.start(
                "POST", reservation.replica.address, self.target, head=head, body=body, callback=self,
                limits=dispatcher.limits_of(self),
            )  # fmt: skip
        except Exception:
            self._release()
            raise
        if sent is None:  # no connection is pooled
            self.request.resume()
        else:
            reservation.watch(sent.idle_timer)
            self.phase = "before_first_byte"

    async def run(self) -> Response | None:
        try:
            return await self.dispatcher.respond(self)
        finally:
            self.dispatcher.in_flight.leave()

    def cancel(self) -> None:
        if self.sent is not None:
            self.sent.cancel()
        self._release()
        self.dispatcher.metrics.cancelled.add(self.phase)

    def _release(self) -> None:
        if self.reservation is not None:
            self.reservation.release()
        self.dispatcher.in_flight.leave()

    def on_response(self, status: int, headers: Headers, body: bytes) -> bool:
        dispatcher, reservation = self.dispatcher, self.reservation
        if status in _REVIEWED_STATUSES or headers.content_type == CONTENT_TYPE or len(body) > SHORT_BYTES:
            return False
        if self.api_format.abort_detector.may_be_aborted(body):
            return False
        assert reservation is not None
        replica, expert = reservation.replica, reservation.expert
        if replica.recent_error:
            dispatcher.health.request_succeeded(replica)
        if dispatcher.in_flight.closing:
            self.request.keep_alive = False
        metrics = dispatcher.metrics
        metrics.first_byte.add(time.perf_counter() - self.started, expert, replica.record.replica)
        reason = self.reason_at(expert)
        metrics.requests.add(expert, reason.value, status)
        head = self.response_head(headers, _routing_headers(expert, replica.record.replica, reason))
        reservation.release()
        dispatcher.in_flight.leave()
        self.request.respond(status, head, body)
        return True

    def on_incomplete(self) -> None:
        self.request.resume()

    def response_head(self, headers: Headers, routing_headers: bytes) -> bytes:
        """The header lines of the response to the client: the engine's and the router's."""
        return b"%bx-request-id: %b\r\n%b" % (
            crossing(headers, drop=_OWN_DOWNSTREAM),
            self.request_id.encode(),
            routing_headers,
        )

    def reason_at(self, expert: str) -> RouteReason:
        return self.reason if expert == self.experts[0] else RouteReason.UNAVAILABLE

    def slot(self) -> int | None:
        """The affinity slot of its conversation (see `balancing`): of the session, else of the first user message."""
        session = self.request.headers.get(_SESSION)
        if session is not None:
            return affinity_slot(session)
        text = first_user_message(self.call.fields)
        return None if text is None else affinity_slot(text[:KEY_CHARS].encode("utf-8", "backslashreplace"))


@dataclass(slots=True)
class RequestResult:
    """Result of a request. `response` None: it was streamed to the client."""

    status: int
    expert: str
    reason: RouteReason
    response: Response | None


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
        head, body = self.request_for(routed, reservation)
        sent, routed.sent = routed.sent, None
        return self.client.request(
            "POST", reservation.replica.address, routed.target, head=head, body=body, watch=reservation.watch,
            started=sent, limits=self.limits_of(routed),
        )  # fmt: skip

    def limits_of(self, routed: RoutedRequest) -> UpstreamTimeouts:
        """A response that is not streamed has its own limit for the first byte, because the engine sends it when
        complete."""
        return self.stream_timeouts if routed.call.fields.get("stream") else self.response_timeouts

    async def _attempt(self, routed: RoutedRequest, reservation: Reservation) -> RequestResult:
        replica, expert = reservation.replica, reservation.expert
        reason = routed.reason_at(expert)
        stream = routed.call.fields.get("stream") is True
        relay = ResponseRelay(routed.request, self.relay_limits, routed.api_format.abort_detector, stream=stream)
        routed.phase = "before_first_byte"

        try:
            async with self._exchange(routed, reservation) as upstream:
                if upstream.status in _REVIEWED_STATUSES:
                    error = await self._review_status(routed, reservation, upstream)
                    if error is not None:
                        return error
                elif replica.recent_error:
                    self.health.request_succeeded(replica)
                if routed.failed_attempts and 200 <= upstream.status < 300:
                    self._report_failures(routed, expert)
                if routed.on_success is not None and 200 <= upstream.status < 300:
                    routed.on_success(replica, expert, reason)
                self.metrics.first_byte.add(time.perf_counter() - routed.started, expert, replica.name)
                routed.phase = "streaming"
                await relay.relay(upstream, self.response_head(routed, reservation, upstream.headers))
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
                    response = json_response(routed.api_format.error_body(_failure_reply(replica, error)), status=502)
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
        if status not in _RETRY_STATUSES:
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

    def _report_failures(self, routed: RoutedRequest, expert: str) -> None:
        """A replica of this expert has served the request: report the replicas of the expert that failed it."""
        for replica, of, seen in routed.failed_attempts:
            if of == expert:
                self.health.request_failed(
                    replica, f"{replica.record.url} answered {seen}" if isinstance(seen, int) else seen
                )
        routed.failed_attempts = ()

    def _wants_token(self, routed: RoutedRequest, reservation: Reservation) -> RequestResult:
        message = f"{reservation.replica.record.url} answered 401: `hpc-router register` it again with --token-file"
        reason, path = routed.reason_at(reservation.expert), routed.target.partition("?")[0]
        response = error_response(502, kind="upstream_error", code="endpoint_unauthorized", message=message, path=path)
        response.add(protocol.REQUEST_ID_HEADER, routed.request_id)
        response.head += _routing_headers(reservation.expert, reservation.replica.record.replica, reason)
        return RequestResult(502, reservation.expert, reason, response)

    async def _error_response(
        self, routed: RoutedRequest, reservation: Reservation, upstream: UpstreamResponse
    ) -> RequestResult:
        body = await upstream.read(_MAX_ERROR_BYTES)
        response = Response(upstream.status, self.response_head(routed, reservation, upstream.headers), body)
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
            await relay.end_with_error(routed.api_format.error_event(fault))
        except DownstreamGoneError:
            self.metrics.cancelled.add("streaming")

    def request_for(self, routed: RoutedRequest, reservation: Reservation) -> tuple[bytes, bytes]:
        """Header lines and body of the request to this replica."""
        replica = reservation.replica
        head = b"%b%bx-request-id: %b\r\n" % (
            crossing(routed.request.headers, drop=NOT_UPSTREAM),
            replica.authorization,
            routed.request_id.encode(),
        )
        return head, _body(routed.call, reservation.expert, replica)

    def response_head(self, routed: RoutedRequest, reservation: Reservation, headers: Headers) -> bytes:
        expert = reservation.expert
        routing_headers = _routing_headers(expert, reservation.replica.record.replica, routed.reason_at(expert))
        return routed.response_head(headers, routing_headers)


def _body(call: ApiCall, expert: str, replica: Replica) -> bytes:
    """The client's bytes, if the replica knows this expert by the requested name; otherwise with the name replaced.

    A replica with one expert means it by each of its model names; for others the record has the name.
    """
    record, asked = replica.record, call.fields["model"]
    if record.serves.get(expert) == asked:
        return call.raw
    wanted = replica.model_for(expert)
    aliased = record.kind is RecordKind.EXPERT and len(record.serves) == 1 and asked in replica.models
    return call.raw if wanted is None or asked == wanted or aliased else call.body(wanted)


def _failure_reply(replica: Replica, error: UpstreamError) -> ErrorReply:
    message = f"{replica.name} failed before it had finished: {error}"
    return ErrorReply(502, "upstream_error", "replica_failed", message)


@lru_cache(maxsize=1024)
def _routing_headers(expert: str, replica: str, reason: RouteReason) -> bytes:
    return f"x-expert: {expert}\r\nx-replica: {replica}\r\nx-route-reason: {reason}\r\n".encode()
