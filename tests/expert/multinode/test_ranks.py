"""An engine on two nodes, as two agents on this machine, which serve, fail and end together."""

import os
import signal
from dataclasses import asdict
from pathlib import Path

import pytest

from hpc_router.config import frozen
from hpc_router.config.schema import ExpertConfig
from hpc_router.expert.agent.agent import bind
from hpc_router.expert.engine_process.guard import descendants
from hpc_router.net import protocol
from hpc_router.net.auth import replica_key
from hpc_router.relay.downstream.interface import Request, Response, json_response
from hpc_router.relay.downstream.server import listening
from hpc_router.state.job_records import FailureReason, JobDir, JobPhase
from hpc_router.state.registry import Record, RecordKind, RegistryReader, State, publish
from hpc_router.state.run_directory import RunDir
from tests.expert.replicas import REPLICA, chat, deployment, exists, half_a_stream, processes_below, rank, ranks
from tests.support.waiting import eventually

pytestmark = pytest.mark.e2e  # mostly waits for silent ranks


async def test_two_ranks_serve_and_only_the_first_is_in_the_registry(run: RunDir, scratch: Path) -> None:
    configured = deployment(scratch, nodes=2)
    configured.cluster.beat_s = 2.0  # stopping the ranks takes up to two beats
    async with ranks(run, configured) as (agent, (other,)):
        progress, _ = await agent.ready()
        assert list(RegistryReader(run.registry).snapshot()) == [REPLICA]
        engines = [progress.engine_pid, *processes_below(other)]
        assert len(engines) == 3  # includes the other rank's guard
        async with agent.session() as session, session.post(protocol.CHAT, json=chat()) as response:
            assert response.status == 200
        agent.process.terminate()
        assert await agent.end() == 0
        assert await other.wait() == 0
        assert not any(pid is not None and exists(pid) for pid in engines)
        ended = agent.job.exit()
        assert ended is not None
        assert ended.reason is FailureReason.DRAINED


async def test_every_rank_has_the_copies_of_its_node(
    run: RunDir, scratch: Path, tmp_path: Path, node_disk: Path
) -> None:
    """Here both are on one node: one of them copies, the other finds the copy or waits for it."""
    adapter = tmp_path / "law"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"lora" * 1000)
    configured = deployment(scratch, nodes=2)
    configured.experts["law"] = ExpertConfig(model=str(adapter), adapter_of="math")
    configured.cluster.stage_to = str(node_disk)
    async with ranks(run, configured) as (agent, (other,)):
        progress, record = await agent.ready()
        assert record.serves == {"math": "math", "law": "law"}
        assert progress.stage_s is not None
        told = [line for line in agent.log().splitlines() if f"{adapter} " in line and "the engine loads" in line]
        assert len(told) == 2
        assert sum("was copied" in line for line in told) == 1
        agent.process.terminate()
        assert await agent.end() == 0
        assert await other.wait() == 0


async def test_a_signal_to_any_rank_drains_all(run: RunDir, scratch: Path) -> None:
    """Slurm signals every task. A request in flight needs all ranks until it has ended."""
    configured = deployment(scratch, nodes=2)
    configured.cluster.beat_s = 2.0  # stopping the ranks takes up to two beats
    async with ranks(run, configured) as (agent, (other,)):
        await agent.ready()
        async with agent.session() as session, half_a_stream(session, for_s=4.0) as response:
            other.send_signal(signal.SIGTERM)
            await agent.reached(JobPhase.DRAINING)
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
        assert await agent.end() == 0
        assert await other.wait() == 0
        ended = agent.job.exit()
        assert ended is not None
        assert ended.message.endswith("received a signal to stop")


async def test_a_killed_engine_of_another_rank_is_why_all_start_again(run: RunDir, scratch: Path) -> None:
    configured = deployment(scratch, nodes=2)
    configured.cluster.beat_s = 2.0  # no rank is silent for five beats
    async with ranks(run, configured) as (agent, (other,)):
        before, _ = await agent.ready()
        _, engine = sorted(processes_below(other))
        os.kill(engine, signal.SIGKILL)
        after, _ = await agent.ready(after=before)
        assert after.restarts == 1
        assert after.engine_pid != before.engine_pid
        assert after.reason is FailureReason.KILLED
        assert after.message is not None
        assert after.message.startswith("rank 1 on ")
        async with agent.session() as session, session.post(protocol.CHAT, json=chat()) as response:
            assert response.status == 200


async def test_a_killed_engine_of_the_first_rank_starts_all_again(run: RunDir, scratch: Path) -> None:
    configured = deployment(scratch, nodes=2)
    configured.cluster.beat_s = 2.0  # no rank is silent for five beats
    async with ranks(run, configured) as (agent, (other,)):
        before, _ = await agent.ready()
        engines = processes_below(other)
        assert before.engine_pid is not None
        os.kill(before.engine_pid, signal.SIGKILL)
        after, _ = await agent.ready(after=before)
        assert after.restarts == 1
        assert after.reason is FailureReason.KILLED
        assert not any(exists(pid) for pid in engines)


async def test_a_lost_rank_that_does_not_return_ends_the_job(run: RunDir, scratch: Path) -> None:
    async with ranks(run, deployment(scratch, nodes=2)) as (agent, (other,)):
        progress, _ = await agent.ready()
        engine = progress.engine_pid
        assert engine is not None
        below = descendants(other.pid)
        other.kill()
        await eventually(lambda: not exists(engine) and not any(exists(pid) for pid in below))
        assert await agent.end() == 1
        ended = agent.job.exit()
        assert ended is not None
        assert ended.reason is FailureReason.RANK_LOST
        assert "did not report in within 3 s" in ended.message
        assert agent.record is None


