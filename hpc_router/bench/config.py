"""The schema of `bench.*` with all defaults: what one run of the load generator does.

It is not part of a deployment's config, because these values measure a deployment and do not change it. The function
`check` tests the conditions that involve several fields.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from hpc_router.bench.load.native.load import MAX_CONNECTIONS
from hpc_router.config.parsing import bounded, parse, within
from hpc_router.config.schema import DAY_S
from hpc_router.errors import ConfigError, suggest

RESERVED_FIELDS: Final = frozenset({"model", "messages", "stream", "stream_options", "max_tokens"})
"""Fields of a request body that the load generator sets, so that `extra` must not set them."""
LengthKind = Literal["fixed", "uniform", "lognormal"]
PauseKind = Literal["fixed", "exponential"]
LoadPlace = Literal["here", "slurm"]


@dataclass
class Lengths:
    """The distribution of a random length, in words or tokens."""

    # fixed: always `mean`; uniform: `low` to `high`; lognormal: with `mean` and `sigma`, limited to `low` to `high`.
    kind: LengthKind = "fixed"
    mean: float = bounded(64.0, 1e-3, 10**6)  # mean length, of fixed and lognormal
    sigma: float = bounded(0.5, 1e-6, 10)  # standard deviation of the logarithm, of lognormal
    low: int = bounded(1, 1, 10**6)  # minimum length, of uniform and lognormal
    high: int = bounded(4096, 1, 10**6)  # maximum length, of uniform and lognormal


@dataclass
class GoodputLimits:
    """Latency limits for goodput: a response counts if it exceeds none of them. Null: no limit."""

    ttft_s: float | None = bounded(1.0, 0, DAY_S)  # time to the first token
    tpot_s: float | None = bounded(0.1, 0, DAY_S)  # time per output token after the first
    e2e_s: float | None = bounded(None, 0, DAY_S)  # time from the request to the end of the response


@dataclass
class ValidityLimits:
    """Limits on the conditions of a measurement. If a point exceeds one of them, its figures are marked invalid."""

    error_share: float = bounded(0.01, 0, 1)  # maximum share of the measured requests that fail
    load_share: float = bounded(0.9, 0, 1)  # maximum share of one core that a load generator uses or waits for
    # Minimum mean number of responses per user in the window; open loop: minimum window length in response times.
    rounds: float = bounded(2.0, 0, 10**6)
    answers: int = bounded(20, 0, 10**9)  # minimum number of measured responses
    late_share: float = bounded(0.05, 0, 1)  # maximum share of time by which simulated engines lag behind their model


@dataclass
class LoadClass:
    """One class of conversations. Lengths are numbers of words; a real engine counts more tokens than words."""

    weight: float = bounded(1.0, 1e-6, 10**6)  # share of the conversations, relative to the other classes
    turns: Lengths = field(default_factory=lambda: Lengths(mean=1))  # messages of the user in a conversation
    think_s: float = bounded(0.0, 0, DAY_S)  # mean pause of the user between a response and the next message
    input_words: Lengths = field(default_factory=Lengths)  # length of each message of the user
    output_tokens: Lengths = field(default_factory=Lengths)  # `max_tokens` of each request, and words of its answer
    system_words: Lengths | None = None  # length of the system prompt; null: no system prompt
    system_prompts: int = bounded(1, 1, 10**6)  # number of different system prompts
    zipf: float = bounded(1.0, 0, 10)  # exponent of their popularity: the k-th one has the weight k ** -zipf
    tool_turns: Lengths | None = None  # agent loops: tool calls after each message of the user; null: none
    tool_words: Lengths = field(default_factory=Lengths)  # length of each result of a tool
    tool_s: float = bounded(0.0, 0, DAY_S)  # mean time that a tool takes
    cancel_share: float = bounded(0.0, 0, 1)  # share of the requests that the client cancels while they stream


@dataclass
class BenchConfig:
    """One run of the load generator. By default a closed loop: each user waits for a response before its next
    request."""

    users: list[int] = field(default_factory=lambda: [1, 4])  # closed loop: numbers of users; one point each, in order
    # Open loop: rates in requests per second, arriving as a Poisson process; one point each. Null: closed loop.
    rates: list[float] | None = field(default=None, metadata=within(1e-6, 10**6))
    trace: str | None = None  # open loop: file of arrival times, or of requests in Mooncake's format; one point
    trace_speed: float = bounded(1.0, 1e-3, 10**4)  # factor by which the trace is replayed faster
    trace_block: int = bounded(512, 1, 10**5)  # words per hashed block of a trace; fewer shorten all its requests
    # Classes of conversations, by name; empty: single prompts. `rates` are then conversations per second.
    classes: dict[str, LoadClass] = field(default_factory=dict)
    # Answers in the history of conversations. engine: those that it gave; prepared: texts that the seed determines.
    history: Literal["engine", "prepared"] = "engine"
    conversations: int = bounded(256, 1, 10**6)  # number of different conversations; they are repeated after the last
    # goodput: open loop; instead of all `rates`, find the highest rate whose goodput target holds.
    search: Literal["goodput"] | None = None
    search_share: float = bounded(0.95, 0, 1)  # the target: share of the measured requests within `good`
    search_step: float = bounded(1.1, 1.01, 10)  # the search ends when a failing rate is at most this times a good one
    search_points: int = bounded(12, 1, 1000)  # maximum number of measured rates
    # Open loop: maximum number of requests in flight, beyond which a point ends as over-saturated; null: with a search
    # twice what fits within `good`, else none.
    most_in_flight: int | None = bounded(None, 1, 10**6)
    # Open loop: maximum number of requests in flight; further ones wait, and the wait is part of their latency.
    connections: int = bounded(2000, 1, MAX_CONNECTIONS)
    think_s: float = bounded(0.0, 0, DAY_S)  # closed loop: mean pause of a user before its next request
    think: PauseKind = "exponential"  # distribution of that pause
    # Number of measured requests per point; null: all requests that begin within duration_s.
    requests: int | None = bounded(None, 1, 10**9)
    # Length of the measured window in seconds; null: 30, or as long as `requests` takes.
    duration_s: float | None = bounded(None, 1e-3, 7 * DAY_S)
    warmup_s: float = bounded(2.0, 0, DAY_S)  # unmeasured load before each point; the users start one by one within it
    drain_s: float = bounded(120.0, 1e-3, DAY_S)  # time limit for measured requests to complete after the window
    repeats: int = bounded(1, 1, 1000)  # number of measurements of each point
    prompts: str | None = None  # file of JSON lines with `prompt` and `domain`; null: the built-in prompts
    input_words: Lengths | None = None  # length of prompts in words: they are repeated or cut; null: unchanged
    output_tokens: Lengths | None = None  # `max_tokens` of each request; null: always the key `max_tokens`
    model: str = "auto"  # `model` of each request: auto, or the name of an expert
    max_tokens: int = bounded(64, 1, 10**7)  # `max_tokens` of each request
    usage: bool = True  # ask the engine for token counts; false: for engines that refuse `stream_options`
    extra: dict[str, Any] = field(default_factory=dict)  # further fields of each request, such as {temperature: 0}
    direct: bool = False  # true: after each point, also measure the replicas without the router
    good: GoodputLimits = field(default_factory=GoodputLimits)  # latency limits for goodput
    trust: ValidityLimits = field(default_factory=ValidityLimits)  # limits for a valid measurement
    seed: int = bounded(0, 0, 2**63 - 1)  # seed of prompts, lengths and arrivals
    timeout_s: float = bounded(600.0, 1e-3, DAY_S)  # silence on a connection after which its request fails
    load_jobs: int = bounded(1, 1, 1000)  # number of load generators that share the users or the rate
    load_place: LoadPlace = "here"  # here: processes on this machine; slurm: one Slurm job per load generator
    load_options: dict[str, Any] = field(default_factory=dict)  # sbatch options of those jobs, such as {partition: cpu}
    retry: bool = False  # sweeps: repeat points whose stored result is invalid
    output: str | None = None  # folder of the result files; null: RUN/bench, and `results` for a sweep
    raw: bool = False  # true: also store every request, as one JSON line each


DURATION_S: Final = 30.0
MAX_STEPS: Final = 10_000
"""Maximum number of requests of one conversation."""


def longest(lengths: Lengths | None) -> float:
    """Returns the maximum of a random length; 0 if `lengths` is None."""
    if lengths is None:
        return 0.0
    return lengths.mean if lengths.kind == "fixed" else lengths.high


def read_config(value: dict[str, Any]) -> BenchConfig:
    """Parses and checks the values of `bench`. Raises ConfigError, which names the key."""
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
    _check_classes(config)
    _check_search(config)
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
    if config.classes and config.trace is not None:
        raise ConfigError("bench.classes and bench.trace: set only one of them", key="bench.classes")
    if config.rates == []:
        raise _invalid("rates", config.rates, "numbers above 0, such as [0.5,2,8]")


def _check_classes(config: BenchConfig) -> None:
    for name, one in config.classes.items():
        for key in ("turns", "input_words", "output_tokens", "system_words", "tool_turns", "tool_words"):
            _check_lengths(f"classes.{name}.{key}", getattr(one, key))
        if longest(one.turns) * (1 + longest(one.tool_turns)) > MAX_STEPS:
            raise _invalid(f"classes.{name}.turns", longest(one.turns), f"at most {MAX_STEPS} requests each")
    given = [key for key in ("input_words", "output_tokens") if getattr(config, key) is not None]
    if config.classes and (given or config.think_s):
        key = f"bench.{given[0]}" if given else "bench.think_s"
        raise ConfigError(f"{key}: each of bench.classes has its own", key=key)
    if config.classes and config.direct:
        raise ConfigError("bench.direct: not with bench.classes (valid: bench.direct=false)", key="bench.direct")


def _check_search(config: BenchConfig) -> None:
    if config.search is None:
        return
    if config.rates is None or len(config.rates) != 1:
        raise _invalid("rates", config.rates, "one rate to begin with, such as [1], because of bench.search")
    if config.repeats > 1:
        raise _invalid("repeats", config.repeats, "1, because of bench.search")


def _check_lengths(name: str, lengths: Lengths | None) -> None:
    if lengths is None:
        return
    if lengths.low > lengths.high:
        raise _invalid(f"{name}.low", lengths.low, f"1 to bench.{name}.high={lengths.high}")


def _invalid(name: str, value: object, valid: str) -> ConfigError:
    return ConfigError(f"bench.{name}={value}: invalid (valid: {valid})", key=f"bench.{name}")


def group_file(name: str, folders: list[Path]) -> Path:
    """Returns the file of `bench=NAME`, from the first folder that has one. Raises ConfigError if there is none."""
    for folder in folders:
        if (path := folder / "bench" / f"{name}.yaml").is_file():
            return path
    known = (path.stem for folder in folders for path in (folder / "bench").glob("*.yaml"))
    raise ConfigError(f"bench={name}: no such config{suggest(name, known)}")
