"""What one call of the load generator does: the only schema and the only home of defaults of `bench.*`.

It is no part of a deployment's config: a run is measured, not changed, by these values. What a single field's type
cannot say is said by `check`.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from hpc_router.errors import ConfigError, suggest
from hpc_router.schema import parse

OURS: Final = frozenset({"model", "messages", "stream", "stream_options", "max_tokens"})
"""Fields of a request body that `extra` may not replace."""


@dataclass
class BenchConfig:
    """Closed loop: each of so many users sends its next request when the answer to its last one has ended."""

    users: list[int] = field(default_factory=lambda: [1, 4])  # one point each, in this order
    requests: int | None = None  # measured requests per point; null: all that begin within duration_s
    duration_s: float | None = None  # null: 30 s, where requests says nothing either
    warmup_s: float = 2.0  # load without measurement, before each point
    prompts: str | None = None  # JSON lines with `prompt` and `domain`; null: the built-in ones
    model: str = "auto"  # or an expert's name
    max_tokens: int = 64
    usage: bool = True  # ask the engine for its token counts; false for engines that refuse the question
    extra: dict[str, Any] = field(default_factory=dict)  # further fields of each request, such as {temperature: 0}
    seed: int = 0
    timeout_s: float = 600.0  # silence on a connection that counts as an error
    output: str | None = None  # folder of the result files; null: RUN/bench
    raw: bool = False  # keep every request as well, one JSON line each


DURATION_S: Final = 30.0


def read_config(value: dict[str, Any]) -> BenchConfig:
    """Raises ConfigError naming the key."""
    config = parse(BenchConfig, value, at="bench")
    check(config)
    if config.requests is None and config.duration_s is None:
        config.duration_s = DURATION_S
    return config


def check(config: BenchConfig) -> None:
    if not config.users:
        raise _refused("users", config.users, "at least one number of users, such as [1,4,16]")
    for count in config.users:
        if count < 1:
            raise _refused("users", config.users, "whole numbers from 1")
    if config.requests is not None and config.duration_s is not None:
        raise ConfigError("bench.requests and bench.duration_s: give one of them", key="bench.requests")
    for name in ("requests", "duration_s", "timeout_s", "max_tokens"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise _refused(name, value, "more than 0")
    if not 0 <= config.warmup_s < math.inf:
        raise _refused("warmup_s", config.warmup_s, "0 or more")
    if config.prompts is not None and not Path(config.prompts).is_file():
        raise _refused("prompts", config.prompts, "a file with one JSON object per line")
    taken = sorted(OURS & config.extra.keys())
    if taken:
        raise ConfigError(f"bench.extra.{taken[0]}: the load generator's own", key="bench.extra")


def _refused(name: str, value: object, valid: str) -> ConfigError:
    return ConfigError(f"bench.{name}={value}: not possible (valid: {valid})", key=f"bench.{name}")


def group_file(name: str, folders: list[Path]) -> Path:
    """`bench=NAME` as a file: the first folder that has it."""
    for folder in folders:
        if (path := folder / "bench" / f"{name}.yaml").is_file():
            return path
    known = (path.stem for folder in folders for path in (folder / "bench").glob("*.yaml"))
    raise ConfigError(f"bench={name}: no such config{suggest(name, known)}")
