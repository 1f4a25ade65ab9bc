"""Measures what open pages of the dashboard cost the router: `hpc-router bench pages`.

One router relays a constant number of streams from the mock engine. Windows without pages and with each number of pages
take turns during this one load, in another order in each round, so that changes of the machine's speed affect all
numbers alike. A page is a client that reads `GET /overview?follow=true`, as the dashboard does.
"""

import contextlib
import http.client
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final, Self

import numpy as np
from rich.console import Console

from hpc_router.bench.load.native.build import build_program
from hpc_router.bench.load.native.engine import mock_engine
from hpc_router.bench.load.native.load import (
    EXIT_TIMEOUT_S,
    MAX_CONNECTIONS,
    LoadSpec,
    Running,
    running,
    write_requests,
)
from hpc_router.bench.load.native.records import Error, errors
from hpc_router.bench.progress import StepDisplay
from hpc_router.bench.relay_cost import requests
from hpc_router.bench.relay_cost.cpu_time import CpuCost, Meter
from hpc_router.bench.relay_cost.interface import RelayPlacement, StartedRelay
from hpc_router.bench.relay_cost.processes import cores_of, pinned_to
from hpc_router.bench.relay_cost.run import raise_file_limit
from hpc_router.bench.relay_cost.this_router import ThisRouter
from hpc_router.cluster.signals import sigterm_as_interrupt
from hpc_router.errors import ConfigError, LaunchError

STARTS_PER_S: Final = 500
SETTLE_S: Final = 1.0
"""Time in seconds between a change of the number of pages and the next window."""
PAGE_TIMEOUT_S: Final = 30.0
MAX_PAGES: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPagesOptions:
    """The options. `rate`: events per second of each stream; `seconds`: length of a window; `rounds`: number of windows
    with each number of pages; `pages`: the largest number of pages."""

    streams: int = 1000
    rate: float = 10.0
    seconds: float = 5.0
    rounds: int = 5
    pages: int = 10

    def checked(self) -> Self:
        """Returns the options if they are valid, else raises ConfigError."""
        for name, value, low, high in (
            ("streams", self.streams, 1, MAX_CONNECTIONS),
            ("rate", self.rate, 0.1, 1000),
            ("seconds", self.seconds, 0.1, 600),
            ("rounds", self.rounds, 1, 100),
            ("pages", self.pages, 1, MAX_PAGES),
        ):
            if not low <= value <= high:
                raise ConfigError(f"--{name} {value:g}: between {low:g} and {high:g}")
        return self

    @property
    def wanted(self) -> tuple[int, ...]:
        """Returns the numbers of pages that are measured, beginning with none."""
        return tuple(dict.fromkeys((0, 1, self.pages)))


@dataclass(frozen=True, slots=True)
class PageWindow:
    """The figures of one window. `cpu`: CPU time of all the router's processes as a share of a core. `hop_ms_p50`,
    `hop_ms_p99`: time from the engine's sending of an event to its arrival at the client."""

    round: int
    pages: int
    cpu: float
    hop_ms_p50: float
    hop_ms_p99: float
    events: int
    others_cpu: float  # of other processes on the router's core


@dataclass(frozen=True, slots=True)
class OpenPagesResults:
    """The windows, and the number of failed streams by kind of error."""

    options: OpenPagesOptions
    windows: Sequence[PageWindow]
    failed: dict[str, int] = field(default_factory=dict)

    def medians(self, name: str, pages: int) -> float:
        """Returns the median of a figure over the windows with this number of pages."""
        return float(median(getattr(window, name) for window in self.windows if window.pages == pages))

    def paired(self, name: str, pages: int, compare: Callable[[float, float], float]) -> list[float]:
        """Returns one comparison per round, sorted. `compare` gets the figure with `pages` pages, and without pages."""
        by_key = {(window.round, window.pages): getattr(window, name) for window in self.windows}
        return sorted(compare(value, by_key[number, 0]) for (number, of), value in by_key.items() if of == pages)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        options = self.options
        yield (
            f"{options.streams} streams x {options.rate:g} events/s, {options.rounds} windows of {options.seconds:g} s "
            "with each number of pages; medians, and range over the rounds"
        )
        for pages in options.wanted:
            text = (
                f"{pages} page{'' if pages == 1 else 's'}: {self.medians('cpu', pages):.1%} of a core, "
                f"hop p50 {self.medians('hop_ms_p50', pages):.2f} ms, p99 {self.medians('hop_ms_p99', pages):.2f} ms"
            )
            if pages:
                more = self.paired("cpu", pages, lambda one, none: one - none)
                ratio = self.paired("hop_ms_p99", pages, lambda one, none: one / none)
                text += (
                    f"; beside none: {100 * median(more):+.1f} ({100 * more[0]:+.1f} to {100 * more[-1]:+.1f}) points "
                    f"of CPU, p99 x {median(ratio):.2f} ({ratio[0]:.2f} to {ratio[-1]:.2f})"
                )
            yield text
        for kind, count in self.failed.items():
            yield f"failed: {count} x {kind}"


def order_of_round(wanted: Sequence[int], number: int) -> list[int]:
    """Returns the numbers of pages in the order of round `number`: each round begins with another one."""
    first = number % len(wanted)
    return [*wanted[first:], *wanted[:first]]


