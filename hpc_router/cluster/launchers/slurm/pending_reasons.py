"""Why a job waits, from Slurm's one word to what it means and what to do about it. Pure.

Slurm's reason is that of its last look at the job, so it changes; few mean that the job can never start as it is.
"""

import re
from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True, slots=True)
class Waiting:
    """`hopeless`: it will never start as it is, however long one waits."""

    what: str
    advice: str | None = None
    hopeless: bool = False


_EDIT: Final = "edit {}, then `hpc-router up` in a new run"
_LIMIT: Final = "`sacctmgr show qos` and `scontrol show assoc_mgr` show the limits"
_JOB: Final = "JOBID"
"""Stands for the job's id, also where that is not known."""
_HELD: Final = "`scontrol release JOBID` releases it"

_WORDS: Final[dict[str, Waiting]] = {
    "Resources": Waiting("it is next in line and waits for nodes to become free"),
    "Priority": Waiting("jobs of higher priority go first", "a shorter cluster.walltime lets it fill gaps sooner"),
    "BeginTime": Waiting("its time to begin has not come, or it was requeued and waits two minutes"),
    "Dependency": Waiting(
        "it waits for another job: a standby router for the serving router, other jobs as sbatch.dependency says",
        "`scontrol show job JOBID` names that job",
    ),
    "DependencyNeverSatisfied": Waiting(
        "it waits for a job that cannot end as its dependency asks", _EDIT.format("resources.sbatch.dependency"), True
    ),
    "Licenses": Waiting("it waits for a license", "`scontrol show licenses` shows which are in use"),
    "JobHeldUser": Waiting("it is held by its owner", _HELD),
    "JobHeldAdmin": Waiting("it is held by an administrator", "ask the site's support why"),
    "JobHoldMaxRequeue": Waiting(
        "it was requeued too often and is held", "`scancel JOBID` and a fresh job replaces it", True
    ),
    "launch_failed_requeued_held": Waiting(
        "a node could not start it, so Slurm holds it", "`scancel JOBID` and a fresh job replaces it", True
    ),
    "NodeDown": Waiting("a node it needs is down", "wait, or leave the node out with cluster.exclude"),
    "ReqNodeNotAvail": Waiting(
        "nodes it needs are down, drained or reserved, often for maintenance: a job that would run into one waits",
        "a shorter cluster.walltime may fit in; `scontrol show reservation` and `sinfo --list-reasons` show more",
    ),
    "Nodes required for job are DOWN": Waiting(
        "nodes it needs are down, drained or reserved for jobs of higher priority", "`sinfo --list-reasons` shows more"
    ),
    "Reservation": Waiting("its reservation has not begun or is full", "`scontrol show reservation` shows when"),
    "ReservationDeleted": Waiting("its reservation is gone", _EDIT.format("cluster.reservation"), True),
    "PartitionDown": Waiting("its partition is closed", "`sinfo` shows more; another cluster.partition may be open"),
    "PartitionInactive": Waiting("its partition takes no jobs now", "another cluster.partition may be open"),
    "PartitionTimeLimit": Waiting(
        "it asks for more time than its partition allows", _EDIT.format("cluster.walltime or cluster.partition"), True
    ),
    "PartitionNodeLimit": Waiting(
        "it asks for more or fewer nodes than its partition allows, or needs nodes that are down",
        _EDIT.format("resources.nodes or cluster.partition"),
        True,
    ),
    "PartitionConfig": Waiting(
        "its partition does not allow what it asks for", _EDIT.format("cluster.partition or resources"), True
    ),
    "BadConstraints": Waiting(
        "no node has what it asks for", _EDIT.format("cluster.constraint, cluster.partition or resources"), True
    ),
    "InvalidAccount": Waiting("its account is not valid", _EDIT.format("cluster.account"), True),
    "AccountNotAllowed": Waiting(
        "its account may not use the partition", _EDIT.format("cluster.account or cluster.partition"), True
    ),
    "InvalidQOS": Waiting("its qos is not valid", _EDIT.format("cluster.qos"), True),
    "QOSNotAllowed": Waiting("its account or partition may not use the qos", _EDIT.format("cluster.qos"), True),
    "QOSUsageThreshold": Waiting("its account has used up what the qos grants", "another cluster.qos or account"),
    "MaxMemPerLimit": Waiting(
        "it asks for more memory than the site allows", _EDIT.format("resources.memory_gb"), True
    ),
    "Prolog": Waiting("its nodes are being prepared"),
    "Cleaning": Waiting("its last run is still being cleaned up"),
    "DeadLine": Waiting("its deadline cannot be kept", _EDIT.format("resources.sbatch.deadline"), True),
    "JobLaunchFailure": Waiting("a node could not start it", "`scancel JOBID` and a fresh job replaces it"),
    "RequiresReservation": Waiting(
        "its partition is for jobs with a reservation only", _EDIT.format("cluster.reservation"), True
    ),
    "BurstBufferResources": Waiting("it waits for room in a burst buffer"),
    "BurstBufferStageIn": Waiting("its data are copied to a burst buffer"),
    "AssociationTimeLimit": Waiting("its account allows less time", _EDIT.format("cluster.walltime"), True),
    "AssociationResourceLimit": Waiting("its account is at a limit", _LIMIT),
    "AssociationJobLimit": Waiting("its account already runs the maximum number of jobs", _LIMIT),
    "QOSTimeLimit": Waiting("its qos allows less time", _EDIT.format("cluster.walltime or cluster.qos"), True),
    "QOSResourceLimit": Waiting("its qos is at a limit", _LIMIT),
    "QOSJobLimit": Waiting("its qos already runs the maximum number of jobs", _LIMIT),
}
_OF: Final = {
    "QOS": ("qos", "cluster.qos"),
    "Assoc": ("account", "cluster.account"),
    "": ("account", "cluster.account"),
}
_LIMITS: Final = re.compile(r"(?P<of>QOS|Assoc|)(?P<kind>Grp|Max|Min)(?P<what>[A-Z][A-Za-z]*)")
_ONE_JOB: Final = re.compile(r"Per(Job|Node)(Limit)?$|Wall|CpuPerNode")
"""Limits of each job by itself: others that end do not help."""
_MEANT: Final = (
    ("Wall", "time", "cluster.walltime"),
    ("Minutes", "CPU or GPU time in a period", "cluster.walltime"),
    ("Submit", "jobs in the queue", "replicas"),
    ("Jobs", "running jobs", "replicas"),
    ("Cpu", "CPUs", "resources.cpus"),
    ("GRES", "GPUs", "resources.gpus"),
    ("Mem", "memory", "resources.memory_gb"),
    ("Node", "nodes", "resources.nodes"),
)


