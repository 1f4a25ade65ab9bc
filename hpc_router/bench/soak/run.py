"""One soak, from its options to its files: deploy, load, strike and look, settle, judge."""

import json
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import numpy as np
import psutil
from rich.console import Console

from hpc_router.bench.interrupt import sigterm_as_interrupt
from hpc_router.bench.load.native.build import built
from hpc_router.bench.load.native.load import LoadSpec, Recorded, Running, running, write_requests
from hpc_router.bench.prompts import built_in
from hpc_router.bench.relay_cost.requests import request
from hpc_router.bench.relay_cost.run import Steps, origin_of
from hpc_router.bench.soak.deployment import SoakDeployment, deployed
from hpc_router.bench.soak.options import FaultTarget, SoakOptions
from hpc_router.bench.soak.report import LoadSummary, SoakResults, markdown, plot, to_json
from hpc_router.bench.soak.verdict import NS, Sample, Struck, complaints, failures, flat
from hpc_router.state.atomic_files import replace_text

TOPOLOGY: Final = "soak"
EXPERTS: Final = ("code", "math", "law", "generalist", "auto", "auto")
VARIETY: Final = 1000
SHORT_TOKENS: Final = 4
STREAM_TOKENS: Final = 60
SETTLE_S: Final = 20.0
DRAIN_S: Final = 60.0
LOOK_S: Final = 1.0
TELL_S: Final = 10.0
TICK_S: Final = 0.1


def soak(options: SoakOptions, console: Console) -> SoakResults:
    """Write the three files, and return what they hold. Raises ConfigError and LaunchError."""
    built("load")
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    overrides = [f"topology={TOPOLOGY}", "policy=classifier", f"router.workers={options.workers}"]
    with sigterm_as_interrupt(), Steps(console) as steps:
        steps.tell("bringing the deployment up")
        with deployed(overrides) as site:
            results = _measured(options, site, steps, at)
            site.keep = results.failed
            if results.failed:
                console.print(f"kept, with its logs: {site.run.path.parent}", highlight=False, soft_wrap=True)
    _write(results, console)
    return results


def _measured(options: SoakOptions, site: SoakDeployment, steps: Steps, at: str) -> SoakResults:
    descriptors = _descriptors(site)
    with tempfile.TemporaryDirectory(prefix="soak-load-") as folder, ExitStack() as stack:
        parts = [
            (name, stack.enter_context(running(load, Path(folder) / name)))
            for name, load in _loads(options, site, Path(folder)).items()
        ]
        begun_ns = parts[0][1].begun_ns
        watch = _FaultInjector(options, site, begun_ns, [under_way for _, under_way in parts])
        watch.until_over(steps)
        recorded = [(name, one.begun_ns, one.wait(patience_s=DRAIN_S)) for name, one in parts]
    steps.tell("waiting until nothing is left")
    gauges = _settled(site)
    after = _descriptors(site, at_most=descriptors)
    loads = [_part(name, load, begun, watch.struck) for name, begun, load in recorded]
    flats = flat(watch.samples, seconds=options.seconds)
    idle_fds = None if descriptors is None or after is None else (descriptors, after)
    origin = origin_of(at)
    said = complaints(
        unexplained=[one for part in loads for one in part.failures if one.allowed is None],
        missed=watch.due,
        gauges=gauges,
        flats=flats,
        idle_fds=idle_fds,
        answered=min(part.answered for part in loads),
    )
    return SoakResults(
        options, loads, watch.struck, watch.samples, flats, gauges, idle_fds, begun_ns, said, origin
    )  # fmt: skip


def _loads(options: SoakOptions, site: SoakDeployment, folder: Path) -> dict[str, LoadSpec]:
    """Short requests as they come, and streams one after the other; each with an opening of its own."""
    random = np.random.default_rng(options.seed)
    arrivals = np.cumsum(random.exponential(1 / options.rate, int(options.rate * options.seconds * 2)))
    texts = [prompt.text for prompt in built_in()]

    def written(name: str, **fields: object) -> Path:
        made = [
            request(
                site.port,
                token=site.token,
                prompt=f"{texts[n % len(texts)]} ({name} {n})",
                model=EXPERTS[n % len(EXPERTS)],
                **fields,
            )
            for n in range(VARIETY)
        ]
        return write_requests(folder / f"{name}.requests", made)

    return {
        "short": LoadSpec(
            requests=written("short", stream=False, max_tokens=SHORT_TOKENS),
            host=site.host,
            port=site.port,
            connections=min(1000, max(16, int(options.rate * 4))),
            arrivals_s=[float(at) for at in arrivals if at < options.seconds],
            label="x-replica",
            drain_s=DRAIN_S,
        ),
        "streams": LoadSpec(
            requests=written("streams", stream=True, max_tokens=STREAM_TOKENS, ignore_eos=True),
            host=site.host,
            port=site.port,
            connections=options.streams,
            seconds=options.seconds,
            ramp_s=min(5.0, options.seconds / 5),
            label="x-replica",
            drain_s=DRAIN_S,
        ),
    }


