"""Moves clusters between experts until none has more load than its capacity allows.

The load of a cluster is its share of the traffic, given or measured; the capacity of an expert its share of all
capacity. A move costs the share of the cluster times what it loses there in score. The cheapest move that brings an
expert under its limit is taken, else the one that relieves it most per loss; when only moves beyond the stated loss are
left, replicas are recommended instead. Pure: a table in, a table out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """`loss`: in score, over all traffic. `replicas`: by what factor those of an expert would have to grow."""

    table: tuple[str, ...]
    shares: Mapping[str, float]
    loss: float
    moves: tuple[str, ...]
    replicas: Mapping[str, int]


def pack(
    table: Sequence[str],
    *,
    clusters: Sequence[str],
    load: Doubles,
    score: Doubles,
    capacity: Mapping[str, float],
    limit: float,
    most_loss: float,
) -> Packed:
    """`score[c, e]`: of cluster c at the e-th expert of `capacity`, whose shares add up to 1."""
    names = list(capacity)
    room = np.array([capacity[name] for name in names]) * limit
    at = [names.index(expert) for expert in table]
    lost, moves = 0.0, []
    while True:
        loads = np.bincount(at, weights=load, minlength=len(names)).astype(np.float64)
        move = _next_move(at, loads, room, load, score, budget=most_loss - lost)
        if move is None:
            break
        cluster, target, loss = move
        moves.append(f"{clusters[cluster]}: {names[at[cluster]]} -> {names[target]}")
        at[cluster], lost = target, lost + loss
    return Packed(
        table=tuple(names[e] for e in at),
        shares={name: float(share) for name, share in zip(names, loads, strict=True)},
        loss=lost,
        moves=tuple(moves),
        replicas={
            name: math.ceil(loads[e] / room[e] - 1e-9)
            for e, name in enumerate(names)
            if loads[e] > room[e] * (1 + 1e-9)
        },
    )


def _next_move(
    at: Sequence[int], loads: Doubles, room: Doubles, load: Doubles, score: Doubles, *, budget: float
) -> tuple[int, int, float] | None:
    over = int(np.argmax(loads / room))
    excess = loads[over] - room[over]
    if excess <= 1e-12:
        return None
    found: list[tuple[bool, float, int, int, float]] = []
    for cluster, expert in enumerate(at):
        if expert != over or load[cluster] <= 0:
            continue
        for target in range(len(room)):
            if target == over or loads[target] + load[cluster] > room[target] + 1e-12:
                continue
            loss = float(load[cluster] * (score[cluster, over] - score[cluster, target]))
            enough = bool(load[cluster] >= excess - 1e-12)
            found.append((not enough, loss if enough else loss / load[cluster], cluster, target, loss))
    usable = [option for option in found if option[4] <= budget + 1e-12]
    if not usable:
        return None
    _, _, cluster, target, loss = min(usable)
    return cluster, target, loss
