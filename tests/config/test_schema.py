"""The schema: conversions, errors with their keys, and checks that involve several dataclasses."""

import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_args, get_type_hints

import pytest

from docs import configuration
from hpc_router.bench.config import BenchConfig
from hpc_router.config.parsing import bounded, bounds_of, parse, within
from hpc_router.config.schema import (
    OPTIONS,
    Deployment,
    EngineConfig,
    ExpertConfig,
    ResourceConfig,
    RouterConfig,
    VllmOptions,
    options_of,
)
from hpc_router.config.validation import check, check_fallback
from hpc_router.errors import ConfigError
from hpc_router.routing.training.train import TrainConfig


@dataclass
class Leaf:
    number: int = 1
    ratio: float = 0.5
    maybe: int | None = None
    words: list[str] = field(default_factory=list)


@dataclass
class Limits:
    small: int = bounded(3, 0, 10)
    each: list[float] | None = field(default=None, metadata=within(0.5, 2.5))
    choice: Literal["left", "right"] | None = None


@dataclass
class Root:
    name: str = "x"
    leaf: Leaf = field(default_factory=Leaf)
    leaves: dict[str, Leaf] = field(default_factory=dict)
    open: dict[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)


def test_values_are_converted_where_nothing_is_lost() -> None:
    root = parse(Root, {"leaf": {"number": "3", "ratio": 2}, "leaves": {"a": {"maybe": None}}}, at="")
    assert (root.leaf.number, root.leaf.ratio) == (3, 2.0)
    assert root.leaves["a"] == Leaf()


def test_open_mappings_keep_what_they_are_given() -> None:
    given = {"flag": True, "list": [1, "two"], "nested": {"on": "off"}}
    assert parse(Root, {"open": given}, at="").open == given


@pytest.mark.parametrize(
    ("value", "key", "message"),
    [
        ({"nam": 1}, "nam", "unknown key 'nam'; did you mean 'name'?"),
        ({"leaf": {"nuber": 1}}, "leaf.nuber", "unknown key 'leaf.nuber'; did you mean 'number'?"),
        ({"leaves": {"a": {"nuber": 1}}}, "leaves.a.nuber", "did you mean 'number'?"),
        ({"leaf": {"number": "x"}}, "leaf.number", "'leaf.number': 'x' is not a whole number"),
        ({"leaf": {"number": 1.5}}, "leaf.number", "1.5 is not a whole number"),
        ({"leaf": {"number": None}}, "leaf.number", "null is not a whole number"),
        ({"leaf": {"maybe": "x"}}, "leaf.maybe", "'x' is not a whole number or null"),
        ({"leaf": {"ratio": "x"}}, "leaf.ratio", "is not a number"),
        ({"leaf": {"words": "x"}}, "leaf.words", "is not a list"),
        ({"leaf": 3}, "leaf", "3 is not a mapping (keys: number, ratio, maybe, words)"),
        ({"leaves": {"a": 3}}, "leaves.a", "3 is not a mapping"),
        ({"leaves": 3}, "leaves", "3 is not a mapping"),
        ({"leaves": {1: {}}}, "leaves.1", "in quotes"),
        ({"name": "a\udcff"}, "name", "is not valid UTF-8 text"),
        ({"name": 1.1}, "name", "1.1 is not text"),
        ({"leaf": {"ratio": float("inf")}}, "leaf.ratio", "not a finite number"),
        ({"open": {"a": [1, {"b": float("nan")}]}}, "open.a[1].b", "not a finite number"),
        ({"limits": {"small": 11}}, "limits.small", "limits.small=11: out of range (valid: 0 to 10)"),
        ({"limits": {"small": 10**400}}, "limits.small", "out of range (valid: 0 to 10)"),
        (
            {"limits": {"choice": "lft"}},
            "limits.choice",
            "choice=lft: not known; did you mean 'left'? (valid: left, right)",
        ),
        ({"limits": {"choice": 3}}, "limits.choice", "3 is not text or null"),
        ({"limits": {"each": [1, 0.4]}}, "limits.each[1]", "each[1]=0.4: out of range (valid: 0.5 to 2.5)"),
    ],
)
@pytest.mark.parametrize("at", ["", "up.here"])
def test_an_error_names_the_key(value: dict[str, Any], key: str, message: str, at: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Root, value, at=at)
    full = f"{at}.{key}" if at else key
    assert caught.value.key == full
    assert message.replace(f"'{key}'", f"'{full}'") in str(caught.value)


@pytest.mark.parametrize("value", [3, None, ["a"], "x"])
def test_a_value_that_is_not_a_mapping_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="not a mapping"):
        parse(Root, value, at="here")


def test_a_value_without_a_default_must_be_given() -> None:
    with pytest.raises(ConfigError, match=r"'experts\.a\.model' is missing"):
        parse(Deployment, {"experts": {"a": {}}}, at="")


