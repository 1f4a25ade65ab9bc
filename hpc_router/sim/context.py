"""The parts that all handlers of one engine share: its settings, its state, and replaceable parts such as the clock."""

import random
from dataclasses import dataclass, field

from hpc_router.sim.admission import AdmissionQueue
from hpc_router.sim.batch_loop import BatchLoop
from hpc_router.sim.config import SimConfig
from hpc_router.sim.fault_injection import Crash
from hpc_router.sim.fault_schedule import FaultSchedule
from hpc_router.sim.kv_cache import BlockPool
from hpc_router.sim.latency import Clock, LatencyModel
from hpc_router.sim.request_log import RequestLog
from hpc_router.sim.response_store import ResponseStore
from hpc_router.sim.tokenizer import Tokenizer


@dataclass(slots=True, kw_only=True)
class EngineContext:
    """The shared state of one engine."""

    config: SimConfig
    clock: Clock
    latency: LatencyModel
    pool: BlockPool
    crash: Crash
    admission: AdmissionQueue
    faults: FaultSchedule
    ids: random.Random
    requests: RequestLog = field(default_factory=RequestLog)
    responses: ResponseStore = field(default_factory=ResponseStore)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    batch: BatchLoop | None = None  # not None if a roofline predicts the latencies
    loaded: bool = False
