"""Selects the slots whose jobs may be replaced now because the jobs have an earlier config. Pure.

`apply` changes the config, and jobs of another revision are then outdated. Experts are replaced one after the other,
and the router last. At most MAX_SHARE of an expert's slots are replaced at the same time. While an expert's successor
fails, no other expert is replaced, so that a bad config affects only one expert.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final

from hpc_router.cluster.control_loop.slots import Attempt, Observed, Slot
from hpc_router.cluster.launchers.interface import ROUTER

MAX_SHARE: Final = 0.25
"""Maximum share of an expert's slots that are replaced at the same time. At least one slot is."""


def is_outdated(attempt: Attempt, revisions: Mapping[str, str]) -> bool:
    """Returns whether the attempt's job was submitted with another config revision than `revisions` has for its
    expert."""
    wanted = revisions.get(attempt.slot.expert)
    return wanted is not None and attempt.revision is not None and attempt.revision != wanted


def may_roll(wanted: Sequence[Slot], observed: Observed, revisions: Mapping[str, str]) -> set[Slot]:
    """Returns the slots in `wanted` whose outdated jobs may be replaced now."""
    waiting = [slot for slot in wanted if any(a.live and is_outdated(a, revisions) for a in observed.get(slot, ()))]
    if not waiting:
        return set()
    expert = min((slot.expert for slot in waiting), key=lambda name: (name == ROUTER, name))
    own = [slot for slot in wanted if slot.expert == expert]
    most = max(1, math.floor(MAX_SHARE * len(own)))
    # A slot whose replacement has begun comes first.
    begun = [slot for slot in waiting if not is_outdated(observed[slot][-1], revisions)]
    return set(sorted((slot for slot in waiting if slot.expert == expert), key=lambda s: (s not in begun, s))[:most])
