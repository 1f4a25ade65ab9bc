"""The requests of a measurement point: bodies, order, arrival times and pauses. Pure functions; the seed determines the
results.

The random generators of a point start from the seed and the number of the repeat, so the same config sends the same
measured requests in the same order. Measured and unmeasured requests have separate orders, so the number of warm-up
requests does not matter. Addresses and tokens are added later.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from hpc_router.bench.config import BenchConfig
from hpc_router.bench.conversations import ANSWER_MARK, DomainWords, Message, conversations, draw_length
from hpc_router.bench.prompts import BenchPrompt
from hpc_router.bench.traces import TracedText, read_trace
from hpc_router.errors import ConfigError

POOL_SIZE: Final = 2048
"""Number of different requests if their lengths are random."""
PERMUTATIONS: Final = 4
"""Number of random orders of all requests before the sequence repeats."""
THINK_TIMES: Final = 4096
"""Number of random pauses before the sequence repeats."""
EXTRA_ARRIVALS_S: Final = 120.0
"""Open loop: time in seconds after the window in which requests still arrive, to keep up the load until measured
requests end."""


@dataclass(frozen=True, slots=True)
class Point:
    """A measurement point, which is one load: a number of users, a request rate or a trace."""

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
    """Returns all measurement points of a benchmark, ordered by repeat, so that slow changes of the machine affect all
    points alike."""
    points = []
    for repeat in range(config.repeats):
        if config.rates is not None:
            points += [Point(rate_per_s=rate, repeat=repeat) for rate in config.rates]
        elif config.trace is not None:
            points.append(Point(trace=Path(config.trace).name, repeat=repeat))
        else:
            points += [Point(users=users, repeat=repeat) for users in config.users]
    return points


@dataclass(frozen=True, slots=True)
class RequestBody:
    """The body of a request. `domain`: the domain of its prompt; None if unknown. `load_class`, `turn`: class of the
    request's conversation, and number of its turn there; None without conversations."""

    body: bytes
    domain: str | None
    load_class: str | None = None
    turn: int | None = None


@dataclass(frozen=True, slots=True)
class ChainStep:
    """A request of a conversation. `request`: index of its body in the workload. `leave_events`: number of events of
    the response after which the client disconnects; 0: never. `last`: whether this request ends the conversation."""

    request: int
    leave_events: int = 0
    pause_s: float = 0.0
    last: bool = True


@dataclass(frozen=True, slots=True)
class Workload:
    """The requests of one load generator.

    `measured_order`, `unmeasured_order`: indices into `bodies`. `count`: number of measured requests; None: all in the
    window. `arrivals_s`: seconds from the start of the load at which requests begin; None: each of `connections` users
    waits for a response before the next request. `chains`: the steps of conversations; with them, both orders and
    `think_s` are not used, and a conversation begins at each arrival.
    """

    bodies: Sequence[RequestBody]
    measured_order: Sequence[int]
    unmeasured_order: Sequence[int]
    connections: int
    count: int | None = None
    arrivals_s: Sequence[float] | None = None
    think_s: Sequence[float] | None = None
    chains: Sequence[ChainStep] | None = None


def workload(config: BenchConfig, prompts: Sequence[BenchPrompt], point: Point, *, job: int = 0) -> Workload:
    """Returns the requests that load generator number `job` sends (from 0, of `config.load_jobs`)."""
    if config.classes:
        return _conversations(config, prompts, point, job)
    if config.trace is not None:
        traced = _traced(config, prompts, point)
        if traced is not None:
            return traced
    bodies = list(_bodies(config, prompts))
    stream = f"{config.seed}:{point.repeat}:{job}"
    return Workload(
        bodies,
        request_order(len(bodies), f"{stream}:measured"),
        request_order(len(bodies), f"{stream}:others"),
        config.connections if point.users is None else share_of(point.users, job, config.load_jobs),
        None if config.requests is None else share_of(config.requests, job, config.load_jobs),
        None if point.users is not None else _arrivals(config, point, stream),
        _think_times(config, stream) if point.users is not None and config.think_s else None,
    )


def jobs_for(point: Point, config: BenchConfig) -> int:
    """Returns the number of load jobs that take part in the load of `point`. Each needs at least one user and one
    measured request."""
    return min(n for n in (config.load_jobs, point.users, config.requests) if n is not None)


def share_of(total: int, job: int, jobs: int) -> int:
    """Returns the share of load job number `job` in `total`, if `jobs` jobs divide it. The shares differ by at most
    one, and their sum is `total`."""
    return total // jobs + (job < total % jobs)


def http_request(body: bytes, *, host: str, path: str, token: str, more: str = "") -> bytes:
    """Returns a complete HTTP/1.1 POST request. `more`: further header lines, each with its line end."""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {token}\r\ncontent-type: application/json\r\n"
        f"accept: */*\r\nuser-agent: hpc-router-bench\r\ncontent-length: {len(body)}\r\n{more}\r\n"
    )
    return head.encode() + body


