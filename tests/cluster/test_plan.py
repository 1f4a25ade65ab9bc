"""What would run, and what only the whole deployment on this machine can show wrong."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_router.cluster import flags
from hpc_router.cluster.plan import make_plan, settled
from hpc_router.compose import load_deployment
from hpc_router.config import Deployment, EngineConfig, ExpertConfig, ResourceConfig
from hpc_router.errors import ConfigError


def deployment(**experts: ExpertConfig) -> Deployment:
    made = Deployment(experts=experts)
    made.policy.kind = "model_field"
    return made


def faults(wrong: Deployment) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        make_plan(wrong)
    return str(caught.value).splitlines()


SIM = ExpertConfig(model="m", engine=EngineConfig(kind="sim"))


def test_the_plan_is_what_is_submitted() -> None:
    plan = make_plan(load_deployment(["topology=sim", "experts.math.replicas=2", "experts.law.replicas=0"]))
    names = [replica.request.replica for replica in plan.replicas]
    assert names == ["router-0.g1", "code-0.g1", "math-0.g1", "math-1.g1", "medicine-0.g1", "generalist-0.g1"]
    math = plan.replicas[2]
    assert math.request.argv[:3] == (sys.executable, "-m", "hpc_router.expert")
    assert math.engine is not None
    assert "hpc_router.expert.sim" in math.engine.argv


def test_gpus_of_all_replicas_together() -> None:
    two = replace(SIM, replicas=2, resources=ResourceConfig(gpus=2))
    wrong = deployment(a=two, b=two)
    wrong.cluster.gpus = 7
    assert faults(wrong) == [
        "cluster.gpus=7: this machine has fewer GPUs than all replicas need: 8 (a 4, b 4)",
    ]
    wrong.cluster.gpus = 8
    make_plan(wrong)


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("no program")
    engine = EngineConfig(kind="transformers")
    wrong = deployment(
        a=ExpertConfig(model="./nope", engine=replace(engine, python="/no/python")),
        b=ExpertConfig(model="/no/model", engine=replace(engine, python=str(plain))),
        c=ExpertConfig(model="org/name", engine=replace(engine, options={"extra": {"host": "0.0.0.0"}})),
    )
    said = faults(wrong)
    for at in ("experts.a.engine.python", "experts.a.model", "experts.b.engine.python", "experts.b.model"):
        assert any(line.startswith(f"{at}=") for line in said), at
    assert any("experts.c.engine.options.extra.host" in line for line in said)
    assert len(said) == 5


@pytest.mark.parametrize("model", ["org/name", "name", "org/name-1.5_x"])
def test_a_hub_id_is_no_path(model: str) -> None:
    make_plan(deployment(a=ExpertConfig(model=model, engine=EngineConfig(kind="transformers"))), ask_engines=False)


def test_exemplars_and_artefacts_are_looked_at() -> None:
    wrong = load_deployment(["topology=sim"])
    wrong.experts["math"].exemplars = list(wrong.experts["law"].exemplars)
    assert "math" in faults(wrong)[0]
    wrong = load_deployment(["topology=sim", "policy.artefact=/no/artefact"])
    assert faults(wrong)[0].startswith("policy.artefact=/no/artefact: no artefact")


def test_what_may_be_meant_so_is_a_note() -> None:
    notes = " ".join(make_plan(load_deployment(["topology=sim", "experts.generalist.replicas=0"])).warnings)
    assert "the fallback expert 'generalist' has replicas=0" in notes
    notes = " ".join(make_plan(load_deployment(["topology=sim", "experts.math.exemplars=[]"])).warnings)
    assert "`auto` never goes to: math" in notes
    assert "no experts" in " ".join(make_plan(load_deployment(["topology=empty"])).warnings)


def test_secrets_are_not_shown() -> None:
    one = replace(SIM, engine=EngineConfig(kind="sim", env={"HF_TOKEN": "hunter2", "LEVEL": "info"}))
    shown = make_plan(deployment(a=one)).to_json()["replicas"][1]["environment"]
    assert shown == {"HF_TOKEN": "***", "LEVEL": "info"}


def test_local_paths_are_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may be completed from another folder. An interpreter that is a link stays one, a hub id a hub id."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "python").symlink_to(sys.executable)
    engine = EngineConfig(kind="transformers", python="./python")
    one = deployment(a=ExpertConfig(model="model", engine=engine), b=ExpertConfig(model="org/name"), c=SIM)
    one.policy.artefact = "artefact"
    done = settled(one)
    assert done.experts["a"].model == str(tmp_path / "model")
    assert done.experts["a"].engine.python == str(tmp_path / "python")
    assert (done.experts["b"].model, done.experts["c"].model) == ("org/name", "m")
    assert done.policy.artefact == str(tmp_path / "artefact")
    assert settled(done) == done


def interpreter(folder: Path, name: str, script: str) -> ExpertConfig:
    """An engine's interpreter that answers as told."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return ExpertConfig(model="m", engine=EngineConfig(kind="transformers", python=str(path)))


def test_a_clear_no_of_the_engines_own_interpreter_is_a_fault(tmp_path: Path) -> None:
    refusing = interpreter(tmp_path, "no", "echo 'error: no such option: --x' >&2; echo '╰───╯' >&2; exit 2")
    assert faults(deployment(a=refusing)) == [
        "experts.a.engine.options: the engine refuses: error: no such option: --x"
    ]


@pytest.mark.parametrize("script", ["exit 1", "echo 'ImportError: nothing here' >&2; exit 1", "kill -9 $$"])
def test_an_interpreter_that_cannot_be_asked_here_may_be_right_there(tmp_path: Path, script: str) -> None:
    plan = make_plan(deployment(a=interpreter(tmp_path, "broken", script)))
    assert "experts.a.engine.options: could not be checked" in plan.warnings[0]


def test_an_interpreter_that_hangs_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags, "TIMEOUT_S", 0.1)
    plan = make_plan(deployment(a=interpreter(tmp_path, "slow", "exec sleep 60")))
    assert "no answer within 0.1 s" in plan.warnings[0]


def test_equal_questions_are_asked_once(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    expert = interpreter(tmp_path, "counting", f"echo x >> {asked}")
    make_plan(deployment(a=expert, b=expert, c=expert))
    assert asked.read_text() == "x\n"
