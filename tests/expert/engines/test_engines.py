"""Command lines and environments, as tables; options that cannot be."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpc_router.config import EngineConfig, ExpertConfig
from hpc_router.errors import ConfigError
from hpc_router.expert.engines import Engine, Place, build_engine, engine_environment, version_command
from hpc_router.expert.engines.base import flags
from hpc_router.registry import EngineInfo

PLACE = Place(Path("/scratch/x"))


def engine_of(
    kind: str, *, expert: str = "math", model: str = "org/model", **fields: Any
) -> tuple[Engine, ExpertConfig]:
    revision = fields.pop("revision", None)
    config = ExpertConfig(model=model, revision=revision, engine=EngineConfig(kind=kind, **fields))
    return build_engine(expert, config), config


def test_vllm_answers_to_the_expert_and_to_auto_behind_a_socket() -> None:
    options = {"tensor_parallel_size": 2, "quantization": "awq", "max_model_len": 4096, "extra": {"seed": 7}}
    engine, _ = engine_of("vllm", python="/env/bin/python", revision="v1", options=options)
    assert engine.argv(PLACE) == [
        *("/env/bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model", "org/model"),
        *("--uds", "/scratch/x/engine.sock", "--served-model-name", "math", "auto"),
        *("--tensor-parallel-size", "2", "--pipeline-parallel-size", "1", "--dtype", "auto"),
        "--disable-uvicorn-access-log",
        *("--revision", "v1", "--quantization", "awq", "--max-model-len", "4096", "--seed", "7"),
    ]
    assert engine.serves() == {"math": "math"}
    assert engine.names() == ("math", "auto")
    assert engine.info() == EngineInfo("vllm", None, "org/model", "v1", "awq", 2, 1)


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
    assert argv[:3] == [sys.executable, "-m", "hpc_router.expert.sim"]
    assert argv[argv.index("--itl-ms") + 1] == "0.5"
    assert argv[argv.index("--faults") + 1] == '[{"kind": "die", "at": 3}]'
    assert argv[-2:] == ["--capacity", "2"]


def test_flags() -> None:
    given = {"seed": 1, "eager": True, "chunked": False, "left-out": None, "names": ["a", "b"], "json": {"x": 1}}
    assert flags(given) == ["--seed", "1", "--eager", "--no-chunked", "--names", "a", "b", "--json", '{"x": 1}']


@pytest.mark.parametrize(
    ("kind", "flag"), [("vllm", "uds"), ("vllm", "--tensor_parallel_size"), ("transformers", "port"), ("sim", "host")]
)
def test_a_flag_that_is_set_elsewhere_is_refused(kind: str, flag: str) -> None:
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


def test_the_users_environment_wins() -> None:
    engine, config = engine_of("vllm", env={"TMPDIR": "/mine", "VLLM_NO_USAGE_STATS": "0"})
    environment = engine_environment(engine, config, PLACE, inherited={"TMPDIR": "/theirs"})
    assert (environment["TMPDIR"], environment["VLLM_NO_USAGE_STATS"]) == ("/mine", "0")


def test_the_interpreter_tells_the_version() -> None:
    engine, _ = engine_of("sim")
    command = version_command(engine)
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout != ""
    assert subprocess.run([*command[:2], "no-such"], check=True, capture_output=True, text=True).stdout == ""
