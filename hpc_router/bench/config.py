"""The schema of `bench.*` and every default of it: what one run of the load generator does.

It is not part of a deployment's config: these values measure a deployment and do not change it. `check` checks what
involves several fields.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from hpc_router.bench.load.native.load import MAX_CONNECTIONS
from hpc_router.config.parsing import bounded, parse, within
from hpc_router.config.schema import DAY_S
from hpc_router.errors import ConfigError, suggest

RESERVED_FIELDS: Final = frozenset({"model", "messages", "stream", "stream_options", "max_tokens"})
"""Fields of a request body that the load generator sets, so that `extra` may not."""
LengthKind = Literal["fixed", "uniform", "lognormal"]
PauseKind = Literal["fixed", "exponential"]
LoadPlace = Literal["here", "slurm"]


@dataclass
class Lengths:
    """The distribution of a length, in words or tokens."""

    # fixed: always `mean`; uniform: `low` to `high`; lognormal: of `mean` and `sigma`, limited to `low` to `high`.
    kind: LengthKind = "fixed"
    mean: float = bounded(64.0, 1e-3, 10**6)  # mean length, of fixed and lognormal
    sigma: float = bounded(0.5, 1e-6, 10)  # standard deviation of the logarithm, of lognormal
    low: int = bounded(1, 1, 10**6)  # shortest length, of uniform and lognormal
    high: int = bounded(4096, 1, 10**6)  # longest length, of uniform and lognormal


@dataclass
class GoodputLimits:
    """Latency limits of goodput: a response counts if it is within every limit that is not null."""

    ttft_s: float | None = bounded(1.0, 0, DAY_S)  # time to the first token
    tpot_s: float | None = bounded(0.1, 0, DAY_S)  # time per output token after the first
    e2e_s: float | None = bounded(None, 0, DAY_S)  # time from the request to the end of the response


@dataclass
class ValidityLimits:
    """Limits beyond which a measured point is marked invalid."""

    error_share: float = bounded(0.01, 0, 1)  # largest share of the measured requests that may fail
    load_share: float = bounded(0.9, 0, 1)  # largest share of one core that a load generator may use or wait for
    # Least average number of responses per user in the window; in an open loop, its least length in response times.
    rounds: float = bounded(2.0, 0, 10**6)
    answers: int = bounded(20, 0, 10**9)  # least number of measured responses
    late_share: float = bounded(0.05, 0, 1)  # largest share of time by which simulated engines may lag their model


@dataclass
class BenchConfig:
    """One run of the load generator. By default a closed loop: each user sends its next request when the response to
    the last one has ended."""

    users: list[int] = field(default_factory=lambda: [1, 4])  # closed loop: numbers of users, one point each, in order
    # Open loop: requests per second as a Poisson process, one point each; null: closed loop.
    rates: list[float] | None = field(default=None, metadata=within(1e-6, 10**6))
    trace: str | None = None  # open loop: file of JSON lines with arrival times `at_s` in seconds, one point
    # Open loop: requests in flight; further ones wait, and their latency includes the wait.
    connections: int = bounded(2000, 1, MAX_CONNECTIONS)
    think_s: float = bounded(0.0, 0, DAY_S)  # closed loop: mean pause of a user before its next request
    think: PauseKind = "exponential"  # distribution of that pause
    # Measured requests per point; null: all requests that begin within duration_s.
    requests: int | None = bounded(None, 1, 10**9)
    # Length of the measured window; null: 30 s, or as long as `requests` takes.
    duration_s: float | None = bounded(None, 1e-3, 7 * DAY_S)
    warmup_s: float = bounded(2.0, 0, DAY_S)  # load before each point that is not measured; users start within it
    drain_s: float = bounded(120.0, 1e-3, DAY_S)  # limit for measured requests to complete after the window
    repeats: int = bounded(1, 1, 1000)  # measurements of each point
    prompts: str | None = None  # file of JSON lines with `prompt` and `domain`; null: the built-in prompts
    input_words: Lengths | None = None  # words of a prompt, which is repeated or cut to fit; null: prompts unchanged
    output_tokens: Lengths | None = None  # `max_tokens` of each request; null: the key `max_tokens`
    model: str = "auto"  # `model` of each request: auto, or the name of an expert
    max_tokens: int = bounded(64, 1, 10**7)  # `max_tokens` of each request
    usage: bool = True  # ask the engine for its token counts; false for engines that refuse `stream_options`
    extra: dict[str, Any] = field(default_factory=dict)  # further fields of each request, such as {temperature: 0}
    direct: bool = False  # true: after each point, also measure the replicas without the router
    good: GoodputLimits = field(default_factory=GoodputLimits)  # latency limits of goodput
    trust: ValidityLimits = field(default_factory=ValidityLimits)  # limits of validity
    seed: int = bounded(0, 0, 2**63 - 1)  # seed of prompts, lengths and arrivals
    timeout_s: float = bounded(600.0, 1e-3, DAY_S)  # pause on a connection after which its request fails
    load_jobs: int = bounded(1, 1, 1000)  # load generators that share the users or the rate
    load_place: LoadPlace = "here"  # here: processes of this machine; slurm: a Slurm job for each load generator
    load_options: dict[str, Any] = field(default_factory=dict)  # sbatch options of those jobs, such as {partition: cpu}
    retry: bool = False  # sweeps: measure points again whose stored result is invalid
    output: str | None = None  # folder of the result files; null: RUN/bench, and `results` for a sweep
    raw: bool = False  # true: also store every request, as one JSON line each


DURATION_S: Final = 30.0


def read_config(value: dict[str, Any]) -> BenchConfig:
    """Raises ConfigError naming the key."""
    config = parse(BenchConfig, value, at="bench")
    check(config)
    if config.requests is None and config.duration_s is None:
        config.duration_s = DURATION_S
    return config


def check(config: BenchConfig) -> None:
    """Raises ConfigError for the first value that is out of range or contradicts another key."""
    if not config.users:
        raise _invalid("users", config.users, "at least one number of users, such as [1,4,16]")
    for count in config.users:
        if not 1 <= count <= MAX_CONNECTIONS * config.load_jobs:
            raise _invalid("users", config.users, f"whole numbers from 1 to {MAX_CONNECTIONS} per load job")
    if config.requests is not None and config.duration_s is not None:
        raise ConfigError("bench.requests and bench.duration_s: set only one of them", key="bench.requests")
    _check_open_loop(config)
    for name in ("prompts", "trace"):
        path = getattr(config, name)
        if path is not None and not Path(path).is_file():
            raise _invalid(name, path, "a file with one JSON object per line")
    _check_lengths("input_words", config.input_words)
    _check_lengths("output_tokens", config.output_tokens)
    taken = sorted(RESERVED_FIELDS & config.extra.keys())
    if taken:
        raise ConfigError(f"bench.extra.{taken[0]}: the load generator sets this field", key="bench.extra")


def _check_open_loop(config: BenchConfig) -> None:
    given = [name for name in ("rates", "trace") if getattr(config, name) is not None]
    if len(given) == 2:
        raise ConfigError("bench.rates and bench.trace: set only one of them", key="bench.rates")
    if not given:
        return
    if config.requests is not None:
        raise ConfigError(
            f"bench.requests and bench.{given[0]}: an open loop is limited by duration_s alone", key="bench.requests"
        )
    if config.load_jobs > 1 and config.trace is not None:
        raise ConfigError("bench.trace needs a single load job (valid: bench.load_jobs=1)", key="bench.load_jobs")
    if config.rates == []:
        raise _invalid("rates", config.rates, "numbers above 0, such as [0.5,2,8]")


def _check_lengths(name: str, lengths: Lengths | None) -> None:
    if lengths is None:
        return
    if lengths.low > lengths.high:
        raise _invalid(f"{name}.low", lengths.low, f"1 to bench.{name}.high={lengths.high}")


def _invalid(name: str, value: object, valid: str) -> ConfigError:
    return ConfigError(f"bench.{name}={value}: invalid (valid: {valid})", key=f"bench.{name}")


def group_file(name: str, folders: list[Path]) -> Path:
    """The file of `bench=NAME`, from the first folder that has one. Raises ConfigError."""
    for folder in folders:
        if (path := folder / "bench" / f"{name}.yaml").is_file():
            return path
    known = (path.stem for folder in folders for path in (folder / "bench").glob("*.yaml"))
    raise ConfigError(f"bench={name}: no such config{suggest(name, known)}")
