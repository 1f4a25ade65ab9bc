"""Runs one soak from its options to its result files: starts the deployment, sends the load, injects the faults, waits
until the router is idle, and judges the result."""

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import psutil
from rich.console import Console

from hpc_router.bench.load.generator import LoadTarget
from hpc_router.bench.load.native.build import build_program
from hpc_router.bench.load.native.load import LoadSpec, Recorded, Running, running, write_requests
from hpc_router.bench.output import stem_of, utc_now, write_results
from hpc_router.bench.progress import StepDisplay
from hpc_router.bench.prompts import built_in
from hpc_router.bench.provenance import origin_of
from hpc_router.bench.relay_cost.requests import request
from hpc_router.bench.soak.deployment import SoakDeployment, running_deployment
from hpc_router.bench.soak.options import FaultTarget, SoakOptions
from hpc_router.bench.soak.report import LoadSummary, SoakResults, markdown, plot, to_json
from hpc_router.bench.soak.verdict import NS, InjectedFault, Sample, complaints, failures, growth_checks
from hpc_router.cluster.signals import sigterm_as_interrupt

TOPOLOGY: Final = "soak"
EXPERTS: Final = ("code", "math", "law", "generalist", "auto", "auto")
VARIETY: Final = 1000
SHORT_TOKENS: Final = 4
STREAM_TOKENS: Final = 60
IDLE_TIMEOUT_S: Final = 20.0
DRAIN_S: Final = 60.0
SAMPLE_S: Final = 1.0
SHOW_S: Final = 10.0
TICK_S: Final = 0.1

T = TypeVar("T")


def soak(options: SoakOptions, console: Console) -> SoakResults:
    """Runs a soak, writes the three result files and returns their content. Raises ConfigError and LaunchError."""
    build_program("load")
    at = utc_now()
    overrides = [f"topology={TOPOLOGY}", "policy=classifier", f"router.workers={options.workers}"]
    with sigterm_as_interrupt(), StepDisplay(console) as steps:
        steps.show("bringing the deployment up")
        with running_deployment(overrides) as deployment:
            results = _measure(options, deployment, steps, at)
            deployment.keep = results.failed
            if results.failed:
                folder = deployment.run.path.parent
                console.print(f"kept for its logs: {folder}", highlight=False, soft_wrap=True)
    stem = stem_of("soak", at)
    texts = {"svg": plot(results), "md": markdown(results, plot=f"{stem}.svg")}
    path = write_results(options.out, stem, to_json(results), texts)
    console.print(f"written: {path}.json, .md and .svg", highlight=False, soft_wrap=True)
    return results


def _measure(options: SoakOptions, deployment: SoakDeployment, steps: StepDisplay, at: str) -> SoakResults:
    fds_before = _descriptors(deployment)
    with tempfile.TemporaryDirectory(prefix="soak-load-") as folder, ExitStack() as stack:
        loads = [
            (name, stack.enter_context(running(spec, Path(folder) / name)))
            for name, spec in _loads(options, deployment, Path(folder)).items()
        ]
        begun_ns = loads[0][1].begun_ns
        injector = _FaultInjector(options, deployment, begun_ns, [load for _, load in loads])
        injector.run(steps)
        recorded = [(name, load.begun_ns, load.wait(timeout_s=DRAIN_S)) for name, load in loads]
    steps.show("waiting until the router is idle")
    gauges = _idle_gauges(deployment)
    fds_after = _descriptors(deployment, at_most=fds_before)
    summaries = [_summary(name, load, begun, injector.faults) for name, begun, load in recorded]
    growth = growth_checks(injector.samples, seconds=options.seconds)
    idle_fds = None if fds_before is None or fds_after is None else (fds_before, fds_after)
    found = complaints(
        unexplained=[one for summary in summaries for one in summary.failures if one.allowed is None],
        missed=injector.due,
        gauges=gauges,
        growth=growth,
        idle_fds=idle_fds,
        answered=min(summary.answered for summary in summaries),
    )
    return SoakResults(
        options, summaries, injector.faults, injector.samples, growth, gauges, idle_fds, begun_ns, found, origin_of(at)
    )


