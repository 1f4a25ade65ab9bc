"""What `bench.*` may say, and the prompts it names: refusals name the key or the line, and what is valid."""

import itertools
from collections import Counter
from pathlib import Path

import pytest

from hpc_router.bench.config import group_file, read_config
from hpc_router.bench.prompts import BenchPrompt, built_in, deck, read_prompts
from hpc_router.config.compose import conf_folder
from hpc_router.errors import ConfigError
from launch.bench import OWN, config_of
from launch.entry import make_call


@pytest.mark.parametrize(
    ("override", "told"),
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
def test_refusals(override: str, told: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        config_of(make_call([override], own=OWN))
    assert all(word in str(refused.value) for word in told), refused.value


def test_one_of_requests_and_duration() -> None:
    with pytest.raises(ConfigError, match="one of them"):
        read_config({"requests": 5, "duration_s": 5.0})


def test_overrides_go_on_top_of_a_group() -> None:
    config = config_of(make_call(["bench=smoke", "bench.users=[3,5]", "bench.extra.temperature=0.5"], own=OWN))
    assert (config.users, config.requests, config.extra) == ([3, 5], 10, {"temperature": 0.5})


@pytest.mark.parametrize("path", sorted((conf_folder() / "bench").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_group_is_valid(path: Path) -> None:
    config_of(make_call([f"bench={path.stem}"], own=OWN))


def test_a_folder_of_one_s_own_goes_first(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "smoke.yaml").write_text("users: [7]\n")
    call = make_call(["bench=smoke"], own=OWN, config_dir=tmp_path)
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
    ("content", "told"),
    [
        ("", "no prompt"),
        ('{"prompt": "a"}\n{half\n', "prompts.jsonl:2: not JSON"),
        ('{"text": "a"}\n', 'prompts.jsonl:1: no text at "prompt"'),
        ('{"prompt": " "}\n', "prompts.jsonl:1"),
        ('{"prompt": "a", "domain": 7}\n', '"domain" is not text'),
        ("[1]\n", "prompts.jsonl:1"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError) as refused:
        read_prompts(path)
    assert told in str(refused.value)


def test_a_deck_comes_round_and_depends_on_its_seed() -> None:
    prompts = built_in()
    first = list(itertools.islice(deck(prompts, seed=1, stream="measured"), 2 * len(prompts)))
    assert set(Counter(first).values()) == {2}
    assert set(first[: len(prompts)]) == set(prompts)
    assert first == list(itertools.islice(deck(prompts, seed=1, stream="measured"), 2 * len(prompts)))
    assert first[0:5] != list(itertools.islice(deck(prompts, seed=2, stream="measured"), 5))


def test_the_built_in_prompts_cover_the_simulated_experts() -> None:
    domains = Counter(prompt.domain for prompt in built_in())
    assert set(domains) == {"code", "math", "medicine", "law", "general"}
    assert len(set(built_in())) == sum(domains.values())
