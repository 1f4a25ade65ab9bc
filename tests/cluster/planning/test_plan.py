"""The plan: what `up` would run, and the faults that a whole deployment has on this machine."""

import io
import json
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from rich.console import Console

from hpc_router.cli.output import WIDE
from hpc_router.cli.tables import plan_text
from hpc_router.cluster.launchers.slurm import sbatch_test
from hpc_router.cluster.launchers.slurm.allocation import AllocationLauncher
from hpc_router.cluster.planning import engine_flags
from hpc_router.cluster.planning.config_faults import own_warnings
from hpc_router.cluster.planning.plan import JOB_FOLDER, Plan, make_plan, with_absolute_paths
from hpc_router.config.compose import load_deployment
from hpc_router.config.schema import (
    ClusterConfig,
    ContainerConfig,
    Deployment,
    EngineConfig,
    ExpertConfig,
    ResourceConfig,
)
from hpc_router.errors import ConfigError
from hpc_router.state.run_directory import RunDir
from tests.cluster.programs import Programs
from tests.routing.samples import artefact


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
    assert "hpc_router.sim" in math.engine.argv


def test_gpus_of_all_replicas_together() -> None:
    two = replace(SIM, replicas=2, resources=ResourceConfig(gpus=2))
    wrong = deployment(a=two, b=two)
    wrong.cluster.gpus = 7
    assert faults(wrong) == [
        "cluster.gpus=7: all replicas together need 8 GPUs (a 4, b 4)",
    ]
    wrong.cluster.gpus = 8
    make_plan(wrong)


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
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


def test_adapters_have_no_jobs_of_their_own() -> None:
    plan = make_plan(load_deployment(["topology=sim_lora"]))
    assert [replica.request.replica for replica in plan.replicas] == ["router-0.g1", "base-0.g1", "base-1.g1"]
    assert plan.to_json()["replicas"][1]["serves"] == ["base", "math", "law", "medicine"]
    assert "serves  base, math, law, medicine" in printed(plan)
    predicted = ["topology=llama3_8b_4lora_bf16", "simulate.gpu=h100-sxm"]
    plan = make_plan(load_deployment(predicted))
    assert [replica.request.replica for replica in plan.replicas] == ["router-0.g1", "base-0.g1"]
    engine = plan.replicas[1].engine
    assert engine is not None
    assert {"--roofline", "--lora-modules"} <= set(engine.argv)


