"""The demand of a prediction: how many users there are and when, how they pause, and the lengths of their requests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpc_router.bench.config import Lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class UserDemand:
    """A closed loop of users: each has one request at a time, and sends the next one after a pause.

    `users`: pairs (time in seconds, number of users from then on), the first at time 0. `think_s`: mean of the pauses,
    which are exponential; 0: no pause. `for_s`: length of the predicted period in seconds. `shares`: share of the
    requests for each expert that has one, relative to the others; empty: equal shares.
    """

    users: Sequence[tuple[float, int]]
    think_s: float
    for_s: float
    prompt_tokens: Lengths
    answer_tokens: Lengths
    shares: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0

    @property
    def is_constant(self) -> bool:
        return len(self.users) == 1

    def to_json(self) -> dict[str, Any]:
        return {
            "users": [{"from_s": at_s, "users": count} for at_s, count in self.users],
            "think_s": self.think_s,
            "for_s": self.for_s,
            "prompt_tokens": self.prompt_tokens.mean,
            "answer_tokens": self.answer_tokens.mean,
            "shares": dict(self.shares) or None,
            "seed": self.seed,
        }


def spread_around(mean: float, sigma: float) -> Lengths:
    """Returns a log-normal distribution of lengths with this mean, limited to an eighth and eight times of it; with a
    `sigma` of 0, always the mean."""
    if not sigma:
        return Lengths(kind="fixed", mean=mean)
    return Lengths(kind="lognormal", mean=mean, sigma=sigma, low=max(1, int(mean / 8)), high=max(1, int(mean * 8)))
