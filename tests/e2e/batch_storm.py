"""A long batch through the loss of each process that runs it: `python -m tests.e2e.batch_storm --lines 100000`.

Simulated engines on this machine, two workers. While the batch runs, these are killed with SIGKILL: a worker, the
control process, the process that runs batches, an engine, the whole router (which `up` then starts again as the next
generation); and one expert job is preempted: it gets SIGTERM, drains, and is replaced. At the end, each line must
have exactly one result, in the order of the input. Prints these events, and by how much the router's processes grew.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import openai
import psutil

from hpc_router.bench.background import repeated
from tests.e2e.deployment import Deployed, deployed
from tests.support.waiting import eventually_sync

TOPOLOGY: Final = """\
# @package _global_
defaults:
  - /expert/math@_global_.experts.math
  - /expert/code@_global_.experts.code
  - _self_
experts:
  math: {model: sim-math, engine: {kind: sim, options: {ttft_ms: 2, itl_ms: 1}}, replicas: 2}
  code: {model: sim-code, engine: {kind: sim, options: {ttft_ms: 2, itl_ms: 1}}}
policy:
  fallback: code
"""
WARM_UP_LINES: Final = 2000
SAMPLE_S: Final = 1.0
LIMIT_S: Final = 3 * 3600.0
QUESTIONS: Final = ("What is the derivative of x^{}?", "Write a Python function that reverses a list of {} items.")


@dataclass
class StormResult:
    """What a storm has shown. `results`: custom ids of the output file in their order; `failed`: number of lines of the
    error file; `growth_mb`: by process of the router, how much more memory of its own it had at most during the storm
    than during a short batch before; `events`: what was done at which number of completed lines."""

    lines: int
    results: int = 0
    ordered: bool = False
    failed: int = 0
    seconds: float = 0.0
    growth_mb: dict[str, float] = field(default_factory=dict)
    events: list[tuple[str, int]] = field(default_factory=list)

    @property
    def total_growth_mb(self) -> float:
        return sum(max(0.0, growth) for growth in self.growth_mb.values())

    def table(self) -> str:
        rows = [
            f"lines {self.lines}, results {self.results}, failed {self.failed}, in order {self.ordered}",
            f"seconds {self.seconds:.0f} ({self.lines / max(self.seconds, 1e-9):.0f} lines per second)",
            *(f"after {done} results: {what}" for what, done in self.events),
            *(f"{name}: {growth:+.1f} MB" for name, growth in sorted(self.growth_mb.items())),
            f"all processes of the router together: {self.total_growth_mb:+.1f} MB",
        ]
        return "\n".join(rows)


class RouterProcesses:
    """The processes of the router of a deployment, by role, and the memory of their own (USS) that they had at most."""

    def __init__(self, one: Deployed) -> None:
        self._one = one
        self.peaks: dict[str, float] = {}

    def by_role(self) -> dict[str, psutil.Process]:
        """The processes of the newest router. The children of its supervisor are its workers and its control process,
        whose children are the control loop and the process that runs batches."""
        found: dict[str, psutil.Process] = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                words = " ".join(process.cmdline())
                if str(self._one.run) not in words:
                    continue
                if "hpc_router.router.batches" in words:
                    found["batches"] = process
                elif "reconcile" in words and "--loop" in words:
                    found["control loop"] = process
        with suppress(psutil.Error, KeyError, ValueError, OSError):
            supervisor = psutil.Process(self._one.progress(self.router())["pid"])
            found["supervisor"] = supervisor
            for child in supervisor.children():
                if child.children() or self._is_control(child):
                    found["control"] = child
                else:
                    found[f"worker {child.pid}"] = child
        return found

    def router(self) -> str:
        names = [path.name for path in (self._one.run / "jobs").iterdir() if path.name.startswith("router-0.g")]
        return max(names, key=lambda name: int(name.rpartition("g")[2]))

    def _is_control(self, process: psutil.Process) -> bool:
        return any(str(file.path).endswith(f"{self.router()}.log") for file in process.open_files())

    def sample(self) -> None:
        used: dict[str, float] = {}
        for role, process in self.by_role().items():
            name = "workers" if role.startswith("worker") else role
            with suppress(psutil.Error):
                used[name] = used.get(name, 0.0) + process.memory_full_info().uss / 1e6
        for name, memory_mb in used.items():
            self.peaks[name] = max(self.peaks.get(name, 0.0), memory_mb)


def write_lines(path: Path, count: int, *, model: str = "auto", max_tokens: int = 2) -> None:
    with path.open("w") as file:
        for number in range(count):
            text = QUESTIONS[number % len(QUESTIONS)].format(number)
            body = {"model": model, "max_tokens": max_tokens, "messages": [{"role": "user", "content": text}]}
            line = {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def submit(client: openai.OpenAI, path: Path) -> str:
    with path.open("rb") as file:
        uploaded = client.files.create(file=file, purpose="batch")
    batch = client.batches.create(input_file_id=uploaded.id, endpoint="/v1/chat/completions", completion_window="24h")
    return batch.id


def storm(folder: Path, lines: int, *, report: Callable[[str], None] = lambda text: None) -> StormResult:
    """Runs one storm with a batch of `lines` lines."""
    result = StormResult(lines)
    config = folder / "conf" / "topology"
    config.mkdir(parents=True)
    (config / "storm.yaml").write_text(TOPOLOGY)
    overrides = (
        f"--config-dir={folder / 'conf'}", "topology=storm", "router.workers=2", "router.batch.in_flight=32",
        "router.records_gb=0.01",
    )  # fmt: skip
    with deployed(folder, *overrides) as one:
        processes = RouterProcesses(one)
        write_lines(folder / "warm-up.jsonl", WARM_UP_LINES)
        write_lines(folder / "lines.jsonl", lines)
        with repeated(processes.sample, every_s=SAMPLE_S):
            wait(one, submit(one.client(), folder / "warm-up.jsonl"))
        before = processes.peaks
        report(f"warm-up done, own memory in MB: {_rounded(before)}")
        processes.peaks = {}
        begun = time.monotonic()
        with repeated(processes.sample, every_s=SAMPLE_S):
            batch = submit(one.client(), folder / "lines.jsonl")
            for share, what, act in actions(one, processes):
                done = eventually_sync(partial(reached, one, batch, share * lines), within_s=LIMIT_S, every_s=0.2)
                act()
                result.events.append((what, done))
                report(f"after {done} results: {what}")
            wait(one, batch)
        result.seconds = time.monotonic() - begun
        result.growth_mb = {role: peak - before.get(role, peak) for role, peak in processes.peaks.items()}
        report(f"own memory in MB: {_rounded(processes.peaks)}")
        check(one, batch, result)
    return result


def actions(one: Deployed, processes: RouterProcesses) -> Iterator[tuple[float, str, Callable[[], None]]]:
    """What is done to the deployment: at which share of the lines, what, and how."""

    def kill(role: str) -> None:
        name = eventually_sync(lambda: next((n for n in processes.by_role() if n.startswith(role)), None))
        processes.by_role()[name].kill()

    def kill_engine() -> None:
        engine = eventually_sync(lambda: engine_of(one, "math"))
        engine.kill()

    def preempt() -> None:
        replica = eventually_sync(lambda: one.ready("math"), within_s=120)[0]
        os.kill(one.progress(replica)["pid"], signal.SIGTERM)

    def lose_router() -> None:
        before = processes.router()
        os.kill(one.progress(before)["pid"], signal.SIGKILL)
        one.up()
        assert processes.router() != before

    yield 0.1, "SIGKILL to a worker of the router", lambda: kill("worker")
    yield 0.2, "SIGKILL to the control process", lambda: kill("control")
    yield 0.35, "SIGKILL to the process that runs batches", lambda: kill("batches")
    yield 0.45, "SIGKILL to an engine", kill_engine
    yield 0.6, "SIGTERM to an expert job (preemption)", preempt
    yield 0.75, "SIGKILL to all processes of the router, and `up`", lose_router


def engine_of(one: Deployed, expert: str) -> psutil.Process | None:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if "hpc_router.sim" in words and expert in words and str(one.scratch) in " ".join(words):
                return process
    return None


def reached(one: Deployed, batch: str, lines: float) -> int | None:
    """The number of results of a batch, if there are at least `lines`."""
    folder = one.run / "batches" / batch
    for name in ("ended.json", "state.json"):
        with suppress(OSError, ValueError):
            state = json.loads((folder / name).read_text())
            done = int(state["completed"] + state["failed"])
            return done if done >= max(1.0, lines) else None
    return None


def wait(one: Deployed, batch: str) -> None:
    eventually_sync(lambda: (one.run / "batches" / batch / "ended.json").exists(), within_s=LIMIT_S, every_s=0.2)


def check(one: Deployed, batch: str, result: StormResult) -> None:
    """Counts the results, and compares their order with that of the input."""
    with one.client() as client:
        shown = client.batches.retrieve(batch)
        assert shown.status == "completed", shown
        assert shown.output_file_id is not None
        expected = 0
        result.ordered = True
        with client.files.with_streaming_response.content(shown.output_file_id) as response:
            for line in response.iter_lines():
                result.ordered &= json.loads(line)["custom_id"] == f"line-{expected}"
                expected += 1
        result.results = expected
        result.failed = 0 if shown.request_counts is None else shown.request_counts.failed


def _rounded(peaks: dict[str, float]) -> dict[str, float]:
    return {role: round(peak, 1) for role, peak in sorted(peaks.items())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=100_000)
    with tempfile.TemporaryDirectory(prefix="storm-") as folder:
        result = storm(Path(folder), parser.parse_args().lines, report=lambda text: print(text, flush=True))
    print(result.table())
    return 0 if result.ordered and result.results == result.lines and result.total_growth_mb < 20 else 1


if __name__ == "__main__":
    sys.exit(main())
