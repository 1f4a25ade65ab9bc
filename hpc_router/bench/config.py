"""What one call of the load generator does: the only schema and the only home of defaults of `bench.*`.

It is no part of a deployment's config: a run is measured, not changed, by these values. What a single field's type
cannot say is said by `check`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from hpc_router.config.parsing import bounded, parse, within
from hpc_router.config.schema import DAY_S
from hpc_router.errors import ConfigError, suggest

OURS: Final = frozenset({"model", "messages", "stream", "stream_options", "max_tokens"})
"""Fields of a request body that `extra` may not replace."""
KINDS: Final = ("fixed", "uniform", "lognormal")
PAUSES: Final = ("fixed", "exponential")
PLACES: Final = ("here", "slurm")
MAX_AT_ONCE: Final = 4000
"""Connections of one load generator."""


@dataclass
class Lengths:
    """fixed: `mean` always; uniform: `low` to `high`; lognormal: of that mean and sigma, cut to `low` to `high`."""

    kind: str = "fixed"
    mean: float = bounded(64.0, 1e-3, 10**6)
    sigma: float = bounded(0.5, 1e-6, 10)
    low: int = bounded(1, 1, 10**6)
    high: int = bounded(4096, 1, 10**6)


@dataclass
class Good:
    """When an answer counts for the goodput: within every limit that is not null."""

    ttft_s: float | None = bounded(1.0, 0, DAY_S)
    tpot_s: float | None = bounded(0.1, 0, DAY_S)
    e2e_s: float | None = bounded(None, 0, DAY_S)


@dataclass
class ValidityLimits:
    """When figures are no figures."""

    error_share: float = bounded(0.01, 0, 1)  # of the measured requests; more failed: invalid
    load_share: float = bounded(0.9, 0, 1)  # of one core that the load generator used or waited for
    # Answers per user that the window must have seen on average; open loop: lengths of an answer.
    rounds: float = bounded(2.0, 0, 10**6)
    answers: int = bounded(20, 0, 10**9)  # measured answers, at least
    late_share: float = bounded(0.05, 0, 1)  # of the simulated engines' time by which they lagged behind their model


@dataclass
class BenchConfig:
    """Closed loop by default: each user sends its next request when the answer to the last one has ended."""

    users: list[int] = field(default_factory=lambda: [1, 4])  # one point each, in this order
    # Open loop instead: so many requests per second, Poisson, one point each.
    rates: list[float] | None = field(default=None, metadata=within(1e-6, 10**6))
    trace: str | None = None  # open loop instead: JSON lines with `at_s`, one point
    # Open loop: requests at once; more wait, which their latency shows.
    connections: int = bounded(2000, 1, MAX_AT_ONCE)
    think_s: float = bounded(0.0, 0, DAY_S)  # closed loop: a user's mean pause before its next request
    think: str = "exponential"  # or fixed
    # Measured requests per point; null: all that begin within duration_s.
    requests: int | None = bounded(None, 1, 10**9)
    duration_s: float | None = bounded(None, 1e-3, 7 * DAY_S)  # null: 30 s, where requests says nothing either
    warmup_s: float = bounded(2.0, 0, DAY_S)  # load without measurement, before each point; users begin spread over it
    drain_s: float = bounded(120.0, 1e-3, DAY_S)  # measured requests may take this long after the window
    repeats: int = bounded(1, 1, 1000)  # of each point
    prompts: str | None = None  # JSON lines with `prompt` and `domain`; null: the built-in ones
    input_words: Lengths | None = None  # prompts are repeated or cut to so many words; null: as they are
    output_tokens: Lengths | None = None  # max_tokens of each request; null: `max_tokens`
    model: str = "auto"  # or an expert's name
    max_tokens: int = bounded(64, 1, 10**7)
    usage: bool = True  # ask the engine for its token counts; false for engines that refuse the question
    extra: dict[str, Any] = field(default_factory=dict)  # further fields of each request, such as {temperature: 0}
    direct: bool = False  # measure the replicas without the router as well, beside each point
    good: Good = field(default_factory=Good)
    trust: ValidityLimits = field(default_factory=ValidityLimits)
    seed: int = bounded(0, 0, 2**63 - 1)
    timeout_s: float = bounded(600.0, 1e-3, DAY_S)  # silence on a connection that counts as an error
    load_jobs: int = bounded(1, 1, 1000)  # load generators that share the users or the rate
    load_place: str = "here"  # or slurm: a job of its own for each
    load_options: dict[str, Any] = field(default_factory=dict)  # their options of sbatch, {partition: cpu}
    retry: bool = False  # of a sweep: measure again what is there but invalid
    output: str | None = None  # folder of the result files; null: RUN/bench, of a sweep: results
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
        if not 1 <= count <= MAX_AT_ONCE * config.load_jobs:
            raise _refused("users", config.users, f"whole numbers from 1 to {MAX_AT_ONCE} per load job")
    if config.requests is not None and config.duration_s is not None:
        raise ConfigError("bench.requests and bench.duration_s: give one of them", key="bench.requests")
    _check_open(config)
    for name, valid in (("think", PAUSES), ("load_place", PLACES)):
        if getattr(config, name) not in valid:
            value = getattr(config, name)
            raise ConfigError(f"bench.{name}={value}: not known{suggest(value, valid)}", key=f"bench.{name}")
    for name in ("prompts", "trace"):
        path = getattr(config, name)
        if path is not None and not Path(path).is_file():
            raise _refused(name, path, "a file with one JSON object per line")
    _check_lengths("input_words", config.input_words)
    _check_lengths("output_tokens", config.output_tokens)
    taken = sorted(OURS & config.extra.keys())
    if taken:
        raise ConfigError(f"bench.extra.{taken[0]}: the load generator sets this field itself", key="bench.extra")


def _check_open(config: BenchConfig) -> None:
    given = [name for name in ("rates", "trace") if getattr(config, name) is not None]
    if len(given) == 2:
        raise ConfigError("bench.rates and bench.trace: give one of them", key="bench.rates")
    if not given:
        return
    if config.requests is not None:
        raise ConfigError(f"bench.requests and bench.{given[0]}: an open loop goes by duration_s", key="bench.requests")
    if config.load_jobs > 1 and config.trace is not None:
        raise ConfigError("bench.trace takes one load job (valid: bench.load_jobs=1)", key="bench.load_jobs")
    if config.rates == []:
        raise _refused("rates", config.rates, "numbers above 0, such as [0.5,2,8]")


def _check_lengths(name: str, lengths: Lengths | None) -> None:
    if lengths is None:
        return
    if lengths.kind not in KINDS:
        raise ConfigError(
            f"bench.{name}.kind={lengths.kind}: not known{suggest(lengths.kind, KINDS)}", key=f"bench.{name}.kind"
        )
    if lengths.low > lengths.high:
        raise _refused(f"{name}.low", lengths.low, f"1 to bench.{name}.high={lengths.high}")


def _refused(name: str, value: object, valid: str) -> ConfigError:
    return ConfigError(f"bench.{name}={value}: not possible (valid: {valid})", key=f"bench.{name}")


def group_file(name: str, folders: list[Path]) -> Path:
    """`bench=NAME` as a file: the first folder that has it."""
    for folder in folders:
        if (path := folder / "bench" / f"{name}.yaml").is_file():
            return path
    known = (path.stem for folder in folders for path in (folder / "bench").glob("*.yaml"))
    raise ConfigError(f"bench={name}: no such config{suggest(name, known)}")
