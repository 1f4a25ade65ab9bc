"""One API request, from its decoded body to the last byte of its answer.

select an expert -> acquire a replica -> relay; until the first body byte any failure goes elsewhere. `auto` may go to
another replica, the runner-up, the fallback; a named expert only to its own replicas, for which it waits up to
`router.queue_timeout_s`. What was met at a replica is told to its `Witness`, who judges its health: a 429 says nothing
about that. Retries have a budget.
"""

import asyncio
import errno
import logging
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, Protocol

from hpc_router import wire
from hpc_router.config import RouterConfig
from hpc_router.errors import OverloadedError, UnavailableError, UpstreamConnectError, UpstreamError
from hpc_router.registry import Kind
from hpc_router.relay.answer import Answer, Answering
from hpc_router.relay.dialects import Fault, dialect_of
from hpc_router.relay.downstream import DownstreamGoneError, Request, Response
from hpc_router.relay.exchange import Started, Upstream, UpstreamResponse
from hpc_router.relay.headers import NOT_DOWNSTREAM, NOT_UPSTREAM, REQUEST_ID, Headers, crossing
from hpc_router.router.balance import KEY_CHARS, slot_of
from hpc_router.router.metrics import Metrics
from hpc_router.router.replica import Event, Hold, Replica, Standing
from hpc_router.router.replicas import QueueFullError, ReplicaLostError, ReplicaTable
from hpc_router.router.request import ApiCall
from hpc_router.router.retries import RetryBudget
from hpc_router.router.sessions import not_found
from hpc_router.routing.conversation import opening
from hpc_router.routing.policy import Reason

logger = logging.getLogger(__name__)

MAX_ATTEMPTS: Final = 6
RETRY_AFTER_S: Final = 2.0
_BUSY: Final = 429
_OUR_OWN: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM})
"""Why no connection is made here, whoever is asked."""
_TRY_ELSEWHERE: Final = frozenset({429, 500, 502, 503, 504})
JUDGED: Final = _TRY_ELSEWHERE | {401}
_SESSION: Final = wire.SESSION_HEADER.encode()
_MAX_ERROR_BYTES: Final = 2**20
_OWN_DOWNSTREAM: Final = NOT_DOWNSTREAM | {REQUEST_ID, b"x-expert", b"x-replica", b"x-route-reason"}


@dataclass(eq=False)
class Errand:
    """A request on its way. `experts`: to be tried in this order; `reason`: how the first of them was chosen.

    `only`: the one replica it may go to. `on_answer` is told who answers with 2xx, before the client sees any of it.
    What most requests never have stays with the class, since one of these is made for each.
    """

    request: Request
    target: str
    request_id: str
    call: ApiCall
    experts: tuple[str, ...]
    reason: Reason
    started: float
    only: Replica | None = None
    on_answer: Callable[[Replica, str, Reason], None] | None = None
    phase: str = field(init=False, default="queued")
    avoid: frozenset[Replica] = field(init=False, default=frozenset())
    refusal: "Answered | None" = field(init=False, default=None)
    """The last error that a replica itself answered with; the client gets it when nobody does better."""
    begun: tuple[Hold, AbstractAsyncContextManager[UpstreamResponse]] | None = field(init=False, default=None)
    work: "Leaving | None" = field(init=False, default=None)
    """Where it was begun without a task: place and exchange to go on with, and what counted it."""

    def reason_at(self, expert: str) -> Reason:
        return self.reason if expert == self.experts[0] else Reason.UNAVAILABLE

    def slot(self) -> int | None:
        """Where its conversation belongs (see `balance`): by its session, else by what its user said first."""
        session = self.request.headers.get(_SESSION)
        if session is not None:
            return slot_of(session)
        text = opening(self.call.fields)
        return None if text is None else slot_of(text[:KEY_CHARS].encode("utf-8", "backslashreplace"))


@dataclass(slots=True)
class Answered:
    """Who answered a request, and how. `response` None: it went to the client as it came."""

    status: int
    expert: str
    reason: Reason
    response: Response | None


class Leaving(Protocol):
    def leave(self) -> None:
        """Count it no more."""


class Witness(Protocol):
    """Told what a request has seen of a replica."""

    def doubt(self, replica: Replica, trouble: str) -> None:
        """It could not be reached: out of the pool."""

    def erred(self, replica: Replica, trouble: str) -> None:
        """It answered with an error, or not at all."""

    def answered(self, replica: Replica) -> None:
        """Well, after it had erred."""

    def heard(self, replica: Replica, event: Event) -> None:
        """What it said of itself."""

    def look_again(self, replica: Replica) -> None:
        """Something failed that may be its fault."""


class _TryElsewhereError(Exception):
    """This attempt is over, nothing was sent; what is known has been noted."""