def in_words(reason: str, job_id: str | None = None) -> Waiting:
    """Slurm's reason as squeue writes it; an unknown one is told as it is. `job_id`: whom the advice is about."""
    text = reason.strip().strip("()")
    word, _, detail = text.partition(",")
    word = "launch_failed_requeued_held" if word.replace(" ", "_") == "launch_failed_requeued_held" else word.strip()
    known = _WORDS.get(word) or _limit(word) or Waiting(f"Slurm says: {text or 'nothing'}")
    named = re.search(r"UnavailableNodes:(\S+)", detail)
    what = f"{known.what} ({named[1]})" if named else known.what
    advice = known.advice.replace(_JOB, job_id) if known.advice and job_id else known.advice
    return replace(known, what=what, advice=advice)


def _limit(word: str) -> Waiting | None:
    """`QOSMaxGRESPerUser`, `AssocGrpCpuLimit`, `MaxNodePerAccount`: whose limit, of what, for whom."""
    match = _LIMITS.fullmatch(word)
    if match is None:
        return None
    whose, key = _OF[match["of"]]
    what, edit = next(
        ((w, k) for part, w, k in _MEANT if part.lower() in match["what"].lower()), ("a resource", "resources")
    )
    if match["kind"] == "Min":
        return Waiting(f"its {whose} wants jobs with more {what}", _EDIT.format(f"{edit} or {key}"), hopeless=True)
    if match["kind"] == "Max" and _ONE_JOB.search(match["what"]):
        return Waiting(f"it asks for more {what} than its {whose} allows a job", _EDIT.format(f"{edit} or {key}"), True)
    who = "all jobs together" if match["kind"] == "Grp" else "one user" if "User" in word else "its jobs"
    return Waiting(
        f"its {whose} is at its limit of {what} for {who}: it starts when others end",
        f"{_LIMIT}; fewer replicas need less",
    )
