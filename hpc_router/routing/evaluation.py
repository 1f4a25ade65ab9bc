"""What an artefact is worth on labelled prompts. Numpy alone; no I/O.

A discovered cluster stands for the label that is commonest in it (of the evaluated prompts, which flatters it where
clusters are small; `fitted` takes the map from other prompts). Intervals are bootstraps over prompts, 2.5 to 97.5 %.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

SHARES: Final = tuple(round(0.1 * n, 1) for n in range(1, 10))
DRAWS: Final = 1000
LENGTHS: Final = (200, 500, 1000, 2000)

Doubles = NDArray[np.float64]


def majority(clusters: Sequence[str], labels: Sequence[str]) -> dict[str, str]:
    """Cluster -> its commonest label; ties go to the first by name."""
    counts: dict[str, Counter[str]] = {}
    for cluster, label in zip(clusters, labels, strict=True):
        counts.setdefault(cluster, Counter())[label] += 1
    return {cluster: min(found, key=lambda name: (-found[name], name)) for cluster, found in counts.items()}


def nmi(clusters: Sequence[str], labels: Sequence[str]) -> float:
    """Mutual information over the mean of the two entropies; 0 where either has none."""
    n = len(clusters)
    both, one, other = Counter(zip(clusters, labels, strict=True)), Counter(clusters), Counter(labels)
    mutual = sum(c / n * math.log(c * n / (one[a] * other[b])) for (a, b), c in both.items())
    entropy = [-sum(c / n * math.log(c / n) for c in counts.values()) for counts in (one, other)]
    mean = sum(entropy) / 2
    return mutual / mean if mean > 0 else 0.0


def confusion(decided: Sequence[str], labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """label -> decided -> how many."""
    table: dict[str, dict[str, int]] = {}
    for (label, name), count in sorted(Counter(zip(labels, decided, strict=True)).items()):
        table.setdefault(label, {})[name] = count
    return table


def balance(decided: Sequence[str], names: Sequence[str]) -> tuple[dict[str, float], float]:
    """Each one's share, and the efficiency 1 / (k x the largest share): 1 where all have the same."""
    counts = Counter(decided)
    shares = {name: counts[name] / len(decided) for name in names}
    return shares, 1 / (len(names) * max(shares.values()))


def coverage(margins: Sequence[float | None], right: Sequence[bool], *, threshold: float) -> list[dict[str, float]]:
    """At the artefact's threshold and around it: the share of prompts above it, and how many of those are right."""
    given = np.array([math.inf if margin is None else margin for margin in margins])
    good = np.array(right)
    rows = []
    for at in (0.0, threshold / 2, threshold, threshold * 2, threshold * 4):
        above = given >= at
        rows.append(
            {
                "margin": round(at, 6),
                "coverage": float(above.mean()),
                "accuracy": float(good[above].mean()) if above.any() else 0.0,
            }
        )
    return rows


def latency(decide: Callable[[str], object], texts: Sequence[str]) -> dict[str, Any]:
    """Microseconds by length in bytes, of texts cut from these; beside a loop that names the machine's speed."""
    joined = " ".join(texts)
    while len(joined) < LENGTHS[-1] * 50:
        joined += " " + joined
    found: dict[str, Any] = {"sum(range(1000))": _quantiles([lambda: sum(range(1000))] * 300)}
    for length in LENGTHS:
        cut = [joined[start : start + length] for start in range(0, length * 50, length)]
        calls = [_bound(decide, text) for text in cut]
        _quantiles(calls)  # what is looked up for the first time is kept, as in a router that has run for a while
        found[f"{length} B"] = _quantiles(calls * 6)
    return found


def _bound(decide: Callable[[str], object], text: str) -> Callable[[], object]:
    return lambda: decide(text)


def _quantiles(calls: Sequence[Callable[[], object]]) -> dict[str, float]:
    took = []
    for call in calls:
        started = time.perf_counter()
        call()
        took.append((time.perf_counter() - started) * 1e6)
    return {"p50_us": round(float(np.quantile(took, 0.5)), 1), "p99_us": round(float(np.quantile(took, 0.99)), 1)}


def interval(values: Callable[[NDArray[np.intp]], float], *, rows: int, seed: int = 0) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    drawn = [values(rng.integers(rows, size=rows)) for _ in range(DRAWS)]
    return float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))


def cost_quality(
    *, experts: Sequence[str], cost: Doubles, gain: Doubles, right: Doubles, seed: int = 0
) -> dict[str, Any]:
    """Two experts, `right[prompt, expert]`; `gain[prompt]`: what the dearer one is expected to add.

    The curve: for a share of prompts, those with the largest expected gain go to the dearer one (ties by chance).
    Random mixing sends the same share by chance: a straight line between the two. The oracle knows who is right.
    `low`, `high`: the interval of what the curve is above random mixing.
    """
    dear, cheap = int(np.argmax(cost)), int(np.argmin(cost))
    rng = np.random.default_rng(seed)
    chance = rng.random(len(gain))
    ranks = {share: _chosen(gain, chance, share) for share in SHARES}
    difference = right[:, dear] - right[:, cheap]

    def above_at(share: float, rows: NDArray[np.intp]) -> float:
        return float((difference[rows] * ranks[share][rows]).mean() - share * difference[rows].mean())

    def above(rows: NDArray[np.intp]) -> float:
        return float(np.mean([above_at(share, rows) for share in SHARES]))

    def curve(chosen: NDArray[np.bool_]) -> float:
        return float(np.where(chosen, right[:, dear], right[:, cheap]).mean())

    everyone = np.arange(len(gain))
    low, high = interval(above, rows=len(gain), seed=seed)
    around = {s: interval(partial(above_at, s), rows=len(gain), seed=seed) for s in SHARES}
    mixing = {s: float(right[:, cheap].mean() + s * difference.mean()) for s in SHARES}
    return {
        "dear": experts[dear],
        "cheap": experts[cheap],
        "single": {name: float(right[:, e].mean()) for e, name in enumerate(experts)},
        "oracle": float(right.max(axis=1).mean()),
        "above_random_mixing": {"mean": above(everyone), "low": low, "high": high},
        "curve": [
            {
                "cost": s,
                "accuracy": curve(ranks[s]),
                "random": mixing[s],
                "oracle": curve(_chosen(difference, chance, s)),
                "low": around[s][0],
                "high": around[s][1],
            }
            for s in SHARES
        ],
    }


def _chosen(gain: Doubles, chance: Doubles, share: float) -> NDArray[np.bool_]:
    order = np.lexsort((chance, -gain))
    chosen = np.zeros(len(gain), np.bool_)
    chosen[order[: round(share * len(gain))]] = True
    return chosen


def mean_cost(decided: Sequence[str], cost: Mapping[str, float]) -> float:
    return float(np.mean([cost.get(name, 0.0) for name in decided]))
