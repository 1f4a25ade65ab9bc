"""Who asks what, and when: requests, their order, arrivals and pauses. Pure, and fixed by the seed.

Each point begins anew from its seed and its repeat, so the same config asks the same questions in the same order,
whatever the warm-up took: measured requests have an order of their own. Knows no addresses and no tokens.
"""

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from hpc_router.bench.config import BenchConfig, Lengths
from hpc_router.bench.prompts import BenchPrompt
from hpc_router.errors import ConfigError
from hpc_router.state.atomic_files import lines_of

POOL: Final = 2048
"""Different requests, where lengths are drawn."""
DECKS: Final = 4
"""Orders of all of them before they repeat."""
PAUSES: Final = 4096
BEYOND_S: Final = 120.0
"""An open loop goes on for so long after its window, should the last measured requests take it."""


@dataclass(frozen=True, slots=True)
class Point:
    """What is measured at once: so many users, or so many requests per second, or the trace."""

    users: int | None = None
    rate_per_s: float | None = None
    trace: str | None = None
    repeat: int = 0

    @property
    def name(self) -> str:
        if self.users is not None:
            load = f"{self.users} user{'s' if self.users > 1 else ''}"
        else:
            load = f"{self.rate_per_s:g} requests/s" if self.rate_per_s is not None else f"trace {self.trace}"
        return load if self.repeat == 0 else f"{load}, repeat {self.repeat + 1}"


def points_of(config: BenchConfig) -> list[Point]:
    """All of a call, repeat by repeat, so that drift of the machine hits all alike."""
    found = []
    for repeat in range(config.repeats):
        if config.rates is not None:
            found += [Point(rate_per_s=rate, repeat=repeat) for rate in config.rates]
        elif config.trace is not None:
            found.append(Point(trace=Path(config.trace).name, repeat=repeat))
        else:
            found += [Point(users=users, repeat=repeat) for users in config.users]
    return found


@dataclass(frozen=True, slots=True)
class Question:
    """One request, but for its address. `domain`: where it is known."""

    body: bytes
    domain: str | None


@dataclass(frozen=True, slots=True)
class Workload:
    """For one load generator. `arrivals_s` None: a closed loop of `connections` users."""

    questions: Sequence[Question]
    order: Sequence[int]
    others: Sequence[int]
    connections: int
    count: int | None = None  # measured requests
    arrivals_s: Sequence[float] | None = None
    think_s: Sequence[float] | None = None


def workload(config: BenchConfig, prompts: Sequence[BenchPrompt], point: Point, *, job: int = 0) -> Workload:
    """What load generator number `job` of `config.load_jobs` does for that point."""
    questions = list(_questions(config, prompts))
    stream = f"{config.seed}:{point.repeat}:{job}"
    return Workload(
        questions,
        _order(len(questions), f"{stream}:measured"),
        _order(len(questions), f"{stream}:others"),
        config.connections if point.users is None else share_of(point.users, job, config.load_jobs),
        None if config.requests is None else share_of(config.requests, job, config.load_jobs),
        None if point.users is not None else _arrivals(config, point, stream),
        _pauses(config, stream) if point.users is not None and config.think_s else None,
    )


def jobs_for(point: Point, config: BenchConfig) -> int:
    """How many load jobs there is something to do for: a user, and a request of those that are counted, for each."""
    return min(n for n in (config.load_jobs, point.users, config.requests) if n is not None)


def share_of(whole: int, job: int, jobs: int) -> int:
    """Shares differ by one at most, and add up."""
    return whole // jobs + (job < whole % jobs)


def request(question: Question, *, host: str, path: str, token: str) -> bytes:
    """Complete HTTP."""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {token}\r\ncontent-type: application/json\r\n"
        f"accept: */*\r\nuser-agent: hpc-router-bench\r\ncontent-length: {len(question.body)}\r\n\r\n"
    )
    return head.encode() + question.body


def request_body(config: BenchConfig, text: str, *, max_tokens: int) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": config.model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "stream": True,
    }
    if config.usage:
        body["stream_options"] = {"include_usage": True}
    return body | config.extra


def length(source: random.Random, lengths: Lengths) -> int:
    if lengths.kind == "fixed":
        return max(1, round(lengths.mean))
    if lengths.kind == "uniform":
        return source.randint(lengths.low, lengths.high)
    # A log-normal of mean m has mu = ln m - sigma^2/2.
    drawn = lengths.mean * source.lognormvariate(-lengths.sigma * lengths.sigma / 2, lengths.sigma)
    return min(lengths.high, max(lengths.low, round(drawn)))


def resized(text: str, words: int) -> str:
    """So many words: repeated from the beginning, or cut."""
    given = text.split()
    return " ".join((given * (1 + words // len(given)))[:words])


def _questions(config: BenchConfig, prompts: Sequence[BenchPrompt]) -> Iterator[Question]:
    drawn = config.input_words is not None or config.output_tokens is not None
    source = random.Random(f"{config.seed}:lengths")
    for number in range(max(POOL, len(prompts)) if drawn else len(prompts)):
        prompt = prompts[number % len(prompts)]
        text = prompt.text if config.input_words is None else resized(prompt.text, length(source, config.input_words))
        tokens = config.max_tokens if config.output_tokens is None else length(source, config.output_tokens)
        body = json.dumps(request_body(config, text, max_tokens=tokens), separators=(",", ":")).encode()
        yield Question(body, prompt.domain)


def _order(count: int, stream: str) -> list[int]:
    source = random.Random(stream)
    return [number for _ in range(DECKS) for number in source.sample(range(count), count)]


def _arrivals(config: BenchConfig, point: Point, stream: str) -> list[float]:
    assert config.duration_s is not None
    until_s = config.warmup_s + config.duration_s + BEYOND_S
    if point.rate_per_s is None:
        assert config.trace is not None
        return read_trace(Path(config.trace))
    source, rate = random.Random(f"{stream}:arrivals"), point.rate_per_s / config.load_jobs
    gaps = (source.expovariate(rate) for _ in range(int(until_s * rate * 2) + 100))
    return [at_s for at_s in accumulate(gaps) if at_s < until_s]


def _pauses(config: BenchConfig, stream: str) -> list[float]:
    source = random.Random(f"{stream}:think")
    if config.think == "fixed":
        return [config.think_s]
    return [source.expovariate(1 / config.think_s) for _ in range(PAUSES)]


def read_trace(path: Path) -> list[float]:
    """Times of arrival in seconds. Raises ConfigError with file and line."""
    found: list[float] = []
    for number, line in lines_of(path):
        try:
            value: Mapping[str, Any] = json.loads(line)
            at_s = float(value["at_s"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ConfigError(f'{path}:{number}: no number at "at_s" (valid: {{"at_s": 1.5}})') from error
        if not math.isfinite(at_s):
            raise ConfigError(f'{path}:{number}: "at_s" is {at_s}, not a finite number')
        found.append(at_s)
    if not found or min(found) < 0:
        raise ConfigError(f"bench.trace={path}: {'no arrival' if not found else 'arrivals before 0 s'}")
    return sorted(found)
