"""A request from its arrival to the end of its answer without a task: what most requests need no more than.

It goes this way when nothing has to be waited for but the replica: its body is there, its expert has a free place and a
connection is kept. And it ends this way when the whole of a short answer comes at once, which is nobody's failure.
Everything else is the dispatcher's: it goes on from where this has come, and nothing is decided twice.
"""

import time
from typing import cast

from hpc_router.relay.downstream import SHORT_BYTES, Response, Work
from hpc_router.relay.exchange import Exchange, WholeResponse
from hpc_router.relay.in_flight import InFlight
from hpc_router.relay.sse import CONTENT_TYPE
from hpc_router.router.dispatch import JUDGED, Dispatcher, Errand
from hpc_router.router.replicas import Hold


class ExpressWork(Work):
    """Once begun it counts as in flight until its `errand` is done, or the handler has taken it over."""

    __slots__ = ("_dispatcher", "_errand", "_in_flight")

    def __init__(self, dispatcher: Dispatcher, errand: Errand, in_flight: InFlight) -> None:
        self._dispatcher = dispatcher
        self._errand = errand
        self._in_flight = in_flight

    def begin(self) -> bool:
        """False: it is the handler's, and not counted. So it is when something is raised."""
        dispatcher, errand = self._dispatcher, self._errand
        picked = dispatcher.table.pick(errand.experts, slot=errand.slot)
        if picked is not None and dispatcher.client.starts(picked[0].address):
            hold = dispatcher.table.hold(*picked)
            try:
                exchange = cast(Exchange, dispatcher.exchange(errand, hold))
                if exchange.start(self._on_news):
                    errand.phase, errand.begun = "before_first_byte", (hold, exchange)
                    self._in_flight.__enter__()
                    return True
            finally:
                if errand.begun is None:
                    hold.release()
        return False

    def leave(self) -> None:
        self._in_flight.__exit__(None, None, None)

    def cancel(self) -> None:
        errand = self._errand
        assert errand.begun is not None
        hold, exchange = errand.begun
        errand.request.begun_work = errand.work = None
        exchange.abandon()
        hold.release()
        self._dispatcher.metrics.cancelled.add(errand.phase)
        self.leave()

    def _on_news(self) -> None:
        errand = self._errand
        assert errand.begun is not None
        hold, exchange = errand.begun
        upstream = exchange.finish(_is_plain)
        if upstream is None:
            errand.work = self
            errand.request.resume()
            return
        if self._in_flight.closing:
            errand.request.keep_alive = False
        errand.request.begun_work = None  # or the two would wait for the garbage collector
        try:
            response = self._answered(hold, upstream)
        finally:
            hold.release()
            self.leave()
        errand.request.answer(response)

    def _answered(self, hold: Hold, upstream: WholeResponse) -> Response:
        errand, expert, metrics = self._errand, hold.expert, self._dispatcher.metrics
        if hold.replica.suspect:
            self._dispatcher.witness.answered(hold.replica)
        metrics.first_byte.add(time.perf_counter() - errand.started, expert)
        metrics.requests.add(expert, str(errand.reason_at(expert)), upstream.status)
        return Response(upstream.status, self._dispatcher.said(errand, hold, upstream), upstream.body)


def _is_plain(status: int, content_type: bytes, size: int) -> bool:
    return status not in JUDGED and content_type != CONTENT_TYPE and size <= SHORT_BYTES
