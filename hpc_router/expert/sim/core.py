"""What the handlers of one engine share: its settings, its state and its seams. One per engine, no I/O."""

import random
from dataclasses import dataclass, field

from hpc_router.expert.sim.batching import Batching
from hpc_router.expert.sim.config import SimConfig
from hpc_router.expert.sim.kept import Kept
from hpc_router.expert.sim.latency import Clock, LatencyModel
from hpc_router.expert.sim.recent import Recent
from hpc_router.expert.sim.scheduler import Scheduler
from hpc_router.expert.sim.script import FaultScript
from hpc_router.expert.sim.strike import Crash


@dataclass(slots=True, kw_only=True)
class Core:
    config: SimConfig
    clock: Clock
    latency: LatencyModel
    crash: Crash
    scheduler: Scheduler
    script: FaultScript
    ids: random.Random
    recent: Recent = field(default_factory=Recent)
    kept: Kept = field(default_factory=Kept)
    batching: Batching | None = None  # where it stands for an engine on GPUs
    loaded: bool = False
