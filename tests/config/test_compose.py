"""Invalid configurations: each error is one line with the file or override, the key, and what is valid."""

import re
import sys
from dataclasses import fields
from itertools import product
from pathlib import Path

import pytest

from hpc_router.cluster.planning.plan import make_plan
from hpc_router.config import frozen
from hpc_router.config.compose import conf_folder, load_deployment, with_overrides
from hpc_router.config.frozen import differing_keys
from hpc_router.config.schema import ClusterConfig, ContainerConfig, Deployment
from hpc_router.errors import ConfigError

HEAD = "# @package _global_\n"
EXPERT = "engine: {kind: sim}"

OVERRIDES = [
    # unknown keys, at every level
    (["router.prot=1"], ["override 'router.prot=1'", "unknown key 'router.prot'", "did you mean 'port'?"]),
    (["rooter.port=1"], ["override 'rooter.port=1'", "unknown key 'rooter'", "'router'?"]),
    (["experts.math.replcas=3"], ["override", "unknown key 'experts.math.replcas'", "'replicas'?"]),
    (["++router.prot=1"], ["override '++router.prot=1'", "'port'?"]),
    (["experts.math.engine.options.ttft=3"], ["unknown key 'experts.math.engine.options.ttft'", "'ttft_ms'?"]),
    # values of the wrong type
    (["router.port=abc"], ["override 'router.port=abc'", "'abc' is not a whole number"]),
    (["experts.math.replicas=2.5"], ["'experts.math.replicas': 2.5 is not a whole number"]),
    (["router.open=maybe"], ["'maybe' is not true or false"]),
    (["router.probe_s=soon"], ["'soon' is not a number"]),
    (["experts=3"], ["'experts': 3 is not a mapping"]),
    (["experts.math=3"], ["'experts.math': 3 is not a mapping (keys: model,"]),
    (["experts.math.exemplars=x"], ["'x' is not a list"]),
    (["experts.math.model=null"], ["'experts.math.model': null is not text"]),
    (["experts.math.engine.options.ttft_ms=abc"], ["override", "'experts.math.engine.options.ttft_ms'", "a number"]),
    (["expert.math.replicas=3"], ["override 'expert.math.replicas=3'", "did you mean 'experts.math.replicas'?"]),
    (["topology.name=x"], ["override 'topology.name=x'", "unknown key 'topology.name'", "valid: cluster, experts"]),
    # several values for one key
    (["experts.math.replicas=1,2"], ["override 'experts.math.replicas=1,2'", "several values", "launch.deploy -m"]),
    (["cluster.modules=a,b"], ["several values", "cluster.modules=[a,b]"]),
    (["cluster=local,slurm"], ["override 'cluster=local,slurm'", "several values"]),
    (["router.port=range(1,3)"], ["several values"]),
    # hosts
    (["router.host='a b'"], ["router.host=a b: neither a host's name nor an address"]),
    (["router.host='http://x'"], ["neither a host's name nor an address"]),
    (["router.host='10.1.2'"], ["neither a host's name nor an address"]),
    (["router.host='h:80'"], ["neither a host's name nor an address", "router.port"]),
    (["cluster.setup=['echo ${HOME}']"], ["'cluster.setup[0]'", "'HOME' not found", "as \\${NAME}"]),
    (["cluster.setup=['a=${b']"], ["override 'cluster.setup=['a=${b']'", "'cluster.setup[0]'", "as \\${NAME}"]),
    (["cluster.env.A='${'"], ["override", "'cluster.env.A'", "as \\${NAME}"]),
    # texts that no key can take
    (["experts.math.replicas=1" + "0" * 400], ["experts.math.replicas=more than 1e15", "valid: 0 to 1024"]),
    (["cluster.env.A=1" + "0" * 5000], ["override 'cluster.env.A=1000", "digits"]),
    (["cluster.env.A=" + "[" * 3000 + "]" * 3000], ["override 'cluster.env.A=[[[", "nested too deeply"]),
    (["router.drain_s='٣.٥'"], ["'router.drain_s': '٣.٥' is not a number"]),
    (["router.drain_s='1_0'"], ["'router.drain_s': '1_0' is not a number"]),
    (["experts.math.model='m\n'"], ["override \"experts.math.model='m\\n'\"", r"control character '\n'"]),
    (["name='x\n'"], ["override \"name='x\\n'\"", r"name: has the control character '\n'"]),
    (["router.port=x\n"], [r"override 'router.port=x\n'"]),
    (["cluster.walltime='٣:00:00'", "cluster.kind=slurm"], ["'cluster.walltime=", "not a time"]),
    (["router.workers=???"], ["override 'router.workers=???'", "'router.workers' is missing"]),
    (["cluster.login='???'"], ["'cluster.login' is missing"]),
    # values out of range or outside a fixed set
    (["router.port=70000"], ["override 'router.port=70000'", "valid: 0 to 65535"]),
    (["router.workers=0"], ["router.workers=0", "1 to 256"]),
    (["experts.math.replicas=-1"], ["override", "valid: 0 to 1024"]),
    (["experts.math.capacity=0"], ["override", "valid: 1 to 1000000"]),
    (["cluster.beat_s=0"], ["cluster.beat_s=0", "valid: 0.001 to 3600"]),
    (["policy.kind=nope"], ["policy.kind=nope", "valid: classifier, least_in_flight, model_field, round_robin"]),
    (["policy.fallback=generalst"], ["no expert is named 'generalst'", "'generalist'?"]),
    (
        ["experts.math.engine.kind=vlm"],
        ["experts.math.engine.kind=vlm: not known", "'vllm'?", "sim, transformers, vllm"],
    ),
    (["name=a/b"], ["name=a/b", "cannot name a run directory"]),
    (["router.port=${nope}"], ["'router.port'", "'nope' not found"]),
    # names of experts
    (["experts.Big={model: x, engine: {kind: sim}}"], ["'Big' cannot name an expert", "lower-case"]),
    (["experts.auto={model: x, engine: {kind: sim}}"], ["'auto' cannot name an expert", "not auto or router"]),
    (["experts.router={model: x, engine: {kind: sim}}"], ["'router' cannot name an expert"]),
    (
        ["experts.new.engine.kind=sim"],
        ["override 'experts.new.engine.kind=sim': 'experts.new.model' is missing: it has no default"],
    ),
    # GPUs
    (["experts.math.resources.gpus=2"], ["experts.math.resources.gpus=2", "cluster.gpus=0"]),
    (["experts.math.resources.nodes=2"], ["experts.math.resources.nodes=2", "cluster=local is one node"]),
    (
        ["cluster.gpus=4", "experts.math.resources.gpus=2", "experts.math.engine={kind: vllm}"],
        ["tensor_parallel_size 1 x pipeline_parallel_size 1 = 1 GPUs", "1 node(s) x 2 GPUs = 2"],
    ),
    # groups
    (["topology=nope"], ["topology=nope: no such config", "valid:", "sim"]),
    (["policy=clasifier"], ["policy=clasifier", "did you mean 'classifier'?"]),
    (["topolgy=sim"], ["unknown key 'topolgy'", "did you mean 'topology'?"]),
    # invalid overrides
    (["topology"], ["override 'topology'", "valid: key=value"]),
    (["a=b=c"], ["override 'a=b=c'"]),
    (["router.port=[1"], ["override 'router.port=[1'"]),
    (["~experts.lew"], ["experts.lew"]),
    # a classifier policy without an artefact or exemplars
    (
        ["topology=empty", "experts.a={model: x, engine: {kind: sim}}"],
        ["policy=classifier needs", "policy=model_field"],
    ),
]