def request_body(config: BenchConfig, messages: Sequence[Message], *, max_tokens: int) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": config.model,
        "messages": messages,
        "max_tokens": max_tokens,
        "stream": True,
    }
    if config.usage:
        body["stream_options"] = {"include_usage": True}
    return body | config.extra


def resize(text: str, word_count: int) -> str:
    """Returns `text`, repeated or cut to `word_count` words."""
    words = text.split()
    return " ".join((words * (1 + word_count // len(words)))[:word_count])


def _bodies(config: BenchConfig, prompts: Sequence[BenchPrompt]) -> Iterator[RequestBody]:
    random_lengths = config.input_words is not None or config.output_tokens is not None
    source = random.Random(f"{config.seed}:lengths")
    for number in range(max(POOL_SIZE, len(prompts)) if random_lengths else len(prompts)):
        prompt = prompts[number % len(prompts)]
        text = (
            prompt.text if config.input_words is None else resize(prompt.text, draw_length(source, config.input_words))
        )
        tokens = config.max_tokens if config.output_tokens is None else draw_length(source, config.output_tokens)
        yield RequestBody(_encoded(config, [{"role": "user", "content": text}], tokens), prompt.domain)


def _encoded(config: BenchConfig, messages: Sequence[Message], max_tokens: int) -> bytes:
    return json.dumps(request_body(config, messages, max_tokens=max_tokens), separators=(",", ":")).encode()


def _conversations(config: BenchConfig, prompts: Sequence[BenchPrompt], point: Point, job: int) -> Workload:
    """Returns the conversations that load job number `job` sends at `point`. Two points share no text other than system
    prompts, so that a cache that is warm from one point does not favour the next."""
    own = f"{config.seed}:{point.name}:{job}"
    bodies: list[RequestBody] = []
    chains: list[ChainStep] = []
    made = conversations(
        config.classes,
        prompts,
        count=config.conversations,
        shared=str(config.seed),
        own=own,
        prepared=config.history == "prepared",
    )
    for one in made:
        for step in one.steps:
            chains.append(ChainStep(len(bodies), step.leave_after, step.pause_s, last=step is one.steps[-1]))
            encoded = _encoded(config, step.messages, step.max_tokens).replace(b"\\u0001", ANSWER_MARK.encode())
            bodies.append(RequestBody(encoded, one.domain, one.load_class, step.turn))
    return Workload(
        bodies,
        (),
        (),
        config.connections if point.users is None else share_of(point.users, job, config.load_jobs),
        None if config.requests is None else share_of(config.requests, job, config.load_jobs),
        None if point.users is not None else _arrivals(config, point, own),
        chains=chains,
    )


def _traced(config: BenchConfig, prompts: Sequence[BenchPrompt], point: Point) -> Workload | None:
    """Returns the load of the trace in `config`; None if the trace has arrival times but no requests."""
    assert config.trace is not None
    assert config.duration_s is not None
    until_s = config.warmup_s + config.duration_s + EXTRA_ARRIVALS_S
    found = [one for one in read_trace(Path(config.trace)) if one.at_s / config.trace_speed < until_s]
    if not found:
        raise ConfigError(f"bench.trace={config.trace}: no arrival in the first {until_s:g} s", key="bench.trace")
    if found[0].hash_ids is None:
        return None
    text = TracedText(DomainWords(prompts).all, seed=f"{config.seed}:{point.repeat}", block_words=config.trace_block)
    bodies = [
        RequestBody(_encoded(config, [{"role": "user", "content": text.prompt(one)}], text.output_tokens(one)), None)
        for one in found
    ]
    return Workload(
        bodies,
        (),
        (),
        config.connections,
        arrivals_s=[one.at_s / config.trace_speed for one in found],
        chains=[ChainStep(number) for number in range(len(bodies))],
    )


def request_order(count: int, stream: str) -> list[int]:
    """Returns the indices below `count` in random order, several such permutations in a row. `stream` is the seed."""
    source = random.Random(stream)
    return [number for _ in range(PERMUTATIONS) for number in source.sample(range(count), count)]


def _arrivals(config: BenchConfig, point: Point, stream: str) -> list[float]:
    assert config.duration_s is not None
    until_s = config.warmup_s + config.duration_s + EXTRA_ARRIVALS_S
    if point.rate_per_s is None:
        assert config.trace is not None
        return [one.at_s / config.trace_speed for one in read_trace(Path(config.trace))]
    source, rate = random.Random(f"{stream}:arrivals"), point.rate_per_s / config.load_jobs
    gaps = (source.expovariate(rate) for _ in range(int(until_s * rate * 2) + 100))
    return [at_s for at_s in accumulate(gaps) if at_s < until_s]


def _think_times(config: BenchConfig, stream: str) -> list[float]:
    source = random.Random(f"{stream}:think")
    if config.think == "fixed":
        return [config.think_s]
    return [source.expovariate(1 / config.think_s) for _ in range(THINK_TIMES)]