def _loads(options: SoakOptions, deployment: SoakDeployment, folder: Path) -> dict[str, LoadSpec]:
    """Returns the two loads by name: short requests that arrive at a fixed rate, and a fixed number of open streams.
    All prompts are long enough and differ from the beginning on, so that the router treats each as a separate
    conversation."""
    host, port = LoadTarget(deployment.url, deployment.token).address
    random = np.random.default_rng(options.seed)
    arrivals = np.cumsum(random.exponential(1 / options.rate, int(options.rate * options.seconds * 2)))
    texts = [prompt.text for prompt in built_in()]

    def request_file(name: str, **fields: object) -> Path:
        requests = [
            request(
                port,
                token=deployment.token,
                prompt=f"({name} {n})" + f" {texts[n % len(texts)]}" * 3,
                model=EXPERTS[n % len(EXPERTS)],
                **fields,
            )
            for n in range(VARIETY)
        ]
        return write_requests(folder / f"{name}.requests", requests)

    return {
        "short": LoadSpec(
            requests=request_file("short", stream=False, max_tokens=SHORT_TOKENS),
            host=host,
            port=port,
            connections=min(1000, max(16, int(options.rate * 4))),
            arrivals_s=[float(at) for at in arrivals if at < options.seconds],
            label="x-replica",
            drain_s=DRAIN_S,
        ),
        "streams": LoadSpec(
            requests=request_file("streams", stream=True, max_tokens=STREAM_TOKENS, ignore_eos=True),
            host=host,
            port=port,
            connections=options.streams,
            seconds=options.seconds,
            ramp_s=min(5.0, options.seconds / 5),
            label="x-replica",
            drain_s=DRAIN_S,
        ),
    }


class _FaultInjector:
    """Injects the scheduled faults, and samples the router's state once a second, until the loads have ended."""

    def __init__(
        self, options: SoakOptions, deployment: SoakDeployment, begun_ns: int, loads: Sequence[Running]
    ) -> None:
        self._seconds, self._deployment, self._begun_ns, self._loads = options.seconds, deployment, begun_ns, loads
        self.due = options.schedule()
        self.faults: list[InjectedFault] = []
        self.samples: list[Sample] = []

    @property
    def elapsed_s(self) -> float:
        return (time.monotonic_ns() - self._begun_ns) / NS

    def run(self, steps: StepDisplay) -> None:
        """Injects the scheduled faults until the loads have ended. Another thread samples the router's state, so that a
        slow response does not delay a fault."""
        sample_at, show_at = 0.0, 0.0
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="sample") as pool:
            sampling: Future[Sample] | None = None
            while any(load.process.poll() is None for load in self._loads):
                now = self.elapsed_s
                if self.due and self.due[0][0] <= now < self._seconds:
                    self._inject(self.due[0][1])
                if sampling is not None and sampling.done():
                    self.samples.append(sampling.result())
                    sampling = None
                if sampling is None and now >= sample_at:
                    sample_at = now + SAMPLE_S
                    sampling = pool.submit(_sample, self._deployment, now)
                if now >= show_at:
                    show_at = now + SHOW_S
                    steps.show(f"{now:.0f} of {self._seconds:g} s, {len(self.faults)} faults injected")
                time.sleep(TICK_S)

    def _inject(self, target: FaultTarget) -> None:
        """Kills a process of the kind `target`. If none can be killed now, the fault is tried again later."""
        fault = self._deployment.inject(target)
        if fault is not None:
            self.faults.append(fault)
            self.due.pop(0)


def _sample(deployment: SoakDeployment, at_s: float) -> Sample:
    status = deployment.status()
    ready = in_flight = waiting = None
    rss_mb: dict[str, float] = {}
    fds: dict[str, int] = {}
    if status is not None:
        experts = status["experts"].values()
        ready = sum(expert["ready"] for expert in experts)
        waiting = sum(expert["waiting"] for expert in experts)
        in_flight = status["router"]["in_flight"]
        for name, pid in deployment.processes(status).items():
            try:
                process = psutil.Process(pid)
                rss_mb[name], fds[name] = round(process.memory_info().rss / 2**20, 2), process.num_fds()
            except psutil.Error:
                continue
    return Sample(round(at_s, 2), ready, in_flight, waiting, rss_mb, fds)


def _idle_gauges(deployment: SoakDeployment) -> dict[str, float] | None:
    """Waits until the router's counts of requests in flight and waiting are all zero, for at most IDLE_TIMEOUT_S.
    Returns the last counts; None if the router does not respond."""
    return _read_until(deployment.gauges, lambda gauges: gauges is not None and not any(gauges.values()))


def _descriptors(deployment: SoakDeployment, *, at_most: int | None = None) -> int | None:
    """Returns the number of open file descriptors of all router processes; None if the router does not respond. With
    `at_most`, first waits until there are at most that many, for at most IDLE_TIMEOUT_S."""

    def count() -> int | None:
        return sum(_sample(deployment, 0.0).fds.values()) or None

    return _read_until(count, lambda fds: at_most is None or (fds is not None and fds <= at_most))


def _read_until(read: Callable[[], T], accepted: Callable[[T], bool]) -> T:
    """Calls `read` until `accepted` is true for its result, for at most IDLE_TIMEOUT_S. Returns the last result."""
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    while not accepted(value := read()) and time.monotonic() <= deadline:
        time.sleep(TICK_S)
    return value


def _summary(name: str, load: Recorded, begun_ns: int, faults: Sequence[InjectedFault]) -> LoadSummary:
    labels = [str(label) for label in load.summary.get("labels", [])]
    failed = failures(name, load.requests, labels=labels, faults=faults, begun_ns=begun_ns)
    return LoadSummary(name, load.requests, failed, begun_ns, labels)
