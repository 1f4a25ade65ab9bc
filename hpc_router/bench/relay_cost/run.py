"""Runs `hpc-router bench router`, from its options to its result files."""

import os
import resource
from pathlib import Path
from typing import Final

from rich.console import Console

from hpc_router.bench.load.native.build import build_program
from hpc_router.bench.output import stem_of, utc_now, write_results
from hpc_router.bench.progress import StepDisplay
from hpc_router.bench.provenance import ROOT, origin_of
from hpc_router.bench.relay_cost.interface import Relay
from hpc_router.bench.relay_cost.options import RelayCostOptions
from hpc_router.bench.relay_cost.other_relays import other_relays
from hpc_router.bench.relay_cost.processes import cores_of
from hpc_router.bench.relay_cost.report import RelayCostResults, markdown, to_json
from hpc_router.bench.relay_cost.rounds import RelayRounds, measure_all
from hpc_router.bench.relay_cost.this_router import this_router
from hpc_router.cluster.signals import sigterm_as_interrupt
from hpc_router.errors import ConfigError, LaunchError, suggest

RELAY_VENV: Final = ".venv-bench-peers"
FDS_PER_STREAM: Final = 8
"""Number of open files per stream over all processes, with a margin. At most half of them belong to one process."""


def default_environment() -> Path | None:
    """Returns the environment with routers from PyPI that `make bench-peers` creates; None if it does not exist."""
    return ROOT / RELAY_VENV if (ROOT / RELAY_VENV).is_dir() else None


def measure_relay_cost(options: RelayCostOptions, console: Console) -> RelayCostResults:
    """Measures all relays, writes JSON and Markdown, and returns the results; after an interrupt, those of the rounds
    that were measured. Raises ConfigError, LaunchError, and KeyboardInterrupt if nothing was measured yet."""
    chosen = _chosen([*other_relays(options.environment), *this_router(options.trees)], options)
    absent = {relay.name: why for relay in chosen if (why := relay.absent()) is not None}
    present = [relay for relay in chosen if relay.name not in absent]
    for name, why in absent.items():
        console.print(f"{name}: {why}", style="yellow", highlight=False)
    if not present:
        raise LaunchError("none of the chosen relays is installed")
    for program in ("load", "engine"):
        build_program(program)
    raise_file_limit(options.streams)
    cores = cores_of(list(os.sched_getaffinity(0)))
    if not cores.separate:
        console.print("only one core: the figures are less meaningful", style="yellow")
    at, interrupted = utc_now(), False
    found = [RelayRounds(relay, relay.version()) for relay in present]
    try:
        with sigterm_as_interrupt(), StepDisplay(console) as steps:
            measure_all(found, options, cores, steps.show)
    except KeyboardInterrupt:
        if not any(one.rounds for one in found):
            raise
        interrupted = True
    results = RelayCostResults(
        options, cores, {one.relay.name: one for one in found}, absent, origin_of(at), interrupted=interrupted
    )
    path = write_results(options.out, stem_of("router", at), to_json(results), {"md": markdown(results)})
    console.print(f"written: {path}.json and .md", highlight=False, soft_wrap=True)
    return results


def _chosen(known: list[Relay], options: RelayCostOptions) -> list[Relay]:
    names = [relay.name for relay in known]
    for name in options.trees:
        if names.count(name) > 1:
            raise ConfigError(f"--tree {name}=...: there is a relay of that name; choose another name")
    for name in options.only:
        if name not in names:
            raise ConfigError(f"--only {name}: no such relay{suggest(name, names)}")
    return [relay for relay in known if not options.only or relay.name in options.only]


def raise_file_limit(streams: int) -> None:
    """Raises this process's limit of open files as far as it can. Raises LaunchError if `streams` need more."""
    needed, (_, hard) = streams * FDS_PER_STREAM // 2, resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise LaunchError(f"{streams} streams need {needed} open files per process, but the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
