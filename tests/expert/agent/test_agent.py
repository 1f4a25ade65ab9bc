"""The agent as a process with a simulated engine: start, service, failures, drain, and kill."""

import asyncio
import contextlib
import os
import signal
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from hpc_router.expert.agent.agent import REMOVAL_CHECK_BEATS
from hpc_router.net import protocol
from hpc_router.net.auth import challenge_answer, replica_key
from hpc_router.state.job_records import Ended, Exit, FailureReason, JobPhase, Stop
from hpc_router.state.registry import RecordKind, State
from hpc_router.state.run_directory import RunDir
from tests.expert.replicas import REPLICA, chat, deployment, exists, half_a_stream, processes_below, replica
from tests.support.waiting import GUARD_S, eventually


async def test_an_agent_from_its_record_to_its_exit(run: RunDir, scratch: Path) -> None:
    async with replica(run, deployment(scratch)) as agent:
        progress, record = await agent.ready()
        assert (record.kind, record.replica, record.serves) == (RecordKind.EXPERT, REPLICA, {"math": "math"})
        assert (record.capacity, record.job_id) == (256, str(agent.process.pid))
        assert (record.engine.kind, record.engine.model, record.engine.max_model_len) == ("sim", "m", 131_072)
        assert (record.engine.priority, record.engine.prefix_caching) == (False, True)
        assert record.accepts == ("text", "tools", "embeddings")
        assert record.load_s is not None
        assert 0 < record.load_s < GUARD_S
        assert progress.ready_at is not None
        first = record.beat or 0
        await eventually(lambda: (now := agent.record) is not None and (now.beat or 0) > first)

        async with agent.session() as session, session.get(protocol.HEALTH, params={"challenge": "c"}) as response:
            health = protocol.ProbeResponse.from_json(await response.json())
            assert record.nonce is not None
            answer = challenge_answer(replica_key(run.secret(), record.nonce), "c")
            assert health == protocol.ProbeResponse(REPLICA, "ready", 0, ("math", "auto"), answer)
        async with agent.session() as session, session.post(protocol.CHAT, json=chat(model="auto")) as response:
            assert response.status == 200

        agent.process.terminate()
        assert await agent.end() == 0
        ended = agent.job.exit()
        assert ended is not None
        assert (ended.ok, ended.reason, ended.message) == (True, FailureReason.DRAINED, "drained after SIGTERM")
        assert agent.record is None
        assert progress.engine_pid is not None
        assert not exists(progress.engine_pid)


async def test_no_prompt_and_no_key_in_any_log(run: RunDir, scratch: Path) -> None:
    async with replica(run, deployment(scratch)) as agent:
        _, record = await agent.ready()
        async with agent.session() as session:
            body = chat(messages=[{"role": "user", "content": "a-secret-question"}])
            async with session.post(protocol.CHAT, json=body) as response:
                assert response.status == 200
            async with session.post(protocol.CHAT, data=b"a-secret-question", headers={"x-api-key": "abc"}) as response:
                assert response.status == 400
        assert record.nonce is not None
        log = agent.log()
        for word in ("a-secret-question", run.secret(), replica_key(run.secret(), record.nonce)):
            assert word not in log


async def test_a_signal_lets_requests_finish(run: RunDir, scratch: Path) -> None:
    async with replica(run, deployment(scratch)) as agent:
        await agent.ready()
        async with agent.session() as session, half_a_stream(session, for_s=4.0) as response:
            for number in (signal.SIGCONT, signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM):  # as Slurm does
                agent.process.send_signal(number)
            await eventually(lambda: (now := agent.record) is not None and now.state is State.DRAINING)
            async with session.post(protocol.CHAT, json=chat()) as refused:
                assert refused.status == 503
                assert protocol.DRAINING_HEADER in refused.headers
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
        assert await agent.end() == 0
        assert agent.record is None


async def test_a_drain_call_lets_requests_finish(run: RunDir, scratch: Path) -> None:
    async with replica(run, deployment(scratch)) as agent:
        await agent.ready()
        async with agent.session() as session, session.post(protocol.DRAIN) as response:
            assert response.status == 202
        assert await agent.end() == 0


