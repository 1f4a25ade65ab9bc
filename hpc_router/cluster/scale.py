"""How many replicas experts have from now on: kept in `desired.json`, carried out by the control loop."""

import re
from collections.abc import Mapping, Sequence

from hpc_router.cluster import desired
from hpc_router.cluster.control import Control
from hpc_router.cluster.plan import make_plan
from hpc_router.cluster.router_access import live_router
from hpc_router.errors import ConfigError
from hpc_router.rundir import RunDir


def parse_counts(words: Sequence[str]) -> dict[str, int]:
    """`math=3` -> {"math": 3}. Raises ConfigError."""
    counts: dict[str, int] = {}
    for word in words:
        name, _, count = word.partition("=")
        if not name or not re.fullmatch(r"[0-9]{1,9}", count):
            raise ConfigError(f"scale: '{word}' is not EXPERT=N (valid: an expert and a whole number, such as math=3)")
        counts[name] = int(count)
    return counts


def scale(run: RunDir, counts: Mapping[str, int]) -> Mapping[str, int]:
    """Every expert's wanted count. Refuses what the cluster cannot hold; acts at once where no router's loop will."""
    control = Control(run)
    seen = control.look()
    desired.check_counts(control.deployment, counts)
    asked = {**seen.desired.replicas, **counts}
    make_plan(desired.with_counts(control.deployment, asked), run=run, ask_engines=False)
    desired.scale(run, control.deployment, counts, seen.observed)
    run.event("scale", **counts)
    if not seen.desired.down and live_router(run) is None:
        control.once()
    return asked
