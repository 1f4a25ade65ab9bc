"""The simulated engine: an OpenAI-style server with vLLM's manners, seeded latencies and scripted faults, no model.

It stands in for vLLM in tests, demos and load experiments: `python -m hpc_router.sim`, or in-process
`async with SimServer(SimConfig(...)) as engine`. Everything it says is labelled simulated. It knows nothing of
agents, routers or registries, and loads neither torch nor vllm.
"""

from hpc_router.sim.config import SimConfig
from hpc_router.sim.latency import Clock, JitteredLatency, LatencyModel
from hpc_router.sim.server import SimServer

__all__ = ["Clock", "JitteredLatency", "LatencyModel", "SimConfig", "SimServer"]
