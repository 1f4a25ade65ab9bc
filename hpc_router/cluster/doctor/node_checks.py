"""Turns the facts from doctor's job into findings. The functions are pure, and each covers one subject."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from hpc_router.cluster.doctor.exchange import ClockReading
from hpc_router.cluster.launchers.slurm.process_tracking import SIGNALS_DESCENDANTS, signals_note
from hpc_router.cluster.launchers.slurm.squeue import MAX_CLOCK_SKEW_S
from hpc_router.cluster.planning.finding import Finding, Severity, fault, note, ok
from hpc_router.config.schema import ClusterConfig, Deployment

NOTED_SKEW_S: Final = 1.0
"""Clock difference in seconds from which a note is made."""
SIGNAL_BEFORE_S: Final = 60
"""Seconds before its end at which doctor's job asks Slurm for its signal. Slurm may send it a minute earlier."""

_NO_INTERPRETER: Final = re.compile(
    r"No module named|ImportError|SyntaxError|execve|No such file|Permission denied|not found"
)
"""Matches the last log line of a job whose interpreter is missing, lacks hpc_router or is too old."""


def shared_folder(delays_s: Sequence[float], *, sees_login: bool, beat_s: float, runs: str) -> Finding:
    """Checks whether this machine and the node see each other's files in `runs` soon enough. `delays_s`: measured
    delays in seconds until a renamed file was seen by the other host; empty if this machine has seen no answer of the
    job. `sees_login`: whether the node saw this machine's files."""
    fix = "`runs=DIR` or `--run DIR` names a folder on the file system that all nodes share"
    if not sees_login:
        return fault(f"{runs}: a node does not see the files that this machine writes there", fix, "runs")
    if not delays_s:
        return fault(f"{runs}: this machine does not see the files that a node renames there", fix, "runs")
    longest = max(delays_s)
    if longest > 2 * beat_s:
        what = f"a renamed file in {runs} is seen after {longest:.1f} s: live replicas may look lost for that time"
        return note(what, f"cluster.beat_s={longest:.0f}, or a folder on another file system", "cluster.beat_s")
    return ok(f"{runs} is seen both ways; a rename is seen after {longest * 1e3:.0f} ms")


def file_operations(node: Mapping[str, Any], runs: str) -> Finding:
    """Checks whether the node can create files in the folder `runs`. `node`: the facts from the job. The finding
    mentions whether flock works there, although the package does not need it."""
    kind = node["file_system"] or "an unknown file system"
    if node["creates_files"] is not None:
        what = f"{runs}, {kind}: files cannot be created there with hard links: {node['creates_files']}"
        return fault(what, "`runs=DIR` or `--run DIR` names a folder on a file system with hard links", "runs")
    flock = "flock works" if node["flock"] is None else f"flock does not work ({node['flock']}), and is not used"
    return ok(f"{runs} is on {kind}; hard links work; {flock}")


def unshared(runs: str, node: str | None) -> Finding:
    """Returns the fault for a job that left not even a log: its node does not see the folder `runs`."""
    where = "its node" if node is None else node
    return fault(
        f"{runs}: {where} does not see this folder: the job left no log there",
        "`runs=DIR` or `--run DIR` names a folder on the file system that all nodes share",
        "runs",
    )


def no_report(error: str, *, key: str | None, python: str) -> Finding:
    """Returns the fault for a job whose Python program left no report. `error`: the last line of the job's log. `key`:
    the config key of the setup line or module that failed, if any. `python`: the job's interpreter."""
    if key is not None:
        return fault(f"{key}: the job ended there: {error}", f"edit {key}", key)
    if not _NO_INTERPRETER.search(error):
        return fault(f"the job ended before it had examined the node: {error}", "try again; look at the node's state")
    return fault(
        f"the interpreter of the jobs does not run hpc_router: {python}: {error}",
        "cluster.python=PATH of an interpreter that every node has, with this version of hpc_router installed",
        "cluster.python",
    )


