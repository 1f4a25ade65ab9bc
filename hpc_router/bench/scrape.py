"""Measures the CPU time that a scrape of `/metrics` costs the control process of a router. Starts nothing.

The table of replicas, the counts of the workers and the engines' loads are like those of a busy router. For each
scrape, the counts of each worker are decoded and added up, and the text is written, as in the control process.
"""

import gc
import statistics
import time
from dataclasses import dataclass
from typing import Final

from hpc_router.errors import ConfigError
from hpc_router.relay import memory_tuning
from hpc_router.router.control.continuity import Continuity
from hpc_router.router.control.engine_metrics import EngineLoads
from hpc_router.router.ipc import messages
from hpc_router.router.metrics import Metrics, gauges
from hpc_router.router.replicas.engine_load import EngineLoad
from hpc_router.router.replicas.replica import Event, Replica
from hpc_router.router.replicas.table import ReplicaTable
from hpc_router.state.registry import Record, RecordKind, State, replica_name

REASONS: Final = ("named", "classified", "low_margin", "unavailable")
STATUSES: Final = (200, 400, 429, 503)
CLUSTERS: Final = 64


@dataclass(frozen=True, slots=True)
class ScrapeCost:
    """The measured cost: milliseconds of CPU time per scrape."""

    replicas: int
    experts: int
    workers: int
    scrapes: int
    kilobytes: float
    median_ms: float
    p90_ms: float

    def line(self) -> str:
        what = f"{self.replicas} replicas of {self.experts} experts, {self.workers} workers, {self.scrapes} scrapes of "
        return f"{what}{self.kilobytes:.0f} kB: {self.median_ms:.1f} ms of CPU (median), {self.p90_ms:.1f} ms (p90)"


def measure_scrapes(*, replicas: int, experts: int, workers: int, scrapes: int) -> ScrapeCost:
    """Returns the cost of a scrape, measured over `scrapes` scrapes. The `replicas` are divided among the `experts`.
    Raises ConfigError for a number below 1."""
    if min(replicas, experts, workers, scrapes) < 1:
        raise ConfigError("bench scrape: at least one replica, expert, worker and scrape are needed")
    names = [f"expert{number}" for number in range(experts)]
    table = ReplicaTable()
    for number in range(replicas):
        table.put(_replica(names[number % experts], number // experts))
    engines, continuity = EngineLoads(table, lambda: None), Continuity(near_end_s=60.0)
    for replica in table.all():
        engines.learn(replica, EngineLoad(3.0, 1.0, 0.5, 1e6, 5e5))
    continuity.update(table)
    replies = [messages.encode(messages.Reply(_counts(table).dump()), 1)] * workers
    call, spent, text = messages.GetMetrics(), [], b""
    memory_tuning.tune()  # as in the control process
    for _ in range(scrapes):
        started = time.process_time()
        counted = Metrics()
        for reply in replies:
            message, _ = messages.decode(reply)
            assert isinstance(message, messages.Reply)
            counted.absorb(messages.reply_value(call, message))  # type: ignore[arg-type]
        known = gauges(table, in_flight=1, max_in_flight=1, registry_age_s=0.1, workers=workers)
        text = counted.exposition((*known, *continuity.metrics(), *engines.metrics()))
        spent.append(1000 * (time.process_time() - started))
    gc.unfreeze()
    p90_ms = sorted(spent)[min(scrapes - 1, int(0.9 * scrapes))]
    return ScrapeCost(replicas, experts, workers, scrapes, len(text) / 1000, statistics.median(spent), p90_ms)


def _replica(expert: str, number: int) -> Replica:
    record = Record(
        RecordKind.EXPERT,
        replica_name(expert, number, 1),
        "http://127.0.0.1:1",
        State.READY,
        {expert: expert},
        expires_at=4e9,
    )
    made = Replica(record, key=None)
    made.apply(Event.SAYS_READY)
    return made


def _counts(table: ReplicaTable) -> Metrics:
    """Returns counts such as those of a worker that has served every expert and has counted every outcome."""
    counts = Metrics()
    for expert in sorted(table.experts()):
        for reason in REASONS:
            for status in STATUSES:
                counts.requests.add(expert, reason, status)
        for kind in ("usage", "chunks", "prompt"):
            counts.tokens.add_many(1, expert, kind)
        counts.broken.add(expert)
        counts.queued.add(0.1, expert)
        counts.token_time.add(0.02, expert)
    for replica in table.all():
        (expert,) = replica.record.serves
        counts.first_byte.add(0.1, expert, replica.name)
        counts.before_attempt.add(0.1, expert, replica.name)
        counts.failovers.add(replica.name, 503)
    for cluster in range(CLUSTERS):
        counts.decided.add("artefact", str(cluster), "classified")
    return counts
