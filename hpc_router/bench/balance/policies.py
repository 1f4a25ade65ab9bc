"""The policies that are measured, each as a router in front of the engines, set up at its best."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hpc_router.bench.balance.options import EXPERT, BalanceOptions
from hpc_router.bench.load.generator import LoadTarget
from hpc_router.bench.provenance import ROOT
from hpc_router.bench.relay_cost.interface import START_TIMEOUT_S, StartedRelay, check_starting, find, serves
from hpc_router.bench.relay_cost.processes import ProcessGroup, process_group
from hpc_router.bench.relay_cost.this_router import environment_of, router_argv
from hpc_router.net.addresses import free_port
from hpc_router.state import registry
from hpc_router.state.registry import Record, RecordKind, RegistryReader, State, leading_router
from hpc_router.state.run_directory import make_run

CAPACITY: Final = 10_000
OPTIONS: Final = ("topology=empty", "router.host=127.0.0.1", "router.reconcile=false")
SETTLE_S: Final = 12.0
"""Seconds after its start in which smg sends nearly everything to one engine."""


@dataclass(frozen=True, slots=True)
class BalancePolicy(ABC):
    """A router with a policy. `peer`: whether it is a Rust router with a policy for prefix caches."""

    name: str
    peer: bool = False

    def absent(self) -> str | None:
        """Returns why it cannot be measured; None if it is installed."""
        return None

    @abstractmethod
    def setup(self) -> str:
        """Returns how it was set up, for the report."""

    @abstractmethod
    def started(self, urls: Sequence[str], folder: Path) -> AbstractContextManager[LoadTarget]:
        """Returns a context manager that starts the router in front of these engines. Raises LaunchError."""


@dataclass(frozen=True, slots=True)
class OwnPolicy(BalancePolicy):
    """This router, or another checkout of it (`tree`), with some overrides."""

    tree: Path = ROOT
    overrides: tuple[str, ...] = ()

    def setup(self) -> str:
        code = "this router" if self.tree == ROOT else "another checkout of this router"
        return f"{code}, one worker{''.join(f', {one}' for one in self.overrides)}"

    @contextmanager
    def started(self, urls: Sequence[str], folder: Path) -> Iterator[LoadTarget]:
        run = make_run(folder / "run")
        for number, url in enumerate(urls):
            name = registry.replica_name(EXPERT, f"x{number}", 1)
            serve = {EXPERT: EXPERT}
            registry.publish(
                run.registry, Record(RecordKind.EXTERNAL, name, url, State.READY, serve, capacity=CAPACITY)
            )
        argv = router_argv(run, options=(*OPTIONS, *self.overrides))
        log = folder / "router.log"
        with process_group() as processes:
            processes.start(argv, log=log, environment=environment_of(self.tree))
            deadline = time.monotonic() + START_TIMEOUT_S
            while (record := leading_router(RegistryReader(run.registry).snapshot())) is None:
                check_starting(processes, log, deadline)
                time.sleep(0.05)
            _wait(StartedRelay(int(record.url.rpartition(":")[2]), processes, run.token()), log, deadline)
            time.sleep(2.0)  # until all endpoints have been probed
            yield LoadTarget(record.url.replace("localhost", "127.0.0.1"), run.token())


@dataclass(frozen=True, slots=True)
class PeerPolicy(BalancePolicy):
    """A router from PyPI. `arguments`: its options beside addresses and limits."""

    program: str = ""
    environment: Path | None = None
    arguments: tuple[str, ...] = ()
    settle_s: float = 0.0
    note: str = ""

    def absent(self) -> str | None:
        return None if find(self.program, self.environment) else "not installed (make bench-peers)"

    def setup(self) -> str:
        return f"{self.program} {' '.join(self.arguments)}{f'; {self.note}' if self.note else ''}"

    @contextmanager
    def started(self, urls: Sequence[str], folder: Path) -> Iterator[LoadTarget]:
        port, log = free_port(), folder / "router.log"
        program = find(self.program, self.environment)
        argv = [
            *(str(program), *(("launch",) if self.program == "smg" else ()), "--host", "127.0.0.1"),
            *("--port", str(port), "--worker-urls", *urls, *self.arguments),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())),
            *("--max-concurrent-requests", "16384", "--log-level", "error"),
        ]
        with process_group() as processes:
            processes.start(argv, log=log)
            started = StartedRelay(port, processes)
            _wait(started, log, time.monotonic() + START_TIMEOUT_S)
            time.sleep(self.settle_s)
            yield LoadTarget(f"http://127.0.0.1:{port}", started.token)


def _wait(started: StartedRelay, log: Path, deadline: float) -> None:
    group: ProcessGroup | None = started.group
    while not serves(started, EXPERT):
        check_starting(group, log, deadline)
        time.sleep(0.1)


def policies(options: BalanceOptions) -> list[BalancePolicy]:
    """Returns all policies, this router's first."""
    peers = options.environment

    def peer(name: str, program: str, policy: str, *more: str, aware: bool = False, note: str = "") -> PeerPolicy:
        return PeerPolicy(
            name, aware, program, peers, ("--policy", policy, *more), SETTLE_S if program == "smg" else 2.0, note
        )

    settled = f"load begins {SETTLE_S:g} s after its start"
    spread = ("--balance-abs-threshold", "4", "--balance-rel-threshold", "1.1")
    return [
        OwnPolicy("prefix"),
        *(OwnPolicy(name, tree=tree) for name, tree in options.trees.items()),
        OwnPolicy("power_of_two", overrides=("router.pin_bound=null",)),
        peer("round_robin", "smg", "round_robin", note=settled),
        peer("smg", "smg", "cache_aware", aware=True, note=f"its defaults; {settled}"),
        peer("smg-spread", "smg", "cache_aware", *spread, aware=True, note=settled),
        peer("vllm-router", "vllm-router", "cache_aware", aware=True, note="its defaults; the engines serve /tokenize"),
        peer(
            "vllm-router-spread", "vllm-router", "cache_aware", *spread, aware=True, note="the engines serve /tokenize"
        ),
    ]
