"""Checks the sampling parameters of a request as vLLM does. The simulated engine does not sample, so it uses none of
them.

Ranges and messages: `SamplingParams._verify_args` in vllm/sampling_params.py. `top_k` is a whole number, and the others
are read as floats.
"""

import math
from collections.abc import Callable
from typing import Final

from hpc_router.sim.api_error import ApiError
from hpc_router.sim.request_fields import RequestFields

_RULES: Final[tuple[tuple[str, Callable[[float], bool], str], ...]] = (
    ("presence_penalty", lambda value: -2 <= value <= 2, "in [-2, 2]"),
    ("frequency_penalty", lambda value: -2 <= value <= 2, "in [-2, 2]"),
    ("repetition_penalty", math.isfinite, "a finite number"),
    ("repetition_penalty", lambda value: value > 0, "greater than zero"),
    ("temperature", math.isfinite, "a finite number"),
    ("temperature", lambda value: value >= 0, "non-negative"),
    ("temperature", lambda value: value <= 2, "in [0, 2]"),
    ("top_p", lambda value: 0 < value <= 1, "in (0, 1]"),
    ("min_p", lambda value: 0 <= value <= 1, "in [0, 1]"),
)


def check_sampling(fields: RequestFields) -> None:
    """Raises ApiError for a sampling parameter that vLLM refuses."""
    for key, holds, rule in _RULES:
        value = fields.number(key)
        if value is not None and not holds(value):
            raise ApiError(f"{key} must be {rule}, got {value}.", param=key)
    top_k = fields.integer("top_k", minimum=-(2**63))
    if top_k is not None and top_k < -1:
        raise ApiError(f"top_k must be 0 (disable), or at least 1, got {top_k}.", param="top_k")
