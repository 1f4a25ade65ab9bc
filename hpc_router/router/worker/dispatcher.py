"""One API request, from its decoded body to the last byte of its answer.

select an expert -> acquire a replica -> relay; until the first body byte any failure goes elsewhere. `auto` may go to
another replica, the runner-up, the fallback; a named expert only to its own replicas, for which it waits up to
`router.queue_timeout_s`. The `HealthReporter` learns what a request saw of a replica and judges its health. Back-
pressure (429, or 503 with `Retry-After`) says nothing about that, and an error speaks against a replica only where
another one of the same expert answers the same request well. Retries have a budget.
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
from hpc_router.relay.api_formats import Dialect, ErrorReply
from hpc_router.relay.downstream.interface import (
    DownstreamGoneError,
    Request,
    Response,
    error_response,
    json_response,
)
from hpc_router.relay.headers import NOT_DOWNSTREAM, NOT_UPSTREAM, REQUEST_ID, Headers, crossing
from hpc_router.relay.response_relay import RelayLimits, ResponseRelay
from hpc_router.relay.upstream.interface import PendingRequest, Upstream, UpstreamResponse, UpstreamTimeouts
from hpc_router.router.metrics import Metrics
from hpc_router.router.replicas.balancing import KEY_CHARS, affinity_slot
from hpc_router.router.replicas.replica import Event, Replica, Reservation, RoutingState
from hpc_router.router.replicas.sessions import not_found
from hpc_router.router.replicas.table import QueueFullError, ReplicaLostError, ReplicaTable
from hpc_router.router.worker.request_body import ApiCall
from hpc_router.router.worker.retry_budget import RetryBudget
from hpc_router.routing.policy import RouteReason
from hpc_router.routing.prompt_text import first_user_message
from hpc_router.state.registry import RecordKind

logger = logging.getLogger(__name__)

MAX_ATTEMPTS: Final = 6
RETRY_AFTER_S: Final = 2.0
_BUSY: Final = 429
_AWAY: Final = 503
_FAILED: Final = 500
_LOST: Final = 502
"""Beside the header that says "starting": the engine had got the request, and dropped it."""
_OUR_OWN: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM})
"""Why no connection is made here, whoever is asked."""
_TRY_ELSEWHERE: Final = frozenset({429, 500, 502, 503, 504})
_MAX_LOST: Final = 2
"""A request that loses its engine so often may be the cause, and must not end all engines of its expert."""
JUDGED: Final = _TRY_ELSEWHERE | {401}
_SESSION: Final = protocol.SESSION_HEADER.encode()
_MAX_ERROR_BYTES: Final = 2**20
_OWN_DOWNSTREAM: Final = NOT_DOWNSTREAM | {REQUEST_ID, b"x-expert", b"x-replica", b"x-route-reason"}


def stream_limits(config: RouterConfig) -> UpstreamTimeouts:
    return UpstreamTimeouts(config.connect_timeout_s, config.first_byte_timeout_s, config.idle_timeout_s)


@dataclass(eq=False)
class RoutedRequest:
    """A request on its way. `experts`: to be tried in this order; `reason`: how the first of them was chosen.

    `only`: the one replica it may go to. `on_answer` is told who answers with 2xx, before the client sees any of it.
    What most requests never have stays with the class, since one of these is made for each.
    """

    request: Request
    target: str
    dialect: Dialect
    request_id: str
    call: ApiCall
    experts: tuple[str, ...]
    reason: RouteReason
    started: float
    only: Replica | None = None
    on_answer: Callable[[Replica, str, RouteReason], None] | None = None
    phase: str = field(init=False, default="queued")
    avoid: frozenset[Replica] = field(init=False, default=frozenset())
    refusal: "Answered | None" = field(init=False, default=None)
    """The last error that a replica itself answered with; the client gets it when nobody does better."""
    accused: tuple[tuple[Replica, str, int | str], ...] = field(init=False, default=())
    """What replicas did with it, by expert: a status, or how the connection broke. It speaks against them only once
    another replica of the same expert answers well."""
    lost: int = field(init=False, default=0)
    """Replicas whose engine went away while it had this request."""
    begun: tuple[Reservation, AbstractAsyncContextManager[UpstreamResponse]] | None = field(init=False, default=None)
    work: "Leaving | None" = field(init=False, default=None)
    """Where it was begun without a task: place and exchange to go on with, and what counted it."""

    def reason_at(self, expert: str) -> RouteReason:
        return self.reason if expert == self.experts[0] else RouteReason.UNAVAILABLE

    def slot(self) -> int | None:
        """Where its conversation belongs (see `balance`): by its session, else by what its user said first."""
        session = self.request.headers.get(_SESSION)
        if session is not None:
            return affinity_slot(session)
        text = first_user_message(self.call.fields)
        return None if text is None else affinity_slot(text[:KEY_CHARS].encode("utf-8", "backslashreplace"))


@dataclass(slots=True)
class Answered:
    """Who answered a request, and how. `response` None: it went to the client as it came."""

    status: int
    expert: str
    reason: RouteReason
    response: Response | None


class Leaving(Protocol):
    def leave(self) -> None:
        """Count it no more."""


class HealthReporter(Protocol):
    """Told what a request has seen of a replica."""

    def connect_failed(self, replica: Replica, trouble: str) -> None:
        """It could not be reached: out of the pool."""

    def request_failed(self, replica: Replica, trouble: str) -> None:
        """It answered with an error, or not at all."""

    def request_succeeded(self, replica: Replica) -> None:
        """Well, after it had erred."""

    def state_reported(self, replica: Replica, event: Event) -> None:
        """What it said of itself."""

    def recheck(self, replica: Replica) -> None:
        """Something failed that may be its fault."""


class _TryElsewhereError(Exception):
    """This attempt is over, nothing was sent; what is known has been noted."""


@dataclass(slots=True)
class Dispatcher:
    table: ReplicaTable
    witness: HealthReporter
    client: Upstream
    metrics: Metrics
    config: RouterConfig
    answering: RelayLimits = field(init=False)
    streamed: UpstreamTimeouts = field(init=False)
    whole: UpstreamTimeouts = field(init=False)
    retries: RetryBudget = field(init=False)

    def __post_init__(self) -> None:
        self.configure(self.config)

    def configure(self, config: RouterConfig) -> None:
        """From now on. What is under way keeps the limits that it began with."""
        self.config = config
        self.client.limits = self.streamed = stream_limits(config)
        self.whole = replace(self.streamed, first_byte_s=config.answer_timeout_s)
        self.retries = RetryBudget(share=config.retry_share, least_per_s=config.retry_least_per_s)
        self.answering = RelayLimits(
            hold_bytes=int(config.hold_mb * 2**20), write_s=config.idle_timeout_s, ping_s=config.ping_s
        )

    async def run(self, errand: RoutedRequest) -> Answered:
        """Raises UnavailableError when no replica could be had in time."""
        try:
            return await self._attempts(errand)
        except asyncio.CancelledError:
            self.metrics.cancelled.add(errand.phase)
            raise

    async def _attempts(self, errand: RoutedRequest) -> Answered:
        deadline = errand.started + self.config.queue_timeout_s
        attempts = 0
        while attempts < MAX_ATTEMPTS:
            begun, errand.begun = errand.begun, None
            if begun is not None:
                hold: Reservation | None = begun[0]
            else:
                hold = self.table.acquire(
                    errand.experts, avoid=errand.avoid, only=errand.only, affinity_slot=errand.slot
                )
            if hold is None and errand.refusal is not None:
                return errand.refusal
            if hold is None:
                errand.phase = "queued"
                hold = await self._wait(errand, deadline)
            with hold:
                attempts += 1
                try:
                    exchange = begun[1] if begun else self.exchange(errand, hold, self.request_for(errand, hold))
                    return await self._attempt(errand, hold, exchange)
                except _TryElsewhereError as error:
                    broken = isinstance(error.__cause__, UpstreamError)
                    if not (attempts == 1 and broken) and not self._may_retry(hold.replica):
                        break
        if errand.refusal is not None:
            return errand.refusal
        times = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        where = ", ".join(sorted(replica.name for replica in errand.avoid))
        raise UnavailableError(f"{times} failed, on {where}", retry_after_s=RETRY_AFTER_S)

    def _may_retry(self, replica: Replica) -> bool:
        """A replica that was lost by it costs nothing: it will not be met again. Nor does the first connection of a
        request that breaks, when a replica that dies takes all it had down at once."""
        if replica.state is not RoutingState.READY:
            return True
        if self.retries.take(time.monotonic(), requests=self.table.acquired_total):
            return True
        self.metrics.retries_refused.add()
        return False

    async def _wait(self, errand: RoutedRequest, deadline: float) -> Reservation:
        begun = time.perf_counter()
        try:
            async with asyncio.timeout(deadline - begun):
                hold = await self.table.wait(errand.experts, avoid=errand.avoid, only=errand.only)
        except ReplicaLostError as error:
            raise not_found(str(error)) from error
        except QueueFullError as error:
            kind = OverloadedError if error.serves else UnavailableError
            raise kind(str(error), retry_after_s=self.table.wait_s(error.expert)) from error
        except TimeoutError as error:
            waited = f"within {self.config.queue_timeout_s:g} s"
            raise UnavailableError(
                f"no replica of {' or '.join(errand.experts)} could take the request {waited}",
                retry_after_s=max(map(self.table.wait_s, errand.experts)),
            ) from error
        self.metrics.queued.add(time.perf_counter() - begun, hold.expert)
        return hold

    def exchange(
        self,
        errand: RoutedRequest,
        hold: Reservation,
        request: tuple[bytes, bytes],
        started: PendingRequest | None = None,
    ) -> AbstractAsyncContextManager[UpstreamResponse]:
        """`request`: of `request_for`. `started`: how far it has come already."""
        head, body = request
        return self.client.request(
            "POST", hold.replica.address, errand.target, head=head, body=body, watch=hold.watch, started=started,
            limits=self.limits_of(errand),
        )  # fmt: skip

    def limits_of(self, errand: RoutedRequest) -> UpstreamTimeouts:
        """An answer that is not streamed comes as a whole, so the wait for its first byte has a limit of its own."""
        return self.streamed if errand.call.fields.get("stream") else self.whole

    async def _attempt(
        self, errand: RoutedRequest, hold: Reservation, exchange: AbstractAsyncContextManager[UpstreamResponse]
    ) -> Answered:
        replica, expert = hold.replica, hold.expert
        reason = errand.reason_at(expert)
        stream = errand.call.fields.get("stream") is True
        answer = ResponseRelay(errand.request, self.answering, errand.dialect.ending, stream=stream)
        errand.phase = "before_first_byte"

        try:
            async with exchange as upstream:
                if upstream.status in JUDGED:
                    refusal = await self._judge(errand, hold, upstream)
                    if refusal is not None:
                        return refusal
                elif replica.recent_error:
                    self.witness.request_succeeded(replica)
                if errand.accused and 200 <= upstream.status < 300:
                    self._convict(errand, expert)
                if errand.on_answer is not None and 200 <= upstream.status < 300:
                    errand.on_answer(replica, expert, reason)
                self.metrics.first_byte.add(time.perf_counter() - errand.started, expert, replica.name)
                errand.phase = "streaming"
                await answer.pass_on(upstream, self.said(errand, hold, upstream.headers))
        except DownstreamGoneError:
            self.metrics.cancelled.add("streaming")
        except UpstreamTimeoutError as error:
            if hold.lost and not answer.committed:
                self._note_failure(errand, hold, error)
                raise _TryElsewhereError from error
            late = self._late(errand, replica, answered=answer.status != 0)
            if not answer.committed:
                raise late from error
            await self._break_off(errand, expert, answer, ErrorReply(504, "timeout_error", "answer_timeout", str(late)))
        except UpstreamError as error:
            if not answer.committed:
                self._note_failure(errand, hold, error)
                if isinstance(error, UpstreamAbortedError):  # the next attempt may cost as much again
                    response = json_response(errand.dialect.body(_fault(replica, error)), status=502)
                    response.add(protocol.REQUEST_ID_HEADER, errand.request_id)
                    errand.refusal = Answered(502, expert, reason, response)
                raise _TryElsewhereError from error
            self.witness.recheck(replica)
            await self._break_off(errand, expert, answer, _fault(replica, error))
        return Answered(answer.status, expert, reason, answer.response)

    async def _judge(self, errand: RoutedRequest, hold: Reservation, upstream: UpstreamResponse) -> Answered | None:
        """Go elsewhere when the status says so; nothing has been sent to the client yet. Else what the client gets;
        None: the response as it comes."""
        replica, status, headers = hold.replica, upstream.status, upstream.headers
        external = replica.record.kind is RecordKind.EXTERNAL
        if status == 401 and external:  # the client's own token is right
            errand.avoid |= {replica}
            self.metrics.failovers.add(replica.name, status)
            errand.refusal = self._wants_token(errand, hold)
            raise _TryElsewhereError
        if status == 401 and replica.key is not None:
            raise UpstreamConnectError("the replica refused the router's key")
        if status not in _TRY_ELSEWHERE:
            return None
        errand.avoid |= {replica}
        if protocol.DRAINING_HEADER.encode() in headers:
            self.metrics.failovers.add(replica.name, "draining")
            # An address that is not ours may have a successor there.
            self.witness.state_reported(replica, Event.SAYS_STARTING if external else Event.SAYS_DRAINING)
        elif protocol.STARTING_HEADER.encode() in headers:
            self.metrics.failovers.add(replica.name, "starting")
            self.witness.state_reported(replica, Event.SAYS_STARTING)
            errand.lost += status == _LOST
            if errand.lost >= _MAX_LOST:
                return await self._refusal(errand, hold, upstream)
        elif status == _BUSY or (status == _AWAY and b"retry-after" in headers):
            self.metrics.failovers.add(replica.name, _BUSY if status == _BUSY else "busy")
            errand.refusal = await self._refusal(errand, hold, upstream)
        else:
            self.metrics.failovers.add(replica.name, status)
            errand.refusal = await self._refusal(errand, hold, upstream)
            if status == _FAILED and any(seen == _FAILED for _, _, seen in errand.accused):
                return errand.refusal  # two replicas agree: it belongs to the request
            errand.accused += ((replica, hold.expert, status),)
        raise _TryElsewhereError

    def _convict(self, errand: RoutedRequest, expert: str) -> None:
        """A replica of this expert has answered well what others did not."""
        for replica, of, seen in errand.accused:
            if of == expert:
                self.witness.request_failed(
                    replica, f"{replica.record.url} answered {seen}" if isinstance(seen, int) else seen
                )
        errand.accused = ()

    def _wants_token(self, errand: RoutedRequest, hold: Reservation) -> Answered:
        message = f"{hold.replica.record.url} answered 401: `hpc-router register` it again with --token-file"
        reason, path = errand.reason_at(hold.expert), errand.target.partition("?")[0]
        response = error_response(502, kind="upstream_error", code="endpoint_unauthorized", message=message, path=path)
        response.add(protocol.REQUEST_ID_HEADER, errand.request_id)
        response.head += _answered_by(hold.expert, hold.replica.record.replica, reason)
        return Answered(502, hold.expert, reason, response)

    async def _refusal(self, errand: RoutedRequest, hold: Reservation, upstream: UpstreamResponse) -> Answered:
        body = await upstream.read(_MAX_ERROR_BYTES)
        response = Response(upstream.status, self.said(errand, hold, upstream.headers), body)
        return Answered(upstream.status, hold.expert, errand.reason_at(hold.expert), response)

    def _note_failure(self, errand: RoutedRequest, hold: Reservation, error: UpstreamError) -> None:
        replica, expert = hold.replica, hold.expert
        logger.warning("%s: %s failed before its first byte: %s", errand.request_id, replica.name, error)
        self.metrics.failovers.add(replica.name, type(error).__name__)
        errand.avoid |= {replica}
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in _OUR_OWN:
            return
        if isinstance(error, UpstreamConnectError):
            self.witness.connect_failed(replica, f"{replica.record.url}: {error}")
        else:
            errand.accused += ((replica, expert, str(error)),)
            self.witness.recheck(replica)

    def _late(self, errand: RoutedRequest, replica: Replica, *, answered: bool) -> AnswerTimeoutError:
        """The replica is alive, as far as its probes know: the timeout says nothing against it."""
        if answered:
            key, limit_s, what = "idle_timeout_s", self.config.idle_timeout_s, "paused for longer than"
        elif errand.call.fields.get("stream"):
            key, limit_s, what = "first_byte_timeout_s", self.config.first_byte_timeout_s, "did not begin within"
        else:
            key, limit_s, what = "answer_timeout_s", self.config.answer_timeout_s, "was not complete within"
        advice = "raise that key, or ask for less" + (", or stream it" if key == "answer_timeout_s" else "")
        return AnswerTimeoutError(f"the answer of {replica.name} {what} router.{key}={limit_s:g}: {advice}")

    async def _break_off(self, errand: RoutedRequest, expert: str, answer: ResponseRelay, fault: ErrorReply) -> None:
        logger.warning("%s: broken off: %s", errand.request_id, fault.message)
        self.metrics.broken.add(expert)
        try:
            await answer.break_off(errand.dialect.event(fault))
        except DownstreamGoneError:
            self.metrics.cancelled.add("streaming")

    def request_for(self, errand: RoutedRequest, hold: Reservation) -> tuple[bytes, bytes]:
        """Header lines and body, as this replica gets them."""
        replica = hold.replica
        head = b"%b%bx-request-id: %b\r\n" % (
            crossing(errand.request.headers, drop=NOT_UPSTREAM),
            replica.authorization,
            errand.request_id.encode(),
        )
        return head, self._body(errand.call, hold.expert, replica)

    def said(self, errand: RoutedRequest, hold: Reservation, headers: Headers) -> bytes:
        """The engine's headers, and ours."""
        return b"%bx-request-id: %b\r\n%b" % (
            crossing(headers, drop=_OWN_DOWNSTREAM),
            errand.request_id.encode(),
            _answered_by(hold.expert, hold.replica.record.replica, errand.reason_at(hold.expert)),
        )

    def _body(self, call: ApiCall, expert: str, replica: Replica) -> bytes:
        """The client's own bytes wherever the replica answers to the requested name *for this expert*.

        An engine of ours with one expert means it by every name it answers to; elsewhere the record says which name.
        """
        wanted, asked = replica.model_for(expert), call.fields["model"]
        aliased = (
            replica.record.kind is RecordKind.EXPERT and len(replica.record.serves) == 1 and asked in replica.models
        )
        return call.raw if wanted is None or asked == wanted or aliased else call.body(wanted)


def _fault(replica: Replica, error: UpstreamError) -> ErrorReply:
    message = f"{replica.name} failed before it had finished: {error}"
    return ErrorReply(502, "upstream_error", "replica_failed", message)


@lru_cache(maxsize=1024)
def _answered_by(expert: str, replica: str, reason: RouteReason) -> bytes:
    return f"x-expert: {expert}\r\nx-replica: {replica}\r\nx-route-reason: {reason}\r\n".encode()
