"""The agent with real engines and a tiny model, from start to drain; the same steps for each engine."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hpc_router.config.schema import ClusterConfig, Deployment, EngineConfig, EngineKind, ExpertConfig, PolicyConfig
from hpc_router.expert.engines import Place, build_engine, engine_environment
from hpc_router.expert.staging.model_files import list_files
from hpc_router.net import protocol
from hpc_router.state.job_records import FailureReason, JobPhase
from hpc_router.state.run_directory import RunDir, make_run
from tests.expert.replicas import chat, exists, replica
from tests.support.needs import ROOT, engine_python
from tests.support.waiting import eventually

TINY_MODEL = ROOT / "launch" / "tiny_model.py"
STARTUP_S = 300.0
CPU = {"device": "cpu"}

pytestmark = pytest.mark.e2e


def expert_of(kind: EngineKind, options: dict[str, Any], *, model: Path) -> ExpertConfig:
    engine = EngineConfig(kind=kind, options=options, python=str(engine_python(kind)), threads=1)
    return ExpertConfig(model=str(model), engine=engine)


def make_model(kind: str, folder: Path) -> Path:
    subprocess.run([str(engine_python(kind)), str(TINY_MODEL), str(folder)], check=True)
    return folder


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("transformers", CPU, marks=pytest.mark.transformers),
        # This takes minutes on two cores; the end-to-end test with two experts always runs.
        pytest.param("vllm", CPU | {"max_model_len": 512}, marks=[pytest.mark.vllm, pytest.mark.long]),
    ],
)
async def test_a_real_engine_from_start_to_end(
    kind: EngineKind, options: dict[str, Any], run: RunDir, scratch: Path, tmp_path: Path
) -> None:
    expert = expert_of(kind, options, model=make_model(kind, tmp_path / "tiny"))
    configured = Deployment(
        experts={"math": expert},
        cluster=ClusterConfig(scratch=str(scratch)),
        policy=PolicyConfig(kind="model_field"),
    )
    async with replica(run, configured) as agent:
        await eventually(lambda: (p := agent.job.progress()) and p.phase is JobPhase.READY, within_s=STARTUP_S)
        progress, record = await agent.ready()
        assert record.engine.version
        served = record.serves["math"]
        async with agent.session() as session:
            async with session.get(protocol.MODELS) as response:
                assert served in [card["id"] for card in (await response.json())["data"]]
            for stream in (False, True):
                async with session.post(
                    protocol.CHAT, json=chat(model=served, max_tokens=4, stream=stream)
                ) as response:
                    assert response.status == 200
                    assert b"content" in await response.read()
        agent.process.terminate()
        assert await agent.end() == 0
        ended = agent.job.exit()
        assert ended is not None
        assert ended.reason is FailureReason.DRAINED
        assert progress.engine_pid is not None
        assert not exists(progress.engine_pid)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("transformers", CPU, marks=pytest.mark.transformers),
        pytest.param(
            "vllm",
            CPU | {"max_model_len": 512, "extra": {"enforce-eager": True}},
            marks=[pytest.mark.vllm, pytest.mark.long],
        ),
    ],
)
async def test_a_model_is_copied_to_the_node_once_and_keeps_its_name(
    kind: EngineKind, options: dict[str, Any], scratch: Path, tmp_path: Path, node_disk: Path
) -> None:
    model = make_model(kind, tmp_path / "tiny")
    configured = Deployment(
        experts={"math": expert_of(kind, options, model=model)},
        cluster=ClusterConfig(scratch=str(scratch), stage_to=str(node_disk), env={"TORCHDYNAMO_DISABLE": "1"}),
        policy=PolicyConfig(kind="model_field"),
    )
    files = list_files(model)
    for number, copied in enumerate((files.size, 0)):
        async with replica(make_run(tmp_path / f"run{number}"), configured) as agent:
            await eventually(lambda: (p := agent.job.progress()) and p.phase is JobPhase.READY, within_s=STARTUP_S)
            progress, record = await agent.ready()
            words = Path(f"/proc/{progress.engine_pid}/cmdline").read_text().split("\0")
            [copy] = node_disk.glob(f"hpc-router-models-*/model-{files.key}/tiny")
            assert str(copy) in words
            assert (progress.stage_bytes, record.engine.model) == (copied, str(model))
            assert (progress.load_s or 0) > 0
            served = record.serves["math"]
            assert served == ("math" if kind == "vllm" else str(model))
            async with agent.session() as session:
                async with session.get(protocol.MODELS) as response:
                    assert served in [card["id"] for card in (await response.json())["data"]]
                async with session.post(protocol.CHAT, json=chat(model=served, max_tokens=4)) as response:
                    assert response.status == 200
                    assert str(node_disk) not in (await response.json())["model"]
            agent.process.terminate()
            assert await agent.end() == 0
            print(f"{kind}: load_s={progress.load_s} stage_s={progress.stage_s} stage_bytes={progress.stage_bytes}")
    kept = [path.name for path in node_disk.glob("hpc-router-models-*/cache-*/vllm/modelinfos/*")]
    assert bool(kept) == (kind == "vllm")


@pytest.mark.parametrize(
    ("kind", "extra", "status"),
    [
        pytest.param("transformers", {}, 0, marks=pytest.mark.transformers),
        pytest.param("transformers", {"no-such-flag": 1}, 2, marks=pytest.mark.transformers),
        pytest.param("vllm", {"no-such-flag": 1}, 2, marks=pytest.mark.vllm),
    ],
)
def test_its_own_interpreter_judges_the_flags(
    kind: EngineKind, extra: dict[str, Any], status: int, tmp_path: Path
) -> None:
    engine = build_engine("math", expert_of(kind, {**CPU, "extra": extra}, model=tmp_path))
    command = engine.check_command(Place(tmp_path))
    assert command is not None
    answer = subprocess.run(command, check=False, capture_output=True, text=True)
    assert answer.returncode == status, answer.stderr
    assert ("no-such-flag" in answer.stderr) == bool(extra)


REFUSED = "the Rust front end does not have the options middleware, root_path"


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"root-path": "/x", "middleware": ["a.b"]}, REFUSED),
        ({"tool-call-parser": "olmo3"}, "tool parser `olmo3` is not registered"),
    ],
)
def test_the_rust_front_end_judges_the_flags_too(extra: dict[str, Any], message: str, tmp_path: Path) -> None:
    """The Python front end has these options and this parser. Flags that it accepts are checked by every `up`."""
    config = expert_of("vllm", {**CPU, "extra": extra, "frontend": "rust"}, model=tmp_path)
    engine, place = build_engine("math", config), Place(tmp_path)
    command = engine.check_command(place)
    assert command is not None
    environment = engine_environment(engine, config, place, inherited={"PATH": os.defpath})
    (tmp_path / "tmp").mkdir()
    answer = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert (answer.returncode, answer.stderr.splitlines()[-1].startswith(message)) == (2, True), answer.stderr