FILES = [
    ("experts:\n  a: {model: x\n  b: 3\n", ["mine.yaml:4", "not valid YAML"]),
    ("experts:\n\ta: 1\n", ["mine.yaml:3", "not valid YAML"]),
    (f"experts:\n  a: {{model: x, {EXPERT}}}\n  a: {{model: y}}\n", ["mine.yaml:4", "'a' is given twice"]),
    (f"experts:\n  a: {{{EXPERT}}}\n", ["mine.yaml: 'experts.a.model' is missing"]),
    (f"experts:\n  a: {{modl: x, {EXPERT}}}\n", ["mine.yaml: unknown key 'experts.a.modl'", "'model'?"]),
    (f"experts:\n  a: {{model: x, replicas: many, {EXPERT}}}\n", ["mine.yaml: 'experts.a.replicas': 'many'"]),
    (f"experts:\n  a: {{model: x, exemplars: no, {EXPERT}}}\n", ["mine.yaml", "is not a list"]),
    ("experts:\n  a: {model: x, engine: {kind: sim, options: {foo: 1}}}\n", ["mine.yaml", "engine.options.foo'"]),
    (f"experts:\n  123: {{model: x, {EXPERT}}}\n", ["'experts.123'", "quotes"]),
    (f"experts:\n  A: {{model: x, {EXPERT}}}\n", ["mine.yaml: experts.A", "cannot name an expert"]),
    ("defaults:\n - /expert/cod@_global_.experts.code\n", ["topology/mine.yaml names 'expert/cod'", "'code'?"]),
    (f"router: 3\nexperts:\n  a: {{model: x, {EXPERT}}}\n", ["topology/mine.yaml"]),
    ("- a\n- b\n", ["topology/mine.yaml"]),
    (f"experts:\n  a: {{model: x, {EXPERT}, replicas: 1{'0' * 400}}}\n", ["mine.yaml", "valid: 0 to 1024"]),
    (f"experts:\n  a: {{model: x, {EXPERT}, replicas: 1{'0' * 5000}}}\n", ["config file", "digits"]),
    (f"experts:\n  a: {{model: x, {EXPERT}, revision: {'[' * 3000}{']' * 3000}}}\n", ["nested too deeply"]),
    (f"experts: &e\n  a: {{model: x, {EXPERT}}}\n  b: *e\n", ["an alias in it contains itself"]),
    (f"experts:\n  a: {{model: x, revision: .nan, {EXPERT}}}\n", ["mine.yaml:3", 'revision: ".nan" in a file']),
    (f"experts:\n  a: {{model: x, revision: '???', {EXPERT}}}\n", ["'experts.a.revision' is missing"]),
    (f'experts:\n  a: {{model: "x\\n", {EXPERT}}}\n', ["mine.yaml", r"control character '\n'"]),
    (
        'experts:\n  a: {model: x, engine: {kind: sim, env: {A: "x\\0"}}}\n',
        ["experts.a.engine.env.A", "null character"],
    ),
    (f"experts:\n  a: {{model: '/m/${{HOME', {EXPERT}}}\n", ["mine.yaml: 'experts.a.model'", "as \\${NAME}"]),
    (
        f"experts:\n  a: {{model: x, exemplars: ['$${{', '${{a b}}'], {EXPERT}}}\n",
        ["experts.a.exemplars[", "\\${NAME}"],
    ),
    ("experts: {}\n# \0\n", ["a config file: not valid YAML", "#x0000"]),
]


