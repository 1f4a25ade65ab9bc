"""The keys of `bench.*` and the prompt file: errors name the key or the line, and the valid values."""

from collections import Counter
from pathlib import Path

import pytest

from hpc_router.bench.config import group_file, read_config
from hpc_router.bench.prompts import BenchPrompt, built_in, read_prompts
from hpc_router.config.compose import conf_folder
from hpc_router.errors import ConfigError
from launch.bench import OWN_KEYS, config_of
from launch.entry import make_call


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bench.user=3", ["bench.user", "did you mean 'users'"]),
        ("bench.users=[]", ["bench.users", "at least one"]),
        ("bench.users=[1,0]", ["bench.users", "whole numbers from 1"]),
        ("bench.users=many", ["bench.users", "list"]),
        ("bench.requests=0", ["bench.requests=0", "valid: 1 to "]),
        ("bench.duration_s=-1", ["bench.duration_s=-1"]),
        ("bench.warmup_s=-0.1", ["bench.warmup_s", "valid: 0 to 86400"]),
        ("bench.duration_s=nan", ["bench.duration_s=nan"]),
        ("bench.duration_s=inf", ["bench.duration_s=inf"]),
        ("bench.prompts=nowhere.jsonl", ["bench.prompts=nowhere.jsonl", "JSON"]),
        ("bench.extra={stream: false}", ["bench.extra.stream"]),
        ("bench=nope", ["bench=nope", "smoke", "ladder"]),
        ("bench", ["override 'bench'"]),
        ("~bench.users", ["~bench.users"]),
    ],
)
def test_an_invalid_override_names_the_key_and_valid_values(override: str, message: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(make_call([override], own=OWN_KEYS))
    assert all(word in str(error.value) for word in message), error.value


def test_requests_and_duration_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="only one of them"):
        read_config({"requests": 5, "duration_s": 5.0})


def test_overrides_replace_values_of_the_group() -> None:
    config = config_of(make_call(["bench=smoke", "bench.users=[3,5]", "bench.extra.temperature=0.5"], own=OWN_KEYS))
    assert (config.users, config.requests, config.extra) == ([3, 5], 10, {"temperature": 0.5})


@pytest.mark.parametrize("path", sorted((conf_folder() / "bench").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_group_is_valid(path: Path) -> None:
    config_of(make_call([f"bench={path.stem}"], own=OWN_KEYS))


def test_the_user_s_config_folder_comes_first(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "smoke.yaml").write_text("users: [7]\n")
    call = make_call(["bench=smoke"], own=OWN_KEYS, config_dir=tmp_path)
    assert config_of(call).users == [7]
    assert group_file("ladder", [tmp_path, conf_folder()]).name == "ladder.yaml"
    for content in ("[1]\n", "a: [\n"):
        (tmp_path / "bench" / "smoke.yaml").write_text(content)
        with pytest.raises(ConfigError, match=r"smoke\.yaml"):
            config_of(call)


def test_prompts_are_read_with_their_domains(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "What is 2+2?", "domain": "math", "id": 7}\n\n{"prompt": "Ciao"}\n')
    assert read_prompts(path) == [BenchPrompt("What is 2+2?", "math"), BenchPrompt("Ciao")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no prompt"),
        ('{"prompt": "a"}\n{half\n', "prompts.jsonl:2: not JSON"),
        ('{"text": "a"}\n', 'prompts.jsonl:1: no text at "prompt"'),
        ('{"prompt": " "}\n', "prompts.jsonl:1"),
        ('{"prompt": "a", "domain": 7}\n', '"domain" is not text'),
        ("[1]\n", "prompts.jsonl:1"),
    ],
)
def test_an_invalid_line_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        read_prompts(path)
    assert message in str(error.value)


def test_the_built_in_prompts_cover_the_simulated_experts() -> None:
    domains = Counter(prompt.domain for prompt in built_in())
    assert set(domains) == {"code", "math", "medicine", "law", "general"}
    assert len(set(built_in())) == sum(domains.values())
