"""Which nodes count as faulty, how many may be excluded, and that a person can take it back."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from hpc_router.cli.main import main
from hpc_router.cluster.control_loop import desired_state
from hpc_router.cluster.control_loop.node_exclusion import (
    ASK_AGAIN_S,
    BY,
    OUTAGE_S,
    QUICK_S,
    WINDOW_S,
    NodeExclusion,
    failing_nodes,
)
from hpc_router.cluster.control_loop.slots import Attempt, Observed, Slot
from hpc_router.cluster.launchers.commands import SlurmCommandError
from hpc_router.cluster.launchers.slurm.sinfo import SlurmSite, parse_site
from hpc_router.config.schema import Deployment, EngineConfig, ExpertConfig
from hpc_router.state.job_records import FailureReason, JobPhase, JobProgress
from hpc_router.state.run_directory import RunDir
from tests.cluster.control_loop.support import MATH, ended, serving

NOW = 2_000_000.0
OTHER = Slot("math", "1")


def failed(
    generation: int,
    *,
    at: float,
    after_s: float = 10.0,
    reason: FailureReason = FailureReason.NODE_FAILED,
    node: str = "n1",
    slot: Slot = MATH,
) -> Attempt:
    return replace(ended(generation, reason, at=at), node=node, slot=slot, started_at=at - after_s)


def twice(**facts: object) -> Observed:
    """Two jobs one after the other on n1, and one that has served on n2 since before."""
    elsewhere = replace(serving(1, slot=OTHER), node="n2", progress=JobProgress(JobPhase.READY, ready_at=NOW - 50))
    return {
        MATH: (failed(1, at=NOW - 100, **facts), failed(2, at=NOW - 50, **facts)),  # type: ignore[arg-type]
        OTHER: (elsewhere,),
    }


@pytest.mark.parametrize("reason", [FailureReason.NODE_FAILED, FailureReason.CUDA])
def test_a_node_that_fails_twice(reason: FailureReason) -> None:
    told = failing_nodes(twice(reason=reason), {}, NOW)
    assert told == {"n1": f"it failed twice: math-0.g1 {reason}, math-0.g2 {reason}"}


def test_names_are_slurms() -> None:
    assert set(failing_nodes(twice(node="n1.cluster.example"), {}, NOW)) == {"n1"}
    assert failing_nodes(twice(node="n[1-2]"), {}, NOW) == {}


def test_one_loss_of_a_node_with_several_replicas_is_one_failure() -> None:
    lost = [failed(1, at=NOW - 50 + n, after_s=500, slot=Slot("math", str(n))) for n in range(4)]
    assert failing_nodes({a.slot: (a,) for a in lost}, {}, NOW) == {}


@pytest.mark.parametrize(("later_s", "found"), [(1.0, set()), (OUTAGE_S, {"n1"})])
def test_a_job_that_slurm_sends_to_a_node_that_is_still_off_is_no_second_failure(
    later_s: float, found: set[str]
) -> None:
    first = failed(1, at=NOW - 1000)
    sent = replace(failed(2, at=NOW - 50), started_at=None, submitted_at=NOW - 1000 + later_s)
    assert set(failing_nodes({MATH: (first, sent)}, {}, NOW)) == found


def test_failures_on_different_nodes() -> None:
    attempts = (failed(1, at=NOW - 100), failed(2, at=NOW - 50, node="n2"))
    assert failing_nodes({MATH: attempts}, {}, NOW) == {}


@pytest.mark.parametrize(("after_s", "found"), [(QUICK_S, {"n1"}), (QUICK_S + 1, set())])
def test_quick_ends_count_while_the_expert_starts_elsewhere(after_s: float, found: set[str]) -> None:
    crashes = twice(reason=FailureReason.CRASHED, after_s=after_s)
    assert set(failing_nodes(crashes, {}, NOW)) == found
    assert failing_nodes({MATH: crashes[MATH]}, {}, NOW) == {}  # nowhere: the engine, not the node


@pytest.mark.parametrize(
    "reason", [FailureReason.PREEMPTED, FailureReason.CANCELLED, FailureReason.WEIGHTS, FailureReason.OUT_OF_MEMORY]
)
def test_other_ends_are_not_the_nodes(reason: FailureReason) -> None:
    assert failing_nodes(twice(reason=reason), {}, NOW) == {}


def test_old_and_forgotten_failures_do_not_count() -> None:
    assert failing_nodes(twice(), {}, NOW - 100 + WINDOW_S) == {}
    assert failing_nodes(twice(), {"n1": NOW - 100}, NOW) == {}
    assert set(failing_nodes(twice(), {"n1": NOW - 101}, NOW)) == {"n1"}


def deployment() -> Deployment:
    made = Deployment(experts={"math": ExpertConfig(model="m", engine=EngineConfig(kind="sim"))})
    made.cluster.kind = "slurm"
    return made


def site(nodes: int) -> Callable[[], SlurmSite]:
    return lambda: parse_site(f"gpu|gpu*|up|infinite|{nodes}|8|1000|idle|(null)|gpu:4")


def test_it_gets_no_further_jobs_until_it_is_forgotten(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    exclusion = NodeExclusion(run, deployment(), site=site(8))
    assert exclusion.apply(twice(), NOW) == ["n1"]
    assert exclusion.apply(twice(), NOW) == []
    assert desired_state.node_exclusions(run)["n1"]["by"] == BY
    assert '"kind": "node_excluded"' in run.events.read_text()
    assert main(["nodes", "list", "--run", str(run.path)]) == 0
    assert capsys.readouterr().out.startswith("n1  by control loop: it failed twice: math-0.g1")
    assert main(["nodes", "forget", "--run", str(run.path), "n1"]) == 0
    assert exclusion.apply(twice(), NOW) == []  # those failures no longer count
    assert main(["nodes", "forget", "--run", str(run.path), "n1"]) == 2


def test_what_a_verb_wrote_stays(run: RunDir) -> None:
    run.write_desired({"replicas": {"math": 3}, "excluded_nodes": {"n9": {"by": "ann", "reason": "drain"}}})
    NodeExclusion(run, deployment(), site=site(8)).apply(twice(), NOW)
    assert run.read_desired()["replicas"] == {"math": 3}
    assert desired_state.excluded_nodes(run) == ("n1", "n9")


@pytest.mark.parametrize(("nodes", "excluded"), [(3, ()), (4, ("n1",)), (7, ("n1",)), (8, ("n1", "n2"))])
def test_at_most_a_quarter_of_the_partition(run: RunDir, nodes: int, excluded: tuple[str, ...]) -> None:
    slots = [Slot("math", str(n)) for n in range(3)]
    observed = {
        slot: tuple(failed(g, at=NOW - 100 + g * 20, node=f"n{n}", slot=slot) for g in (1, 2))
        for n, slot in enumerate(slots, start=1)
    }
    NodeExclusion(run, deployment(), site=site(nodes)).apply(observed, NOW)
    assert desired_state.excluded_nodes(run) == excluded


def test_sinfo_is_asked_rarely(run: RunDir) -> None:
    now, asked = 0.0, []

    def fails() -> SlurmSite:
        asked.append(now)
        raise SlurmCommandError("sinfo gave no answer")

    exclusion = NodeExclusion(run, deployment(), site=fails, clock=lambda: now)
    for now in (0.0, ASK_AGAIN_S - 1, ASK_AGAIN_S):  # noqa: B007 - the clock reads it
        assert exclusion.apply(twice(), NOW) == []
    assert asked == [0.0, ASK_AGAIN_S]
