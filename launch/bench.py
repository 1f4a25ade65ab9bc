"""Puts load on a deployment and measures it: prints a table and writes a record per point to a file.

    python -m launch.bench run=runs/latest bench.users=[1,10,100]               a running deployment
    python -m launch.bench topology=sim bench=smoke                             starts a deployment and stops it again
    python -m launch.bench -m topology=a,b bench.users=[1,4,16]                 a sweep, with results/report.html;
                                                                                the same command continues it
    python -m launch.bench -m hydra/launcher=submitit_slurm topology=a,b ...    the same in Slurm jobs

`bench=NAME` selects conf/bench/NAME.yaml, `bench.KEY=VALUE` overrides a value. docs/bench.md defines every figure. With
`--json`, progress and figures are JSON events, one per line (docs/operations.md#progress). The exit status is 1 if a
measurement failed, or if no request of some point succeeded.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from yaml import YAMLError

from hpc_router.bench.config import BenchConfig, group_file, read_config
from hpc_router.bench.point import MeasuredPoint, point_measurement
from hpc_router.bench.progress import progress
from hpc_router.bench.prompts import BenchPrompt, built_in, read_prompts
from hpc_router.bench.provenance import Provenance, provenance
from hpc_router.bench.record import ResultFiles
from hpc_router.bench.search import limit_text, next_rate, target_holds
from hpc_router.bench.store import Store
from hpc_router.bench.sweep import DeploymentSweep, measure_missing
from hpc_router.bench.table import table
from hpc_router.bench.workload import Point, points_of
from hpc_router.cli.json_events import JsonEvents
from hpc_router.cli.tables import UpProgress
from hpc_router.cluster.planning.plan import with_absolute_paths, without_secrets
from hpc_router.config import compose, frozen
from hpc_router.config.as_written import as_written
from hpc_router.config.compose import conf_folder
from hpc_router.config.frozen import GROUPS
from hpc_router.config.sources import Sources, parse_override
from hpc_router.errors import ConfigError, suggest
from hpc_router.relay.downstream.server import raise_file_limit
from hpc_router.state.run_directory import RunDir, open_run
from launch.entry import Call, launch

OWN_KEYS = ("run", "bench")
WIDTH = 132
RESULTS: Final = "results"


def bench(call: Call, events: JsonEvents | None = None) -> int:
    """Measures as the arguments say. `events`: prints progress and results; None: texts for people. Returns the exit
    status."""
    config = config_of(call)
    prompts = built_in() if config.prompts is None else read_prompts(Path(config.prompts))
    raise_file_limit()
    if "run" in call.own:
        return measure_run(open_run(Path(call.required("run"))), config, prompts, events)
    return measure_new(call, config, prompts, events)


def bench_as_json(call: Call) -> int:
    with JsonEvents() as events:
        return bench(call, events)


def config_of(call: Call) -> BenchConfig:
    """Returns the values of the config group with the overrides applied. Raises ConfigError for an unknown key."""
    folders = [conf_folder()] if call.config_dir is None else [call.config_dir, conf_folder()]
    path = group_file(call.own.get("bench", "default"), folders)
    try:
        merged = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(frozen.yaml_error_text(error, str(path))) from error
    if not isinstance(merged, DictConfig):
        raise ConfigError(f"{frozen.display_path(path)}: not a mapping of keys to values")
    for override in map(parse_override, call.overrides):
        group, _, key = override.key_or_group.partition(".")
        if group != "bench":
            if "run" in call.own:
                raise ConfigError(f"'{override.key_or_group}': not a key of bench{suggest(group, ('bench', 'run'))}")
            continue
        if not key:
            raise ConfigError(f"'{override.key_or_group}': not a key of bench{suggest(group, ('bench', 'run'))}")
        if override.is_delete():
            raise ConfigError(f"'{override.input_line}': a key of bench cannot be deleted; set a value instead")
        OmegaConf.update(merged, key, override.value(), merge=True, force_add=True)
    sources = Sources(call.overrides, [(path, "bench")])
    plain = {key: compose.resolved(merged, key) for key in merged}
    values = as_written(BenchConfig, plain, lambda key, value: sources.find(("bench", *key), value), at="bench")
    return read_config(values)


def measure_run(run: RunDir, config: BenchConfig, prompts: list[BenchPrompt], events: JsonEvents | None) -> int:
    """Measures a running deployment, which stays up. Every call measures all points. Returns the exit status."""
    deployment = resolved(run)
    results = ResultFiles(run.path / "bench" if config.output is None else Path(config.output).absolute(), config.raw)
    rows: list[MeasuredPoint] = []
    with point_measurement(run, config, prompts, deployment=deployment, shared=run.path) as measurement:
        origin = provenance(run, deployment, code=Path(__file__).parent)
        for point, total in _points(config, rows):
            with progress(_console(), config, point, done=len(rows), total=total, event=_event_of(events)):
                rows.append(measurement.measure(point))
            results.add(rows[-1], config=config, origin=origin)
    limit = None if config.search is None else limit_text(_measured(rows, config), config)
    return _print_results(rows, origin, results.path, limit, events)


def _event_of(events: JsonEvents | None) -> Callable[..., None] | None:
    return None if events is None else events.event


def _points(config: BenchConfig, rows: Sequence[MeasuredPoint]) -> Iterator[tuple[Point, int]]:
    """Yields each point with the number of points as far as it is known. A search decides after each one."""
    if config.search is None:
        points = points_of(config)
        yield from ((point, len(points)) for point in points)
        return
    while (rate := next_rate(_measured(rows, config), config)) is not None:
        yield Point(rate_per_s=rate), len(rows) + 1


def _measured(rows: Sequence[MeasuredPoint], config: BenchConfig) -> dict[float, bool]:
    return {row.point.rate_per_s or 0.0: target_holds(row.figures, config) for row in rows}


def measure_new(call: Call, config: BenchConfig, prompts: list[BenchPrompt], events: JsonEvents | None) -> int:
    """Starts a deployment, measures the points that have no result yet, and stops it. Returns the exit status."""
    overrides = [text for text in call.overrides if parse_override(text).key_or_group.partition(".")[0] != "bench"]
    choices = {o.key_or_group: str(o.value()) for o in map(parse_override, overrides) if o.key_or_group in GROUPS}
    if "topology" not in choices:
        raise ConfigError("run=DIR (a running deployment) or topology=NAME (a new one) is missing")
    deployment = with_absolute_paths(compose.load_deployment(overrides, config_dir=call.config_dir))
    store = Store(Path(config.output or RESULTS).absolute())
    sweep = DeploymentSweep(store, deployment, config, prompts)
    label = " ".join(overrides)
    missing = len(sweep.missing())
    total = len(sweep.points())
    if events is not None:
        events.event("sweep", deployment=label, missing=missing, total=total)
    elif missing:
        print(f"{label}: {missing} of {total} points to measure", flush=True)
    else:
        print(f"{label}: all {total} points are in {store.folder} (to measure again: bench.output=OTHER_FOLDER)")
    if not missing:
        return 0
    values = [text for text in overrides if parse_override(text).key_or_group not in GROUPS]
    origins: list[Provenance] = []

    def origin(run: RunDir) -> Provenance:
        origins.append(provenance(run, resolved(run), code=Path(__file__).parent, choices=choices, overrides=values))
        return origins[0]

    def context(point: Point, done: int) -> AbstractContextManager[None]:
        return progress(_console(), config, point, done=done, total=total, label=label, event=_event_of(events))

    with UpProgress(Console(stderr=True, markup=False)) if events is None else nullcontext(events) as reporter:
        rows = measure_missing(sweep, reporter=reporter, context=context, origin=origin)
    limit = None if config.search is None else limit_text(sweep.measured_rates(), config)
    return _print_results(rows, origins[0], store.folder, limit, events)


def swept(call: Call) -> int:
    """Writes a report on all results in the sweep's folder. Called at the end of a sweep. Returns the exit status."""
    outputs = [o for o in map(parse_override, call.overrides) if o.key_or_group == "bench.output"]
    if "run" in call.own or any(o.is_sweep_override() for o in outputs):
        return 0  # the results are not all in one folder
    folder = Path(str(outputs[-1].value()) if outputs else RESULTS)
    try:
        import matplotlib  # noqa: F401

        from analysis import report
    except ModuleNotFoundError as error:
        sys.stderr.write(f"no report, because {error.name} is not installed: pip install 'hpc-router[analysis]', then\n"
                         f"  python -m analysis.report {folder} --out {folder}/report.html\n")  # fmt: skip
        return 0
    return report.main([str(folder), "--out", str(folder / "report.html")])


