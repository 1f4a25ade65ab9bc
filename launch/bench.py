"""Load on a running deployment, and what it measured: a table here, a record per point in a file.

    python -m launch.bench run=runs/latest
    python -m launch.bench run=runs/latest bench.users=[1,10,100] bench.duration_s=60
    python -m launch.bench run=runs/latest bench=smoke bench.model=math

`bench=NAME` takes values of conf/bench/NAME.yaml, `bench.KEY=VALUE` goes on top; docs/bench.md defines every figure.
Exit status 1 when at some point no request succeeded.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvloop
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from yaml import YAMLError

from hpc_router import frozen
from hpc_router.bench.ask import Target
from hpc_router.bench.config import BenchConfig, group_file, read_config
from hpc_router.bench.load import apply_load
from hpc_router.bench.progress import progress
from hpc_router.bench.prompts import Prompt, built_in, read_prompts
from hpc_router.bench.record import Results, provenance
from hpc_router.bench.table import Row, table
from hpc_router.cluster.plan import shown
from hpc_router.cluster.router_access import router_access
from hpc_router.compose import conf_folder
from hpc_router.errors import ConfigError, suggest
from hpc_router.provenance import parse_override
from hpc_router.router.service import raise_file_limit
from hpc_router.rundir import RunDir, open_run
from launch.entry import Call, launch

OWN = ("run", "bench")
WIDTH = 120


def bench(call: Call) -> int:
    run = open_run(Path(call.required("run")))
    config = config_of(call)
    prompts = built_in() if config.prompts is None else read_prompts(Path(config.prompts))
    access = router_access(run)
    raise_file_limit()
    return measure(run, config, prompts, Target(access.url, access.token))


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
        if group != "bench" or not key:
            raise ConfigError(f"'{override.key_or_group}': not a key of bench{suggest(group, ('bench', 'run'))}")
        if override.is_delete():
            raise ConfigError(f"'{override.input_line}': give a value instead")
        OmegaConf.update(merged, key, override.value(), merge=True, force_add=True)
    return read_config({str(key): value for key, value in merged.items()})


def measure(run: RunDir, config: BenchConfig, prompts: list[Prompt], target: Target) -> int:
    console = Console()
    console.width = max(console.width, WIDTH)
    origin = provenance(run, resolved(run), code=Path(__file__).parent)
    results = Results(run.path / "bench" if config.output is None else Path(config.output).absolute(), config.raw)
    rows = []
    for users in config.users:
        with progress(console, config, users=users) as watcher:
            load = uvloop.run(apply_load(target, config, prompts, users=users, watcher=watcher))
        rows.append(Row(users, results.add(load, config=config, origin=origin), load.cpu_share))
    console.print(table(rows, simulated=origin.simulated))
    print(f"records: {results.path}")
    without = [str(row.users) for row in rows if not row.found.succeeded]
    if without:
        sys.stderr.write(f"hpc-router: no request succeeded with {', '.join(without)} users\n")
    return 1 if without else 0


def resolved(run: RunDir) -> dict[str, Any] | None:
    """The run's config without what looks like a secret; None for a run that has none."""
    if not run.config.exists():
        return None
    config = asdict(frozen.read(run.config))
    for section in (config["cluster"], *(expert["engine"] for expert in config["experts"].values())):
        if section.get("env"):
            section["env"] = shown(section["env"])
    return config


def added(words: list[str]) -> list[str]:
    """deploy.yaml has no default of the group `bench`, so where Hydra composes it must be told to add one."""
    return [f"+{word}" if word.startswith("bench=") else word for word in words]


if __name__ == "__main__":
    sys.exit(launch(bench, own=OWN, words=added(sys.argv[1:])))
