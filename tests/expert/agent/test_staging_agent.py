"""An agent that copies its models to its node first: what its engine, its progress and `status` show of that."""

import os
import sys
from pathlib import Path

import pytest

from hpc_router.config.schema import Deployment, ExpertConfig
from hpc_router.expert.staging.model_files import list_files
from hpc_router.expert.staging.node_disk import NodeDisk
from hpc_router.net import protocol
from hpc_router.state.job_records import FailureReason, JobPhase
from hpc_router.state.registry import State
from hpc_router.state.run_directory import RunDir, make_run
from tests.expert.replicas import chat, deployment, replica
from tests.support.waiting import eventually


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "law"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(b"lora" * 1000)
    return folder


@pytest.fixture
def staged(scratch: Path, adapter: Path, node_disk: Path) -> Deployment:
    """The simulated engine is given the folders of adapters only."""
    configured = deployment(scratch)
    configured.experts["law"] = ExpertConfig(model=str(adapter), adapter_of="math")
    configured.cluster.stage_to = str(node_disk)
    return configured


def arguments(pid: int | None) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


async def test_the_engine_loads_the_copy_and_serves_the_same_names(
    tmp_path: Path, staged: Deployment, adapter: Path, node_disk: Path
) -> None:
    """The second agent finds the copy that the first one made."""
    files = list_files(adapter)
    for number, copied in enumerate((files.size, 0)):
        async with replica(make_run(tmp_path / f"run{number}"), staged) as agent:
            progress, record = await agent.ready()
            copy = node_disk / f"hpc-router-models-{os.getuid()}" / f"model-{files.key}" / "law"
            assert f"law={copy}" in arguments(progress.engine_pid)
            assert record.serves == {"math": "math", "law": "law"}
            assert (progress.stage_bytes, progress.message) == (copied, None)
            assert progress.stage_s is not None
            assert progress.load_s is not None
            async with agent.session() as session:
                async with session.post(protocol.CHAT, json=chat(model="law")) as response:
                    assert response.status == 200
                    assert (await response.json())["model"] == "law"
                async with session.get(protocol.MODELS) as listed:
                    assert {card["id"] for card in (await listed.json())["data"]} == {"math", "law"}
            agent.process.terminate()
            assert await agent.end() == 0
            assert f"{adapter} {'was copied' if copied else 'is on'}" in agent.log()


async def test_an_agent_that_waits_for_a_copy_beats_tells_and_drains(
    run: RunDir, staged: Deployment, adapter: Path, node_disk: Path
) -> None:
    part = NodeDisk.open(node_disk).begin(list_files(adapter))
    assert part is not None
    async with replica(run, staged) as agent:
        progress = await agent.reached(JobPhase.STARTING)
        await eventually(lambda: (p := agent.job.progress()) and p.message)
        progress = await agent.reached(JobPhase.STARTING)
        assert progress.message == f"waits for another engine on this node, which copies {adapter}"
        before = agent.record
        assert before is not None
        assert before.state is State.STARTING
        await eventually(lambda: (now := agent.record) is not None and (now.beat or 0) > (before.beat or 0))
        agent.process.terminate()
        await agent.end()
    part.lock.release()


async def test_an_agent_whose_model_cannot_be_copied_serves_from_its_folder(
    run: RunDir, staged: Deployment, adapter: Path
) -> None:
    staged.cluster.stage_to = "$NOT_SET/models"
    async with replica(run, staged) as agent:
        progress, _ = await agent.ready()
        assert f"law={adapter}" in arguments(progress.engine_pid)
        assert progress.stage_bytes == 0
        assert "$NOT_SET is not set in this job" in agent.log()


async def test_an_engine_that_cannot_start_with_the_kept_cache_gets_an_empty_one(
    run: RunDir, staged: Deployment, node_disk: Path
) -> None:
    """As vLLM where a cache file was cut off: a stand-in for the engine ends with an error if the cache has one."""
    program = run.path.parent / "python"
    program.write_text(
        "#!/bin/sh\n"
        'case "$*" in *hpc_router.sim*) [ ! -e "${TRITON_CACHE_DIR%/*}/damaged" ] || exit 1;; esac\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    program.chmod(0o700)
    staged.experts["math"].engine.python = str(program)
    for damaged in (False, True):
        async with replica(run if damaged else make_run(run.path.parent / "first"), staged) as agent:
            progress, _ = await agent.ready()
            caches = list(node_disk.glob("*/cache-sim-*"))
            assert (progress.restarts, len(caches)) == ((1, 0) if damaged else (0, 1))
            for cache in caches:
                (cache / "damaged").write_text("")
            agent.process.terminate()
            assert await agent.end() == 0


async def test_a_copy_that_the_engine_cannot_load_is_removed(run: RunDir, staged: Deployment, node_disk: Path) -> None:
    """It may be damaged, and the next agent on this node would find it."""
    staged.experts["math"].engine.options["faults"] = [{"kind": "load_fail", "reason": "weights"}]
    async with replica(run, staged) as agent:
        assert await agent.end() == 1
        ended = agent.job.exit()
        assert ended is not None
        assert ended.reason is FailureReason.WEIGHTS
        assert "the engine loads " in agent.log()
    assert list(node_disk.glob("*/model-*")) == []
