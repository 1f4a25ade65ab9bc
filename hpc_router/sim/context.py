"""What the handlers of one engine share: its settings, its state and its seams. One per engine, no I/O."""

import random
from dataclasses import dataclass, field

from hpc_router.sim.admission import Scheduler
from hpc_router.sim.batch_loop import Batching
from hpc_router.sim.config import SimConfig
from hpc_router.sim.fault_injection import Crash
from hpc_router.sim.fault_schedule import FaultScript
from hpc_router.sim.latency import Clock, LatencyModel
from hpc_router.sim.request_log import RequestLog
from hpc_router.sim.response_store import Kept


@dataclass(slots=True, kw_only=True)
class Core:
    config: SimConfig
    clock: Clock
    latency: LatencyModel
    crash: Crash
    scheduler: Scheduler
    script: FaultScript
    ids: random.Random
    recent: RequestLog = field(default_factory=RequestLog)
    kept: Kept = field(default_factory=Kept)
    batching: Batching | None = None  # where it stands for an engine on GPUs
    loaded: bool = False