async def test_a_handover_lets_requests_take_longer_than_the_drain_time(run: RunDir, scratch: Path) -> None:
    """The successor serves already, so they may take the rest of the walltime."""
    configured = deployment(scratch)
    configured.cluster.drain_s = 0.1
    async with replica(run, configured) as agent:
        await agent.ready()
        async with agent.session() as session, half_a_stream(session, for_s=2.0) as response:
            async with session.post(protocol.drain_target(time.time() + 60)) as accepted:
                assert accepted.status == 202
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
        assert await agent.end() == 0
        ended = agent.job.exit()
        assert ended is not None
        assert (ended.cut, ended.message) == (0, "drained after a drain call")


async def test_requests_that_do_not_finish_in_time_are_aborted(run: RunDir, scratch: Path) -> None:
    configured = deployment(scratch)
    configured.cluster.drain_s = 0.1
    async with replica(run, configured) as agent:
        await agent.ready()
        async with agent.session() as session:
            body = chat(stream=True, sim_fault={"kind": "hang", "at": 3})
            async with session.post(protocol.CHAT, json=body) as response:
                agent.process.terminate()
                with pytest.raises(aiohttp.ClientPayloadError):
                    await response.read()
        assert await agent.end() == 0
        ended = agent.job.exit()
        assert ended is not None
        assert (ended.ok, ended.cut, ended.message) == (True, 1, "drained after SIGTERM; 1 answer was cut off")


@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGALRM, signal.SIGQUIT], ids=lambda n: n.name
)
async def test_a_walltime_warning_to_every_process_of_the_job_cuts_nothing(
    run: RunDir, scratch: Path, number: signal.Signals
) -> None:
    """Slurm sends the warning to every process where it tracks processes by proctrack/linuxproc. A job of the user may
    ask for another signal than ours do."""
    async with replica(run, deployment(scratch)) as agent:
        await agent.ready()
        async with agent.session() as session, half_a_stream(session, for_s=1.0) as response:
            for pid in [agent.process.pid, *processes_below(agent.process)]:
                os.kill(pid, number)
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
        assert await agent.end() == 0
        ended = agent.job.exit()
        assert ended is not None
        assert (ended.cut, ended.message) == (0, f"drained after {number.name}")


async def test_a_drain_whose_engine_dies_counts_the_lost_responses(run: RunDir, scratch: Path) -> None:
    """A stream and a response that had not begun are lost. The engine may have received the job's SIGTERM too."""
    async with replica(run, deployment(scratch)) as agent:
        progress, _ = await agent.ready()
        assert progress.engine_pid is not None
        async with agent.session() as session, half_a_stream(session, for_s=GUARD_S) as response:
            whole = asyncio.create_task(_status(session, chat(sim_fault={"kind": "hang", "at": 0})))
            await eventually_in_flight(session, 2)
            agent.process.terminate()
            await eventually(lambda: (now := agent.record) is not None and now.state is State.DRAINING)
            os.kill(progress.engine_pid, signal.SIGKILL)
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
            assert await whole == 502
        assert await agent.end() == 0
        ended = agent.job.exit()
        assert ended is not None
        assert (ended.ok, ended.cut) == (True, 2)
        assert ended.message == "drained after SIGTERM; 2 answers were cut off"


async def _status(session: aiohttp.ClientSession, body: dict[str, Any]) -> int:
    async with session.post(protocol.CHAT, json=body) as response:
        return response.status


async def eventually_in_flight(session: aiohttp.ClientSession, count: int) -> None:
    while True:
        async with session.get(protocol.HEALTH) as response:
            if (await response.json())["in_flight"] == count:
                return


PATHS: dict[str, dict[str, Any]] = {
    protocol.CHAT: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1000},
    protocol.COMPLETIONS: {"prompt": "hi", "max_tokens": 1000},
    protocol.MESSAGES: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1000},
    protocol.RESPONSES: {"input": "hi", "max_output_tokens": 1000},
}


