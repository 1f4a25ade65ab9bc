"""The log lines of a vLLM that cannot start, by failure reason. Tests check with them that the agent recognises the
reasons.

The texts are shortened from those of vLLM, PyTorch and CUDA. The first line says that it is simulated.
"""

import os
from pathlib import Path
from typing import Final

from hpc_router.sim.faults import Fault

_LAST_LINES: Final = {
    "out_of_memory": (
        '  File "torch/nn/modules/linear.py", line 106, in __init__',
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 896.00 MiB. GPU 0 has a total capacity of "
        "79.25 GiB of which 412.56 MiB is free. Process has 78.84 GiB memory in use.",
    ),
    "kv_cache": (
        '  File "vllm/v1/core/kv_cache_utils.py", line 687, in check_enough_kv_cache_memory',
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
        "initializing the engine.",
    ),
    "weights": (
        '  File "vllm/model_executor/model_loader/default_loader.py", line 152, in _prepare_weights',
        "RuntimeError: Cannot find any model weights with `/models/{model}`",
    ),
    "cuda": (
        '  File "vllm/v1/worker/gpu_worker.py", line 188, in init_device',
        "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device",
    ),
}


def failure_log(reason: str, *, model: str) -> str:
    """Returns the log of a start that fails for this reason."""
    where, what = _LAST_LINES[reason]
    core = (
        "EngineCore failed to start.",
        "Traceback (most recent call last):",
        '  File "vllm/v1/engine/core.py", line 709, in run_engine_core',
        "    engine_core = EngineCoreProc(*args, **kwargs)",
        where,
        what.format(model=model),
    )
    pid = os.getpid()
    return "\n".join(
        (
            f"hpc_router-sim: simulated load failure ({reason})",
            *(f"(EngineCore_DP0 pid={pid}) ERROR [core.py:718] {line}" for line in core),
            "Traceback (most recent call last):",
            '  File "vllm/v1/engine/utils.py", line 750, in wait_for_engine_startup',
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): "
            "{'EngineCore_DP0': 1}",
        )
    )


def fails_this_start(fault: Fault, *, times: int | None) -> bool:
    """Returns whether this start must fail: always if `times` is None, else only the first `times` starts. Each failing
    start adds a byte to the file `fault.counter`."""
    if times is None or fault.counter is None:
        return True
    counter = Path(fault.counter)
    failed = counter.stat().st_size if counter.exists() else 0
    if failed >= times:
        return False
    with counter.open("ab") as file:
        file.write(b".")
    return True
