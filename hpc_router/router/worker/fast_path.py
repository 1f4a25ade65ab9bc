"""A request from its arrival to the end of its answer without a task: what most requests need no more than.

It goes this way when nothing has to be waited for but the replica: its body is there, its expert has a free place and a
connection is kept. And it ends this way when the whole of a short answer comes at once, which is nobody's failure.
Everything else is the dispatcher's: it goes on from where this has come, and nothing is decided twice.
"""

import time

from hpc_router.relay.downstream.interface import SHORT_BYTES, Work
from hpc_router.relay.headers import Headers
from hpc_router.relay.in_flight import InFlight
from hpc_router.relay.sse import CONTENT_TYPE
from hpc_router.relay.upstream.interface import PendingRequest, ResponseCallback
from hpc_router.router.replicas.replica import Reservation
from hpc_router.router.worker.dispatcher import JUDGED, Dispatcher, RoutedRequest


class FastPathRequest(Work, ResponseCallback):
    """Once begun it counts as in flight until its `errand` is done, or the handler has taken it over."""

    __slots__ = ("_dispatcher", "_errand", "_hold", "_in_flight", "_request", "_started")

    _hold: Reservation
    _request: tuple[bytes, bytes]
    _started: PendingRequest

    def __init__(self, dispatcher: Dispatcher, errand: RoutedRequest, in_flight: InFlight) -> None:
        self._dispatcher = dispatcher
        self._errand = errand
        self._in_flight = in_flight

    def begin(self) -> bool:
        """False: it is the handler's, and not counted. So it is when something is raised."""
        dispatcher, errand = self._dispatcher, self._errand
        hold = dispatcher.table.acquire(errand.experts, affinity_slot=errand.slot)
        if hold is None:
            return False
        started: PendingRequest | None = None
        try:
            self._request = head, body = dispatcher.request_for(errand, hold)
            started = dispatcher.client.start(
                "POST", hold.replica.address, errand.target, head=head, body=body, asker=self,
                limits=dispatcher.limits_of(errand),
            )  # fmt: skip
        finally:
            if started is None:
                hold.release()
                hold.replica.last_used = 0  # it was not: the handler is to get the same one, and not always the other
        if started is None:
            return False
        self._hold, self._started = hold, started
        hold.watch(started.patience)
        errand.phase = "before_first_byte"
        self._in_flight.enter()
        return True

    def leave(self) -> None:
        self._in_flight.leave()

    def cancel(self) -> None:
        errand = self._errand
        errand.request.begun_work = errand.work = errand.begun = None
        self._started.abandon()
        self._hold.release()
        self._dispatcher.metrics.cancelled.add(errand.phase)
        self.leave()

    def on_answer(self, status: int, headers: Headers, body: bytes) -> bool:
        errand, hold, dispatcher = self._errand, self._hold, self._dispatcher
        if status in JUDGED or headers.content_type == CONTENT_TYPE or len(body) > SHORT_BYTES:
            return False
        if errand.dialect.ending.may_be_aborted(body):
            return False
        request = errand.request
        request.begun_work = None  # or the two would wait for the garbage collector
        if self._in_flight.closing:
            request.keep_alive = False
        try:
            if hold.replica.recent_error:
                dispatcher.witness.request_succeeded(hold.replica)
            head = dispatcher.said(errand, hold, headers)
            dispatcher.metrics.first_byte.add(time.perf_counter() - errand.started, hold.expert, hold.replica.name)
            dispatcher.metrics.requests.add(hold.expert, str(errand.reason_at(hold.expert)), status)
        finally:
            hold.release()
            self._in_flight.leave()
        request.answer(status, head, body)
        return True

    def on_news(self) -> None:
        errand = self._errand
        errand.begun = self._hold, self._dispatcher.exchange(errand, self._hold, self._request, self._started)
        errand.work = self
        errand.request.resume()