@pytest.mark.parametrize("extra", [{"drain-s": 0}, {}], ids=["aborts at once", "as the agent starts it"])
async def test_answers_are_broken_off_before_the_engine_is_stopped(
    run: RunDir, scratch: Path, extra: dict[str, Any]
) -> None:
    """A stopped engine ends its running responses regularly, as vLLM does. None of that may reach a client."""
    configured = deployment(scratch, options={"itl_ms": 20.0, "extra": {"max-tokens-default": 2000, **extra}})
    configured.cluster.drain_s = 0.2
    async with replica(run, configured) as agent:
        await agent.ready()
        async with agent.session() as session, AsyncExitStack() as stack:
            bodies = {path: {"model": "math", **body} for path, body in PATHS.items()}
            outcomes = [asyncio.create_task(outcome(session, path, body)) for path, body in bodies.items()]
            streams = [
                await stack.enter_async_context(session.post(path, json=body | {"stream": True}))
                for path, body in bodies.items()
            ]
            reading = [asyncio.create_task(until_broken(response)) for response in streams]
            agent.process.terminate()
            for received in await asyncio.gather(*reading):
                assert received.count(b"\n\n") > 2
                for end in (b"abort", b"[DONE]", b"message_stop", b"response.completed"):
                    assert end not in received
            assert await asyncio.gather(*outcomes) == ["broken off"] * len(PATHS)
        assert await agent.end() == 0


async def until_broken(response: aiohttp.ClientResponse) -> bytes:
    received = b""
    with contextlib.suppress(aiohttp.ClientPayloadError):
        while piece := await response.content.readany():
            received += piece
        raise AssertionError(f"it ended in good form: {received[-300:]!r}")
    return received


