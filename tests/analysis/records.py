"""Result records in the form that `launch.bench` writes, with values chosen by the tests."""

from dataclasses import asdict, replace
from typing import Any

from hpc_router.bench.config import BenchConfig, read_config
from hpc_router.bench.figures import MeasurementPart, Observation, Window, figures
from hpc_router.bench.load.generator import LoadResult
from hpc_router.bench.point import MeasuredPoint
from hpc_router.bench.provenance import Provenance
from hpc_router.bench.record import record
from hpc_router.bench.workload import Point

LONG = "llama3_4x8b_2replicas_bf16 +experts.math.engine.options.extra={enable-prompt-tokens-details: true}"
ORIGIN = Provenance(
    run="/runs/r",
    choices={"topology": "four_small"},
    overrides=[],
    config=None,
    endpoints=[{"engine": {"kind": "sim", "version": "1", "model": "/models/m"}}],
    command="python -m launch.bench <&>",
    job_id="7",
    versions={},
    git={"commit": "0123456789abcdef", "changed": False},
    hardware={"host": "h", "cpu": "a CPU", "cpus": 2, "memory_gb": 8.0, "kernel": "6"},
)


def result_record(
    users: int,
    *,
    topology: str = "four_small",
    ttft_s: float = 0.1,
    repeat: int = 0,
    invalid: tuple[str, ...] = (),
    evidence: str = "simulated",
    added_s: float | None = None,
    experts: tuple[str, str] = ("code", "math"),
) -> dict[str, Any]:
    """Returns the record of `users` responses of 8 tokens, 0.1 s apart, in a window of 10 s. The two `experts` answer
    in turn."""
    seen = [
        Observation(
            part=MeasurementPart.MEASURED, user=n, started_s=1.0, ended_s=1.0 + ttft_s + 0.8,
            content_s=[1.0 + ttft_s + k / 10 for k in range(8)], tokens=8,
            expert=experts[n % 2], replica=f"{experts[n % 2]}-0.g1",
        )
        for n in range(users)
    ]  # fmt: skip
    load = LoadResult(0.0, seen, Window(0.0, 10.0), 0.1, 0.0)
    added = None if added_s is None else {"ttft_s": {"added_s": added_s, "share": added_s / ttft_s}}
    point = MeasuredPoint(Point(users=users, repeat=repeat), load, figures(seen, load.window), invalid, None, added)
    origin = replace(ORIGIN, choices={"topology": topology})
    return record("p", point, config=BenchConfig(), origin=origin) | {"evidence": evidence}


def searched(rate: float, *, good: bool) -> dict[str, Any]:
    """Returns the record of a point of a search with conversations of two classes, on a deployment with a long name."""
    seen = [
        Observation(
            part=MeasurementPart.MEASURED, user=n, started_s=1.0, ended_s=2.0, content_s=[1.1, 1.9], tokens=8,
            prompt_tokens=123_456, cached_tokens=100_000, expert="math", replica=f"math-{n % 2}.g1",
            load_class=("chat", "agent")[n % 2], turn=n % 12 + 1,
        )
        for n in range(60)
    ]  # fmt: skip
    found = asdict(figures(seen, Window(0.0, 10.0), exceeded=not good))
    invalid = [] if good else ["over-saturated: more requests were in flight than engines that keep up would have"]
    bench = asdict(read_config({"rates": [rate], "search": "goodput"}))
    base = result_record(4, topology=LONG, added_s=0.00123)
    point = {"users": None, "rate_per_s": rate, "bench": bench, "invalid": invalid, "valid": good}
    return {**base, **found, "good_share": 0.99 if good else 0.2, **point}
