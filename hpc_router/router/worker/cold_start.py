"""Limits how long a request waits for a replica, and holds it longer while a replica is starting (a cold start).

A request waits for at most `router.queue_timeout_s`. Time in which a replica of one of its experts starts does not
count, so the request is held until that replica is ready. Meanwhile a stream gets SSE comments with the state of the
start; any other request is held no longer than its client's timeout. `router.answer_timeout_s` limits the whole wait.
"""

import asyncio
import time
from types import TracebackType
from typing import Final

from hpc_router.config.schema import RouterConfig
from hpc_router.errors import ColdStartError
from hpc_router.router.replicas.table import ReplicaTable
from hpc_router.router.worker.routed_request import RoutedRequest

CHECK_S: Final = 1.0
"""Interval in seconds at which a waiting request looks at the forecast."""
DEADLINE_HEADERS: Final = (b"x-stainless-read-timeout", b"x-stainless-timeout")
"""Request headers in which the openai and anthropic clients state their timeout in seconds."""
MIN_ADVANCE_S: Final = 1.0
ADVANCE_SHARE: Final = 0.05
"""Share of a client's timeout by which a response is sent before it passes, but at least `MIN_ADVANCE_S`."""


class ColdStartWait:
    """An asynchronous context manager around the wait of `routed` for a replica; raises TimeoutError at the time limit
    (`routed.queue_until`). While a replica is starting, it extends the limit and sends comments to a stream."""

    def __init__(self, routed: RoutedRequest, table: ReplicaTable, config: RouterConfig) -> None:
        self._routed, self._table, self._config = routed, table, config
        self._limit = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None

    def check(self) -> None:
        """If none of the request's experts has a ready replica, counts a cold start. Raises ColdStartError in this case
        if `x-wait`, or else `router.cold_start`, says that the request fails instead of waiting."""
        routed, table = self._routed, self._table
        if routed.only is not None or any(table.has_ready(expert, ()) for expert in routed.experts):
            return
        if (routed.endpoint.wait or self._config.cold_start) == "fail":
            routed.count_cold("failed")
            raise ColdStartError(
                f"{' and '.join(routed.experts)} {'has' if len(routed.experts) == 1 else 'have'} no ready replica"
                f"{self.state()}",
                retry_after_s=max(map(table.wait_s, routed.experts)),
            )
        routed.count_cold("waited")

    def state(self) -> str:
        """Returns the state of the starting replica, as the end of an error message; empty if none is starting."""
        coming = self._table.coming(self._routed.experts)
        return "" if coming is None else f": {coming.text(time.time())}"

    async def __aenter__(self) -> "ColdStartWait":
        await self._limit.__aenter__()
        self._look()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._limit.__aexit__(kind, error, traceback)

    def _look(self) -> None:
        """While a replica is starting, extends the request's time limit and sends the state of the start to a stream.
        Calls itself again after `CHECK_S`."""
        routed, loop = self._routed, asyncio.get_running_loop()
        now, queue_s = time.perf_counter(), self._config.queue_timeout_s
        coming = None if routed.only is not None else self._table.coming(routed.experts)
        if coming is not None:
            until = max(routed.queue_until, now + queue_s)
            early = routed.begin_early()
            if early is not None:
                early.say(coming.text(time.time()))
            routed.queue_until = min(until, routed.started + self._hold_s(streams=early is not None))
        self._limit.reschedule(loop.time() + routed.queue_until - now)
        self._timer = loop.call_later(min(CHECK_S, queue_s / 2), self._look)

    def _hold_s(self, *, streams: bool) -> float:
        """Returns the maximum time in seconds from the request's arrival to the end of its wait. `streams`: whether the
        client gets comments meanwhile, which keep its timeout from expiring. Otherwise the wait ends before the timeout
        that the client states, if it states one."""
        most_s = self._config.answer_timeout_s
        stated = None if streams else _stated_timeout_s(self._routed)
        if stated is None:
            return most_s
        return min(most_s, max(stated - max(MIN_ADVANCE_S, ADVANCE_SHARE * stated), stated / 2))


def _stated_timeout_s(routed: RoutedRequest) -> float | None:
    """Returns the timeout in seconds that the client states in one of `DEADLINE_HEADERS`; None if it states none."""
    for name in DEADLINE_HEADERS:
        try:
            stated = float(routed.request.headers.get(name, b""))
        except ValueError:
            continue
        if 0 < stated < float("inf"):
            return stated
    return None