def test_the_folder_of_an_adapter_must_exist(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    engine = EngineConfig(kind="vllm", options={"device": "cpu"})
    wrong = deployment(
        base=ExpertConfig(model="org/name", engine=engine),
        a=ExpertConfig(model=str(tmp_path / "bare"), adapter_of="base"),
        b=ExpertConfig(model="/no/adapter", adapter_of="base"),
    )
    assert faults(wrong) == [
        f"experts.a.model={tmp_path}/bare: it has no adapter_config.json, so it is no LoRA adapter",
        "experts.b.model=/no/adapter: no such folder (valid: an adapter's folder, or a hub id such as org/name)",
    ]


def test_a_variable_may_not_choose_the_front_end_of_vllm() -> None:
    """Its options would not be checked. Other engines do not know the variable."""
    env = {"VLLM_USE_RUST_FRONTEND": "1"}
    wrong = deployment(
        a=ExpertConfig(model="org/name", engine=EngineConfig(kind="vllm", env=env)),
        b=ExpertConfig(model="org/name", engine=EngineConfig(kind="vllm", options={"frontend": "rust"})),
    )
    wrong.cluster.env = env
    said = ".VLLM_USE_RUST_FRONTEND: not a variable to set; use experts.<name>.engine.options.frontend"
    assert faults(wrong) == [f"cluster.env{said}", f"experts.a.engine.env{said}"]
    other = deployment(a=ExpertConfig(model="m", engine=EngineConfig(kind="sim")))
    other.cluster.env = env
    make_plan(other)


@pytest.mark.parametrize("model", ["org/name", "name", "org/name-1.5_x"])
def test_a_hub_id_is_no_path(model: str) -> None:
    make_plan(deployment(a=ExpertConfig(model=model, engine=EngineConfig(kind="transformers"))), ask_engines=False)


def test_exemplars_and_artefacts_are_checked() -> None:
    wrong = load_deployment(["topology=sim"])
    wrong.experts["math"].exemplars = list(wrong.experts["law"].exemplars)
    assert "math" in faults(wrong)[0]
    wrong = load_deployment(["topology=sim", "policy.artefact=/no/artefact"])
    assert faults(wrong)[0].startswith("policy.artefact=/no/artefact: no artefact")


def test_a_value_that_may_be_intended_is_a_warning() -> None:
    notes = " ".join(make_plan(load_deployment(["topology=sim", "experts.generalist.replicas=0"])).warnings)
    assert "the fallback expert 'generalist' has replicas=0" in notes
    notes = " ".join(make_plan(load_deployment(["topology=sim", "experts.math.exemplars=[]"])).warnings)
    assert "`auto` never goes to: math" in notes
    lora = ["topology=sim_lora", "experts.base.replicas=0", "policy.fallback=math"]
    notes = " ".join(make_plan(load_deployment(lora)).warnings)
    assert "every expert has replicas=0" in notes
    assert "the fallback expert 'math' is served by 'base': replicas=0" in notes
    assert "no experts" in " ".join(make_plan(load_deployment(["topology=empty"])).warnings)
    limited = ["topology=sim", "router.classes.batch.max_in_flight=4"]
    notes = " ".join(make_plan(load_deployment(limited)).warnings)
    assert "these engines delay interactive ones: code, math, medicine, law, generalist (" in notes
    ordered = [f"experts.{name}.engine.options.extra.scheduling-policy=priority" for name in ("code", "law")]
    notes = " ".join(make_plan(load_deployment([*limited, *ordered])).warnings)
    assert "these engines delay interactive ones: math, medicine, generalist (" in notes


def test_an_expert_without_a_cluster_is_a_note(tmp_path: Path) -> None:
    artefact().write(tmp_path / "made")
    one = load_deployment(["topology=sim", f"policy.artefact={tmp_path}/made"])
    (note,) = (note for note in make_plan(one).warnings if "auto" in note)
    assert "so `auto` never goes to: law (" in note
    assert "classify assign" in note


def test_secrets_are_not_shown() -> None:
    one = replace(SIM, engine=EngineConfig(kind="sim", env={"HF_TOKEN": "hunter2", "LEVEL": "info"}))
    shown = make_plan(deployment(a=one)).to_json()["replicas"][1]["environment"]
    assert shown["HF_TOKEN"] == "***"
    assert shown["LEVEL"] == "info"


def test_the_engines_whole_environment_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that the agent makes, without the node's own variables."""
    monkeypatch.setenv("SOMEBODYS", "own")
    engine = EngineConfig(kind="transformers", threads=3, env={"LEVEL": "info"})
    made = deployment(a=ExpertConfig(model=str(tmp_path), engine=engine))
    made.cluster.env = {"LEVEL": "debug", "SITE": "s"}
    shown = make_plan(made, ask_engines=False).to_json()["replicas"][1]["environment"]
    assert {k: shown[k] for k in ("LEVEL", "SITE", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")} == {
        "LEVEL": "info",
        "SITE": "s",
        "OMP_NUM_THREADS": "3",
        "HF_HUB_OFFLINE": "1",
    }
    assert shown["TMPDIR"].endswith(f"/{JOB_FOLDER}/tmp")
    assert not {"SOMEBODYS", "PATH", "HOME"} & set(shown)


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Local paths become absolute, because a run may be completed from another folder. An interpreter that is a link
    stays one, and a hub id stays a hub id."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "python").symlink_to(sys.executable)
    engine = EngineConfig(kind="transformers", python="./python")
    one = deployment(
        a=ExpertConfig(model="model", engine=engine),
        b=ExpertConfig(model="org/name"),
        c=SIM,
        on_b=ExpertConfig(model="model", adapter_of="b"),
        on_c=ExpertConfig(model="model", adapter_of="c"),
    )
    one.policy.artefact = "artefact"
    done = with_absolute_paths(one)
    assert done.experts["a"].model == str(tmp_path / "model")
    assert done.experts["a"].engine.python == str(tmp_path / "python")
    assert (done.experts["b"].model, done.experts["c"].model) == ("org/name", "m")
    assert (done.experts["on_b"].model, done.experts["on_c"].model) == (str(tmp_path / "model"), "model")
    assert done.policy.artefact == str(tmp_path / "artefact")
    assert with_absolute_paths(done) == done


def interpreter(folder: Path, name: str, script: str) -> ExpertConfig:
    """An expert whose engine's interpreter is this script."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return ExpertConfig(model="m", engine=EngineConfig(kind="transformers", python=str(path)))


def test_flags_that_the_engines_interpreter_refuses_are_a_fault(tmp_path: Path) -> None:
    refusing = interpreter(tmp_path, "no", "echo 'error: no such option: --x' >&2; echo '╰───╯' >&2; exit 2")
    assert faults(deployment(a=refusing)) == [
        "experts.a.engine.options: the engine refuses: error: no such option: --x"
    ]


@pytest.mark.parametrize("script", ["exit 1", "echo 'ImportError: nothing here' >&2; exit 1", "kill -9 $$"])
def test_an_interpreter_that_cannot_start_here_is_a_warning(tmp_path: Path, script: str) -> None:
    plan = make_plan(deployment(a=interpreter(tmp_path, "broken", script)))
    assert "experts.a.engine.options: could not be checked" in plan.warnings[0]


def test_the_check_of_an_interpreter_has_a_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_flags, "TIMEOUT_S", 0.1)
    plan = make_plan(deployment(a=interpreter(tmp_path, "slow", "exec sleep 60")))
    assert "no answer within 0.1 s" in plan.warnings[0]


def test_equal_commands_are_checked_once(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    expert = interpreter(tmp_path, "counting", f"echo x >> {asked}")
    make_plan(deployment(a=expert, b=expert, c=expert))
    assert asked.read_text() == "x\n"


def test_secrets_are_not_shown_in_scripts() -> None:
    one = deployment(a=SIM)
    one.cluster = ClusterConfig(kind="slurm", env={"HF_TOKEN": "hunter2 x", "LEVEL": "info"})
    plan = make_plan(one, ask_engines=False)
    assert "hunter2" in plan.jobs[0].script()
    for told in (printed(plan), json.dumps(plan.to_json())):
        assert "hunter2" not in told
        assert "export HF_TOKEN='***'" in told
        assert "export LEVEL=info" in told


NODES = "batch|batch*|up|1-00:00:00|3|8|16000|idle|(null)|gpu:4"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """A site that accepts every job that fits its nodes."""
    programs = Programs(tmp_path / "bin", monkeypatch)
    programs.add("sinfo", f"echo '{NODES}'")
    programs.add("sbatch", "cat >/dev/null")
    return programs


def test_the_plan_shows_the_batch_scripts(slurm: Programs) -> None:
    """The plan shows each job's whole script. Jobs that differ only in names share one."""
    plan = make_plan(
        load_deployment(["topology=sim", "cluster=slurm", "experts.math={replicas: 2, resources: {gpus: 1}}"])
    )
    told = plan.to_json()
    assert [job["replicas"] for job in told["sbatch"]][:3] == [["router-0.g1"], ["code-0.g1"], ["math-0.g1"]]
    scripts = {replica["replica"]: replica["script"] for replica in told["replicas"]}
    assert scripts["math-1.g1"] == plan.jobs[3].script()
    assert "#SBATCH --gres=gpu:1" in scripts["math-1.g1"]
    assert [[replica for job in alike for replica in job.replicas] for alike in plan.alike()] == [
        ["router-0.g1", "code-0.g1", "medicine-0.g1", "law-0.g1", "generalist-0.g1"],
        ["math-0.g1", "math-1.g1"],
    ]
    text = printed(plan)
    assert text.count("#!/bin/bash") == 2
    assert "and the same for math-1.g1" in text
    assert "  #SBATCH --gres=gpu:1" in text


def test_replicas_that_share_a_job_stand_in_one_script(slurm: Programs) -> None:
    plan = make_plan(load_deployment(["topology=sim", "cluster=slurm", "cluster.replicas_per_job=3"]))
    assert [job.replicas for job in plan.jobs] == [
        ("router-0.g1",),
        ("code-0.g1", "math-0.g1", "medicine-0.g1"),
        ("law-0.g1", "generalist-0.g1"),
    ]


def test_the_controller_is_queried_no_more_than_needed(slurm: Programs) -> None:
    """One sinfo, one sbatch for each different job, and no query with `--no-ask`."""
    deployed = load_deployment(["topology=sim", "cluster=slurm", "experts.math.resources.gpus=1"])
    make_plan(deployed, ask_engines=False)
    assert (slurm.calls("sinfo"), slurm.calls("sbatch")) == ([], [])
    make_plan(deployed)
    assert (len(slurm.calls("sinfo")), len(slurm.calls("sbatch"))) == (1, 2)


def test_sbatch_decides_and_sinfo_names_the_value(slurm: Programs) -> None:
    """A submit plugin may choose another partition, so a job that does not fit is refused only if sbatch refuses it."""
    deployed = load_deployment(["topology=sim", "cluster=slurm", "experts.math.resources.gpus=8"])
    misfit = "experts.math.resources.gpus=8: partition batch has at most 4 per node"
    assert f"{misfit}; sbatch accepts it, but such a job may never start" in make_plan(deployed).warnings
    slurm.add("sbatch", "exec sleep 60")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sbatch_test, "TIMEOUT_S", 0.1)
        notes = make_plan(deployed).warnings
    assert misfit in notes
    assert any("could not be checked with Slurm: sbatch gave no answer" in note for note in notes)
    refuse = "echo 'allocation failure: Requested node configuration is not available' >&2; exit 1"
    slurm.add("sbatch", f"grep -q gpu:8 && {{ {refuse}; }}; true")
    assert faults(deployed) == [misfit]


def test_a_router_on_this_machine_is_no_slurm_job(slurm: Programs) -> None:
    plan = make_plan(load_deployment(["topology=sim", "cluster=slurm", "router.place=here"]))
    assert "router-0.g1" not in [replica for job in plan.jobs for replica in job.replicas]
    assert plan.to_json()["replicas"][0]["script"] is None


def test_a_failing_sinfo_is_a_warning(slurm: Programs) -> None:
    slurm.add("sinfo", "echo 'slurm_load_partitions: Unable to contact slurm controller (connect failure)' >&2; exit 1")
    (note,) = make_plan(load_deployment(["topology=sim", "cluster=slurm"])).warnings
    assert note == (
        "could not be checked with Slurm: slurm_load_partitions: Unable to contact slurm controller (connect failure); "
        "`up` needs it"
    )


def test_an_allocation_is_not_judged_by_partitions(slurm: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    deployed = load_deployment(["topology=sim", "cluster=allocation", "experts.math.resources.gpus=8"])
    (note,) = make_plan(deployed).warnings
    assert "`up` must run in one" in note
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    slurm.add("scontrol", "echo 'JobId=7 EndTime=Unknown Nodes=n1 CPU_IDs=0-7 Mem=0 GRES=gpu:8(IDX:0-7)'")
    assert make_plan(deployed).warnings == ()
    assert slurm.calls("sinfo") == []
    assert slurm.calls("srun") == []


def held(*, minutes: float, gpus: int = 8) -> str:
    end = datetime.fromtimestamp(time.time() + 60 * minutes).isoformat(timespec="seconds")
    return f"echo 'JobId=7 EndTime={end} Nodes=n[1-2] CPU_IDs=0-7 Mem=0 GRES=gpu:{gpus}(IDX:0)'"


def test_an_allocation_that_is_too_small_or_ends_too_soon(slurm: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    deployed = load_deployment(["topology=sim", "cluster=allocation", "experts.math.resources.gpus=4"])
    slurm.add("scontrol", held(minutes=29.5))
    (note,) = make_plan(deployed).warnings
    key = "experts.code.engine.startup_timeout_s=1800"
    assert note == f"job 7 ends in 29 min with all its steps, before {key} has passed"
    slurm.add("scontrol", held(minutes=60, gpus=2))
    assert faults(deployed) == ["experts.math.resources.gpus=4: job 7 has at most 2 per node"]


def test_a_step_that_holds_the_allocation_is_a_fault(slurm: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    """srun tries a step, unless other steps run, because these may be the deployment's own."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "3")
    deployed = load_deployment(["topology=sim", "cluster=allocation"])
    slurm.add("scontrol", held(minutes=60))
    slurm.add("squeue", "printf '7.batch\\n7.3\\n'")
    slurm.add("srun", "echo 'srun: error: Unable to create step for job 7: Requested nodes are busy' >&2; exit 1")
    (fault,) = faults(deployed)
    assert "no step for code-0.g1 can start beside step 7.3" in fault
    (words,) = slurm.calls("srun")
    assert {"--jobid=7", "--exact", "--immediate=3", "true"} <= set(words.split())
    assert "--output" not in words
    slurm.add("squeue", "printf '7.batch\\n7.3\\n7.4\\n'")
    make_plan(deployed)
    assert len(slurm.calls("srun")) == 1


def test_a_step_of_an_allocation_is_shown_as_it_will_run(
    slurm: Programs, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan shows exactly the script that `up` starts with bash."""
    monkeypatch.delenv("HPC_ROUTER_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    slurm.add("setsid", "")
    deployed = load_deployment(["topology=sim", "cluster=allocation", "cluster.setup=[true]"])
    plan = make_plan(deployed, run=run)
    told = plan.to_json()
    launcher = AllocationLauncher(run, deployed)
    assert launcher.submit([replica.request for replica in plan.replicas])
    for replica in told["replicas"]:
        assert replica["script"] == (run.jobs / replica["replica"] / "step.sh").read_text()
    assert "--jobid=7" in printed(plan)
    assert told["sbatch"] == []


def test_outside_of_any_job_the_steps_have_a_placeholder(slurm: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HPC_ROUTER_JOB_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    deployed = load_deployment(["topology=sim", "cluster=allocation", "router.place=here"])
    router, math, *_ = make_plan(deployed).to_json()["replicas"]
    assert router["script"] is None
    assert "--jobid='<job>'" in math["script"]
    assert "#SBATCH" not in math["script"]


def test_an_engine_in_an_image(slurm: Programs, tmp_path: Path) -> None:
    """The interpreter is in the image: it is not looked for on this machine, and checks its flags inside the image."""
    slurm.add("apptainer", "echo 'error: no such option: --x' >&2; exit 2")
    image = tmp_path / "x.sif"
    one = ExpertConfig(model="org/m", engine=EngineConfig(kind="transformers", python="/opt/python"))
    made = deployment(a=one, b=SIM)
    made.cluster = ClusterConfig(kind="slurm", container=ContainerConfig(image=str(image)))
    assert faults(made)[0].startswith(f"cluster.container.image={image}: no such file")
    assert faults(made)[1].startswith("experts.a.engine.options: the engine refuses: error: no such option: --x")
    image.touch()
    slurm.add("apptainer", "exit 0")
    plan = make_plan(made)
    argv = plan.replicas[1].engine
    assert argv is not None
    assert argv.argv[:2] == ("apptainer", "exec")
    assert str(image) in argv.argv
    assert "/opt/python" in argv.argv
    sim = plan.replicas[2].engine
    assert sim is not None
    assert sim.argv[0] == sys.executable
    made.cluster.container.image = "docker://a/b"
    assert "could not be checked: they are in docker://a/b" in " ".join(make_plan(made).warnings)


def test_a_missing_interpreter_of_the_jobs_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = deployment(a=SIM)
    wrong.cluster = ClusterConfig(python=str(tmp_path / "python"))
    assert faults(wrong)[0].startswith(f"cluster.python={tmp_path}/python: not an executable file")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python").symlink_to(sys.executable)
    wrong.cluster = ClusterConfig(python="./python", container=ContainerConfig(image="x.sif"))
    done = with_absolute_paths(wrong).cluster
    assert (done.python, done.container.image) == (str(tmp_path / "python"), str(tmp_path / "x.sif"))


def test_paths_of_container_binds_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths of binds become absolute, because Apptainer knows neither `~` nor the folder in which `up` was started. The
    path after the colon is inside the container and stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ada")
    binds = ["~/models", "data:/data:ro", "/project:/p", "~:/me"]
    one = deployment(a=SIM)
    one.cluster.container = ContainerConfig(image="x.sif", binds=binds)
    done = with_absolute_paths(one)
    assert done.cluster.container.binds == [
        "/home/ada/models",
        f"{tmp_path}/data:/data:ro",
        "/project:/p",
        "/home/ada:/me",
    ]
    assert with_absolute_paths(done) == done
    assert one.cluster.container.binds == binds


def test_a_container_on_this_machine_is_checked_too(tmp_path: Path) -> None:
    """On cluster=local a missing program is a fault, because there are no other nodes."""
    wrong = deployment(a=SIM)
    wrong.cluster = ClusterConfig(container=ContainerConfig(image=str(tmp_path / "no.sif"), program="no-program"))
    image, program = faults(wrong)
    assert image.startswith(f"cluster.container.image={tmp_path}/no.sif: no such file")
    assert program.startswith("cluster.container.program=no-program: not on the PATH here")


def test_a_key_without_effect_on_this_machine_is_a_warning() -> None:
    """The warning is one line, and no module is loaded."""
    made = deployment(a=SIM)
    made.cluster = ClusterConfig(modules=["nope"], setup=["false"])
    (note,) = make_plan(made).warnings
    assert note.startswith("cluster.modules and cluster.setup have no effect with cluster=local")
    made.cluster.modules = []
    (note,) = make_plan(made, ask_engines=False).warnings
    assert note.startswith("cluster.setup has no effect with cluster=local")


def test_setup_lines_must_parse_as_bash() -> None:
    wrong = deployment(a=SIM)
    wrong.cluster = ClusterConfig(kind="slurm", setup=["true", "echo 'x"])
    (fault,) = faults(wrong)
    assert fault.startswith("cluster.setup[1]: ")
    wrong.cluster.kind = "local"  # nothing reads them there
    make_plan(wrong)


def printed(plan: Plan) -> str:
    console = Console(width=WIDE, record=True, file=io.StringIO())
    console.print(plan_text(plan), soft_wrap=True)
    return console.export_text()


def test_models_that_are_not_copied_to_the_nodes_are_named(tmp_path: Path) -> None:
    """Models on the hub and models above the size limit are named. A simulated engine loads no model."""
    folder = tmp_path / "math"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x" * 2000)
    vllm = EngineConfig(kind="vllm", options={"device": "cpu"})
    made = deployment(
        a=ExpertConfig(model="org/model", engine=vllm), b=ExpertConfig(model=str(folder), engine=vllm), c=SIM
    )
    made.cluster = ClusterConfig(stage_to=str(tmp_path))

    def notes() -> list[str]:
        return [note for note in own_warnings(made) if note.startswith("cluster.stage")]

    hub = "cluster.stage_to: org/model is a hub id and is not copied to the nodes: the hub's cache (HF_HOME) holds them"
    assert notes() == [hub]
    made.cluster.stage_gb = 1e-6
    assert notes() == [hub, f"cluster.stage_gb=1e-06: {folder} is not copied to the nodes: it has 0.0 GB"]
    made.cluster.stage_to = None
    assert notes() == ["cluster.stage_gb has no effect without cluster.stage_to"]