def _print_results(
    rows: Sequence[MeasuredPoint], origin: Provenance, path: Path, limit: str | None, events: JsonEvents | None
) -> int:
    if events is not None:
        for row in rows:
            facts = {"succeeded": row.figures.succeeded, "failed": row.figures.failed, "invalid": list(row.invalid)}
            rates = {"tokens_per_s": row.figures.tokens_per_s, "requests_per_s": row.figures.requests_per_s}
            ttft_s = None if row.figures.ttft_s is None else row.figures.ttft_s.p50
            events.event("measured", point=row.point.name, **facts, **rates, ttft_s=ttft_s, simulated=origin.simulated)
        events.event("records", path=str(path), limit=limit)
    else:
        _console().print(table(rows, simulated=origin.simulated))
        if limit is not None:
            print(limit)
        print(f"records: {path}")
    failed = [row.point.name for row in rows if not row.figures.succeeded and not row.figures.exceeded]
    if failed:
        sys.stderr.write(f"hpc-router: no request succeeded with {', '.join(failed)}\n")
    return 1 if failed else 0


def _console() -> Console:
    console = Console(markup=False)
    console.width = max(console.width, WIDTH)
    return console


def resolved(run: RunDir) -> dict[str, Any] | None:
    """Returns the run's config with secrets masked; None for a run without a config."""
    if not run.config.exists():
        return None
    config = asdict(frozen.read(run.config))
    for section in (config["cluster"], *(expert["engine"] for expert in config["experts"].values())):
        if section.get("env"):
            section["env"] = without_secrets(section["env"])
    return config


def added(arguments: list[str]) -> list[str]:
    """Prefixes `bench=NAME` with `+`, because Hydra requires it for a group without a default in deploy.yaml."""
    return [f"+{one}" if one.startswith("bench=") else one for one in arguments]


def main(words: list[str]) -> int:
    values = [word for word in words if word != "--json"]
    if len(values) == len(words):
        return launch(bench, own=OWN_KEYS, words=added(values), swept=swept)
    return launch(bench_as_json, own=OWN_KEYS, words=added(values), swept=_swept_as_json)


def _swept_as_json(call: Call) -> int:
    with redirect_stdout(sys.stderr):  # stdout has one event per line
        return swept(call)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
