"""The fast path: serves a request by callbacks, without a task.

A request starts on it if only the replica has to be awaited: the body is complete, the expert has a free replica and a
connection is pooled. It ends on it if a short response without an error is received in one read. Every other request is
continued by the dispatcher in a task, from the current state, so that nothing is decided twice.
"""

import time

from hpc_router.relay.downstream.interface import SHORT_BYTES, PendingResponse
from hpc_router.relay.headers import Headers
from hpc_router.relay.in_flight import InFlight
from hpc_router.relay.sse import CONTENT_TYPE
from hpc_router.relay.upstream.interface import PendingRequest, ResponseCallback
from hpc_router.router.replicas.replica import Reservation
from hpc_router.router.worker.dispatcher import REVIEWED_STATUSES, Dispatcher, RoutedRequest


class FastPathRequest(PendingResponse, ResponseCallback):
    """Counts as in flight from `begin` until the response is complete or the handler continues the request."""

    __slots__ = ("_dispatcher", "_in_flight", "_request", "_reservation", "_routed", "_started")

    _reservation: Reservation
    _request: tuple[bytes, bytes]
    _started: PendingRequest

    def __init__(self, dispatcher: Dispatcher, routed: RoutedRequest, in_flight: InFlight) -> None:
        self._dispatcher = dispatcher
        self._routed = routed
        self._in_flight = in_flight

    def begin(self) -> bool:
        """False, or an exception: not started and not counted; the handler has to serve it."""
        dispatcher, routed = self._dispatcher, self._routed
        reservation = dispatcher.table.acquire(routed.experts, slot=routed.slot)
        if reservation is None:
            return False
        started: PendingRequest | None = None
        try:
            self._request = head, body = dispatcher.request_for(routed, reservation)
            started = dispatcher.client.start(
                "POST", reservation.replica.address, routed.target, head=head, body=body, callback=self,
                limits=dispatcher.limits_of(routed),
            )  # fmt: skip
        finally:
            if started is None:
                reservation.release()
                reservation.replica.last_used = 0  # unused, so that the handler gets the same replica
        if started is None:
            return False
        self._reservation, self._started = reservation, started
        reservation.watch(started.idle_timer)
        routed.phase = "before_first_byte"
        self._in_flight.enter()
        return True

    def leave(self) -> None:
        self._in_flight.leave()

    def cancel(self) -> None:
        routed = self._routed
        routed.request.fast_path = routed.in_flight_entry = routed.sent = None
        self._started.cancel()
        self._reservation.release()
        self._dispatcher.metrics.cancelled.add(routed.phase)
        self.leave()

    def on_response(self, status: int, headers: Headers, body: bytes) -> bool:
        routed, reservation, dispatcher = self._routed, self._reservation, self._dispatcher
        if status in REVIEWED_STATUSES or headers.content_type == CONTENT_TYPE or len(body) > SHORT_BYTES:
            return False
        if routed.api_format.abort_detector.may_be_aborted(body):
            return False
        request = routed.request
        request.fast_path = None  # breaks a reference cycle
        if self._in_flight.closing:
            request.keep_alive = False
        try:
            if reservation.replica.suspect:
                dispatcher.health.request_succeeded(reservation.replica)
            head = dispatcher.response_head(routed, reservation, headers)
            dispatcher.metrics.first_byte.add(
                time.perf_counter() - routed.started, reservation.expert, reservation.replica.name
            )
            dispatcher.metrics.requests.add(reservation.expert, str(routed.reason_at(reservation.expert)), status)
        finally:
            reservation.release()
            self._in_flight.leave()
        request.respond(status, head, body)
        return True

    def on_incomplete(self) -> None:
        routed = self._routed
        routed.sent = (
            self._reservation,
            self._dispatcher.exchange(routed, self._reservation, self._request, self._started),
        )
        routed.in_flight_entry = self
        routed.request.resume()
