"""One API request, from its decoded body to the last byte of its answer.

select an expert -> acquire a replica -> relay; until the first body byte any failure goes elsewhere. `auto` may go to
another replica, the runner-up, the fallback; a named expert only to its own replicas, for which it waits up to
`router.queue_timeout_s`. A 429 says nothing about a replica's health; a refused connection ejects it at once.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from hpc_router import wire
from hpc_router.config import RouterConfig
from hpc_router.errors import UnavailableError, UpstreamConnectError, UpstreamError, UpstreamTimeoutError
from hpc_router.registry import Kind
from hpc_router.relay.delivery import DownstreamGoneError
from hpc_router.relay.dialects import Fault, dialect_of
from hpc_router.relay.downstream import Downstream
from hpc_router.relay.exchange import Upstream, UpstreamResponse
from hpc_router.relay.headers import downstream_headers, upstream_headers
from hpc_router.relay.patience import Patience
from hpc_router.router.discovery import Discovery
from hpc_router.router.metrics import Metrics
from hpc_router.router.replicas import Event, Hold, Replica, ReplicaLostError, ReplicaTable
from hpc_router.router.request import ApiCall
from hpc_router.router.sessions import not_found
from hpc_router.routing.policy import Reason

logger = logging.getLogger(__name__)

MAX_ATTEMPTS: Final = 6
RETRY_AFTER_S: Final = 2.0
LOST_S: Final = 5.0
"""A replica that has been ejected or has left may be silent for this long before its requests are given up."""
_TRY_ELSEWHERE: Final = frozenset({429, 500, 502, 503, 504})
_MAX_ERROR_BYTES: Final = 2**20


@dataclass(slots=True)
class Errand:
    """A request on its way. `experts`: to be tried in this order; `reason`: how the first of them was chosen.

    `only`: the one replica it may go to. `on_answer` is told who answers with 2xx, before the client sees any of it.
    """

    request: web.BaseRequest
    path: str
    request_id: str
    call: ApiCall
    experts: tuple[str, ...]
    reason: Reason
    started: float = field(default_factory=time.perf_counter)
    phase: str = "queued"
    avoid: set[Replica] = field(default_factory=set)
    disconnected: set[Replica] = field(default_factory=set)
    refusal: web.Response | None = None
    """The last error that a replica itself answered with; the client gets it when nobody does better."""
    only: Replica | None = None
    on_answer: Callable[[Replica, str, Reason], None] | None = None

    def reason_at(self, expert: str) -> Reason:
        return self.reason if expert == self.experts[0] else Reason.UNAVAILABLE


class _TryElsewhereError(Exception):
    """This attempt is over, nothing was sent; what is known has been noted."""


@dataclass(slots=True)
class Dispatcher:
    table: ReplicaTable
    discovery: Discovery
    client: Upstream
    metrics: Metrics
    config: RouterConfig

    async def run(self, errand: Errand) -> web.StreamResponse:
        """Raises UnavailableError when no replica could be had in time."""
        try:
            return await self._attempts(errand)
        except asyncio.CancelledError:
            self.metrics.cancelled.labels(errand.phase).inc()
            raise

    async def _attempts(self, errand: Errand) -> web.StreamResponse:
        deadline = asyncio.get_running_loop().time() + self.config.queue_timeout_s
        attempts = 0
        while attempts < MAX_ATTEMPTS:
            hold = self.table.acquire(errand.experts, avoid=errand.avoid, only=errand.only)
            if hold is None and errand.refusal is not None:
                return errand.refusal
            if hold is None:
                errand.phase = "queued"
                hold = await self._wait(errand, deadline)
            with hold:
                attempts += 1
                try:
                    return await self._attempt(errand, hold)
                except _TryElsewhereError:
                    continue
        if errand.refusal is not None:
            return errand.refusal
        raise UnavailableError(f"{attempts} replicas failed one after the other", retry_after_s=RETRY_AFTER_S)

    async def _wait(self, errand: Errand, deadline: float) -> Hold:
        try:
            async with asyncio.timeout_at(deadline):
                return await self.table.wait(errand.experts, avoid=errand.avoid, only=errand.only)
        except ReplicaLostError as error:
            raise not_found(str(error)) from error
        except TimeoutError as error:
            waited = f"within {self.config.queue_timeout_s:g} s"
            raise UnavailableError(
                f"no replica of {' or '.join(errand.experts)} could take the request {waited}",
                retry_after_s=RETRY_AFTER_S,
            ) from error

    async def _attempt(self, errand: Errand, hold: Hold) -> web.StreamResponse:
        replica, expert = hold.replica, hold.expert
        downstream = Downstream(
            errand.request, hold_bytes=int(self.config.hold_mb * 2**20), write_s=self.config.idle_timeout_s
        )
        said = {
            wire.REQUEST_ID_HEADER: errand.request_id,
            "x-expert": expert,
            "x-replica": replica.name,
            "x-route-reason": errand.reason_at(expert).value,
        }
        errand.phase = "before_first_byte"
        try:
            url = URL(replica.record.url + errand.path, encoded=True)
            body = self._body(errand.call, expert, replica)
            headers = self._headers(errand, replica)

            def watch(patience: Patience) -> None:
                hold.on_lost = lambda: patience.shorten(LOST_S)

            async with self.client.request("POST", url, headers=headers, body=body, watch=watch) as upstream:
                await self._judge(errand, replica, upstream, said)
                if errand.on_answer is not None and 200 <= upstream.status < 300:
                    errand.on_answer(replica, expert, errand.reason_at(expert))
                self.metrics.first_byte.labels(expert).observe(time.perf_counter() - errand.started)
                errand.phase = "streaming"
                await downstream.pass_on(upstream, downstream_headers(upstream.headers, add=said))
        except DownstreamGoneError:
            self.metrics.cancelled.labels("streaming").inc()
        except UpstreamError as error:
            if not downstream.committed:
                self._note_failure(errand, replica, error)
                raise _TryElsewhereError from error
            await self._break_off(errand, expert, replica, downstream, error)
        assert downstream.response is not None
        return downstream.response

    async def _judge(self, errand: Errand, replica: Replica, upstream: UpstreamResponse, said: dict[str, str]) -> None:
        """Go elsewhere when the status says so; nothing has been sent to the client yet."""
        if upstream.status == 401 and replica.key is not None:
            raise UpstreamConnectError("the replica refuses our key")
        if upstream.status not in _TRY_ELSEWHERE:
            return
        errand.avoid.add(replica)
        self.metrics.failovers.labels(replica.name, str(upstream.status)).inc()
        if wire.DRAINING_HEADER in upstream.headers:
            self.table.apply(replica, Event.SAYS_DRAINING)
        elif wire.STARTING_HEADER in upstream.headers:
            self.table.apply(replica, Event.SAYS_STARTING)
            self.discovery.look_again(replica)
        else:
            body = await upstream.read(_MAX_ERROR_BYTES)
            headers = downstream_headers(upstream.headers, add=said)
            errand.refusal = web.Response(status=upstream.status, headers=headers, body=body)
        raise _TryElsewhereError

    def _note_failure(self, errand: Errand, replica: Replica, error: UpstreamError) -> None:
        """A refused connection ejects; a connection that broke may have been a stale one and is tried once more."""
        logger.warning("%s: %s failed before its first byte: %s", errand.request_id, replica.name, error)
        self.metrics.failovers.labels(replica.name, type(error).__name__).inc()
        if isinstance(error, UpstreamConnectError):
            self.discovery.doubt(replica, str(error))
        else:
            self.discovery.look_again(replica)
            if replica not in errand.disconnected and not isinstance(error, UpstreamTimeoutError):
                errand.disconnected.add(replica)
                return
        errand.avoid.add(replica)

    async def _break_off(
        self, errand: Errand, expert: str, replica: Replica, downstream: Downstream, error: UpstreamError
    ) -> None:
        logger.warning("%s: %s failed in the midst of its answer: %s", errand.request_id, replica.name, error)
        self.metrics.broken.labels(expert).inc()
        self.discovery.look_again(replica)
        message = f"{replica.name} failed before it had finished: {error}"
        try:
            fault = Fault(502, "upstream_error", "replica_failed", message)
            await downstream.break_off(dialect_of(errand.path.partition("?")[0]).event(fault))
        except DownstreamGoneError:
            self.metrics.cancelled.labels("streaming").inc()

    def _headers(self, errand: Errand, replica: Replica) -> CIMultiDict[str]:
        add = {wire.REQUEST_ID_HEADER: errand.request_id}
        if replica.key is not None:
            add["Authorization"] = f"Bearer {replica.key}"
        return upstream_headers(errand.request.headers, add=add)

    def _body(self, call: ApiCall, expert: str, replica: Replica) -> bytes:
        """The client's own bytes wherever the replica answers to the requested name *for this expert*.

        An engine of ours with one expert means it by every name it answers to; elsewhere the record says which name.
        """
        wanted, asked = replica.model_for(expert), call.model
        aliased = replica.record.kind is Kind.EXPERT and len(replica.record.serves) == 1 and asked in replica.models
        return call.raw if wanted is None or asked == wanted or aliased else call.body(wanted)
