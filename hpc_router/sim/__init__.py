"""The simulated engine: an OpenAI-compatible server that responds as vLLM does, without a model.

A seed determines latencies and answers, and faults can be injected. It replaces vLLM in tests, demos and load
experiments: as a process, `python -m hpc_router.sim`, or in-process, `async with SimServer(SimConfig(...)) as engine`
(module `server`). All responses are labelled as simulated. This package does not know agents, routers or registries. It
loads neither torch nor vllm. Importing it loads no server, because an agent reads only the options of the engine.
"""