class _FaultInjector:
    """Strikes when it is time, and looks once a second, until the loads are over."""

    def __init__(self, options: SoakOptions, site: SoakDeployment, begun_ns: int, loads: Sequence[Running]) -> None:
        self._seconds, self._site, self._begun_ns, self._loads = options.seconds, site, begun_ns, loads
        self.due = options.schedule()
        self.struck: list[Struck] = []
        self.samples: list[Sample] = []

    @property
    def elapsed_s(self) -> float:
        return (time.monotonic_ns() - self._begun_ns) / NS

    def until_over(self, steps: Steps) -> None:
        """Looking has a thread of its own: a router that answers late must not delay what is due."""
        look_at, tell_at = 0.0, 0.0
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="look") as looker:
            looking: Future[Sample] | None = None
            while any(load.process.poll() is None for load in self._loads):
                now = self.elapsed_s
                if self.due and self.due[0][0] <= now < self._seconds:
                    self._strike(self.due[0][1])
                if looking is not None and looking.done():
                    self.samples.append(looking.result())
                    looking = None
                if looking is None and now >= look_at:
                    look_at = now + LOOK_S
                    looking = looker.submit(_sample, self._site, now)
                if now >= tell_at:
                    tell_at = now + TELL_S
                    steps.tell(f"{now:.0f} of {self._seconds:g} s, {len(self.struck)} struck")
                time.sleep(TICK_S)

    def _strike(self, target: FaultTarget) -> None:
        """What cannot be struck now stays due."""
        struck = self._site.strike(target)
        if struck is not None:
            self.struck.append(struck)
            self.due.pop(0)


def _sample(site: SoakDeployment, at_s: float) -> Sample:
    status = site.status()
    ready = in_flight = waiting = None
    rss_mb: dict[str, float] = {}
    fds: dict[str, int] = {}
    if status is not None:
        experts = status["experts"].values()
        ready = sum(expert["ready"] for expert in experts)
        waiting = sum(expert["waiting"] for expert in experts)
        in_flight = status["router"]["in_flight"]
        for name, pid in site.processes(status).items():
            try:
                process = psutil.Process(pid)
                rss_mb[name], fds[name] = round(process.memory_info().rss / 2**20, 2), process.num_fds()
            except psutil.Error:
                continue
    return Sample(round(at_s, 2), ready, in_flight, waiting, rss_mb, fds)


def _settled(site: SoakDeployment) -> dict[str, float] | None:
    deadline = time.monotonic() + SETTLE_S
    while True:
        gauges = site.gauges()
        if (gauges is not None and not any(gauges.values())) or time.monotonic() > deadline:
            return gauges
        time.sleep(TICK_S)


def _descriptors(site: SoakDeployment, *, at_most: int | None = None) -> int | None:
    """Of all processes of the router; once there are no more than that, or the time is over."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        fds = _sample(site, 0.0).fds
        count = sum(fds.values()) if fds else None
        if at_most is None or (count is not None and count <= at_most) or time.monotonic() > deadline:
            return count
        time.sleep(LOOK_S)


def _part(name: str, load: Recorded, begun_ns: int, struck: Sequence[Struck]) -> LoadSummary:
    labels = [str(label) for label in load.summary.get("labels", [])]
    found = failures(name, load.requests, labels=labels, struck=struck, begun_ns=begun_ns)
    return LoadSummary(name, load.requests, found, begun_ns, labels)


def _write(results: SoakResults, console: Console) -> None:
    folder = results.options.out
    folder.mkdir(parents=True, exist_ok=True)
    name = f"soak-{results.origin['at'].replace('-', '').replace(':', '')}"
    texts = {
        "json": json.dumps(to_json(results), indent=1, allow_nan=False) + "\n",
        "svg": plot(results),
        "md": markdown(results, plot=f"{name}.svg"),
    }
    for suffix, text in texts.items():
        replace_text(folder / f"{name}.{suffix}", text, mode=0o644)
    console.print(f"written: {folder / name}.json, .md and .svg", highlight=False, soft_wrap=True)