def refusal(overrides: list[str], config_dir: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_deployment(overrides, config_dir=config_dir)
    return str(caught.value)


@pytest.mark.parametrize(("overrides", "expected"), OVERRIDES, ids=lambda value: " ".join(value)[:60])
def test_a_wrong_override_is_named(overrides: list[str], expected: list[str]) -> None:
    message = refusal(overrides)
    assert all(part in message for part in expected), message
    assert "\n" not in message


@pytest.mark.parametrize(("content", "expected"), FILES, ids=[content.split("\n")[1][:40] for content, _ in FILES])
def test_a_wrong_file_is_named(tmp_path: Path, content: str, expected: list[str]) -> None:
    write(tmp_path, "topology/mine.yaml", HEAD + content)
    message = refusal(["topology=mine"], tmp_path)
    assert all(part in message for part in expected), message
    assert "\n" not in message


def write(folder: Path, name: str, content: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_a_file_without_its_package_line_is_explained(tmp_path: Path) -> None:
    write(tmp_path, "topology/mine.yaml", "experts: {}\n")
    assert "`# @package _global_`" in refusal(["topology=mine"], tmp_path)


def test_an_absent_folder_is_named(tmp_path: Path) -> None:
    assert "--config-dir" in refusal([], tmp_path / "nope")


def test_a_users_folder_takes_precedence(tmp_path: Path) -> None:
    """The user's file replaces ours of the same name. The folder's path may contain spaces and commas."""
    folder = tmp_path / "my, 'own' conf"
    write(folder, "expert/math.yaml", 'description: "mine"\nexemplars: ["one plus one"]\n')
    write(folder, "topology/mine.yaml", f"{HEAD}experts:\n  a: {{model: x, {EXPERT}}}\n")
    assert load_deployment([], config_dir=folder).experts["math"].description == "mine"
    assert list(load_deployment(["topology=mine", "policy=model_field"], config_dir=folder).experts) == ["a"]
    assert load_deployment([]).experts["math"].description != "mine"


@pytest.fixture(autouse=True)
def _models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the environment variables that topologies with real engines read."""
    monkeypatch.setenv("TINY_MODELS", "/models")
    monkeypatch.setenv("ENGINE_PYTHON", "/venv/bin/python")


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))


@pytest.mark.parametrize(
    ("topology", "policy", "cluster", "router"),
    list(product(("empty", "sim", "tiny"), names("policy"), ("local", "slurm"), names("router"))),
)
def test_every_combination_composes(topology: str, policy: str, cluster: str, router: str) -> None:
    choice = [f"topology={topology}", f"policy={policy}", f"cluster={cluster}", f"router={router}"]
    deployment = load_deployment(choice)
    assert deployment.policy.kind == policy
    assert deployment.cluster.kind == cluster
    assert bool(deployment.experts) == (topology != "empty")


@pytest.mark.parametrize("topology", [name for name in names("topology") if name != "empty"])
def test_every_topology_passes_plan_and_says_what_it_is(
    topology: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's comment names its GPUs and the command; engines over several nodes use Slurm by default."""
    for expert in ("code", "math", "medicine", "law", "generalist"):
        (tmp_path / expert).mkdir()
        (tmp_path / expert / "adapter_config.json").write_text('{"r": 8}')
    monkeypatch.setenv("TINY_MODELS", str(tmp_path))
    monkeypatch.setenv("ENGINE_PYTHON", sys.executable)
    deployment = load_deployment([f"topology={topology}"])
    make_plan(deployment, ask_engines=False)
    head = (conf_folder() / "topology" / f"{topology}.yaml").read_text().split("\n\n")[0]
    assert f"topology={topology}" in head
    if any(expert.resources.gpus for expert in deployment.experts.values()):
        assert "# GPUs: " in head
    if topology.startswith("llama3"):
        predicted = load_deployment([f"topology={topology}", "cluster=local", "simulate.gpu=h100-sxm"])
        plan = make_plan(predicted, ask_engines=False)
        assert sum(replica.request.resources.gpus for replica in plan.replicas) == 0


@pytest.mark.parametrize("cluster", names("cluster"))
def test_every_cluster_composes(cluster: str) -> None:
    """Each also accepts another partition; the files of sites are for Slurm."""
    of_slurm = [] if cluster == "local" else ["cluster.partition=mine"]
    deployment = load_deployment([f"cluster={cluster}", *of_slurm, "experts.math.resources.partition=own"])
    assert deployment.cluster.kind == ("slurm" if cluster.startswith("site_") else cluster)
    assert deployment.cluster.partition == ("mine" if of_slurm else None)
    assert deployment.experts["math"].resources.partition == "own"
    assert with_overrides(load_deployment([]), [f"cluster={cluster}"]).cluster.kind == deployment.cluster.kind


def test_the_plain_cluster_shows_every_key() -> None:
    text = (conf_folder() / "cluster" / "slurm.yaml").read_text()
    for schema in (ClusterConfig, ContainerConfig):
        for key in (item.name for item in fields(schema)):
            assert re.search(rf"^#? *{key}:", text, re.MULTILINE), key


@pytest.mark.parametrize("expert", names("expert"))
def test_every_expert_composes(expert: str) -> None:
    deployment = load_deployment(
        [
            "topology=empty",
            "policy=model_field",
            f"+expert@experts.{expert}={expert}",
            f"experts.{expert}.model=m",
            f"experts.{expert}.engine.kind=sim",
        ]
    )
    assert deployment.experts[expert].description


@pytest.mark.parametrize("path", sorted(conf_folder().rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_opens_with_what_it_is(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# ")
    assert lines[1].startswith("#   ") or lines[2].startswith("#   "), "how to run it"


def test_the_frozen_config_reads_back_equal(tmp_path: Path) -> None:
    deployment = load_deployment(["experts.math.engine.options.extra.x='on'", "experts.math.engine.env.A='1'"])
    (tmp_path / "config.yaml").write_text(frozen.to_yaml(deployment))
    assert frozen.read(tmp_path / "config.yaml") == deployment


@pytest.mark.parametrize("content", ["a: [", "a: 1\na: 2\n", "nope: 1\n", "- 1\n", "router: 3\n"])
def test_a_damaged_frozen_config_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        frozen.read(tmp_path / "config.yaml")


def test_overrides_go_on_top_of_a_frozen_config() -> None:
    base = load_deployment(["router.port=8000"])
    changed = with_overrides(base, ["policy=round_robin", "experts.math.replicas=3", "experts.math.engine.env.A=b"])
    assert (changed.policy.kind, changed.policy.fallback) == ("round_robin", "generalist")
    assert (changed.router.port, changed.experts["math"].engine.env) == (8000, {"A": "b"})
    env = "experts.math.engine.env"
    assert differing_keys(base, changed) == [env, f"{env}.A", "experts.math.replicas", "policy.kind"]
    with pytest.raises(ConfigError, match=r"override 'router\.prt=1': unknown key"):
        with_overrides(base, ["router.prt=1"])


def test_equal_deployments_differ_in_nothing() -> None:
    assert differing_keys(load_deployment([]), load_deployment(["topology=sim"])) == []
    assert differing_keys(Deployment(), Deployment(name="x")) == ["name"]


def test_a_chosen_file_is_named_and_not_the_choice(tmp_path: Path) -> None:
    write(tmp_path, "cluster/mine.yaml", "kind: slurm\nwalltime: soon\n")
    assert refusal(["cluster=mine"], tmp_path).startswith(f"{tmp_path}/cluster/mine.yaml: cluster.walltime=soon")


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_file_in_another_encoding_is_named(tmp_path: Path, encoding: str) -> None:
    write(tmp_path, "topology/good.yaml", HEAD)
    (tmp_path / "topology" / "a.yaml").write_bytes(b"\xfc")
    (tmp_path / "topology" / "mine.yaml").write_bytes(f"{HEAD}# \xe9\n".encode(encoding))
    assert refusal(["topology=mine"], tmp_path).startswith(f"{tmp_path}/topology/mine.yaml: not UTF-8 text (byte ")


def test_a_byte_order_mark_that_hides_the_package_is_named(tmp_path: Path) -> None:
    """Editors write it in front of UTF-8. Without such a line it does no harm."""
    write(tmp_path, "topology/mine.yaml", f"\ufeff{HEAD}")
    assert refusal(["topology=mine"], tmp_path).startswith(f"{tmp_path}/topology/mine.yaml: a byte order mark hides ")
    write(tmp_path, "topology/mine.yaml", HEAD)
    write(tmp_path, "cluster/mine.yaml", "\ufeffwalltime: '30'\n")
    assert load_deployment(["cluster=mine"], config_dir=tmp_path).cluster.walltime == "30"


@pytest.mark.parametrize("host", ["node7", "node-7.cluster.example", "0.0.0.0", "::", "fd00::1", "10.1.2.3", "7up"])
def test_a_host_is_a_name_or_an_address(host: str) -> None:
    assert load_deployment([f"router.host='{host}'"]).router.host == host


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("partition", "batch,urgent"),
        ("exclude", "n1,n2"),
        ("exclude", "n1,n[2-3]"),
        ("exclude", "n[1-2],m[01,05-07]"),
        ("constraint", "a&b"),
        ("constraint", "[a|b]"),
        ("constraint", "[a*2&b*4]"),
        ("sbatch.mail-type", "BEGIN,END"),
        ("sbatch.nodelist", "n[1-2]"),
        ("login", "a, b"),
        ("scratch", "/tmp/é"),
    ],
)
def test_a_text_is_written_as_slurm_writes_it(key: str, value: str) -> None:
    """An override may contain commas, brackets and other marks without quotes."""
    cluster = load_deployment(["cluster=slurm", f"cluster.{key}={value}"]).cluster
    _, _, option = key.partition("sbatch.")
    found = cluster.sbatch[option] if option else getattr(cluster, key)
    assert found == value
    assert with_overrides(load_deployment(["cluster=slurm"]), [f"cluster.{key}={value}"]).cluster == cluster


def test_a_prediction_keeps_the_prefix_cache_s_flags() -> None:
    extra = "{enable_prefix_caching: false, --block-size: 32, enforce-eager: true}"
    overrides = ["topology=llama3_8b_4replicas_bf16", "cluster=local", "simulate.gpu=h100-sxm"]
    [name] = load_deployment(overrides).experts
    predicted = load_deployment([*overrides, f"+experts.{name}.engine.options.extra={extra}"])
    kept = predicted.experts[name].engine.options["extra"]
    assert kept == {"enable_prefix_caching": False, "--block-size": 32}