@dataclass(slots=True)
class Dispatcher:
    table: ReplicaTable
    witness: Witness
    client: Upstream
    metrics: Metrics
    config: RouterConfig
    answering: Answering = field(init=False)
    retries: RetryBudget = field(init=False)

    def __post_init__(self) -> None:
        self.configure(self.config)

    def configure(self, config: RouterConfig) -> None:
        """From now on. What is under way keeps the limits that it began with."""
        self.config = config
        self.retries = RetryBudget(share=config.retry_share, least_per_s=config.retry_least_per_s)
        self.answering = Answering(
            hold_bytes=int(config.hold_mb * 2**20), write_s=config.idle_timeout_s, ping_s=config.ping_s
        )

    async def run(self, errand: Errand) -> Answered:
        """Raises UnavailableError when no replica could be had in time."""
        try:
            return await self._attempts(errand)
        except asyncio.CancelledError:
            self.metrics.cancelled.add(errand.phase)
            raise

    async def _attempts(self, errand: Errand) -> Answered:
        deadline = errand.started + self.config.queue_timeout_s
        attempts = 0
        while attempts < MAX_ATTEMPTS:
            begun, errand.begun = errand.begun, None
            if begun is not None:
                hold: Hold | None = begun[0]
            else:
                hold = self.table.acquire(errand.experts, avoid=errand.avoid, only=errand.only, slot=errand.slot)
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
        raise UnavailableError(f"{attempts} replicas failed one after the other", retry_after_s=RETRY_AFTER_S)

    def _may_retry(self, replica: Replica) -> bool:
        """A replica that was lost by it costs nothing: it will not be met again. Nor does the first connection of a
        request that breaks, when a replica that dies takes all it had down at once."""
        if replica.standing is not Standing.READY:
            return True
        if self.retries.take(time.monotonic(), requests=self.table.uses):
            return True
        self.metrics.retries_refused.add()
        return False

    async def _wait(self, errand: Errand, deadline: float) -> Hold:
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
        self, errand: Errand, hold: Hold, request: tuple[bytes, bytes], started: Started | None = None
    ) -> AbstractAsyncContextManager[UpstreamResponse]:
        """`request`: of `request_for`. `started`: how far it has come already."""
        head, body = request
        return self.client.request(
            "POST", hold.replica.address, errand.target, head=head, body=body, watch=hold.watch, started=started
        )

    async def _attempt(
        self, errand: Errand, hold: Hold, exchange: AbstractAsyncContextManager[UpstreamResponse]
    ) -> Answered:
        replica, expert = hold.replica, hold.expert
        reason = errand.reason_at(expert)
        answer = Answer(errand.request, self.answering)
        errand.phase = "before_first_byte"

        try:
            async with exchange as upstream:
                if upstream.status in JUDGED:
                    await self._judge(errand, hold, upstream)
                elif replica.suspect:
                    self.witness.answered(replica)
                if errand.on_answer is not None and 200 <= upstream.status < 300:
                    errand.on_answer(replica, expert, reason)
                self.metrics.first_byte.add(time.perf_counter() - errand.started, expert, replica.name)
                errand.phase = "streaming"
                await answer.pass_on(upstream, self.said(errand, hold, upstream.headers))
        except DownstreamGoneError:
            self.metrics.cancelled.add("streaming")
        except UpstreamError as error:
            if not answer.committed:
                self._note_failure(errand, replica, error)
                raise _TryElsewhereError from error
            await self._break_off(errand, expert, replica, answer, error)
        return Answered(answer.status, expert, reason, answer.response)

    async def _judge(self, errand: Errand, hold: Hold, upstream: UpstreamResponse) -> None:
        """Go elsewhere when the status says so; nothing has been sent to the client yet."""
        replica = hold.replica
        if upstream.status == 401 and replica.key is not None:
            raise UpstreamConnectError("the replica refused the router's key")
        if upstream.status not in _TRY_ELSEWHERE:
            return
        errand.avoid |= {replica}
        self.metrics.failovers.add(replica.name, upstream.status)
        if wire.DRAINING_HEADER.encode() in upstream.headers:
            self.witness.heard(replica, Event.SAYS_DRAINING)
        elif wire.STARTING_HEADER.encode() in upstream.headers:
            self.witness.heard(replica, Event.SAYS_STARTING)
        else:
            if upstream.status != _BUSY:
                self.witness.erred(replica, f"answered {upstream.status}")
            body = await upstream.read(_MAX_ERROR_BYTES)
            response = Response(upstream.status, self.said(errand, hold, upstream.headers), body)
            errand.refusal = Answered(upstream.status, hold.expert, errand.reason_at(hold.expert), response)
        raise _TryElsewhereError

    def _note_failure(self, errand: Errand, replica: Replica, error: UpstreamError) -> None:
        logger.warning("%s: %s failed before its first byte: %s", errand.request_id, replica.name, error)
        self.metrics.failovers.add(replica.name, type(error).__name__)
        errand.avoid |= {replica}
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in _OUR_OWN:
            return
        if isinstance(error, UpstreamConnectError):
            self.witness.doubt(replica, str(error))
        else:
            self.witness.erred(replica, str(error))

    async def _break_off(
        self, errand: Errand, expert: str, replica: Replica, answer: Answer, error: UpstreamError
    ) -> None:
        logger.warning("%s: %s failed in the midst of its answer: %s", errand.request_id, replica.name, error)
        self.metrics.broken.add(expert)
        self.witness.look_again(replica)
        message = f"{replica.name} failed before it had finished: {error}"
        try:
            fault = Fault(502, "upstream_error", "replica_failed", message)
            await answer.break_off(dialect_of(errand.target.partition("?")[0]).event(fault))
        except DownstreamGoneError:
            self.metrics.cancelled.add("streaming")

    def request_for(self, errand: Errand, hold: Hold) -> tuple[bytes, bytes]:
        """Header lines and body, as this replica gets them."""
        replica = hold.replica
        head = b"%b%bx-request-id: %b\r\n" % (
            crossing(errand.request.headers, drop=NOT_UPSTREAM),
            replica.authorization,
            errand.request_id.encode(),
        )
        return head, self._body(errand.call, hold.expert, replica)

    def said(self, errand: Errand, hold: Hold, headers: Headers) -> bytes:
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
        aliased = replica.record.kind is Kind.EXPERT and len(replica.record.serves) == 1 and asked in replica.models
        return call.raw if wanted is None or asked == wanted or aliased else call.body(wanted)


@lru_cache(maxsize=1024)
def _answered_by(expert: str, replica: str, reason: Reason) -> bytes:
    return f"x-expert: {expert}\r\nx-replica: {replica}\r\nx-route-reason: {reason}\r\n".encode()
