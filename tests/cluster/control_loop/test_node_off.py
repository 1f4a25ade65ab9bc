"""A node that is switched off, under the real control loop and the simulated Slurm, which notices it much later."""

import json
from pathlib import Path

import pytest

from hpc_router.state.job_records import FailureReason, JobDir
from tests.cluster.control_loop.fake_slurm import BEAT_S
from tests.cluster.control_loop.storm import storm

DETECT_S = 300.0


def test_a_node_that_is_off_failed_although_slurm_says_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.cluster.control_loop.fake_slurm.DETECT_S", DETECT_S)
    with storm(7, tmp_path) as played:
        played._run_until(played._all_ready, limit_s=240.0, what="ready")
        slurm = played.slurm
        beside = next(job.node for job, agent in played._running() if agent.is_router)
        job, agent = next((job, agent) for job, agent in played._running() if job.node != beside)
        assert job.node is not None
        lost_at = slurm.now
        slurm.lose_node(job.node)
        folder, slot = JobDir(played.run, agent.replica), agent.replica.rpartition(".")[0]

        def replacements() -> list[str]:
            names = [name for name in slurm.submissions if name.rpartition(".")[0] == slot]
            return names[names.index(agent.replica) + 1 :]

        played._run_until(lambda: bool(replacements()), limit_s=4 * BEAT_S, what="replaced")
        end = folder.exit()
        assert end is not None
        assert (end.reason, f"node {job.node} is off" in end.message) == (FailureReason.NODE_FAILED, True)
        assert end.at < lost_at + 4 * BEAT_S
        played._run_until(lambda: job.over, limit_s=DETECT_S + 60.0, what="known to Slurm")
        played._tick(6.0)
        assert job.state == "CANCELLED"
        assert folder.exit() == end
        events = [json.loads(line) for line in played.run.events.read_text().splitlines()]
        told = [e["reason"] for e in events if e["kind"] == "ended" and e["replica"] == agent.replica]
        assert told == ["node_failed"]
