"""Moves clusters between experts until no expert has more load than its limit.

The load of a cluster is its share of the traffic. The limit of an expert is its share of the total capacity, times a
factor. Moving a cluster loses score: its load times the difference between the two experts' scores. Each step takes the
most overloaded expert and makes the move with the smallest loss that brings this expert under its limit. If no single
move does that, it makes the move with the least loss per load. If the remaining moves would exceed the permitted total
loss, the result recommends more replicas instead. Pure functions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hpc_router.routing.features import Doubles


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalancedTable:
    """The result of rebalancing. `table`: expert of each cluster. `shares`: load of each expert. `loss`: total loss of
    score. `moves`: the moved clusters, as texts.

    `replicas`: for each expert that stays overloaded, the factor by which its number of replicas has to grow.
    """

    table: tuple[str, ...]
    shares: Mapping[str, float]
    loss: float
    moves: tuple[str, ...]
    replicas: Mapping[str, int]


def rebalance(
    table: Sequence[str],
    *,
    clusters: Sequence[str],
    load: Doubles,
    score: Doubles,
    capacity: Mapping[str, float],
    limit: float,
    max_loss: float,
) -> RebalancedTable:
    """Returns the result of moving clusters from overloaded experts to others.

    `table[c]`, `load[c]`: expert and load of cluster c. `score[c, e]`: score of cluster c at the e-th expert of
    `capacity`, whose values add up to 1. `limit`: factor on the capacity, up to which load is allowed. `max_loss`:
    maximum total loss.
    """
    names = list(capacity)
    max_load = np.array([capacity[name] for name in names]) * limit
    assignment = [names.index(expert) for expert in table]
    total_loss, moves = 0.0, []
    while True:
        loads = np.bincount(assignment, weights=load, minlength=len(names)).astype(np.float64)
        move = _next_move(assignment, loads, max_load, load, score, budget=max_loss - total_loss)
        if move is None:
            break
        cluster, target, loss = move
        moves.append(f"{clusters[cluster]}: {names[assignment[cluster]]} -> {names[target]}")
        assignment[cluster], total_loss = target, total_loss + loss
    return RebalancedTable(
        table=tuple(names[e] for e in assignment),
        shares={name: float(share) for name, share in zip(names, loads, strict=True)},
        loss=total_loss,
        moves=tuple(moves),
        replicas={
            name: math.ceil(loads[e] / max_load[e] - 1e-9)
            for e, name in enumerate(names)
            if loads[e] > max_load[e] * (1 + 1e-9)
        },
    )


def _next_move(
    assignment: Sequence[int], loads: Doubles, max_load: Doubles, load: Doubles, score: Doubles, *, budget: float
) -> tuple[int, int, float] | None:
    """Returns cluster, target expert and loss of the next move; None if no expert is overloaded, or if every move loses
    more than `budget`."""
    source = int(np.argmax(loads / max_load))
    excess = loads[source] - max_load[source]
    if excess <= 1e-12:
        return None
    # Sort key: first the moves that bring the expert under its limit, by loss; then the others, by loss per load.
    moves: list[tuple[bool, float, int, int, float]] = []
    for cluster, expert in enumerate(assignment):
        if expert != source or load[cluster] <= 0:
            continue
        for target in range(len(max_load)):
            if target == source or loads[target] + load[cluster] > max_load[target] + 1e-12:
                continue
            loss = float(load[cluster] * (score[cluster, source] - score[cluster, target]))
            enough = bool(load[cluster] >= excess - 1e-12)
            moves.append((not enough, loss if enough else loss / load[cluster], cluster, target, loss))
    affordable = [move for move in moves if move[4] <= budget + 1e-12]
    if not affordable:
        return None
    _, _, cluster, target, loss = min(affordable)
    return cluster, target, loss
