"""Load on a deployment, and what it measured: a table here, a record per point in a file.

    python -m launch.bench run=runs/latest bench.users=[1,10,100]               of one that runs
    python -m launch.bench topology=sim bench=smoke                             brings one up, and takes it down again
    python -m launch.bench -m topology=a,b bench.users=[1,4,16]                 a sweep; it ends in results/report.html,
                                                                                and goes on when begun again
    python -m launch.bench -m hydra/launcher=submitit_slurm topology=a,b ...    the same as Slurm jobs

`bench=NAME` takes values of conf/bench/NAME.yaml, `bench.KEY=VALUE` goes on top; docs/bench.md defines every figure.
Exit status 1 when something could not be measured, or at some point no request succeeded.
"""

import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from yaml import YAMLError

from hpc_router.bench.config import BenchConfig, group_file, read_config
from hpc_router.bench.load.generator import LoadTarget
from hpc_router.bench.load.load_jobs import crew
from hpc_router.bench.point import Bench, MeasuredPoint, slowdown_of
from hpc_router.bench.progress import progress
from hpc_router.bench.prompts import BenchPrompt, built_in, read_prompts
from hpc_router.bench.record import Provenance, ResultFiles, provenance
from hpc_router.bench.store import Store
from hpc_router.bench.sweep import DeploymentSweep, sim_options
from hpc_router.bench.sweep import measure as measure_leg
from hpc_router.bench.table import table
from hpc_router.bench.workload import Point, points_of
from hpc_router.cli.tables import UpProgress
from hpc_router.cluster.commands.router_access import router_access
from hpc_router.cluster.planning.plan import with_absolute_paths, without_secrets
from hpc_router.config import compose, frozen
from hpc_router.config.as_written import as_written
from hpc_router.config.compose import conf_folder
from hpc_router.config.frozen import GROUPS
from hpc_router.config.sources import Sources, parse_override
from hpc_router.errors import ConfigError, suggest
from hpc_router.router.main import raise_file_limit
from hpc_router.state.run_directory import RunDir, open_run
from launch.entry import Call, launch

OWN = ("run", "bench")
WIDTH = 132
RESULTS: Final = "results"


def bench(call: Call) -> int:
    config = config_of(call)
    prompts = built_in() if config.prompts is None else read_prompts(Path(config.prompts))
    raise_file_limit()
    if "run" in call.own:
        return measure_run(open_run(Path(call.required("run"))), config, prompts)
    return measure_new(call, config, prompts)


def config_of(call: Call) -> BenchConfig:
    """The group's values with the overrides on top. Raises ConfigError for a key of something else."""
    folders = [conf_folder()] if call.config_dir is None else [call.config_dir, conf_folder()]
    path = group_file(call.own.get("bench", "default"), folders)
    try:
        merged = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(frozen.yaml_fault(error, str(path))) from error
    if not isinstance(merged, DictConfig):
        raise ConfigError(f"{frozen.shown(path)}: not a mapping of keys to values")
    for override in map(parse_override, call.overrides):
        group, _, key = override.key_or_group.partition(".")
        if group != "bench":
            if "run" in call.own:
                raise ConfigError(f"'{override.key_or_group}': not a key of bench{suggest(group, ('bench', 'run'))}")
            continue
        if not key:
            raise ConfigError(f"'{override.key_or_group}': not a key of bench{suggest(group, ('bench', 'run'))}")
        if override.is_delete():
            raise ConfigError(f"'{override.input_line}': give a value instead")
        OmegaConf.update(merged, key, override.value(), merge=True, force_add=True)
    sources = Sources(call.overrides, [(path, "bench")])
    plain = {key: compose.resolved(merged, key) for key in merged}
    values = as_written(BenchConfig, plain, lambda key, value: sources.find(("bench", *key), value), at="bench")
    return read_config(values)