def vllm(*, gpus: int = 0, nodes: int = 1, **options: Any) -> ExpertConfig:
    engine = EngineConfig(kind="vllm", options=options)
    return ExpertConfig(model="m", engine=engine, resources=ResourceConfig(gpus=gpus, nodes=nodes))


def deployment(**experts: ExpertConfig) -> Deployment:
    made = Deployment(experts=experts)
    made.policy.kind = "model_field"
    made.cluster.gpus = 8
    return made


@pytest.mark.parametrize(
    ("expert", "fits"),
    [
        (vllm(gpus=1), True),
        (vllm(gpus=4, tensor_parallel_size=4), True),
        (vllm(gpus=4, tensor_parallel_size=2, pipeline_parallel_size=2), True),
        (vllm(gpus=4, tensor_parallel_size=2), False),
        (vllm(gpus=2, tensor_parallel_size=4), False),
        (vllm(gpus=0), False),
        (vllm(gpus=0, device="cpu"), True),
        (vllm(gpus=0, device="cpu", tensor_parallel_size=2), True),
    ],
)
def test_parallel_sizes_and_gpus_must_agree(expert: ExpertConfig, fits: bool) -> None:
    if fits:
        check(deployment(a=expert))
        return
    with pytest.raises(ConfigError, match=r"experts\.a: tensor_parallel_size . x pipeline_parallel_size"):
        check(deployment(a=expert))


def test_the_boundaries_are_valid() -> None:
    for port in (0, 65535):
        check(Deployment(router=RouterConfig(port=port)))
    for port in (-1, 65536):
        with pytest.raises(ConfigError, match=r"router\.port"):
            check(Deployment(router=RouterConfig(port=port)))
    check(deployment(**{"a" * 63: vllm(gpus=8, tensor_parallel_size=8), "0-_": vllm(gpus=1)}))
    for name in ("a" * 64, "-a", "A", "a.b", "", "ä", "auto", "router"):
        with pytest.raises(ConfigError, match="cannot name an expert"):
            check(deployment(**{name: vllm(gpus=1)}))


def test_zero_replicas_and_no_experts_are_valid() -> None:
    check(Deployment())
    check(deployment(a=ExpertConfig(model="m", replicas=0, engine=EngineConfig(kind="sim"))))


def test_options_are_typed_by_the_engine() -> None:
    options = options_of("a", EngineConfig(kind="vllm", options={"max_model_len": "4096"}))
    assert isinstance(options, VllmOptions)
    assert options.max_model_len == 4096
    with pytest.raises(ConfigError, match=r"'experts\.a\.engine\.options\.itl_ms'"):
        options_of("a", EngineConfig(kind="vllm", options={"itl_ms": 3}))
    with pytest.raises(
        ConfigError, match=r"experts\.a\.engine\.kind=ollama: not known.* .valid: sim, transformers, vllm"
    ):
        options_of("a", EngineConfig(kind="ollama"))  # type: ignore[arg-type]


def test_a_fallback_is_an_expert() -> None:
    check_fallback(None, [])
    check_fallback("a", ["a"])
    with pytest.raises(ConfigError, match=r"policy\.fallback: no expert is named 'b' \(valid: a\)"):
        check_fallback("b", ["a"])


def schemas(root: type) -> set[type]:
    """Returns the dataclasses of a config: nested ones, their base classes, and the options of engines."""
    found = {root}
    for kind in get_type_hints(root).values():
        for part in (kind, *get_args(kind), *(inner for each in get_args(kind) for inner in get_args(each))):
            if is_dataclass(part) and isinstance(part, type):
                found |= schemas(part)
    return found


@pytest.mark.parametrize("root", [Deployment, BenchConfig, TrainConfig, *OPTIONS.values()])
def test_every_number_of_every_config_has_a_range(root: type) -> None:
    """Both ends are finite, and the default lies between them."""
    for schema in schemas(root):
        for name, kind in get_type_hints(schema).items():
            scalars = {kind, *get_args(kind), *(inner for part in get_args(kind) for inner in get_args(part))}
            if not scalars & {int, float} or bool in scalars or kind == list[int]:
                continue
            bounds = bounds_of(schema, name)
            assert bounds is not None, f"{schema.__name__}.{name}"
            assert math.isfinite(bounds.low)
            assert math.isfinite(bounds.high)
            default = next(item.default for item in fields(schema) if item.name == name)
            assert default is None or bounds.contains(default), f"{schema.__name__}.{name}"  # type: ignore[arg-type]


@pytest.mark.parametrize("root", [Deployment, BenchConfig, *OPTIONS.values()])
def test_every_field_of_every_config_has_a_meaning(root: type) -> None:
    """The comment is the description in docs/configuration.md."""
    missing = [
        f"{schema.__name__}.{item.name}"
        for schema in schemas(root)
        for item in fields(schema)
        if not configuration.comments(schema).get(item.name)
    ]
    assert missing == []
