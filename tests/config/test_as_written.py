"""Text fields contain the text that the user wrote, although YAML and Hydra read some texts as numbers or truth
values."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hpc_router.cluster.planning.plan import make_plan
from hpc_router.config import frozen
from hpc_router.config.compose import load_deployment, with_overrides
from hpc_router.config.schema import ClusterConfig, Deployment, EngineConfig, ExpertConfig, PolicyConfig
from hpc_router.errors import ConfigError
from hpc_router.router.settings import with_settings
from hpc_router.state.run_directory import RunDir
from launch.bench import config_of as bench_config_of
from launch.entry import make_call
from launch.train_classifier import config_of as train_config_of

HEAD = "# @package _global_\npolicy: {kind: model_field}\n"
SHOWN = """
cluster:
  kind: slurm
  scratch: /scratch/\\${USER}
  setup: ['export DATA=\\${HOME}/data', 'echo "\\${DATA:-none}" ${name}', 'echo $PATH \\\\n']
  env: {CACHE: '/scratch/\\${name}/c', NAME: '${name}'}
experts:
  a:
    model: x
    exemplars: ['What does \\${HOME} mean?', 'in ${name}: $x and ???']
    engine: {kind: sim, env: {DIR: '\\${A}'}, options: {extra: {template: '{{ \\${x} }}'}}}