async def outcome(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> str:
    try:
        async with session.post(path, json=body) as response:
            return f"{response.status} {await response.text()}"
    except aiohttp.ClientError:
        return "broken off"


async def test_an_engine_that_gets_sigterm_itself_finishes_its_answers(run: RunDir, scratch: Path) -> None:
    """Some Slurm sites signal every process of a step. The agent gives the engine as much time as it drains itself."""
    configured = deployment(scratch, options={"itl_ms": 20.0, "extra": {}})
    async with replica(run, configured) as agent:
        progress, _ = await agent.ready()
        body = chat(stream=True, max_tokens=50, ignore_eos=True)
        async with agent.session() as session, session.post(protocol.CHAT, json=body) as response:
            await response.content.readuntil(b"\n\n")
            assert progress.engine_pid is not None
            os.kill(progress.engine_pid, signal.SIGTERM)
            agent.process.terminate()
            received = await response.read()
        assert await agent.end() == 0
    assert b'"finish_reason":"length"' in received
    assert received.endswith(b"data: [DONE]\n\n")


async def test_draining_while_the_engine_loads(run: RunDir, scratch: Path) -> None:
    async with replica(run, deployment(scratch, options={"load_s": 1000.0})) as agent:
        progress = await agent.reached(JobPhase.LOADING)
        async with agent.session() as session, session.post(protocol.CHAT, json=chat()) as response:
            assert response.status == 503
            assert protocol.STARTING_HEADER in response.headers
        agent.process.send_signal(signal.SIGINT)
        assert await agent.end() == 0
        assert progress.engine_pid is not None
        assert not exists(progress.engine_pid)


@pytest.mark.parametrize(
    ("numbers", "reason", "message"),
    [
        ([signal.SIGUSR2], FailureReason.WALLTIME, "its walltime ended before its engine was ready: raise walltime"),
        ([signal.SIGUSR1], FailureReason.WALLTIME, "its walltime ended"),
        ([signal.SIGUSR2, signal.SIGTERM], FailureReason.WALLTIME, "its walltime ended"),
        ([signal.SIGQUIT], FailureReason.CANCELLED, "ended from outside before it was ready"),
        ([signal.SIGTERM], FailureReason.CANCELLED, "ended from outside before it was ready"),
    ],
)
async def test_an_end_before_the_engine_was_ever_ready_is_no_success(
    run: RunDir, scratch: Path, numbers: list[signal.Signals], reason: FailureReason, message: str
) -> None:
    """Otherwise a job whose walltime is shorter than its start would be submitted again for ever."""
    async with replica(run, deployment(scratch, options={"load_s": 1000.0})) as agent:
        await agent.reached(JobPhase.LOADING)
        for number in numbers:
            agent.process.send_signal(number)
        assert await agent.end() == 1
        ended, progress = agent.job.exit(), agent.job.progress()
        assert ended is not None
        assert (ended.ok, ended.reason) == (False, reason)
        assert message in ended.message
        assert progress is not None
        assert progress.ready_at is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
async def test_an_end_that_a_verb_requested_is_a_success_at_any_time(
    run: RunDir, scratch: Path, number: signal.Signals
) -> None:
    async with replica(run, deployment(scratch, options={"load_s": 1000.0})) as agent:
        await agent.reached(JobPhase.LOADING)
        agent.job.write(Stop(cancel_at=1.0))
        agent.process.send_signal(number)
        assert await agent.end() == 0
        ended = agent.job.exit()
        assert ended is not None
        assert (ended.ok, ended.reason) == (True, FailureReason.DRAINED)


async def test_a_drain_call_before_the_engine_is_ready_is_a_success(run: RunDir, scratch: Path) -> None:
    async with replica(run, deployment(scratch, options={"load_s": 1000.0})) as agent:
        await agent.reached(JobPhase.LOADING)
        async with agent.session() as session, session.post(protocol.DRAIN) as response:
            assert response.status == 202
        assert await agent.end() == 0


GIVEN_UP = Exit(ok=False, reason=FailureReason.NODE_FAILED, message="Slurm says NODE_FAIL on n1")


async def test_an_agent_whose_exit_record_exists_drains(run: RunDir, scratch: Path) -> None:
    """Its node could not be reached and its successor serves. The exit record is not changed."""
    async with replica(run, deployment(scratch)) as agent:
        await agent.ready()
        agent.job.write(GIVEN_UP)
        assert await agent.end() == 0
        assert agent.job.exit() == GIVEN_UP
        assert agent.record is None
        assert "drained after its job was given up: Slurm says NODE_FAIL on n1" in agent.log()


async def test_an_agent_whose_batch_script_has_ended_drains(run: RunDir, scratch: Path) -> None:
    async with replica(run, deployment(scratch)) as agent:
        await agent.ready()
        agent.job.write(Ended(status=143, at=1.0))
        assert await agent.end() == 0
        ended = agent.job.exit()
        assert ended is not None
        assert (ended.ok, ended.message) == (True, "drained after its batch script had ended")
        assert agent.record is None


async def test_an_agent_that_down_could_not_reach_drains(run: RunDir, scratch: Path) -> None:
    async with replica(run, deployment(scratch, options={"load_s": 1000.0})) as agent:
        await agent.reached(JobPhase.LOADING)
        run.write_desired({"down": True})
        assert await agent.end() == 0
        ended = agent.job.exit()
        assert ended is not None
        assert (ended.ok, ended.message) == (True, "drained after the deployment was taken down")
        assert agent.record is None


async def test_unreadable_files_end_no_agent(run: RunDir, scratch: Path) -> None:
    async with replica(run, deployment(scratch)) as agent:
        _, record = await agent.ready()
        run.desired.write_text('{"down": tru')
        (agent.job.path / "exit.json").write_text("{")
        last_check_beat = (record.beat or 0) + 3 * REMOVAL_CHECK_BEATS
        await eventually(lambda: (now := agent.record) is not None and (now.beat or 0) > last_check_beat)
        assert agent.process.returncode is None
        assert (now := agent.record) is not None
        assert now.state is State.READY


async def test_a_killed_engine_is_started_again(run: RunDir, scratch: Path) -> None:
    async with replica(run, deployment(scratch)) as agent:
        progress, record = await agent.ready()
        async with agent.session() as session:
            async with half_a_stream(session, for_s=GUARD_S) as response:
                assert progress.engine_pid is not None
                os.kill(progress.engine_pid, signal.SIGKILL)
                with pytest.raises(aiohttp.ClientPayloadError):
                    await response.read()
            again, published = await agent.ready(after=progress)
            assert (again.restarts, again.reason) == (1, FailureReason.KILLED)
            assert again.message is not None
            assert "signal 9" in again.message
            assert again.engine_pid != progress.engine_pid
            assert again.ready_at == progress.ready_at
            assert (published.url, published.nonce) == (record.url, record.nonce)
            async with session.post(protocol.CHAT, json=chat()) as response:
                assert response.status == 200


async def test_a_failure_that_no_restart_cures_ends_the_job(run: RunDir, scratch: Path) -> None:
    options = {"faults": [{"kind": "load_fail", "reason": "weights"}]}
    async with replica(run, deployment(scratch, options=options)) as agent:
        assert await agent.end() == 1
        ended = agent.job.exit()
        assert ended is not None
        assert (ended.ok, ended.reason) == (False, FailureReason.WEIGHTS)
        assert ended.message == "RuntimeError: Cannot find any model weights with `/models/math`"
        assert agent.record is None


async def test_too_many_failures_in_a_row_end_the_job(run: RunDir, scratch: Path) -> None:
    options = {"faults": [{"kind": "load_fail", "reason": "out_of_memory"}]}
    async with replica(run, deployment(scratch, options=options, max_restarts=1)) as agent:
        assert await agent.end() == 1
        ended, progress = agent.job.exit(), agent.job.progress()
        assert ended is not None
        assert ended.reason is FailureReason.OUT_OF_MEMORY
        assert progress is not None
        assert progress.restarts == 1


async def test_an_engine_that_never_answers(run: RunDir, scratch: Path) -> None:
    configured = deployment(scratch, options={"load_s": 1000.0}, startup_timeout_s=0.5, max_restarts=0)
    async with replica(run, configured) as agent:
        assert await agent.end() == 1
        ended = agent.job.exit()
        assert ended is not None
        assert ended.reason is FailureReason.TIMEOUT
        assert "engine.startup_timeout_s=0.5" in ended.message


async def test_an_interpreter_that_is_not_there(run: RunDir, scratch: Path) -> None:
    async with replica(run, deployment(scratch, python="/no/such/python")) as agent:
        assert await agent.end() == 1
        ended = agent.job.exit()
        assert ended is not None
        assert ended.reason is FailureReason.INTERPRETER
        assert "cannot run /no/such/python" in ended.message


async def test_a_killed_agent_leaves_no_process_and_no_file(run: RunDir, scratch: Path) -> None:
    async with replica(run, deployment(scratch)) as agent:
        progress, _ = await agent.ready()
        assert progress.engine_pid is not None
        engine = progress.engine_pid
        agent.process.kill()
        await agent.end()
        await eventually(lambda: not exists(engine))
        (parent,) = scratch.iterdir()
        await eventually(lambda: not any(parent.iterdir()))
        assert agent.record is not None  # not withdrawn; its beat has stopped, which readers notice


async def test_a_run_directory_that_is_removed_ends_its_agents(run: RunDir, scratch: Path, tmp_path: Path) -> None:
    """Otherwise they would hold their GPUs, and `down` could not find them."""
    async with replica(run, deployment(scratch)) as agent:
        progress, _ = await agent.ready()
        run.path.rename(tmp_path / "away")
        assert await agent.end() == 0
        assert progress.engine_pid is not None
        assert not exists(progress.engine_pid)


async def test_agent_and_guard_killed_at_once(run: RunDir, scratch: Path) -> None:
    """The folder is left behind, and the next agent removes it."""
    async with replica(run, deployment(scratch)) as agent:
        progress, _ = await agent.ready()
        assert progress.engine_pid is not None
        guard = int(Path(f"/proc/{progress.engine_pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(guard, signal.SIGSTOP)  # so that the guard cannot clean up
        agent.process.kill()
        await agent.end()
        os.kill(guard, signal.SIGKILL)
        engine = progress.engine_pid
        await eventually(lambda: not exists(engine))
    (parent,) = scratch.iterdir()
    (left,) = parent.iterdir()
    async with replica(run, deployment(scratch)) as agent:
        await agent.reached(JobPhase.READY)
        assert not left.exists()


async def test_a_killed_guard_is_a_restart_like_any_other(run: RunDir, scratch: Path) -> None:
    async with replica(run, deployment(scratch)) as agent:
        progress, _ = await agent.ready()
        assert progress.engine_pid is not None
        guard = int(Path(f"/proc/{progress.engine_pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(guard, signal.SIGKILL)
        again, _ = await agent.ready(after=progress)
        assert (again.restarts, again.reason) == (1, FailureReason.KILLED)
        engine = progress.engine_pid
        await eventually(lambda: not exists(engine))


async def test_a_value_to_edit_exits_2(run: RunDir, scratch: Path) -> None:
    configured = deployment(scratch)
    configured.experts = {"code": configured.experts["math"]}
    async with replica(run, configured) as agent:
        assert await agent.end() == 2
        ended = agent.job.exit()
        assert ended is not None
        assert ended.reason is FailureReason.BAD_OPTION
        assert "no expert 'math'" in ended.message