def interpreter(started: Mapping[str, Any], version: str, python: str) -> Finding:
    """Checks whether the job's interpreter, `python`, has the version `version` of hpc_router, as this process has."""
    theirs = started["hpc_router"]
    if theirs != version:
        what = f"{python} on {started['host']} has hpc_router {theirs}, but this is {version}"
        fix = f"install {version} there, or cluster.python=PATH of an interpreter that has it"
        return fault(what, fix, "cluster.python")
    return ok(f"{python} (Python {started['python']}) on {started['host']} has hpc_router {theirs}")


def clock(reading: ClockReading | None, host: str) -> Finding:
    """Checks whether the node's clock agrees with this machine's. `reading`: the measured difference, None if there is
    none."""
    if reading is None:
        return note(f"the clock of {host} could not be compared", "see the findings about files and ports")
    off, fix = abs(reading.offset_s), f"ask the site to synchronise the clocks (chrony or NTP) of {host} and this host"
    way = "ahead of" if reading.offset_s > 0 else "behind"
    what = f"the clock of {host} is {off:.1f} s {way} this machine's"
    if off - reading.error_s > MAX_CLOCK_SKEW_S:
        return fault(f"{what}: files from there look too new or too old, and live replicas may look lost", fix)
    if off - reading.error_s > NOTED_SKEW_S:
        return note(what, fix)
    return ok(f"the clocks of {host} and this machine differ by {off * 1e3:.0f} ms (+-{reading.error_s * 1e3:.0f})")


def ports(error: str | None, started: Mapping[str, Any], reaches_login: str | None) -> Iterator[Finding]:
    """Yields findings about connections in both directions. `error`, `reaches_login`: why this machine cannot connect
    to the node, and the node to this machine; None if it can. `started`: the content of the job's first file."""
    at = f"{started['host']} ({started['address']}:{started['port']})"
    if started.get("fabric_error"):
        yield fault(str(started["fabric_error"]), "cluster.fabric=INTERFACE or NETWORK of the nodes", "cluster.fabric")
    if error is not None:
        yield fault(
            f"this machine cannot connect to {at}: {error}: clients and `hpc-router` here would not reach the router",
            "cluster.fabric names another network of the nodes, or the site opens the ports above 1024 between its "
            "hosts; a fixed port is router.port",
            "cluster.fabric",
        )
    else:
        yield ok(f"this machine connects to {at}")
    if reaches_login is not None:
        yield ok(
            f"{started['host']} cannot connect to this machine ({reaches_login}); the deployment does not need that"
        )


def slurm_commands(node: Mapping[str, Any], deployment: Deployment, host: str) -> Finding:
    """Checks whether sbatch and squeue work on the node. The router's job needs them if it runs the control loop."""
    errors = [f"{name}: {node[name]}" for name in ("sbatch", "squeue") if node[name] is not None]
    if not errors:
        return ok(f"sbatch and squeue work on {host}")
    what = f"on {host} {'; '.join(errors)}"
    router = deployment.router
    if router.place == "here" or not router.reconcile:
        return ok(f"{what}; no job needs them")
    return fault(
        f"{what}: the router's job could not replace replicas",
        "router.place=here runs router and control loop where `up` runs; or cluster.modules, cluster.setup or "
        "cluster.env.PATH make Slurm's commands usable in jobs",
        "router.place",
    )


@dataclass(frozen=True, slots=True)
class SignalRecord:
    """When and where SIGUSR2 arrived. `at`: Unix seconds. `descendants`: whether a child of the job's process received
    it as well."""

    at: float
    descendants: bool


