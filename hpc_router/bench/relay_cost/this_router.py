"""This router as a relay under test: a run directory, endpoints in its registry, and `python -m launch.router`.

Its policy is the classifier of `topology=sim`, trained from the packaged exemplars. Only requests for `auto` are
classified. No control loop runs, because there are no jobs to manage. Requests have the owner's token, or that of a
user with limits that are never reached.
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import hpc_router
from hpc_router.bench.load.native.engine import NAMES
from hpc_router.bench.provenance import ROOT
from hpc_router.bench.relay_cost import requests
from hpc_router.bench.relay_cost.interface import (
    START_TIMEOUT_S,
    Relay,
    RelayPlacement,
    StartedRelay,
    check_starting,
    serves,
)
from hpc_router.bench.relay_cost.processes import ProcessGroup, pinned_to, process_group
from hpc_router.state import registry
from hpc_router.state.registry import Record, RecordKind, RegistryReader, State, leading_router
from hpc_router.state.run_directory import RunDir, make_run
from hpc_router.state.user_tokens import TokenLimits, create_token

CAPACITY: Final = 100_000
NEVER_REACHED: Final = TokenLimits(requests=10**9, tokens=10**12, concurrency=CAPACITY)
OPTIONS: Final = ("topology=sim", "policy=classifier", "router.host=127.0.0.1", "router.reconcile=false")


@dataclass(frozen=True, slots=True)
class ThisRouter(Relay):
    """This router in front of the mock engine. The registry lists the engine as an external endpoint of each expert."""

    name: str = "router"
    classifies: bool = True
    tree: Path = ROOT  # the checkout of the code to run
    workers: int = 1  # number of workers, all on the relay's core
    user: str | None = None  # whose token the requests have; None: the owner's

    def version(self) -> str:
        return hpc_router.__version__ if self.tree == ROOT else ""

    @contextmanager
    def started(self, placement: RelayPlacement) -> Iterator[StartedRelay]:
        run = make_run(placement.folder / "run")
        for expert in NAMES:
            registry.publish(run.registry, _external(expert, f"http://127.0.0.1:{placement.engine.port}"))
        with process_group() as processes:
            with pinned_to(placement.cores):
                processes.start(
                    router_argv(run, workers=self.workers), log=placement.log, environment=environment_of(self.tree)
                )
            token = None if self.user is None else create_token(run, self.user, limits=NEVER_REACHED)[1]
            yield _wait_until_serving(run, processes, placement, models=(*NAMES, "auto"), token=token)


@dataclass(frozen=True, slots=True)
class RouterAndAgent(Relay):
    """This router and an agent's request path on one core. The agent relays to the engine's unix socket."""

    name: str = "router+agent"
    hops: int = 2
    behind_socket: bool = True

    def version(self) -> str:
        return hpc_router.__version__

    @contextmanager
    def started(self, placement: RelayPlacement) -> Iterator[StartedRelay]:
        run = make_run(placement.folder / "run")
        assert placement.engine.socket is not None
        with process_group() as processes:
            with pinned_to(placement.cores):
                processes.start(
                    agent_argv(run, placement.engine.socket), log=placement.log, environment=environment_of(ROOT)
                )
                processes.start(router_argv(run), log=placement.log, environment=environment_of(ROOT))
            yield _wait_until_serving(run, processes, placement, models=(requests.MODEL,))


def this_router(trees: Mapping[str, Path] | None = None) -> list[Relay]:
    """Returns the variants of this router as relays, and one for each of `trees`, other checkouts of it by name."""
    others = [ThisRouter(name=name, tree=tree) for name, tree in (trees or {}).items()]
    return [
        ThisRouter(),
        ThisRouter(name="router-user", user="bench"),
        ThisRouter(name="router-2-workers", classifies=False, workers=2),
        RouterAndAgent(),
        *others,
    ]


def router_argv(run: RunDir, *, workers: int = 1, options: Sequence[str] = OPTIONS) -> list[str]:
    return [sys.executable, "-m", "launch.router", f"run={run.path}", f"router.workers={workers}", *options]


def agent_argv(run: RunDir, socket: Path) -> list[str]:
    replica = registry.replica_name(requests.MODEL, 0, 1)
    arguments = ["--run", str(run.path), "--replica", replica, "--socket", str(socket)]
    return [sys.executable, "-m", "hpc_router.bench.relay_cost.agent_relay_only", *arguments]


def environment_of(tree: Path) -> dict[str, str]:
    """Returns environment variables with which Python imports the packages of the checkout `tree`."""
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{tree}{os.pathsep}{before}" if before else str(tree)}


def _external(expert: str, url: str) -> Record:
    return Record(
        kind=RecordKind.EXTERNAL,
        replica=registry.replica_name(expert, "x0", 1),
        url=url,
        state=State.READY,
        serves={expert: expert},
        capacity=CAPACITY,
    )


def _wait_until_serving(
    run: RunDir,
    processes: ProcessGroup,
    placement: RelayPlacement,
    *,
    models: tuple[str, ...],
    token: str | None = None,
) -> StartedRelay:
    """Blocks until the router serves all of `models`, and returns the running router. `token`: None: the owner's.
    Raises LaunchError."""
    deadline = time.monotonic() + START_TIMEOUT_S
    missing = list(models)
    while True:
        record = leading_router(RegistryReader(run.registry).snapshot())
        if record is not None:
            started = StartedRelay(int(record.url.rpartition(":")[2]), processes, token or run.token())
            while missing and serves(started, missing[0]):
                missing.pop(0)
            if not missing:
                return started
        check_starting(processes, placement.log, deadline)
        time.sleep(0.05)
