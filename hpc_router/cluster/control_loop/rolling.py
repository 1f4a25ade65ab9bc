"""Which slots may replace their jobs now because these run with an earlier config. Pure.

`apply` changes the config; jobs of another revision are outdated. Experts are replaced one after the other, the router
last, and of one expert at most MAX_SHARE of its slots at a time. An expert whose successor fails keeps its turn, so
that a bad config stops at the first one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final

from hpc_router.cluster.control_loop.slots import Attempt, Observed, Slot
from hpc_router.cluster.launchers.interface import ROUTER

MAX_SHARE: Final = 0.25
"""Largest share of an expert's slots that are replaced at the same time; at least one."""


def is_outdated(attempt: Attempt, revisions: Mapping[str, str]) -> bool:
    """Returns whether the attempt was submitted with another revision of the config."""
    wanted = revisions.get(attempt.slot.expert)
    return wanted is not None and attempt.revision is not None and attempt.revision != wanted


def may_roll(wanted: Sequence[Slot], observed: Observed, revisions: Mapping[str, str]) -> set[Slot]:
    """Returns the slots whose outdated jobs may be replaced now."""
    waiting = [slot for slot in wanted if any(a.live and is_outdated(a, revisions) for a in observed.get(slot, ()))]
    if not waiting:
        return set()
    expert = min((slot.expert for slot in waiting), key=lambda name: (name == ROUTER, name))
    own = [slot for slot in wanted if slot.expert == expert]
    most = max(1, math.floor(MAX_SHARE * len(own)))
    # Slots that have begun keep their turn.
    begun = [slot for slot in waiting if not is_outdated(observed[slot][-1], revisions)]
    return set(sorted((slot for slot in waiting if slot.expert == expert), key=lambda s: (s not in begun, s))[:most])