"""


def write(folder: Path, content: str, name: str = "topology/mine.yaml") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def composed(folder: Path, content: str, *overrides: str) -> Deployment:
    write(folder, HEAD + content)
    return load_deployment(["topology=mine", *overrides], config_dir=folder)


def read_back(folder: Path, deployment: Deployment) -> Deployment:
    (folder / "config.yaml").write_text(frozen.to_yaml(deployment))
    return frozen.read(folder / "config.yaml")


def test_an_escaped_dollar_reaches_the_job_as_the_plan_shows_it(tmp_path: Path) -> None:
    made = composed(tmp_path, SHOWN, "name=mine")
    assert made.cluster.scratch == "/scratch/${USER}"
    assert made.cluster.setup[:2] == ["export DATA=${HOME}/data", 'echo "${DATA:-none}" mine']
    assert made.cluster.env == {"CACHE": "/scratch/${name}/c", "NAME": "mine"}
    expert = made.experts["a"]
    assert expert.exemplars == ["What does ${HOME} mean?", "in mine: $x and ???"]
    assert expert.engine.env == {"DIR": "${A}"}
    assert expert.engine.options["extra"] == {"template": "{{ ${x} }}"}
    again = read_back(tmp_path, made)
    assert again == made
    assert with_overrides(again, ["router.port=8000", "cluster.login='${name}'"]).cluster.setup == made.cluster.setup
    shown = json.dumps(make_plan(made, ask_engines=False).to_json())
    assert shown == json.dumps(make_plan(again, ask_engines=False).to_json())
    assert "export DATA=${HOME}/data" in shown
    assert "{{ ${x} }}" in shown


def test_an_interpolation_may_name_a_key_that_no_file_mentions(tmp_path: Path) -> None:
    made = composed(
        tmp_path,
        "cluster: {env: {A: '${cluster.scratch}/x', P: '${router.port}'}}\n"
        "experts: {a: {model: '${experts.a.engine.kind}', engine: {kind: sim}}}\n",
    )
    assert made.cluster.env == {"A": "/tmp/x", "P": "0"}
    assert made.experts["a"].model == "sim"


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "${name}",
        "\\${name}",
        "\\\\${a}\\",
        "0421",
        "10:30",
        "695e0514",
        "no",
        "1.10",
        "~",
        "${",
        "a\\\\${x}${y}",
        "=",
        "<<",
    ]
)


@example("a", "b", "\x85")
@example("a", "x \u2028 y", "\u2029")
@given(texts, texts, texts)
def test_any_text_survives_being_frozen_and_changed(one: str, two: str, three: str) -> None:
    deployment = Deployment(
        cluster=ClusterConfig(kind="slurm", env={"A": one}),
        policy=PolicyConfig(kind="model_field"),
        experts={
            "a": ExpertConfig(
                model="m", exemplars=[two], engine=EngineConfig("sim", env={"B": three.replace("\0", "")})
            )
        },
    )
    deployment.experts["a"].engine.options = {"extra": {"x": two}}
    if any(c in one for c in "\n\r\0\x85\u2028\u2029") or not one.isprintable():
        one = "x"
        deployment = replace(deployment, cluster=replace(deployment.cluster, env={"A": one}))
    text = frozen.to_yaml(deployment)
    assert frozen.from_yaml(text) == deployment
    assert with_overrides(deployment, []) == deployment


def test_a_setting_is_no_interpolation() -> None:
    changed = with_settings(Deployment(), {"policy.artefact": "/x/${name}"})
    assert changed.policy.artefact == "/x/${name}"


# texts that YAML 1.1 (in files) and Hydra (in overrides) read as numbers or truth values
FILES = [
    "0421",
    "4_21",
    "0x1A5",
    "7:01",
    "10:30",
    "1:30:00",
    "no",
    "off",
    "Yes",
    "1.10",
    "1e5",
    ".5",
    "695e0514",
]
OVERRIDES = ["4_21", "1.10", "1e5", ".5", "695e0514", "True", "FALSE", "-.0", "1.", "+1"]
TEXT_FIELDS = ["cluster.account", "cluster.env.X", "experts.a.revision", "experts.a.engine.env.X", "cluster.walltime"]
ON_BASE = "# @package _global_\ndefaults: [base, _self_]\npolicy: {kind: model_field}\n"
PLAIN = "experts:\n  a: {model: x, engine: {kind: sim}}\n"


def in_file(key: str, value: str) -> str:
    parts = key.split(".")
    lines = [f"{'  ' * depth}{part}:" for depth, part in enumerate(parts)]
    return "\n".join(lines) + f" {value}\n"


@pytest.mark.parametrize("value", FILES)
@pytest.mark.parametrize("key", TEXT_FIELDS)
def test_a_file_whose_text_would_change_is_refused_with_its_quoted_form(tmp_path: Path, key: str, value: str) -> None:
    name = key.rpartition(".")[2]
    write(tmp_path, PLAIN.replace("experts:", "# @package _global_\nexperts:"), "topology/base.yaml")
    write(tmp_path, ON_BASE + in_file(key, value))
    with pytest.raises(ConfigError) as refused:
        load_deployment(["topology=mine", "cluster=slurm"], config_dir=tmp_path)
    message = str(refused.value)
    assert message.startswith(f"{tmp_path}/topology/mine.yaml:{3 + len(key.split('.'))}: '{key}': {value} is read as ")
    assert refused.value.key == key
    assert f'{name}: "{value}" in a file' in message
    command = message.partition(" in a file, ")[2].removesuffix(" on the command line")
    override = shlex.split(command)[0]
    write(tmp_path, ON_BASE)
    if key != "cluster.walltime":
        assert value in str(load_deployment(["topology=mine", "cluster=slurm", override], config_dir=tmp_path))


@pytest.mark.parametrize("value", OVERRIDES)
@pytest.mark.parametrize("key", TEXT_FIELDS)
def test_an_override_whose_text_would_change_is_refused_with_its_quoted_form(key: str, value: str) -> None:
    given = ["topology=empty", "policy=model_field", "cluster=slurm", "experts.a={model: x, engine: {kind: sim}}"]
    with pytest.raises(ConfigError) as refused:
        load_deployment([*given, f"{key}={value}"])
    assert str(refused.value).startswith(f"override '{key}={value}': '{key}': {value} is read as ")
    command = str(refused.value).partition(" in a file, ")[2].removesuffix(" on the command line")
    assert shlex.split(command) == [f'{key}="{value}"']


@pytest.mark.parametrize("value", ["421", "-3", "1.5", "0.25", '"0421"', "'no'", "a1", "08", "2026-11-28", "true"])
def test_text_that_does_not_change_is_accepted(tmp_path: Path, value: str) -> None:
    text = value.strip("'\"")
    made = composed(
        tmp_path, f"{PLAIN}cluster: {{kind: slurm, account: {value}, env: {{X: {value}}}, setup: [{value}]}}\n"
    )
    assert (made.cluster.account, made.cluster.env["X"], made.cluster.setup) == (text, text, [text])
    assert load_deployment([f"cluster.env.X={value}"]).cluster.env["X"] == text


@pytest.mark.parametrize(
    ("content", "key", "quoted"),
    [
        (
            "cluster: {kind: slurm, setup: [a, 1.10]}",
            "cluster.setup[1]",
            """- "1.10" in a file, 'cluster.setup=["1.10"]'""",
        ),
        ("cluster: {kind: slurm, sbatch: {time-min: 10:30}}", "cluster.sbatch.time-min", 'time-min: "10:30"'),
        ("cluster: {kind: slurm, srun: {mpi: 010}}", "cluster.srun.mpi", 'mpi: "010"'),
        ("experts: {a: {engine: {options: {extra: {x: 0x10}}}}}", "experts.a.engine.options.extra.x", 'x: "0x10"'),
        ("experts: {a: {replicas: 010}}", "experts.a.replicas", "write a plain decimal number"),
        (
            "experts: {a: {engine: {options: {faults: [{at: 1:30}]}}}}",
            "experts.a.engine.options.faults[0].at",
            "decimal",
        ),
        ("cluster: {drain_s: 1:30}", "cluster.drain_s", "write a plain decimal number"),
        ("router: {port: 0x1F90}", "router.port", "write a plain decimal number"),
        ("cluster: {env: {<<: {ACC: 0421}}}", "cluster.env.ACC", 'ACC: "0421"'),
    ],
)
def test_options_and_numbers_are_as_written_too(tmp_path: Path, content: str, key: str, quoted: str) -> None:
    write(tmp_path, "# @package _global_\n" + PLAIN, "topology/base.yaml")
    write(tmp_path, f"{ON_BASE}{content}\n")
    with pytest.raises(ConfigError) as refused:
        load_deployment(["topology=mine"], config_dir=tmp_path)
    assert refused.value.key == key
    assert quoted in str(refused.value)


def test_a_flags_number_keeps_its_text_and_a_number_stays_a_number(tmp_path: Path) -> None:
    content = (
        "experts:\n  a:\n    model: x\n    engine: {kind: sim, options: {ttft_ms: 1.50, faults: [{rate: 0.50}], extra: "
        "{a: 0.90, b: 1e-5, c: 3, d: yes, e: [0.10], f: {g: 0.20}}}}\n"
    )
    options = composed(tmp_path, content).experts["a"].engine.options
    assert options["extra"] == {"a": "0.90", "b": "1e-5", "c": 3, "d": True, "e": [0.1], "f": {"g": 0.2}}
    assert (options["ttft_ms"], options["faults"]) == (1.5, [{"rate": 0.5}])


def test_the_last_source_counts(tmp_path: Path) -> None:
    """The error shows the text of the last source of the value, not of one that was overridden."""
    content = f"{PLAIN}cluster: {{kind: slurm, account: 0421}}\n"
    assert composed(tmp_path, content, "cluster.account=421").cluster.account == "421"
    assert composed(tmp_path, content, "cluster.account='x'").cluster.account == "x"
    with pytest.raises(ConfigError, match=r"mine\.yaml:5: 'cluster\.account': 0421"):
        composed(tmp_path, content, "cluster.env.A=x")


def test_the_load_generators_keys_are_as_written() -> None:
    with pytest.raises(ConfigError) as refused:
        bench_config_of(make_call(["bench.prompts=1.10"], own=("bench", "run")))
    assert "'bench.prompts': 1.10 is read as the number 1.1" in str(refused.value)
    assert """'bench.prompts="1.10"' on the command line""" in str(refused.value)
    with pytest.raises(ConfigError, match=r"bench\.rates\[1\]=inf: out of range"):
        bench_config_of(make_call(["bench.rates=[1,inf]"], own=("bench", "run")))


def test_the_keys_of_a_training_are_as_written() -> None:
    assert train_config_of(["data=x", "output=2026"]).output == "2026"
    with pytest.raises(ConfigError, match=r"'output': 1\.10 is read as the number 1\.1"):
        train_config_of(["data=x", "output=1.10"])
    given: dict[str, Any] = {"clusters=inf": "not a whole number", "weight=inf": "out of range", "clusters=0": "1 to"}
    for word, message in given.items():
        with pytest.raises(ConfigError) as refused:
            train_config_of(["data=x", "output=y", word])
        assert message in str(refused.value)


def test_a_run_takes_text_as_its_first_start_did(tmp_path: Path) -> None:
    """`up --run DIR` reads the config that `up` wrote and gets the same texts."""
    made = composed(tmp_path, SHOWN)
    run = RunDir(tmp_path)
    run.config.write_text(frozen.to_yaml(made))
    assert frozen.differing_keys(frozen.read(run.config), made) == []
