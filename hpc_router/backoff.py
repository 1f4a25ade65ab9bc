"""Computes the pauses of an exponential back-off, for every retry and restart of the package. Pure: callers sleep and
add their own jitter."""


def pause_s(step: int, *, first_s: float, max_s: float, factor: float = 2.0) -> float:
    """Returns the seconds to wait before the next attempt: `first_s * factor**step`, at most `max_s`; 0 if `step` is
    negative. `step`: number of earlier pauses."""
    return 0.0 if step < 0 else min(max_s, first_s * factor ** min(step, 64))  # 64: no overflow
