"""Measures a classifier on labelled prompts: accuracy, balance, coverage, latency, and accuracy for a given cost.

A discovered cluster has no label of its own, so its most frequent label is used. If that label comes from the evaluated
prompts themselves, small clusters look better than they are, so callers can take it from other prompts. Confidence
intervals are bootstraps over prompts, from the 2.5 to the 97.5 % quantile. The results can be printed as JSON. Uses
only numpy; no I/O.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import numpy as np

from hpc_router.routing.features import Doubles, Ids, Mask

SHARES: Final = tuple(round(0.1 * n, 1) for n in range(1, 10))
"""Measurement points of the cost-accuracy curve: shares of the prompts that the expensive expert answers."""
BOOTSTRAP_SAMPLES: Final = 1000
LENGTHS: Final = (200, 500, 1000, 2000)
"""Prompt lengths of the latency measurement, in characters."""


def majority(clusters: Sequence[str], labels: Sequence[str]) -> dict[str, str]:
    """Returns the most frequent label of each cluster; in a tie, the first in alphabetical order."""
    counts: dict[str, Counter[str]] = {}
    for cluster, label in zip(clusters, labels, strict=True):
        counts.setdefault(cluster, Counter())[label] += 1
    return {cluster: min(count, key=lambda name: (-count[name], name)) for cluster, count in counts.items()}


def nmi(clusters: Sequence[str], labels: Sequence[str]) -> float:
    """Returns the normalised mutual information: the mutual information divided by the mean of the two entropies; 0 if
    both entropies are 0."""
    n = len(clusters)
    joint, by_cluster, by_label = Counter(zip(clusters, labels, strict=True)), Counter(clusters), Counter(labels)
    mutual = sum(c / n * math.log(c * n / (by_cluster[a] * by_label[b])) for (a, b), c in joint.items())
    entropy = [-sum(c / n * math.log(c / n) for c in counts.values()) for counts in (by_cluster, by_label)]
    mean = sum(entropy) / 2
    return mutual / mean if mean > 0 else 0.0


def confusion(decided: Sequence[str], labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """Returns the number of prompts by their label and by what was decided for them: label -> decision -> number."""
    table: dict[str, dict[str, int]] = {}
    for (label, name), count in sorted(Counter(zip(labels, decided, strict=True)).items()):
        table.setdefault(label, {})[name] = count
    return table


def balance(decided: Sequence[str], names: Sequence[str]) -> tuple[dict[str, float], float]:
    """Returns the share of each of the k `names` in `decided`, and the balance 1 / (k x largest share), which is 1 if
    all shares are equal."""
    counts = Counter(decided)
    shares = {name: counts[name] / len(decided) for name in names}
    return shares, 1 / (len(names) * max(shares.values()))


def coverage(margins: Sequence[float | None], right: Sequence[bool], *, threshold: float) -> list[dict[str, float]]:
    """Returns, for several limits around `threshold`, the share of the prompts whose margin is at least the limit, and
    the accuracy on these prompts.

    A margin of None counts as infinite.
    """
    known = np.array([math.inf if margin is None else margin for margin in margins])
    correct = np.array(right)
    rows = []
    for margin in (0.0, threshold / 2, threshold, threshold * 2, threshold * 4):
        above = known >= margin
        accuracy = float(correct[above].mean()) if above.any() else 0.0
        rows.append({"margin": round(margin, 6), "coverage": float(above.mean()), "accuracy": accuracy})
    return rows


def latency(decide: Callable[[str], object], texts: Sequence[str]) -> dict[str, Any]:
    """Measures how long `decide` takes. Returns p50 and p99 in microseconds for several prompt lengths; the prompts are
    cut from `texts`.

    A fixed loop of Python code is measured too, as a reference for the speed of the machine.
    """
    joined = " ".join(texts)
    while len(joined) < LENGTHS[-1] * 50:
        joined += " " + joined
    result: dict[str, Any] = {"sum(range(1000))": _quantiles([lambda: sum(range(1000))] * 300)}
    for length in LENGTHS:
        calls = [partial(decide, joined[start : start + length]) for start in range(0, length * 50, length)]
        _quantiles(calls)  # fills the token cache, as in a router that has run for a while
        result[f"{length} B"] = _quantiles(calls * 6)
    return result


def _quantiles(calls: Sequence[Callable[[], object]]) -> dict[str, float]:
    """Returns p50 and p99 of the durations of these calls, in microseconds."""
    durations_us = []
    for call in calls:
        started = time.perf_counter()
        call()
        durations_us.append((time.perf_counter() - started) * 1e6)
    p50, p99 = (round(float(np.quantile(durations_us, q)), 1) for q in (0.5, 0.99))
    return {"p50_us": p50, "p99_us": p99}


def bootstrap_interval(statistic: Callable[[Ids], float], *, rows: int, seed: int = 0) -> tuple[float, float]:
    """Returns the 95 % bootstrap interval of `statistic`, which is called with row numbers of random samples."""
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(rows, size=rows)) for _ in range(BOOTSTRAP_SAMPLES)]
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


def cost_quality(
    *, experts: Sequence[str], cost: Doubles, gain: Doubles, right: Doubles, seed: int = 0
) -> dict[str, Any]:
    """Compares the expert with the lowest and the one with the highest `cost`: how right are the answers if a given
    share of the prompts goes to the expensive one? Returns a dictionary for the report (`classify eval`).

    `right[prompt, expert]`: correctness. `gain[prompt]`: predicted gain from the expensive expert. At each share, the
    prompts with the largest predicted gain go to the expensive expert; ties are broken at random. For comparison,
    `random` is the accuracy if the same number of prompts is selected at random, and `oracle` if those with the largest
    real gain are. `low` and `high`: confidence interval of the difference to `random`.
    """
    expensive, cheap = int(np.argmax(cost)), int(np.argmin(cost))
    rng = np.random.default_rng(seed)
    tie_breaker = rng.random(len(gain))
    selected = {share: _largest(gain, tie_breaker, share) for share in SHARES}
    real_gain = right[:, expensive] - right[:, cheap]

    def above_at(share: float, rows: Ids) -> float:
        return float((real_gain[rows] * selected[share][rows]).mean() - share * real_gain[rows].mean())

    def above(rows: Ids) -> float:
        return float(np.mean([above_at(share, rows) for share in SHARES]))

    def accuracy(to_expensive: Mask) -> float:
        return float(np.where(to_expensive, right[:, expensive], right[:, cheap]).mean())

    def point(share: float) -> dict[str, float]:
        low, high = bootstrap_interval(partial(above_at, share), rows=len(gain), seed=seed)
        return {
            "cost": share,
            "accuracy": accuracy(selected[share]),
            "random": float(right[:, cheap].mean() + share * real_gain.mean()),
            "oracle": accuracy(_largest(real_gain, tie_breaker, share)),
            "low": low,
            "high": high,
        }

    low, high = bootstrap_interval(above, rows=len(gain), seed=seed)
    return {
        "dear": experts[expensive],
        "cheap": experts[cheap],
        "single": {name: float(right[:, e].mean()) for e, name in enumerate(experts)},
        "oracle": float(right.max(axis=1).mean()),
        "above_random_mixing": {"mean": above(np.arange(len(gain))), "low": low, "high": high},
        "curve": [point(share) for share in SHARES],
    }


def _largest(gain: Doubles, tie_breaker: Doubles, share: float) -> Mask:
    """Returns a mask that selects a `share` of the prompts: those with the largest gain."""
    order = np.lexsort((tie_breaker, -gain))
    selected = np.zeros(len(gain), np.bool_)
    selected[order[: round(share * len(gain))]] = True
    return selected
