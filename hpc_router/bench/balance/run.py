"""Runs `hpc-router bench balance`, from its options to its result files."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from hpc_router.bench.balance.engines import EngineCounts, counts, engines
from hpc_router.bench.balance.load import bench_config, mixed_load, upper_bound
from hpc_router.bench.balance.options import TRACE, BalanceOptions
from hpc_router.bench.balance.policies import BalancePolicy, policies
from hpc_router.bench.balance.report import BalanceResults, PolicyResult, html, markdown, to_json
from hpc_router.bench.figures import Window, faster, figures
from hpc_router.bench.load.generator import LoadResult, run_load
from hpc_router.bench.load.native.build import build_program
from hpc_router.bench.output import stem_of, utc_now, write_results
from hpc_router.bench.progress import StepDisplay
from hpc_router.bench.prompts import built_in
from hpc_router.bench.provenance import origin_of
from hpc_router.bench.workload import Workload
from hpc_router.cluster.signals import sigterm_as_interrupt
from hpc_router.errors import ConfigError, LaunchError, suggest
from hpc_router.relay.downstream.server import raise_file_limit
from hpc_router.sim.roofline import BLOCK, RooflineEngine


@dataclass(frozen=True, slots=True)
class _MeasuredPolicy:
    """What the load and the engines have recorded with one policy. `engines`: their counts of the load alone."""

    policy: BalancePolicy
    load: LoadResult
    engines: Sequence[EngineCounts]


def measure_balance(options: BalanceOptions, console: Console) -> BalanceResults:
    """Measures all policies, writes the three result files, and returns their content. Raises ConfigError and
    LaunchError."""
    chosen = _chosen(options)
    absent = {policy.name: why for policy in chosen if (why := policy.absent()) is not None}
    for name, why in absent.items():
        console.print(f"{name}: {why}", style="yellow", highlight=False)
    if options.trace is None and TRACE in options.loads:
        console.print("no --trace: Mooncake's trace is not part of the load", style="yellow", highlight=False)
    build_program("load")
    raise_file_limit()
    at, work = utc_now(), mixed_load(options, built_in())
    with sigterm_as_interrupt(), StepDisplay(console) as steps:
        measured = []
        for policy in chosen:
            if policy.name not in absent:
                steps.show(policy.name)
                measured.append(_measure(policy, options, work))
        steps.show("the upper bound")
    results = _results(options, work, measured, absent, at)
    texts = {"md": markdown(results), "html": html(results)}
    path = write_results(options.out, stem_of("balance", at), to_json(results), texts)
    console.print(f"written: {path}.json, .md and .html", highlight=False, soft_wrap=True)
    return results


def _chosen(options: BalanceOptions) -> list[BalancePolicy]:
    known = policies(options)
    names = [policy.name for policy in known]
    for name in options.only:
        if name not in names:
            raise ConfigError(f"--only {name}: no such policy{suggest(name, names)}")
    return [policy for policy in known if not options.only or policy.name in options.only]


def _measure(policy: BalancePolicy, options: BalanceOptions, work: Workload) -> _MeasuredPolicy:
    with tempfile.TemporaryDirectory(prefix="balance-") as name:
        folder = Path(name)
        with engines(options, folder) as urls, policy.started(urls, folder) as target:
            before = [counts(url) for url in urls]
            load = run_load(target, bench_config(options), work, folder / "load")
            after = [counts(url) for url in urls]
    if not any(o.error is None for o in load.observations):
        errors = sorted({str(o.error) for o in load.observations})
        raise LaunchError(f"{policy.name}: no request succeeded ({', '.join(errors)})")
    return _MeasuredPolicy(policy, load, [a.minus(b) for a, b in zip(after, before, strict=True)])


def _results(
    options: BalanceOptions,
    work: Workload,
    measured: Sequence[_MeasuredPolicy],
    absent: dict[str, str],
    at: str,
) -> BalanceResults:
    blocks = (RooflineEngine(options.engine).kv_tokens // BLOCK) * options.replicas
    found = []
    for one in measured:
        observations = faster(one.load.observations, options.slowdown)
        window = Window(options.warmup_s, options.warmup_s + options.seconds)
        steps_s = sum(engine.steps_s for engine in one.engines) or 1.0
        found.append(
            PolicyResult(
                name=one.policy.name,
                peer=one.policy.peer,
                setup=one.policy.setup(),
                figures=figures(observations, window),
                jain=_jain([engine.work for engine in one.engines]),
                bound=upper_bound(work, one.load.observations, blocks=blocks),
                late_share=sum(engine.lost_s for engine in one.engines) / steps_s,
                load_cpu_share=one.load.cpu_share,
            )
        )
    return BalanceResults(options, found, absent, origin_of(at))


def _jain(work: Sequence[float]) -> float:
    return sum(work) ** 2 / (len(work) * sum(value * value for value in work)) if any(work) else 1.0
