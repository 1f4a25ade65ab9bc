"""Keeps further jobs off nodes that have failed twice. Only the leading loop does this.

A node has failed if the loop found it off, if Slurm ended a job on it with NODE_FAIL or BOOT_FAIL, if an engine on it
ended with a CUDA error, or if a job on it ended within QUICK_S of its start although its expert became ready on another
node. Two failures of a node count only if the second job began after the first had failed, because a job that Slurm
sent to the node while it was off shows no second failure. A failure counts for WINDOW_S, but not after `nodes forget`.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from hpc_router.cluster.control_loop.desired_state import exclude_nodes, excluded_nodes, forgotten_nodes
from hpc_router.cluster.control_loop.slots import Attempt, Observed, all_attempts
from hpc_router.cluster.launchers.commands import SlurmCommandError
from hpc_router.cluster.launchers.slurm.node_fit import partition_of
from hpc_router.cluster.launchers.slurm.sinfo import SlurmSite, ask_site
from hpc_router.config.schema import Deployment
from hpc_router.state.job_records import FailureReason, Runner
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)

WINDOW_S: Final = 86400.0
"""Time for which a failure counts, in seconds."""
QUICK_S: Final = 30.0
"""Maximum run time in seconds of a job whose end may be the node's failure."""
OUTAGE_S: Final = 300.0
"""Time after a failure in seconds in which Slurm may still send jobs to the node (its default SlurmdTimeout)."""
MAX_SHARE: Final = 0.25
"""Maximum share of a partition's nodes that may be excluded, including those that a user has excluded."""
ASK_AGAIN_S: Final = 300.0
"""Seconds for which no further node is excluded, and sinfo is not called, after the limit was reached."""
BY: Final = "control loop"
_OF_THE_NODE: Final = frozenset({FailureReason.NODE_FAILED, FailureReason.CUDA})
_QUICK: Final = frozenset({FailureReason.CRASHED, FailureReason.KILLED, FailureReason.VANISHED, FailureReason.TIMEOUT})


def failing_nodes(observed: Observed, forgotten: Mapping[str, float], now: float) -> dict[str, str]:
    """Returns the nodes that have failed twice, each with its newest failures as text. Pure. `forgotten`: Unix time by
    node; failures of the node until then do not count."""
    attempts = all_attempts(observed)
    failed: defaultdict[str, list[Attempt]] = defaultdict(list)
    for attempt in attempts:
        end = attempt.exit
        if end is None or end.ok or attempt.runner is not Runner.SLURM or (node := _node(attempt)) is None:
            continue
        if end.at > max(now - WINDOW_S, forgotten.get(node, 0.0)) and _is_of_the_node(attempt, node, attempts):
            failed[node].append(attempt)
    return {node: _told(of) for node, of in sorted(failed.items()) if _failed_twice(of)}


def _node(attempt: Attempt) -> str | None:
    """Returns Slurm's name of the attempt's node; None if the attempt ran on several nodes or its node is not known."""
    name = (attempt.node or "").partition(".")[0]
    return None if not name or "[" in name or "," in name else name


def _is_of_the_node(attempt: Attempt, node: str, attempts: Iterable[Attempt]) -> bool:
    """Returns whether the end of `attempt`, a job on `node`, is a failure of the node. `attempts`: all of the run."""
    assert attempt.exit is not None
    began_at = attempt.started_at
    if attempt.exit.reason in _OF_THE_NODE:
        return True
    if attempt.exit.reason not in _QUICK or attempt.ready_at is not None or began_at is None:
        return False
    elsewhere = (a for a in attempts if a.slot.expert == attempt.slot.expert and _node(a) not in (None, node))
    return attempt.exit.at - began_at <= QUICK_S and any((a.ready_at or 0.0) >= began_at for a in elsewhere)


def _failed_twice(failed: Iterable[Attempt]) -> bool:
    """Returns whether these failed jobs of one node count as two failures: whether one of them began after another had
    failed. A job that never began must have been submitted more than OUTAGE_S after that failure."""
    first_at = min(a.exit.at for a in failed if a.exit is not None)
    return any(
        a.started_at >= first_at
        if a.started_at is not None
        else (a.submitted_at or a.claimed_at) >= first_at + OUTAGE_S
        for a in failed
    )


def _told(failed: Iterable[Attempt]) -> str:
    """Returns the two newest failures of a node as text for the user."""
    newest = sorted((a.exit.at, a.replica, a.exit.reason.value) for a in failed if a.exit is not None)[-2:]
    return "it failed twice: " + ", ".join(f"{replica} {reason}" for _, replica, reason in newest)


class NodeExclusion:
    """Excludes nodes that have failed twice, in `excluded_nodes` of `desired.json`. Each pass adds nodes that are
    missing there, unless a user has allowed them again."""

    def __init__(
        self,
        run: RunDir,
        deployment: Deployment,
        *,
        site: Callable[[], SlurmSite] = ask_site,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._deployment = run, deployment
        self._site, self._clock = site, clock
        self._ask_at = -float("inf")

    def apply(self, observed: Observed, now: float) -> list[str]:
        """Excludes the nodes that have failed twice, as far as the limit allows, and returns the newly excluded ones.
        Calls sinfo only if there is such a node."""
        if self._deployment.cluster.kind != "slurm":
            return []
        if not failing_nodes(observed, {}, now) or self._clock() < self._ask_at:
            return []
        failing = failing_nodes(observed, forgotten_nodes(self._run), now)
        new = [node for node in failing if node not in excluded_nodes(self._run)]
        if not new:
            return []
        left = self._allowed() - len(excluded_nodes(self._run))
        for node in new[:left] if left > 0 else ():
            exclude_nodes(self._run, [node], reason=failing[node], by=BY)
        if len(new) > max(left, 0):
            self._ask_at = self._clock() + ASK_AGAIN_S
            logger.warning("%s failed twice, but a quarter of the partition's nodes may be excluded", ", ".join(new))
        return new[: max(left, 0)]

    def _allowed(self) -> int:
        """Returns how many nodes may be excluded: the share MAX_SHARE of the smallest partition in use, or 0 if sinfo
        fails."""
        try:
            site = self._site()
        except SlurmCommandError as error:
            logger.warning("the number of nodes is not known: %s", error)
            return 0
        names = {
            name for expert in self._deployment.experts for name in partition_of(self._deployment, expert).split(",")
        }
        used = [site.partitions.get(name or site.default or "") for name in names]
        return min((int(MAX_SHARE * sum(k.nodes for k in p.kinds)) for p in used if p is not None), default=0)