def measure_open_pages(options: OpenPagesOptions, console: Console) -> OpenPagesResults:
    """Starts engine, router and load on this machine, and measures all windows. Raises LaunchError."""
    for program in ("load", "engine"):
        build_program(program)
    raise_file_limit(options.streams)
    cores = cores_of(list(os.sched_getaffinity(0)))
    if not cores.separate:
        console.print("only one core: the figures are less meaningful", style="yellow")
    with (
        sigterm_as_interrupt(),
        StepDisplay(console) as steps,
        tempfile.TemporaryDirectory(prefix="hr-bench-", ignore_cleanup_errors=True) as name,
        pinned_to(cores.load),
        mock_engine(Path(name), rate=options.rate) as engine,
    ):
        steps.show("starting")
        with ThisRouter().started(RelayPlacement(engine, Path(name), cores.relay)) as started:
            return _measure(options, started, Meter(started.group, engine.pid, cores), Path(name), steps.show)


def _measure(
    options: OpenPagesOptions, started: StartedRelay, meter: Meter, folder: Path, show: Callable[[str], None]
) -> OpenPagesResults:
    ramp_s = max(0.5, options.streams / STARTS_PER_S)  # the streams then run until `stop`, as `drain_s` allows
    windows_s = options.rounds * len(options.wanted) * (options.seconds + SETTLE_S + PAGE_TIMEOUT_S / 10)
    events = max(1, round(options.rate * (ramp_s + SETTLE_S + windows_s)))
    sent = requests.streaming(started.port, token=started.token, events=events)
    spec = LoadSpec(
        requests=write_requests(folder / "load.requests", sent), port=started.port, connections=options.streams,
        count=options.streams, ramp_s=ramp_s, events=True, drain_s=windows_s,
    )  # fmt: skip
    costs: list[tuple[int, int, CpuCost]] = []
    with running(spec, folder / "load") as load:
        time.sleep(ramp_s)
        for number in range(options.rounds):
            for pages in order_of_round(options.wanted, number):
                show(f"round {number + 1} of {options.rounds}, {pages} pages")
                costs.append((number, pages, _window(load, started, meter, pages, options.seconds)))
        load.stop()
        found = load.wait(timeout_s=EXIT_TIMEOUT_S)
    rows, arrived, windows = found.requests, found.events, []
    for number, pages, cost in costs:
        inside = arrived[(arrived["at"] >= cost.begin.at_ns) & (arrived["at"] < cost.end.at_ns)]
        hops_ms = inside["hop"][inside["hop"] >= 0] / 1e6
        if not len(hops_ms):
            raise LaunchError("no events arrived in a window: the router is too slow for so many streams")
        p50, p99 = (float(value) for value in np.percentile(hops_ms, [50, 99]))
        windows.append(PageWindow(number, pages, cost.relay_share, p50, p99, len(inside), cost.others_share))
    kinds = {k: count for k, count in errors(rows).items() if count and k != Error.STOPPED.name.lower()}
    return OpenPagesResults(options, windows, kinds)


def _window(load: Running, started: StartedRelay, meter: Meter, pages: int, span_s: float) -> CpuCost:
    """Returns the CPU time of a window of `span_s` seconds in which this number of pages is open."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open_page(started.port, started.token)) for _ in range(pages)]
        for page in opened:
            page.wait()
        after_s = (time.monotonic_ns() - load.begun_ns) / 1e9 + SETTLE_S
        cost = meter.measure(load, after_s=after_s, span_s=span_s)
        if not all(page.open for page in opened):
            raise LaunchError("the router closed a page of the dashboard during a window")
    return cost


@dataclass(slots=True)
class OpenPage:
    """A page that is open: a thread reads its overviews. `count`: the number of overviews so far."""

    response: http.client.HTTPResponse
    open: bool = True
    count: int = 0
    _first: threading.Event = field(default_factory=threading.Event)

    def read(self) -> None:
        """Reads overviews until the connection ends."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            while self.response.readline():
                self.count += 1
                self._first.set()
        self.open = False
        self._first.set()

    def wait(self) -> None:
        """Blocks until the first overview has arrived. Raises LaunchError after `PAGE_TIMEOUT_S`."""
        if not self._first.wait(PAGE_TIMEOUT_S) or not self.count:
            raise LaunchError("the router sends no overview to a page of the dashboard")


@contextlib.contextmanager
def open_page(port: int, token: str) -> Iterator[OpenPage]:
    """Opens a page's connection to the router on this machine, and closes it with the block. Raises LaunchError."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PAGE_TIMEOUT_S)
    try:
        connection.request("GET", "/overview?follow=true", headers={"authorization": f"Bearer {token}"})
        sock, response = connection.sock, connection.getresponse()
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        raise LaunchError(f"a page of the dashboard cannot be opened: {error}") from error
    page = OpenPage(response)
    if response.status != 200:
        connection.close()
        raise LaunchError(f"a page of the dashboard cannot be opened: status {response.status}")
    reader = threading.Thread(target=page.read)
    reader.start()
    try:
        yield page
    finally:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        reader.join()
        response.close()
        connection.close()
