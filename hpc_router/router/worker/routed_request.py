"""A request whose experts are chosen. It is sent and answered by callbacks, without a task, where that is possible.

`RoutedRequest` holds the state of one request from the choice of the experts to the end of its response. If something
has to be awaited (a queue, a connection, a retry, a long body), `dispatcher` continues from this state in a task.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from hpc_router.errors import RoutingError
from hpc_router.net import protocol
from hpc_router.relay.api_formats import ApiFormat
from hpc_router.relay.downstream.interface import (
    SHORT_BYTES,
    PendingResponse,
    Request,
    Response,
)
from hpc_router.relay.early_stream import EarlyStream
from hpc_router.relay.headers import NOT_DOWNSTREAM, NOT_UPSTREAM, REQUEST_ID, Headers, crossing
from hpc_router.relay.response_relay import EventStream, ResponseRelay
from hpc_router.relay.sse import CONTENT_TYPE
from hpc_router.relay.stream_summary import StreamSummary, TokenUsage, stated_usage
from hpc_router.relay.upstream.interface import (
    PendingRequest,
    ResponseCallback,
    UpstreamTimeouts,
    request_line,
)
from hpc_router.router.access.user_access import Charge, TokenSource
from hpc_router.router.replicas.fair_order import INTERACTIVE, OWNER_SLOT, Flow, RequestClass
from hpc_router.router.replicas.prefixes import PromptPrefix, prompt_prefix
from hpc_router.router.replicas.replica import Replica, Reservation
from hpc_router.router.worker.request_body import ApiCall
from hpc_router.router.worker.request_records import ANSWERED, CANCELLED
from hpc_router.routing.policy import Decision, RouteReason
from hpc_router.state.registry import RecordKind

if TYPE_CHECKING:
    from hpc_router.router.worker.dispatcher import Dispatcher

RETRY_STATUSES: Final = frozenset({429, 500, 502, 503, 504})
"""Statuses after which another replica is tried."""
MISSING_STATUSES: Final = frozenset({404, 405})
"""Statuses of an engine that may not serve the path at all."""
REVIEWED_STATUSES: Final = RETRY_STATUSES | MISSING_STATUSES | {400, 401}
"""Statuses that `AttemptReview` checks before the client gets the response."""
_STREAMED: Final = frozenset(protocol.GENERATE_PATHS) - {protocol.EMBEDDINGS}
"""Paths at which an engine streams."""
_SESSIONS: Final = tuple(name.encode() for name in (protocol.SESSION_HEADER, *protocol.AGENT_SESSION_HEADERS))
_CONTENT_ENCODING: Final = b"content-encoding"
_OWN_DOWNSTREAM: Final = NOT_DOWNSTREAM | {REQUEST_ID, b"x-expert", b"x-replica", b"x-route-reason"}


class ApiEndpoint(NamedTuple):
    """The API path of a request, and the other values that depend on its head only. `path`: the path without a final
    slash; `target`: path and query of the upstream request; `wait`: value of the header `x-wait`, which says whether
    the request waits while no replica is ready; None if there is none."""

    path: str
    target: str
    api_format: ApiFormat
    request_class: RequestClass = INTERACTIVE
    wait: str | None = None


class RoutedRequest(PendingResponse, ResponseCallback):
    """A request whose experts are chosen, and the state of its dispatch.

    `experts`: the experts in the order in which they are tried. `reason`: why the first of them was chosen. `only`: the
    only replica that may serve the request. `on_success` is called with the replica of a 2xx response, before the
    client receives any of it. `started`: time of the request's arrival (`time.perf_counter`).

    The request counts as in flight from `start` until its end. It is served by callbacks if an expert has a free
    replica, the pool has a connection to it, and the response is either short and received in one read, or a stream of
    events. Otherwise a task continues from the state reached. Rarely used fields are class attributes until they are
    set, which saves time per request.
    """

    method = "POST"
    repeatable = True
    """Whether the request may be sent again if an engine may have begun it. A request that generates text may, because
    it changes nothing; one that deletes or cancels may not."""
    only: Replica | None = None
    on_success: Callable[[Replica, str, RouteReason], None] | None = None
    phase = "queued"
    reservation: Reservation | None = None
    sent: PendingRequest | None = None
    """The request to the reserved replica, if it was sent without a task."""
    relay: ResponseRelay | None = None
    """The relay of a stream that is served without a task, or that was begun without the task that now serves it."""
    avoid: frozenset[Replica] = frozenset()
    error_result: "RequestResult | None" = None
    """The last error response of a replica, which the client gets if no other replica serves the request."""
    failed_attempts: tuple[tuple[Replica, str, int | str], ...] = ()
    """Failed attempts: replica, expert, and status or connection error. They are reported as evidence of bad health
    only if another replica of the same expert serves the request."""
    failovers: tuple[tuple[str, int | str], ...] = ()
    """All failed attempts, for the request's record: name of the replica, and status or kind of failure."""
    lost_error: Callable[[str], RoutingError] | None = None
    """Makes the error for a request whose `only` replica is not ready any more. None: the client gets the error that
    its session was lost."""
    engines_lost = 0
    """Number of attempts whose engine or connection ended before the response began."""
    user: str | None = None
    """The user of the request's token; None for the owner."""
    user_slot = OWNER_SLOT
    """The number of the user's token."""
    charge: Charge | None = None
    """What the request has taken of the limits of a user's token; None for the owner's requests."""
    summary: StreamSummary | None = None
    """What is known of the response of a request that may be a stream."""
    left = False
    """Whether the client has disconnected."""
    decision: Decision | None = None
    """The policy's decision; None if the request names its expert or continues a session."""
    artefact: str | None = None
    """The version of the classifier that has decided."""
    attempts = 1
    queued_s = 0.0
    """Time in seconds that the request has waited in queues."""
    first_byte_s: float | None = None
    """Time in seconds from the request's arrival to the head of the response that the client gets."""
    status: int | None = None
    """The status of the response that the client gets; None before its head has arrived."""
    tried: Reservation | None = None
    """The reservation of the last attempt in a task."""
    broken = False
    """Whether the response failed after its first byte."""
    early: EarlyStream | None = None
    """The start of a stream that may be sent before its first event."""
    queue_until = 0.0
    """Time (of `time.perf_counter`) until which the request may wait for a replica."""
    cold = False
    """Whether the request was counted in the metric of cold starts."""
    known_prefix: PromptPrefix | None = None
    """The result of `prefix`."""

    def __init__(
        self,
        dispatcher: "Dispatcher",
        request: Request,
        request_id: str,
        call: ApiCall,
        endpoint: ApiEndpoint,
        experts: tuple[str, ...],
        reason: RouteReason,
        started: float,
    ) -> None:
        self.dispatcher = dispatcher
        self.request = request
        self.request_id = request_id
        self.call = call
        self.endpoint = endpoint
        self.experts = experts
        self.reason = reason
        self.started = started

    def start(self) -> None:
        """Sends the request to a replica if that needs no waiting; otherwise starts a task that serves it."""
        dispatcher = self.dispatcher
        dispatcher.in_flight.enter()
        table, request_class = dispatcher.table, self.endpoint.request_class
        if request_class is INTERACTIVE and not table.bounds.limits_classes:
            picked = table.pick(self.experts, prefix=self.prefix, needed_s=self.needed_s)
            reservation = None if picked is None else table.reserve(*picked)
            if reservation is not None and self.known_prefix is not None:  # there was a choice of replicas
                table.place(reservation, self.prefix)
        else:
            reservation = table.acquire(
                self.experts, prefix=self.prefix, needed_s=self.needed_s, request_class=request_class
            )
        self.reservation = reservation
        if reservation is None:
            self.request.resume()
            return
        if reservation.expert != self.experts[0]:
            self.count_cold("fell_back")
        if dispatcher.config.early_headers_s is not None:
            self.begin_early(dispatcher.config.early_headers_s)
        try:
            replica, headers = reservation.replica, self.request.headers
            call = self.call
            if replica.by_priority:
                call = call.with_priority(request_class)
            body = _body(call, reservation.expert, replica)
            message = b"%b%bx-request-id: %b\r\ncontent-length: %d\r\n\r\n%b" % (
                replica.request_starts.get(self.endpoint.target) or self._request_start(replica),
                headers.cached.get(NOT_UPSTREAM) or crossing(headers, drop=NOT_UPSTREAM),
                self.request_id.encode(),
                len(body),
                body,
            )
            timeouts = dispatcher.stream_timeouts if call.fields.get("stream") else dispatcher.response_timeouts
            self.sent = sent = dispatcher.client.start(replica.address, message, self, timeouts)
        except Exception:
            self._release()
            raise
        if sent is None:  # no connection is pooled
            self.request.resume()
        else:
            reservation.idle_timer = sent.idle_timer
            self.phase = "before_first_byte"

    async def run(self) -> Response | None:
        try:
            return await self.dispatcher.respond(self)
        finally:
            self.dispatcher.in_flight.leave()

    def cancel(self) -> None:
        if self.sent is not None:
            self.sent.cancel()
        self.left = True
        self._release()
        self.dispatcher.metrics.cancelled.add(self.phase)
        self.record(self.status, CANCELLED)

    def _release(self) -> None:
        if self.relay is not None and self.relay.events is not None:
            self.relay.events.stop_pings()
        if self.early is not None:
            self.early.stop()
        if self.reservation is not None:
            self.reservation.release()
        if self.charge is not None:
            self.settle()
        self.dispatcher.in_flight.leave()

    def _settle_short(self, accepted: bytes | None) -> bytes | TokenUsage | None:
        """Ends the charge against the token's limits after a complete, short response. `accepted`: its body; None if
        its status is not 2xx, so that it counts as 0 tokens. If the body does not state the number of generated tokens,
        those that were reserved stay charged. Returns the numbers of tokens if they had to be read, else `accepted`."""
        charge, self.charge = self.charge, None
        assert charge is not None
        if not charge.counted or accepted is None:
            charge.end(0)
            return accepted
        usage = stated_usage(accepted)
        generated = None if usage is None else usage.generated
        charge.end(generated)
        if generated is None:
            self.dispatcher.metrics.tokens.add_many(charge.reserved, self.experts[0], TokenSource.RESERVED)
        return usage

    def settle(self) -> None:
        """Ends the charge of the request against its token's limits: frees the place of the request, and replaces the
        reserved number of tokens by the generated one. Does nothing if there is no charge or it has ended already."""
        charge, self.charge = self.charge, None
        if charge is None:
            return
        if not charge.counted:
            charge.end(None)
            return
        generated, source = self._generated(self.summary)
        charge.end(generated)
        if source is TokenSource.RESERVED:
            self.dispatcher.metrics.tokens.add_many(charge.reserved, self.experts[0], source)

    def _generated(self, summary: StreamSummary | None) -> tuple[int | None, TokenSource | None]:
        """Returns the number of generated tokens, and how it is known. The number is 0, with None, if no engine has
        accepted the request. It is None, with RESERVED, if it cannot be known, because the response does not state it
        or the client left before the first byte."""
        if summary is not None and summary.accepted:
            if (stated := summary.stated()) is not None and stated.generated is not None:
                return stated.generated, TokenSource.USAGE
            return (summary.generated(), TokenSource.CHUNKS) if summary.streamed else (None, TokenSource.RESERVED)
        if self.left and self.phase == "before_first_byte":
            return None, TokenSource.RESERVED
        return 0, None

    def on_response(self, status: int, headers: Headers, body: bytes) -> bool:
        dispatcher, reservation = self.dispatcher, self.reservation
        if status in REVIEWED_STATUSES or headers.content_type == CONTENT_TYPE or len(body) > SHORT_BYTES:
            return False
        if self.endpoint.api_format.abort_detector.may_be_aborted(body):
            return False
        if self.early is not None:
            self.early.stop()
            if self.early.started:
                return False
        assert reservation is not None
        head = self.accept(reservation, status, headers, short=True)
        self.measure(reservation)
        reservation.release()
        accepted = body if 200 <= status < 300 else None
        counted = accepted if self.charge is None else self._settle_short(accepted)
        dispatcher.in_flight.leave()
        dispatcher.records.ended(self, reservation.expert, reservation.replica, status, ANSWERED, counted, short=True)
        self.request.respond(status, head, body)
        return True

    def on_head(self, status: int, headers: Headers) -> EventStream | None:
        """Called with the head of the replica's response. If the response is a stream of events, returns the object
        that forwards them from the replica's connection to the client's without a task; None for any other response."""
        if status in REVIEWED_STATUSES or headers.content_type != CONTENT_TYPE:
            return None
        encoded = headers.cached.get(_CONTENT_ENCODING)
        if encoded is None:  # kept with the head, which is the same for most streams
            encoded = headers.cached[_CONTENT_ENCODING] = _CONTENT_ENCODING in headers
        if encoded:
            return None
        assert self.reservation is not None
        self.relay = relay = self.new_relay(self.reservation)
        head = self.accept(self.reservation, status, headers)
        return relay.begin_events(status, head)

    def on_end(self) -> None:
        relay, reservation = self.relay, self.reservation
        assert relay is not None
        assert reservation is not None
        relay.end_events()
        self.measure(reservation)
        self._release()
        self.record(relay.status, ANSWERED)
        self.request.end()

    def on_incomplete(self) -> None:
        self.request.resume()

    def new_relay(self, reservation: Reservation) -> ResponseRelay:
        stream = self.call.fields.get("stream") is True
        detector = self.endpoint.api_format.abort_detector
        limits = self.dispatcher.relay_limits
        exact = self.charge is not None and self.charge.counted
        self.summary = StreamSummary(self.endpoint.api_format.delta_mark, exact=exact)
        return ResponseRelay(
            self.request, limits, detector, stream=stream, summary=self.summary, early=self.early,
            on_start=reservation.prefill_ended,
        )  # fmt: skip

    def begin_early(self, delay_s: float | None = None) -> EarlyStream | None:
        """Returns the object that can send the head of this request's stream before its first event; None if the
        request does not ask for a stream. `delay_s`: seconds from the arrival of the request after which it sends the
        head; None: it sends the head with its first comment."""
        if self.early is None and self.call.fields.get("stream") is True and self.endpoint.path in _STREAMED:
            head = f"x-request-id: {self.request_id}\r\n"
            if len(self.experts) == 1:
                head += f"x-expert: {self.experts[0]}\r\nx-route-reason: {self.reason}\r\n"
            self.early = EarlyStream(self.request, head.encode(), ping_s=self.dispatcher.relay_limits.ping_s)
            if delay_s is not None:
                self.early.start_after(max(0.0, self.started + delay_s - time.perf_counter()))
        return self.early

    def count_cold(self, outcome: str) -> None:
        """Counts a cold start in the metrics, at most once: the first expert of the request has no ready replica.
        `outcome`: `waited`, `failed` or `fell_back` (another expert serves the request)."""
        if not self.cold:
            self.cold = True
            self.dispatcher.metrics.cold_starts.add(self.experts[0], outcome)

    def accept(self, reservation: Reservation, status: int, headers: Headers, *, short: bool = False) -> bytes:
        """Records that the client gets the reserved replica's response, and returns the header lines to send to the
        client. `status`, `headers`: those of the replica's response. `short`: whether the response is complete, so that
        `RequestRecords.ended` counts the time to its first byte."""
        dispatcher, replica, expert = self.dispatcher, reservation.replica, reservation.expert
        if status not in REVIEWED_STATUSES and replica.recent_error:
            dispatcher.health.request_succeeded(replica)
        if 200 <= status < 300:
            if self.summary is not None:
                self.summary.accepted = True
            if self.failed_attempts:
                dispatcher.review.report_failures(self, expert)
            if self.on_success is not None:
                self.on_success(replica, expert, self.reason_at(expert))
        if dispatcher.in_flight.closing:
            self.request.keep_alive = False
        self.status = status
        self.first_byte_s = first_byte_s = time.perf_counter() - self.started
        if not short:
            dispatcher.metrics.first_byte.add(first_byte_s, expert, replica.record.replica)
        self.phase = "streaming"
        return self.response_head(reservation, headers)

    def _request_start(self, replica: Replica) -> bytes:
        """Returns the request line and header lines that all requests with this target to this replica have."""
        path, target = self.endpoint.path, self.endpoint.target
        start = request_line("POST", replica.address, target) + replica.authorization
        if target == path:  # cached, because there are only a few paths
            replica.request_starts[path] = start
        return start

    def request_for(self, reservation: Reservation) -> tuple[bytes, bytes]:
        """Returns the header lines and the body with which the request is sent to the reserved replica."""
        replica = reservation.replica
        head = b"%b%bx-request-id: %b\r\n" % (
            crossing(self.request.headers, drop=NOT_UPSTREAM),
            replica.authorization,
            self.request_id.encode(),
        )
        call = self.call.with_priority(self.endpoint.request_class) if replica.by_priority else self.call
        return head, _body(call, reservation.expert, replica)

    def timeouts(self) -> UpstreamTimeouts:
        """Returns the upstream timeouts of the request. Without streaming, the limit for the first byte is
        `router.answer_timeout_s`, because the engine sends nothing until the response is complete."""
        dispatcher = self.dispatcher
        return dispatcher.stream_timeouts if self.call.fields.get("stream") else dispatcher.response_timeouts

    def response_head(self, reservation: Reservation, headers: Headers) -> bytes:
        """Returns the header lines of the client's response: the engine's (`headers`) and those of the router."""
        return b"%bx-request-id: %b\r\n%b" % (
            headers.cached.get(_OWN_DOWNSTREAM) or crossing(headers, drop=_OWN_DOWNSTREAM),
            self.request_id.encode(),
            self.routing_headers(reservation),
        )

    def routing_headers(self, reservation: Reservation) -> bytes:
        replica, expert = reservation.replica, reservation.expert
        reason = self.reason_at(expert)
        lines = replica.routing_lines.get((expert, reason))
        if lines is None:
            text = f"x-expert: {expert}\r\nx-replica: {replica.name}\r\nx-route-reason: {reason}\r\n"
            lines = replica.routing_lines[expert, reason] = text.encode()
        return lines

    def reason_at(self, expert: str) -> RouteReason:
        return self.reason if expert == self.experts[0] else RouteReason.UNAVAILABLE

    def measure(self, reservation: Reservation) -> None:
        """Records the time from the request's arrival to its complete response, by which `lifetime` estimates later
        requests. Does nothing for a replica without a walltime."""
        if reservation.replica.record.expires_at is not None:
            elapsed_s = time.perf_counter() - self.started
            self.dispatcher.table.lifetimes.ended(reservation.expert, elapsed_s, self.call.fields)

    def record(self, status: int | None, outcome: str, *, expert: str | None = None, error: str | None = None) -> None:
        """Records the end of the request, with the tokens of its response. `expert`: None means that of the last
        attempt. `status`, `outcome`, `error`: as in `RequestRecords.ended`."""
        tried = self.reservation or self.tried
        if expert is None:
            expert = self.experts[0] if tried is None else tried.expert
        replica = tried.replica if tried is not None and tried.expert == expert else None
        response = self.summary if self.summary is not None and self.summary.accepted else None
        self.dispatcher.records.ended(self, expert, replica, status, outcome, response, error)

    def needed_s(self, expert: str) -> float:
        """Returns the expected duration in seconds of this request on the expert."""
        return self.dispatcher.table.lifetimes.expected_s(expert, self.call.fields)

    def flow(self) -> Flow:
        """Returns the class and the user of the request, for the order of waiting requests."""
        return Flow(self.endpoint.request_class, self.user or "", self.user_slot)

    def prefix(self) -> PromptPrefix:
        """Returns the beginnings of the request's prompt, by which a replica is chosen for its prefix cache."""
        if self.known_prefix is None:
            self.known_prefix = prompt_prefix(self.call.raw, self.call.fields, session_key(self.request.headers))
        return self.known_prefix


def session_key(headers: Headers) -> bytes | None:
    """Returns the session that the headers of a request name, in `x-session-id` or in a coding agent's header; None if
    they name none. The result is kept with the head."""
    try:
        found: bytes | None = headers.cached[_SESSIONS]
    except KeyError:
        named = (headers.get(name) for name in _SESSIONS)
        found = headers.cached[_SESSIONS] = next((value for value in named if value), None)
    return found


@dataclass(slots=True)
class RequestResult:
    """What came of a request. `response`: the response to send; None if the client has got it already, as a stream."""

    status: int
    expert: str
    reason: RouteReason
    response: Response | None


def _body(call: ApiCall, expert: str, replica: Replica) -> bytes:
    """Returns the request body with the name by which the replica's engine knows the model of `expert`. Returns the
    client's bytes unchanged if they have this name already, if the engine's name is unknown, or if the replica serves
    only this expert and its engine knows the client's name as an alias."""
    record, asked = replica.record, call.fields["model"]
    wanted = record.serves.get(expert) or replica.model_for(expert)
    if wanted is None or asked == wanted:
        return call.raw
    aliased = record.kind is RecordKind.EXPERT and len(record.serves) == 1 and asked in replica.models
    return call.raw if aliased else call.body(wanted)
