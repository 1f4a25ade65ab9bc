"""Reads the metrics of the engines every `READ_S` seconds, once for the whole router.

The agents pass their engine's metrics through. The load of each engine is stored on its `Replica`, from where it
reaches `/metrics`, `/status` and, with the replica snapshot, the workers. External endpoints are not asked, because
they may belong to other people. All engines are read in one burst, so that the workers get one snapshot with all loads.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import aiohttp
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from hpc_router.net import protocol
from hpc_router.net.http_client import bounded_body, session
from hpc_router.router.replicas.engine_load import EngineLoad
from hpc_router.router.replicas.replica import Replica, RoutingState
from hpc_router.router.replicas.table import ReplicaTable
from hpc_router.state.registry import RecordKind, split_replica

logger = logging.getLogger(__name__)

READ_S: Final = 15.0
"""Interval in seconds between two readings of all engines."""
TIMEOUT_S: Final = 5.0
AT_ONCE: Final = 8
"""Number of engines that are read at the same time."""


@dataclass(slots=True)
class EngineLoads:
    """Reads the loads of all engines, and adds up what their prefix caches did, by expert. The expert of an engine is
    the one that owns its job, so that adapters count for their host. `on_read` is called after each burst that changed
    a load. `prefix_queries`, `prefix_hits`: number of prompt tokens, and how many of them were in a prefix cache."""

    table: ReplicaTable
    on_read: Callable[[], None]
    prefix_hits: dict[str, float] = field(default_factory=dict)
    prefix_queries: dict[str, float] = field(default_factory=dict)
    _last: dict[Replica, EngineLoad] = field(default_factory=dict)
    _silent: set[Replica] = field(default_factory=set)

    async def read_forever(self) -> None:
        async with session(timeout_s=TIMEOUT_S) as client:
            while True:
                await self.read(client)
                await asyncio.sleep(READ_S)

    async def read(self, client: aiohttp.ClientSession) -> None:
        """Reads the metrics of all ready engines once, `AT_ONCE` engines at a time."""
        asked = [r for r in self.table.all() if r.record.kind is RecordKind.EXPERT and r.state is RoutingState.READY]
        before = [replica.engine_load for replica in asked]
        places = asyncio.Semaphore(AT_ONCE)
        await asyncio.gather(*(self._read_one(client, places, replica) for replica in asked))
        self._silent.intersection_update(asked)
        self._last = {r: self._last[r] for r in self.table.all() if r in self._last}
        if before != [replica.engine_load for replica in asked]:
            self.on_read()

    async def _read_one(self, client: aiohttp.ClientSession, places: asyncio.Semaphore, replica: Replica) -> None:
        headers = {"Authorization": f"Bearer {replica.key}"} if replica.key else {}
        load = None
        try:
            async with (
                places,
                client.get(replica.record.url + protocol.METRICS, headers=headers, allow_redirects=False) as response,
            ):
                if response.status == 200:
                    load = EngineLoad.read(await bounded_body(response))
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            if replica not in self._silent:
                self._silent.add(replica)
                logger.info("%s: its engine's metrics cannot be read: %s", replica.name, error or type(error).__name__)
        self.learn(replica, load)

    def learn(self, replica: Replica, load: EngineLoad | None) -> None:
        """Stores the load of the replica's engine; None if it could not be read. Adds the increase of its prefix
        cache's counters to the sums of its expert. The first reading adds nothing, as an earlier router may have
        counted that. A counter that has become smaller belongs to a new engine process, and is added in full."""
        replica.engine_load = load
        if load is None:
            return
        expert = split_replica(replica.name)[0]
        last = self._last.get(replica, load)
        self._last[replica] = load
        for sums, new, old in (
            (self.prefix_hits, load.prefix_hits, last.prefix_hits),
            (self.prefix_queries, load.prefix_queries, last.prefix_queries),
        ):
            if new is not None:
                sums[expert] = sums.get(expert, 0.0) + (new if old is None or new < old else new - old)

    def metrics(self) -> Iterator[Metric]:
        """Yields metrics with the loads and the sums of each expert's engines, for `/metrics`."""
        running = GaugeMetricFamily(
            "hpc_router_engine_requests_running", "Requests that the expert's engines compute.", labels=("expert",)
        )
        waiting = GaugeMetricFamily(
            "hpc_router_engine_requests_waiting", "Requests that wait in the expert's engines.", labels=("expert",)
        )
        use = GaugeMetricFamily(
            "hpc_router_engine_kv_cache_usage_ratio", "Share of the engines' KV caches in use.", labels=("expert",)
        )
        loads: dict[str, list[EngineLoad]] = {}
        for replica in self.table.all():
            if replica.engine_load is not None:
                loads.setdefault(split_replica(replica.name)[0], []).append(replica.engine_load)
        for expert, known in sorted(loads.items()):
            running.add_metric((expert,), sum(load.running or 0.0 for load in known))
            waiting.add_metric((expert,), sum(load.waiting or 0.0 for load in known))
            shares = [load.kv_use for load in known if load.kv_use is not None]
            if shares:
                use.add_metric((expert,), sum(shares) / len(shares))
        yield from (running, waiting, use)
        for name, text, sums in (
            (
                "hpc_router_prefix_hit_tokens",
                "Tokens of prompts that the engines' prefix caches had.",
                self.prefix_hits,
            ),
            ("hpc_router_prefix_query_tokens", "Tokens of prompts looked up in prefix caches.", self.prefix_queries),
        ):
            counter = CounterMetricFamily(name, text, labels=("expert",))
            for expert, count in sorted(sums.items()):
                counter.add_metric((expert,), count)
            yield counter
