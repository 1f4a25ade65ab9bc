"""Implements `hpc-router doctor`: runs the checks on this machine, then in a job, and collects the findings."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import hpc_router
from hpc_router.cluster.doctor import node_checks
from hpc_router.cluster.doctor.exchange import ClockReading, clock_server, own_address, read_clock
from hpc_router.cluster.doctor.job import SIGNAL_S, DoctorJob, JobStart, doctor_resources
from hpc_router.cluster.launchers.commands import SlurmCommandError
from hpc_router.cluster.launchers.slurm.node_fit import site_faults, site_warnings
from hpc_router.cluster.launchers.slurm.pending_reasons import explain_pending
from hpc_router.cluster.launchers.slurm.sbatch import effective_options, python_of
from hpc_router.cluster.launchers.slurm.sinfo import ask_site
from hpc_router.cluster.launchers.slurm.submit_errors import explain
from hpc_router.cluster.planning.finding import Finding, Severity, fault, note
from hpc_router.cluster.planning.prerequisites import CHECKS, CheckedHost
from hpc_router.cluster.signals import sigterm_as_interrupt
from hpc_router.config.schema import Deployment

LOGIN: Final = "login"
"""Name under which a report lists the findings of this machine."""
Found = Iterator[tuple[str, str, Finding]]
"""Items of a report: the name of the check, the host, and the finding."""


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """The findings of one run of `doctor`, in the order in which they were made. Each entry is the name of a check, the
    host that it concerns (`login` or the node's name), and the finding."""

    findings: tuple[tuple[str, str, Finding], ...]

    @property
    def has_faults(self) -> bool:
        """Returns whether a finding is a fault."""
        return any(finding.severity is Severity.FAULT for *_, finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Returns all findings as JSON values, with the number of findings of each severity."""
        listed = [{"check": check, "where": where, **f.to_json()} for check, where, f in self.findings]
        count = {str(s): sum(f.severity is s for *_, f in self.findings) for s in Severity}
        return {"findings": listed, "count": count}


def examine(deployment: Deployment, runs: Path, *, job: bool, progress: Callable[[str], None]) -> DoctorReport:
    """Runs all checks and returns the report. `runs`: the folder of run directories, as for `plan`. `job`: whether to
    submit a job that examines a node. Ctrl-C and SIGTERM raise KeyboardInterrupt, which cancels the job and removes its
    files."""
    found = list(_login(CheckedHost(deployment, runs)))
    if deployment.cluster.kind == "slurm" and job:
        with sigterm_as_interrupt(), DoctorJob(deployment, runs) as doctor_job:
            found += _node(doctor_job, progress)
    elif deployment.cluster.kind == "allocation" and job:
        text = "cluster=allocation: the nodes of the job are not examined"
        found.append(("job", LOGIN, note(text, "`hpc-router doctor cluster=slurm` on a login node examines a node")))
    return DoctorReport(tuple(found))


def _login(host: CheckedHost) -> Found:
    """Yields the findings on this machine."""
    for name, check in CHECKS.items():
        for finding in check(host).findings:
            yield name, LOGIN, finding
    if host.cluster.kind != "slurm":
        return
    try:
        site = ask_site()
    except SlurmCommandError as error:
        yield "Slurm", LOGIN, fault(f"Slurm does not answer: {error}", "use a login node, or set SLURM_CONF")
        return
    for text in (*site_faults(host.deployment, site), *site_warnings(host.deployment, site)):
        yield "sizes", LOGIN, note(text, "`hpc-router plan` asks sbatch about every job")


def _node(job: DoctorJob, progress: Callable[[str], None]) -> Found:
    """Submits the job and yields the findings on its node."""
    deployment = job.deployment
    own, _ = own_address(deployment.cluster.fabric)  # a login node may not be on the fabric
    with clock_server(own) as port:
        try:
            job.submit({"address": own, "port": port})
        except SlurmCommandError as error:
            expert = doctor_resources(deployment)[0]
            text = explain(error.output, deployment, expert) if error.output else str(error)
            yield "job", LOGIN, fault(text, "edit the named values, or try again if Slurm was busy")
            return
        progress(f"job {job.job_id} is submitted")
        start = job.wait_for_start()
        if start.started is None:
            yield _not_started(job, start)
            return
        progress(f"job {job.job_id} runs on {start.started['host']}; its signal takes up to a minute")
        yield from _running(job, start.started)


def _not_started(job: DoctorJob, start: JobStart) -> tuple[str, str, Finding]:
    """Returns the entry of the report that says why the job has not written its first file."""
    deployment = job.deployment
    if start.pending_reason is not None:
        why = explain_pending(start.pending_reason, job.job_id)
        what = f"job {job.job_id} did not start in time: {why.what}"
        make = fault if why.hopeless else note
        return "job", LOGIN, make(what, why.advice or "try again later, or cluster.partition=NAME of an idle one")
    where = start.node or "node"
    if not start.left_logs:
        return "shared folder", where, node_checks.unshared(str(job.runs.absolute()), start.node)
    python = python_of(deployment.cluster)
    return "python", where, node_checks.no_report(start.error, key=start.failed_key, python=python)


def _running(job: DoctorJob, started: Mapping[str, Any]) -> Found:
    """Yields the findings on the node of the job, which runs. `started`: the content of the job's first file."""
    deployment, host = job.deployment, str(started["host"])
    cluster = deployment.cluster
    yield "python", host, node_checks.interpreter(started, hpc_router.__version__, python_of(cluster))
    trips = list(job.round_trips())
    reading, error = _read_clock(started)
    node = job.facts()
    delays = [trip.error_s for trip in trips]
    sees_login = bool(trips) or node is None or bool(node["sees_login"])
    runs = str(job.runs.absolute())
    yield (
        "shared folder",
        host,
        node_checks.shared_folder(delays, sees_login=sees_login, beat_s=cluster.beat_s, runs=runs),
    )
    reading = min(filter(None, (reading, *trips)), key=lambda reading: reading.error_s, default=None)
    yield "clock", host, node_checks.clock(reading, host)
    for finding in node_checks.ports(error, started, None if node is None else node["reaches_login"]):
        yield "ports", host, finding
    if node is None:
        yield "job", host, fault(f"the checks on {host} did not end in time", "look at its load and its file systems")
    else:
        yield from _facts(node, deployment, host, runs)
    for finding in node_checks.changed_by_site(_asked(deployment), job.shown()):
        yield "job", host, finding
    yield "signals", host, _signals(job, started, reading)


def _read_clock(started: Mapping[str, Any]) -> tuple[ClockReading | None, str | None]:
    """Returns the clock difference to the job's node, and None; if the job's port cannot be reached, None and the error
    text. `started`: the content of the job's first file."""
    try:
        return read_clock(str(started["address"]), int(started["port"])), None
    except OSError as error:
        return None, error.strerror or str(error)


def _facts(node: Mapping[str, Any], deployment: Deployment, host: str, runs: str) -> Found:
    """Yields the findings that follow from `node`, the facts in the file that the job wrote. `host`: the node's
    name."""
    for name, findings in node["checks"].items():
        for finding in findings:
            yield name, host, node_checks.of_json(finding)
    yield "file operations", host, node_checks.file_operations(node, runs)
    yield "Slurm's commands", host, node_checks.slurm_commands(node, deployment, host)
    asked = doctor_resources(deployment)[1].gpus
    gpus = node_checks.gpus(asked, node["visible_gpus"], node["gpu_list"], host)
    if gpus is not None:
        yield "GPUs", host, gpus


def _asked(deployment: Deployment) -> dict[str, str | None]:
    """Returns the partition, account and QOS that the job requests, by their names in the output of `scontrol show
    job`."""
    options = effective_options(deployment.cluster, doctor_resources(deployment)[1])
    return {"Partition": options.partition, "Account": options.account, "QOS": options.qos}


def _signals(job: DoctorJob, started: Mapping[str, Any], reading: ClockReading | None) -> Finding:
    """Waits until the job has recorded the signal that Slurm sends before the walltime ends, and returns the finding
    about this signal. `reading`: the clock difference to the node."""
    value, queued = job.signals(), job.in_queue()
    end = started.get("end_time")
    ends_at = float(end) if end else (queued.ends_at if queued is not None else None)
    offset = 0.0 if reading is None else reading.offset_s
    record = value and node_checks.SignalRecord(float(value["at"]) - offset, bool(value["descendants"]))
    return node_checks.signals(record or None, ends_at=ends_at, waited_s=SIGNAL_S, cluster=job.deployment.cluster)