async def test_a_silent_rank_is_a_lost_one(run: RunDir, scratch: Path) -> None:
    """Its processes live and keep their connections, as on a node that lost its network."""
    configured = deployment(scratch, nodes=2)
    configured.cluster.beat_s = 0.4
    async with ranks(run, configured) as (agent, (other,)):
        before, _ = await agent.ready()
        frozen = [other.pid, *processes_below(other)]
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        progress = await agent.reached(JobPhase.RESTARTING, after=before)
        assert progress.reason is FailureReason.RANK_LOST
        assert progress.message is not None
        assert "sent no report for 2 s" in progress.message
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
        await agent.ready(after=before)  # the rank was silent for less than six seconds


async def test_a_killed_leader_leaves_no_engine_and_no_follower(run: RunDir, scratch: Path) -> None:
    async with ranks(run, deployment(scratch, nodes=2)) as (agent, (other,)):
        await agent.ready()
        engines = processes_below(other)
        agent.process.kill()
        await agent.process.wait()
        await eventually(lambda: not any(exists(pid) for pid in engines))
        assert await other.wait() == 1
        ended = agent.job.exit()
        assert ended is not None
        assert ended.reason is FailureReason.RANK_LOST
        assert ended.message.startswith("rank 0 gave no order for 6 s to rank 1 on ")


async def test_a_leader_that_cannot_be_heard(run: RunDir, scratch: Path) -> None:
    """As on a node that lost its network: the other ranks end their engines, and join again when rank 0 is back."""
    async with ranks(run, deployment(scratch, nodes=2)) as (agent, (other,)):
        before, _ = await agent.ready()
        engines = processes_below(other)
        agent.process.send_signal(signal.SIGSTOP)
        await eventually(lambda: not any(exists(pid) for pid in engines))
        agent.process.send_signal(signal.SIGCONT)
        await agent.ready(after=before)
        assert processes_below(other)


async def test_slurm_ends_the_job_of_a_lost_node_and_the_reason_stays(run: RunDir, scratch: Path) -> None:
    """Slurm ends the job by SIGTERM, but no command asked this replica to drain."""
    async with ranks(run, deployment(scratch, nodes=2)) as (agent, (other,)):
        before, _ = await agent.ready()
        other.kill()
        await agent.reached(JobPhase.RESTARTING, after=before)
        agent.process.terminate()
        assert await agent.end() == 1
        ended = agent.job.exit()
        assert ended is not None
        assert ended.reason is FailureReason.RANK_LOST


async def test_a_lost_rank_is_why_the_others_are_told_to_end(run: RunDir, scratch: Path) -> None:
    """`srun` ends a step by SIGTERM as soon as one task has died, before rank 0 can notice the missing rank."""
    async with ranks(run, deployment(scratch, nodes=2)) as (agent, (other,)):
        await agent.ready()
        other.kill()
        await other.wait()
        agent.process.terminate()
        assert await agent.end() == 1
        ended = agent.job.exit()
        assert ended is not None
        assert ended.reason is FailureReason.RANK_LOST


async def test_a_stranger_at_the_leaders_port_gives_no_orders(run: RunDir, scratch: Path) -> None:
    """Another process at that port knows no key, and learns no token from the reports that is valid elsewhere."""
    reports: list[str] = []

    async def answer(request: Request) -> Response:
        reports.append(request.headers.text("authorization"))
        return json_response(asdict(protocol.RankOrder(protocol.Action.RUN, 1, "127.0.0.1", 9)))

    configured = deployment(scratch, nodes=2)
    configured.cluster.beat_s = 0.05
    run.config.write_text(frozen.to_yaml(configured))
    with bind("127.0.0.1") as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        publish(run.registry, Record(RecordKind.EXPERT, REPLICA, url, State.STARTING, {"math": "math"}, nonce="n"))
        async with listening(answer, sock, max_body=2**16), rank(run, 1) as other:
            assert await other.wait() == 1
    assert len(reports) > 10
    assert {f"Bearer {replica_key(run.secret(), 'n')}"}.isdisjoint(reports)
    log = (run.logs / f"{REPLICA}.rank1.log").read_text()
    assert "the order is not signed by rank 0" in log
    assert "engine started" not in log


async def test_a_rank_that_never_comes(run: RunDir, scratch: Path) -> None:
    configured = deployment(scratch, nodes=3)
    configured.cluster.beat_s = 0.2
    async with ranks(run, configured) as (agent, (first, second)):
        first.kill()
        assert await agent.end() == 1
        ended = agent.job.exit()
        assert ended is not None
        assert (ended.reason, ended.message) == (FailureReason.RANK_LOST, "rank 1 did not report in within 12 s")
        assert await second.wait() == 0


@pytest.mark.parametrize("value", ["2", "-1", "one"])
async def test_an_unknown_rank_is_refused(
    run: RunDir, scratch: Path, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, `srun` with two tasks for an expert on one node."""
    monkeypatch.setenv("HPC_ROUTER_RANK", value)
    async with ranks(run, deployment(scratch)) as (agent, _):
        assert await agent.end() == 2


async def test_a_rank_that_fails_before_it_has_reported_says_why(run: RunDir, scratch: Path) -> None:
    """srun ends rank 0 too. Rank 0 alone would report a requested end before it was ready, without the cause."""
    configured = deployment(scratch, nodes=2)
    configured.cluster.scratch = "$NOT_SET_ON_THIS_NODE"
    run.config.write_text(frozen.to_yaml(configured))
    async with rank(run, 1) as other:
        assert await other.wait() != 0
    ended = JobDir(run, REPLICA).exit()
    assert ended is not None
    assert (ended.ok, ended.reason) == (False, FailureReason.BAD_OPTION)
    assert ended.message.startswith("rank 1 on ")
    assert "NOT_SET_ON_THIS_NODE" in ended.message
