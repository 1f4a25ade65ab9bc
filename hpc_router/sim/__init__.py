"""The simulated engine: an OpenAI-compatible server that responds as vLLM does, without a model.

A seed determines latencies and answers, and faults can be injected. It replaces vLLM in tests, demos and load
experiments: as a process, `python -m hpc_router.sim`, or in-process, `async with SimServer(SimConfig(...)) as engine`.
All responses are labelled as simulated. This package does not know agents, routers or registries. It loads neither
torch nor vllm.
"""

from hpc_router.sim.config import SimConfig
from hpc_router.sim.latency import Clock, JitteredLatency, LatencyModel
from hpc_router.sim.server import SimServer

__all__ = ["Clock", "JitteredLatency", "LatencyModel", "SimConfig", "SimServer"]
