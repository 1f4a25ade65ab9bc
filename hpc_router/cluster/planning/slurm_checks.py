"""Findings that follow from Slurm's configuration, version and limits. Only `slurm` and `_ask_limits` call Slurm."""

import getpass
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from hpc_router.cluster.launchers.commands import SlurmCommandError, run_slurm_command
from hpc_router.cluster.launchers.slurm.process_tracking import signals_note
from hpc_router.cluster.launchers.slurm.site_config import TIMEOUT_S, ask_config, seconds
from hpc_router.cluster.planning.finding import CheckResult, Finding, fault, note, ok
from hpc_router.config.adapters import hosts
from hpc_router.config.schema import Deployment

Config = Mapping[str, str]
TRAPS: Final = (
    ((0,), (21, 8), "releases before 21.08 are not tested"),
    ((0,), (24, 11), "jobs have no SLURM_JOB_END_TIME: their end is read from squeue"),
    ((0,), (23, 2), "the batch script's srun ends with status 0 after the loss of its node"),
    ((24, 11), (99,), "dependencies on forgotten jobs are refused: later jobs leave them out"),
    ((25, 5), (99,), "cgroup/v1 is deprecated"),
    ((25, 11), (99,), "CUDA_VISIBLE_DEVICES may hold UUIDs"),
)
"""Known properties of Slurm releases: the first affected release, the first that is not, and the text. They need no
setting. An unknown release has none."""
_ASSOCIATIONS: Final = ("account", "maxsubmit", "maxjobs", "grpsubmit", "grpjobs")
_QOS: Final = ("name", "maxsubmitpu", "maxjobspu", "grpsubmit", "grpjobs")
_PURGED: Final = 3
"""Minimum ratio of MinJobAge to the interval between two queries."""


def slurm(deployment: Deployment) -> CheckResult:
    """Returns findings from `scontrol show config` and, if Slurm has accounting, from `sacctmgr`. Returns no findings
    if Slurm does not answer, because the callers report that themselves."""
    try:
        config = ask_config()
    except SlurmCommandError:
        return CheckResult()
    if "SLURM_VERSION" not in config:
        return CheckResult()
    findings = list(config_findings(config, deployment))
    if _has_accounting(config) and deployment.cluster.kind == "slurm":
        findings += limit_findings(_ask_limits(deployment), needed_jobs(deployment))
    return CheckResult(findings)


def config_findings(config: Config, deployment: Deployment) -> Iterator[Finding]:
    """Yields the findings about Slurm's configuration."""
    yield _version(config)
    yield _accounting(config)
    yield _job_age(config, deployment.cluster.ask_s)
    yield _submit_plugin(config)
    yield _tracking(config)


def _version(config: Config) -> Finding:
    text = config.get("SLURM_VERSION", "")
    version = tuple(int(part) for part in re.findall(r"\d+", text)[:2])
    known = [what for first, before, what in TRAPS if len(version) == 2 and first <= version < before]
    return ok(f"Slurm {text or 'of an unknown version'}{': ' if known else ''}{'; '.join(known)}")


def _has_accounting(config: Config) -> bool:
    return config.get("AccountingStorageType", "accounting_storage/none") != "accounting_storage/none"


def _accounting(config: Config) -> Finding:
    if _has_accounting(config):
        return ok(f"accounting is on ({config['AccountingStorageType']})")
    return note(
        "accounting is off: Slurm forgets a job MinJobAge after its end, and `sacct` has no record",
        "nothing to set for deployments, which keep their own records; programs that use submitit or `sacct` to learn "
        "the state of a job need slurmdbd, which the site sets up",
    )


def _job_age(config: Config, ask_s: float) -> Finding:
    age = seconds(config, "MinJobAge")
    if not age:  # unknown, or 0, with which Slurm keeps all jobs
        return ok("Slurm keeps ended jobs")
    if age >= _PURGED * ask_s:
        return ok(f"Slurm keeps ended jobs for {age} s")
    return fault(
        f"MinJobAge={age}: Slurm forgets a job {age} s after its end, but is queried every cluster.ask_s={ask_s:g} s: "
        "why a job ended would stay unknown",
        f"cluster.ask_s={max(1, age // _PURGED)}, or MinJobAge={_PURGED * ask_s:g} in the site's slurm.conf",
        "cluster.ask_s",
    )


def _submit_plugin(config: Config) -> Finding:
    plugins = config.get("JobSubmitPlugins")
    if plugins is None:
        return ok("no submit plugin")
    return note(
        f"JobSubmitPlugins={plugins}: the site's plugin may change or refuse jobs",
        "set explicitly what it would choose: cluster.partition, cluster.account, cluster.qos, cluster.walltime",
        "cluster.partition",
    )


def _tracking(config: Config) -> Finding:
    tracking = config.get("ProctrackType")
    text = signals_note(tracking) if tracking is not None else None
    if text is None:
        return ok(f"a job's signals: {tracking or 'process tracking is not known'}")
    return note(text, "end replicas with `hpc-router drain` and `hpc-router down`, not with `scancel`")


def needed_jobs(deployment: Deployment) -> int:
    """Returns the number of Slurm jobs that the deployment has at the same time, running or in the queue: those of the
    router, its standby and the replicas."""
    router = 0 if deployment.router.place == "here" else 1 + deployment.router.standby
    replicas = sum(expert.replicas for expert in hosts(deployment.experts).values())
    return router + -(-replicas // deployment.cluster.replicas_per_job)


def _ask_limits(deployment: Deployment) -> dict[str, int]:
    """Returns Slurm's limits on the number of the user's jobs, by name; empty if sacctmgr does not answer."""
    cluster = deployment.cluster
    mine = ["sacctmgr", "--noheader", "--parsable2", "show"]
    where = [f"account={cluster.account}"] if cluster.account else []
    try:
        rows = [*mine, "associations", f"user={getpass.getuser()}", *where, f"format={','.join(_ASSOCIATIONS)}"]
        found = parse_limits(run_slurm_command(rows, timeout_s=TIMEOUT_S), _ASSOCIATIONS, "account")
        if cluster.qos:
            rows = [*mine, "qos", cluster.qos, f"format={','.join(_QOS)}"]
            found |= parse_limits(run_slurm_command(rows, timeout_s=TIMEOUT_S), _QOS, "qos")
    except SlurmCommandError:
        return {}
    return found


def parse_limits(text: str, columns: Iterable[str], whose: str) -> dict[str, int]:
    """Returns the limits in the output of sacctmgr, whose columns are `columns`. If `whose` is "account", `test|4||6|`
    gives {"account test: maxsubmit": 4, "account test: grpsubmit": 6}."""
    _, *limits = columns
    return {
        f"{whose} {name}: {limit}": int(value)
        for name, *values in (line.split("|") for line in text.splitlines())
        for limit, value in zip(limits, values, strict=False)
        if value.isdecimal()
    }


def limit_findings(limits: Mapping[str, int], needed: int) -> list[Finding]:
    """Returns findings about the limits that are lower than `needed`, the number of jobs of the deployment."""
    low = [f"{name}={value}" for name, value in limits.items() if value < needed]
    if not low:
        return [ok(f"limits allow the {needed} jobs of the deployment")]
    what = f"the deployment needs {needed} jobs in the queue, but {', '.join(low)}"
    return [fault(what, "fewer replicas, or a higher cluster.replicas_per_job", "cluster.replicas_per_job")]
