"""The verb that examines a site: `doctor`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_router.cli.deployment import add_overrides
from hpc_router.cli.output import print_lines, print_value
from hpc_router.cli.parser import Parser, Verbs, add_verb

if TYPE_CHECKING:
    from hpc_router.cluster.doctor.examine import DoctorReport


def add_doctor(verbs: "Verbs[Parser]") -> None:
    parser = add_verb(verbs, doctor, json=True)
    parser.add_argument("--no-job", action="store_true", help="examine this machine only")
    add_overrides(parser)


def doctor(arguments: argparse.Namespace) -> int:
    """examine the site from here and from a one-minute job; exit status 1 if something will not work

    hpc-router doctor --config-dir my topology=mine cluster=mysite
    hpc-router doctor cluster=slurm cluster.partition=gpu --json
    """
    from hpc_router.cluster.doctor.examine import examine
    from hpc_router.cluster.planning.run_target import find_target

    target = find_target(arguments.run, arguments.overrides, config_dir=arguments.config_dir)
    runs = Path(target.deployment.runs) if target.planned is None else target.planned.path
    report = examine(target.deployment, runs, job=not arguments.no_job, progress=_progress)
    print_value(report.to_json()) if arguments.json else print_lines(_lines(report))
    return 1 if report.has_faults else 0


def _progress(text: str) -> None:
    sys.stderr.write(f"hpc-router: {text}\n")


def _lines(report: "DoctorReport") -> list[str]:
    """Returns one line per finding, followed by a line with the fix if there is one."""
    lines = []
    for check, where, finding in report.findings:
        lines.append(f"{finding.severity:<5}  {where:<8}  {check}: {finding.what}")
        lines += [f"{'':>17}fix: {finding.advice}"] if finding.advice else []
    count = report.to_json()["count"]
    return [*lines, f"{count['fault']} faults, {count['note']} notes, {count['ok']} ok"]
