"""Measures how long a user's requests and interactive requests wait while others flood the router: `hpc-router bench
fairness`.

Two measurements on one deployment of simulated engines (`topology=fairness`). In the first, user A keeps 2,000 requests
in the router, and user B sends one per second; every request takes 0.5 s of its engine. In the second, interactive
streams arrive with and without a queue of batch requests for the same engine, which takes requests by priority.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from rich.console import Console

from hpc_router.bench.load.generator import LoadTarget
from hpc_router.bench.load.native.build import build_program
from hpc_router.bench.load.native.load import MAX_CONNECTIONS, LoadSpec, run, running, write_requests
from hpc_router.bench.load.native.records import Error, Table
from hpc_router.bench.output import stem_of, utc_now, write_results
from hpc_router.bench.progress import StepDisplay
from hpc_router.bench.prompts import built_in
from hpc_router.bench.provenance import origin_of
from hpc_router.bench.relay_cost.requests import chat_body
from hpc_router.bench.soak.deployment import SoakDeployment, running_deployment
from hpc_router.bench.workload import http_request
from hpc_router.cluster.signals import sigterm_as_interrupt
from hpc_router.errors import ConfigError, LaunchError
from hpc_router.net.protocol import CHAT, PRIORITY_HEADER
from hpc_router.state.user_tokens import create_token

TOPOLOGY: Final = "fairness"
SERVICE_S: Final = 0.5
"""Time in seconds that the engine of the first measurement takes for a request, in topology/fairness.yaml."""
STREAM_TOKENS: Final = 32
BATCH_TOKENS: Final = 256
FILL_S: Final = 5.0
"""Time in seconds before the measured requests, in which the flood fills the queue."""
TIMEOUT_S: Final = 600.0
NS: Final = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class FairnessOptions:
    """The options. `seconds`: duration of each measured load. `flood`: number of requests that are kept in the router,
    of user A in the first measurement and of the class `batch` in the second. `rate`: interactive streams per second in
    the second measurement. `workers`: workers of the router."""

    seconds: float = 30.0
    flood: int = 2000
    rate: float = 8.0
    workers: int = 2
    seed: int = 0
    out: Path

    def checked(self) -> Self:
        """Returns the options if they are valid, else raises ConfigError."""
        limits = {"seconds": 3600, "flood": MAX_CONNECTIONS, "rate": 1000, "workers": 64}
        for name, high in limits.items():
            if not 1 <= (value := getattr(self, name)) <= high:
                raise ConfigError(f"--{name} {value:g}: between 1 and {high}")
        return self


@dataclass(frozen=True, slots=True)
class Latencies:
    """Percentiles in milliseconds of `count` requests."""

    count: int
    p50_ms: float
    p99_ms: float
    max_ms: float

    @classmethod
    def of(cls, seconds: "np.ndarray[Any, np.dtype[np.float64]]") -> Self:
        p50, p99, top = (float(value) * 1e3 for value in np.percentile(seconds, [50, 99, 100]))
        return cls(len(seconds), round(p50, 2), round(p99, 2), round(top, 2))


@dataclass(frozen=True, slots=True)
class FairnessResults:
    """The results. `waits_*`: by how much the requests of user B took longer than the engine needs, while B is alone
    and while user A floods the router. `first_token_*`: time to the first token of interactive streams, without and
    with a queue of batch requests. `starts_of_a`, `batch_ended`: number of served requests of user A and of the batch
    class."""

    options: FairnessOptions
    waits_alone: Latencies
    waits_beside_flood: Latencies
    starts_of_a: int
    first_token_alone: Latencies
    first_token_before_batch: Latencies
    batch_ended: int
    at: str

    @property
    def ratio(self) -> float:
        """The 99th percentile of interactive streams' time to the first token with batch requests, divided by
        without."""
        return self.first_token_before_batch.p99_ms / self.first_token_alone.p99_ms

    def to_json(self) -> dict[str, Any]:
        value = asdict(self) | {"ratio": round(self.ratio, 3), "origin": origin_of(self.at)}
        value["options"]["out"] = str(self.options.out)
        return value

    def markdown(self) -> str:
        rows = [
            ("B's wait alone", self.waits_alone),
            (f"B's wait beside {self.options.flood} requests of A", self.waits_beside_flood),
            ("interactive first token alone", self.first_token_alone),
            (f"interactive first token before {self.options.flood} batch requests", self.first_token_before_batch),
        ]
        lines = [f"# Fairness, {self.at}", "", "| | requests | p50 ms | p99 ms | max ms |", "|---|---|---|---|---|"]
        lines += [f"| {name} | {one.count} | {one.p50_ms:g} | {one.p99_ms:g} | {one.max_ms:g} |" for name, one in rows]
        return "\n".join([
            *lines, "",
            f"The first-token p99 with the batch queue is {self.ratio:.2f} of that without. Meanwhile "
            f"{self.starts_of_a} requests of A and {self.batch_ended} batch requests were served by "
            f"{self.options.workers} workers.",
        ])  # fmt: skip


def fairness(options: FairnessOptions, console: Console) -> FairnessResults:
    """Makes both measurements, writes JSON and Markdown, and returns the results. Raises ConfigError, LaunchError."""
    build_program("load")
    at = utc_now()
    overrides = [f"topology={TOPOLOGY}", f"router.workers={options.workers}"]
    with (
        sigterm_as_interrupt(),
        StepDisplay(console) as steps,
        tempfile.TemporaryDirectory(prefix="fairness-") as folder,
    ):
        steps.show("bringing the deployment up")
        with running_deployment(overrides) as deployment:
            results = _Measurement(options, deployment, Path(folder), steps.show).run(at)
    path = write_results(options.out, stem_of("fairness", at), results.to_json(), {"md": results.markdown() + "\n"})
    console.print(f"written: {path}.json and .md", highlight=False, soft_wrap=True)
    return results


class _Measurement:
    def __init__(
        self, options: FairnessOptions, deployment: SoakDeployment, folder: Path, show: Callable[[str], None]
    ) -> None:
        self._options, self._folder, self._show = options, folder, show
        self._run = deployment.run
        self._deployment = deployment
        self._host, self._port = LoadTarget(deployment.url, deployment.token).address

    def run(self, at: str) -> FairnessResults:
        options = self._options
        a, b = (create_token(self._run, name)[1] for name in ("a", "b"))
        time.sleep(2.0)  # the workers read new tokens every 0.5 s
        every_second = [float(n) for n in range(int(options.seconds))]
        random = np.random.default_rng(options.seed)
        arrivals = np.cumsum(random.exponential(1 / options.rate, int(options.rate * options.seconds * 2)))
        streams = [float(arrival) for arrival in arrivals if arrival < options.seconds]

        self._show("user B alone")
        alone = self._waits(self._load("b", b, "fixed", arrivals_s=every_second, max_tokens=1))
        self._show(f"user B beside {options.flood} requests of user A")
        with self._flood("a", a, "fixed", max_tokens=1) as ended_a:
            beside = self._waits(self._load("b", b, "fixed", arrivals_s=every_second, max_tokens=1))
        self._show("interactive streams alone")
        stream: dict[str, Any] = {"max_tokens": STREAM_TOKENS, "stream": True, "ignore_eos": True}
        before = self._first_tokens(self._load("i", b, "batched", arrivals_s=streams, **stream))
        self._show(f"interactive streams before {options.flood} batch requests")
        with self._flood("batch", a, "batched", max_tokens=BATCH_TOKENS, ignore_eos=True) as ended_batch:
            behind = self._first_tokens(self._load("i", b, "batched", arrivals_s=streams, **stream))
        return FairnessResults(options, alone, beside, ended_a(), before, behind, ended_batch(), at)

    def _requests(self, name: str, token: str, expert: str, **fields: Any) -> Path:
        head = f"{PRIORITY_HEADER}: batch\r\n" if name == "batch" else ""
        host = f"{self._host}:{self._port}"
        texts = [f"{prompt.text} ({name} {n})" for n, prompt in enumerate(built_in())]
        bodies = [chat_body(text, expert, **fields) for text in texts]
        requests = [http_request(body, host=host, path=CHAT, token=token, more=head) for body in bodies]
        return write_requests(self._folder / f"{name}-{expert}.requests", requests)

    def _load(self, name: str, token: str, expert: str, *, arrivals_s: list[float], **fields: Any) -> Table:
        """Sends a request to `expert` at each time in `arrivals_s` (seconds from the start) and returns their records.
        `name`: name of the load; `fields`: fields of the bodies. Raises LaunchError if a request failed."""
        spec = LoadSpec(
            requests=self._requests(name, token, expert, **fields),
            host=self._host,
            port=self._port,
            connections=256,
            arrivals_s=arrivals_s,
            timeout_s=TIMEOUT_S,
            drain_s=TIMEOUT_S,
        )
        requests = run(spec, self._folder / f"{name}-{time.monotonic_ns()}", timeout_s=None).requests
        if failed := int((requests["error"] != Error.NONE).sum()):
            raise LaunchError(f"{failed} of {len(requests)} requests of load {name!r} failed")
        return requests

    @contextmanager
    def _flood(self, name: str, token: str, expert: str, **fields: Any) -> Iterator[Callable[[], int]]:
        """Keeps `options.flood` requests for `expert` in the router during the block. Yields a function that returns
        how many of them were served; it can be called after the block. `name`, `fields`: as for `_load`."""
        served: list[int] = []
        spec = LoadSpec(
            requests=self._requests(name, token, expert, **fields),
            host=self._host,
            port=self._port,
            connections=self._options.flood,
            seconds=self._options.seconds + 4 * FILL_S,
            timeout_s=TIMEOUT_S,
            drain_s=0.0,
        )
        with running(spec, self._folder / f"flood-{name}") as load:
            time.sleep(FILL_S)
            yield lambda: served[0]
            recorded = load.wait(timeout_s=TIMEOUT_S)
        served.append(int((recorded.requests["error"] == Error.NONE).sum()))

    @staticmethod
    def _waits(requests: Table) -> Latencies:
        return Latencies.of((requests["end"] - requests["due"]) / NS - SERVICE_S)

    @staticmethod
    def _first_tokens(requests: Table) -> Latencies:
        return Latencies.of((requests["first_event"] - requests["due"]) / NS)
