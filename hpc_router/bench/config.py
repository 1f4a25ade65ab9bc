"""The `bench.*` keys of one call of the load generator: the only schema and the only defaults.

They are not part of a deployment's config: they change how a deployment is measured, not the deployment. The parser
checks each field's type; `check` holds the rules beyond that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from hpc_router.bench.load.native.load import MAX_CONNECTIONS
from hpc_router.config.parsing import bounded, parse, within
from hpc_router.config.schema import DAY_S
from hpc_router.errors import ConfigError, suggest

RESERVED_FIELDS: Final = frozenset({"model", "messages", "stream", "stream_options", "max_tokens"})
"""Fields of a request body that the load generator sets, so that `extra` may not."""
LENGTH_KINDS: Final = ("fixed", "uniform", "lognormal")
THINK_KINDS: Final = ("fixed", "exponential")
LOAD_PLACES: Final = ("here", "slurm")


@dataclass
class Lengths:
    """Distribution of a length: always `mean` (fixed), uniform from `low` to `high`, or log-normal with `mean` and
    `sigma`, clipped to `low` and `high`."""

    kind: str = "fixed"
    mean: float = bounded(64.0, 1e-3, 10**6)
    sigma: float = bounded(0.5, 1e-6, 10)
    low: int = bounded(1, 1, 10**6)
    high: int = bounded(4096, 1, 10**6)


@dataclass
class GoodputLimits:
    """A response counts towards the goodput if it is within every limit that is not null."""

    ttft_s: float | None = bounded(1.0, 0, DAY_S)
    tpot_s: float | None = bounded(0.1, 0, DAY_S)
    e2e_s: float | None = bounded(None, 0, DAY_S)


@dataclass
class ValidityLimits:
    """A point whose measurement is outside one of these limits is marked invalid."""

    error_share: float = bounded(0.01, 0, 1)  # largest share of failed requests among the measured ones
    load_share: float = bounded(0.9, 0, 1)  # largest share of one core that the load generator used or waited for
    # Least responses per user in the window; open loop: least window length in response times.
    rounds: float = bounded(2.0, 0, 10**6)
    answers: int = bounded(20, 0, 10**9)  # least number of measured responses
    late_share: float = bounded(
        0.05, 0, 1
    )  # largest share of their time by which simulated engines lag behind their model


@dataclass
class BenchConfig:
    """By default a closed loop: each user sends its next request when the response to the last one has ended."""

    users: list[int] = field(default_factory=lambda: [1, 4])  # numbers of users, one point each, in this order
    # Open loop: requests per second (Poisson arrivals), one point each.
    rates: list[float] | None = field(default=None, metadata=within(1e-6, 10**6))
    trace: str | None = None  # open loop: arrivals from a JSON Lines file with `at_s`, one point
    # Open loop: most concurrent requests; later ones wait, which counts in their latency.
    connections: int = bounded(2000, 1, MAX_CONNECTIONS)
    # Closed loop: mean pause of a user between a response and the next request.
    think_s: float = bounded(0.0, 0, DAY_S)
    think: str = "exponential"  # distribution of that pause: exponential or fixed
    # Measured requests per point; null: all that begin within duration_s.
    requests: int | None = bounded(None, 1, 10**9)
    duration_s: float | None = bounded(
        None, 1e-3, 7 * DAY_S
    )  # length of the window; null: 30 s, unless `requests` is given
    # Unmeasured load before each point; the users' first requests are spread over it.
    warmup_s: float = bounded(2.0, 0, DAY_S)
    drain_s: float = bounded(120.0, 1e-3, DAY_S)  # time limit for measured requests after the window
    repeats: int = bounded(1, 1, 1000)  # measurements of each point
    prompts: str | None = None  # JSON Lines file with `prompt` and `domain`; null: the built-in prompts
    input_words: Lengths | None = None  # prompts are repeated or cut to this many words; null: unchanged
    output_tokens: Lengths | None = None  # max_tokens of each request; null: `max_tokens`
    model: str = "auto"  # or an expert's name
    max_tokens: int = bounded(64, 1, 10**7)
    usage: bool = True  # request token counts from the engine; false for engines that reject `stream_options`
    extra: dict[str, Any] = field(default_factory=dict)  # more fields for each request, such as {temperature: 0}
    direct: bool = False  # also measure the replicas without the router, for each point
    good: GoodputLimits = field(default_factory=GoodputLimits)
    trust: ValidityLimits = field(default_factory=ValidityLimits)
    seed: int = bounded(0, 0, 2**63 - 1)
    timeout_s: float = bounded(600.0, 1e-3, DAY_S)  # a connection without data for this long is an error
    load_jobs: int = bounded(1, 1, 1000)  # load generators that share the users or the rate
    load_place: str = "here"  # where they run: `here`, or `slurm` for one Slurm job each
    load_options: dict[str, Any] = field(default_factory=dict)  # sbatch options of those jobs, {partition: cpu}
    retry: bool = False  # in a sweep: measure invalid points again
    output: str | None = None  # folder of the result files; null: RUN/bench, in a sweep: results
    raw: bool = False  # also write one JSON line per request


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
    for name, valid in (("think", THINK_KINDS), ("load_place", LOAD_PLACES)):
        _check_choice(name, getattr(config, name), valid)
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
    _check_choice(f"{name}.kind", lengths.kind, LENGTH_KINDS)
    if lengths.low > lengths.high:
        raise _invalid(f"{name}.low", lengths.low, f"1 to bench.{name}.high={lengths.high}")


def _check_choice(name: str, value: str, valid: Sequence[str]) -> None:
    if value not in valid:
        raise ConfigError(f"bench.{name}={value}: not known{suggest(value, valid)}", key=f"bench.{name}")


def _invalid(name: str, value: object, valid: str) -> ConfigError:
    return ConfigError(f"bench.{name}={value}: invalid (valid: {valid})", key=f"bench.{name}")


def group_file(name: str, folders: list[Path]) -> Path:
    """The file of `bench=NAME`, from the first folder that has one. Raises ConfigError."""
    for folder in folders:
        if (path := folder / "bench" / f"{name}.yaml").is_file():
            return path
    known = (path.stem for folder in folders for path in (folder / "bench").glob("*.yaml"))
    raise ConfigError(f"bench={name}: no such config{suggest(name, known)}")