def measure_run(run: RunDir, config: BenchConfig, prompts: list[BenchPrompt]) -> int:
    """A deployment that runs already; it stays as it is. Every call measures anew."""
    access = router_access(run)
    config_then = resolved(run)
    origin = provenance(run, config_then, code=Path(__file__).parent)
    results = ResultFiles(run.path / "bench" if config.output is None else Path(config.output).absolute(), config.raw)
    rows: list[MeasuredPoint] = []
    options = [] if config_then is None else sim_options(config_then)
    with tempfile.TemporaryDirectory(prefix="hpc-router-bench-") as scratch, crew(config, shared=run.path) as makers:
        target = LoadTarget(access.url, access.token)
        one = Bench(run, target, config, prompts, makers, Path(scratch), slowdown_of(options))
        todo = points_of(config)
        for point in todo:
            with progress(_console(), config, point, done=len(rows), total=len(todo)):
                rows.append(one.measure(point))
            results.add(rows[-1], config=config, origin=origin)
    return _tell(rows, origin, results.path)


def measure_new(call: Call, config: BenchConfig, prompts: list[BenchPrompt]) -> int:
    """A deployment of its own: up, measured, down. What is there already is not measured again."""
    overrides = [text for text in call.overrides if parse_override(text).key_or_group.partition(".")[0] != "bench"]
    choices = {o.key_or_group: str(o.value()) for o in map(parse_override, overrides) if o.key_or_group in GROUPS}
    if "topology" not in choices:
        raise ConfigError("run=DIR or topology=NAME is missing: what is to be measured")
    deployment = with_absolute_paths(compose.load_deployment(overrides, config_dir=call.config_dir))
    store = Store(Path(config.output or RESULTS).absolute())
    leg = DeploymentSweep(store, deployment, config, prompts)
    label = " ".join(overrides)
    missing = len(leg.missing())
    if not missing:
        print(f"{label}: all {len(leg.points())} points are in {store.folder} (bench.output=DIR measures again)")
        return 0
    values = [text for text in overrides if parse_override(text).key_or_group not in GROUPS]
    told: list[Provenance] = []

    def origin(run: RunDir) -> Provenance:
        told.append(provenance(run, resolved(run), code=Path(__file__).parent, choices=choices, overrides=values))
        return told[0]

    def around(point: Point, done: int) -> AbstractContextManager[None]:
        return progress(_console(), config, point, done=done, total=len(leg.points()), label=label)

    print(f"{label}: {missing} of {len(leg.points())} points to measure")
    sys.stdout.flush()
    with UpProgress(Console(stderr=True)) as reporter:
        rows = measure_leg(leg, reporter=reporter, around=around, origin=origin)
    return _tell(rows, told[0], store.folder)


def swept(call: Call) -> int:
    """What a sweep ends in: the report on all that its result folder holds."""
    given = [o for o in map(parse_override, call.overrides) if o.key_or_group == "bench.output"]
    if "run" in call.own or any(o.is_sweep_override() for o in given):
        return 0  # no folder that holds all of it
    folder = Path(str(given[-1].value()) if given else RESULTS)
    try:
        import matplotlib  # noqa: F401

        from analysis import report
    except ModuleNotFoundError as error:
        sys.stderr.write(f"no report, as {error.name} is missing: pip install 'hpc-router[analysis]', then\n"
                         f"  python -m analysis.report {folder} --out {folder}/report.html\n")  # fmt: skip
        return 0
    return report.main([str(folder), "--out", str(folder / "report.html")])


def _tell(rows: Sequence[MeasuredPoint], origin: Provenance, path: Path) -> int:
    _console().print(table(rows, simulated=origin.simulated))
    print(f"records: {path}")
    without = [row.point.name for row in rows if not row.found.succeeded]
    if without:
        sys.stderr.write(f"hpc-router: no request succeeded with {', '.join(without)}\n")
    return 1 if without else 0


def _console() -> Console:
    console = Console()
    console.width = max(console.width, WIDTH)
    return console


def resolved(run: RunDir) -> dict[str, Any] | None:
    """The run's config without what looks like a secret; None for a run that has none."""
    if not run.config.exists():
        return None
    config = asdict(frozen.read(run.config))
    for section in (config["cluster"], *(expert["engine"] for expert in config["experts"].values())):
        if section.get("env"):
            section["env"] = without_secrets(section["env"])
    return config


def added(words: list[str]) -> list[str]:
    """deploy.yaml has no default of the group `bench`, so where Hydra composes it must be told to add one."""
    return [f"+{word}" if word.startswith("bench=") else word for word in words]


if __name__ == "__main__":
    sys.exit(launch(bench, own=OWN, words=added(sys.argv[1:]), swept=swept))
