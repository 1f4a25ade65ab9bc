"""Finds the highest request rate at which the goodput target holds: at which enough requests are within `bench.good`.
Pure functions of the rates measured so far.

The rate is doubled until the target no longer holds, or halved until it holds. The interval between the last two rates
is then bisected at its geometric mean. A search continues from stored results, because it has no other state.
"""

import math
from collections.abc import Mapping

from hpc_router.bench.config import BenchConfig, longest
from hpc_router.bench.figures import Figures

_DIGITS = 4


def next_rate(measured: Mapping[float, bool], config: BenchConfig) -> float | None:
    """Returns the rate to measure next; None after the end of the search. `measured`: rate -> whether the target
    held."""
    assert config.rates is not None
    if len(measured) >= config.search_points:
        return None
    if not measured:
        return config.rates[0]
    bad = min((rate for rate, held in measured.items() if not held), default=None)
    good = max((rate for rate, held in measured.items() if held and (bad is None or rate < bad)), default=None)
    if bad is None:
        assert good is not None
        return _rounded(2 * good)
    if good is None:
        return _rounded(bad / 2)
    middle = _rounded(math.sqrt(good * bad))
    return middle if bad / good > config.search_step and good < middle < bad else None


def limit_text(measured: Mapping[float, bool], config: BenchConfig) -> str:
    """Returns the result of a search in one sentence. `measured`: rate -> whether the target held."""
    target = f"{config.search_share:.0%} of the requests within bench.good"
    bad = min((rate for rate, held in measured.items() if not held), default=None)
    good = max((rate for rate, held in measured.items() if held and (bad is None or rate < bad)), default=None)
    if good is None:
        return f"no measured rate has {target}"
    above = "no higher rate was measured" if bad is None else f"not at {bad:g}"
    return f"highest rate with {target}: {good:g} per second ({above})"


def target_holds(figures: Figures, config: BenchConfig) -> bool:
    return bool(figures.requests) and not figures.exceeded and figures.good_share >= config.search_share


def most_in_flight(config: BenchConfig, rate_per_s: float) -> int | None:
    """Returns the number of requests in flight above which the load of `rate_per_s` ends early, because the engines do
    not keep up. It is `bench.most_in_flight` if set. Otherwise, in a search, it follows from Little's law: the rate
    times the longest good response time, doubled, plus ten. None: no limit."""
    if config.most_in_flight is not None or config.search is None:
        return config.most_in_flight
    good = config.good
    seconds = good.e2e_s
    if seconds is None and good.ttft_s is not None and good.tpot_s is not None:
        seconds = good.ttft_s + good.tpot_s * _longest_answer(config)
    if seconds is None:
        return None
    requests = max((longest(one.turns) * (1 + longest(one.tool_turns)) for one in config.classes.values()), default=1.0)
    return math.ceil(2 * rate_per_s * seconds * requests) + 10


def _longest_answer(config: BenchConfig) -> float:
    lengths = [one.output_tokens for one in config.classes.values()]
    if not lengths and config.output_tokens is not None:
        lengths = [config.output_tokens]
    return max(map(longest, lengths), default=config.max_tokens)


def _rounded(rate: float) -> float:
    return float(f"{rate:.{_DIGITS}g}")