def signals(record: SignalRecord | None, *, ends_at: float | None, waited_s: float, cluster: ClusterConfig) -> Finding:
    """Checks whether Slurm sent SIGUSR2 before the end of the job's walltime, and to which processes. `record`: None if
    it did not arrive within `waited_s` seconds. `ends_at`: end of the walltime in Unix seconds."""
    if record is None:
        return fault(
            f"no SIGUSR2 arrived within {waited_s:.0f} s, though --signal=USR2@{SIGNAL_BEFORE_S} asks for it: jobs "
            "would not drain before their walltime ends",
            f"ask the site why; until then cluster.warn_s={cluster.warn_s:g} has no effect, and a cluster.handover "
            "with a long cluster.handover_margin_s replaces jobs earlier",
            "cluster.handover_margin_s",
        )
    lead = "" if ends_at is None else f" {ends_at - record.at:.0f} s before the end (asked: {SIGNAL_BEFORE_S} s)"
    text = signals_note(SIGNALS_DESCENDANTS) if record.descendants else None
    if text is None:
        return ok(f"SIGUSR2 arrived{lead}, at the task alone")
    return note(
        f"SIGUSR2 arrived{lead}, at every process of the step: {text}",
        "end replicas with `hpc-router drain` and `hpc-router down`, not with `scancel`",
    )


def gpus(asked: int, visible: str | None, listed: Sequence[str] | None, host: str) -> Finding | None:
    """Checks whether the job on `host` got usable GPUs; returns None if `asked`, the requested number, is 0. `visible`:
    the job's CUDA_VISIBLE_DEVICES. `listed`: the lines of `nvidia-smi -L`."""
    if not asked:
        return None
    names = [name for name in (visible or "").split(",") if name]
    if listed is not None and visible is None:
        names = re.findall(r"GPU-[0-9a-f-]+", "\n".join(listed))
    fix = "cluster.gpu_request=gpus_per_node, or cluster.gpu_type as the site names it"
    if len(names) < asked or names == ["NoDevFiles"]:
        what = f"the job asked for {asked} GPU on {host}, but CUDA_VISIBLE_DEVICES={visible or ''}"
        return fault(what, fix, "cluster.gpu_request")
    if any("MIG" in text for text in (*names, *(listed or ()))):
        what = f"the job's GPUs on {host} are MIG instances ({', '.join(names)}): tensor parallelism cannot use them"
        return note(
            what, "engine.options.tensor_parallel_size=1, or a cluster.gpu_type of whole GPUs", "cluster.gpu_type"
        )
    if listed is not None and not any(line.startswith("GPU ") for line in listed):
        return fault(f"nvidia-smi on {host} lists no GPU", fix, "cluster.gpu_request")
    kind = "indices" if all(name.isdecimal() for name in names) else "UUIDs"
    return ok(f"CUDA_VISIBLE_DEVICES={visible} on {host} ({kind})")


def changed_by_site(asked: Mapping[str, str | None], job: Mapping[str, str]) -> list[Finding]:
    """Returns findings about values that the site has changed. `asked`: the requested values. `job`: the values that
    the job has. Both have the names of the fields in `scontrol show job`."""
    findings = []
    if job.get("Requeue", "0") != "0":
        what = (
            "the job can be requeued, although it was submitted with --no-requeue: it would start beside its successor"
        )
        findings.append(
            fault(what, "ask the site for jobs without requeue, or another cluster.partition", "cluster.partition")
        )
    for name, key in (("Partition", "partition"), ("Account", "account"), ("QOS", "qos")):
        wanted, got = asked.get(name), job.get(name)
        if wanted is not None and got is not None and got not in wanted.split(","):
            findings.append(
                note(f"the site changed cluster.{key}={wanted} to {got}", f"cluster.{key}={got}", f"cluster.{key}")
            )
    return findings or [ok("the job got what it asked for, and is never requeued")]


def of_json(value: Mapping[str, Any]) -> Finding:
    """Returns the finding from the JSON object that `Finding.to_json` returned."""
    return Finding(Severity(value["state"]), str(value["what"]), value.get("fix"), value.get("key"))
