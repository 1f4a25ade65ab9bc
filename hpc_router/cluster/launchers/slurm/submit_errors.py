"""Maps the error texts of sbatch to the config keys to edit, with advice. Pure.

The texts are those of sbatch and slurmctld, 20.11 to 25.05. A site's submit plugin may print any text, so an unknown
text is quoted with all requested options. With a temporary error, no value is wrong: Slurm is busy or does not answer.
"""

import re
from dataclasses import dataclass, replace
from itertools import chain
from typing import Final

from hpc_router.cluster.launchers.slurm.node_fit import configured_at, resources_of
from hpc_router.cluster.launchers.slurm.sbatch import effective_options
from hpc_router.config.schema import Deployment, ResourceConfig

_OPTIONS: Final = ("partition", "account", "qos", "constraint", "reservation", "exclude", "walltime", "gpu_type")
_SIZES: Final = ("nodes", "gpus", "cpus", "memory_gb")


@dataclass(frozen=True, slots=True)
class SubmitError:
    """A known error of sbatch. `keys`: the options and sizes that may be wrong, the most likely first. `temporary`:
    whether no value is wrong and Slurm cannot accept the job now."""

    pattern: re.Pattern[str]
    keys: tuple[str, ...]
    advice: str
    temporary: bool = False


def _permanent(keys: str, advice: str, *patterns: str) -> SubmitError:
    return SubmitError(re.compile("|".join(patterns), re.IGNORECASE), tuple(keys.split()), advice)


def _temporary(keys: str, advice: str, *patterns: str) -> SubmitError:
    return replace(_permanent(keys, advice, *patterns), temporary=True)


_ACCOUNTS: Final = "`sacctmgr show associations user=$USER format=account,partition,qos` lists yours"
_LIMITS: Final = "`sacctmgr show qos` and `scontrol show assoc_mgr` show the limits"
TABLE: Final = (
    _temporary(
        "",
        "the controller does not answer; try again",
        r"Unable to contact slurm controller",
        r"Slurm backup controller",
    ),
    _temporary(
        "",
        "the controller is busy or unreachable; try again",
        r"Zero Bytes were transmitted",
        r"Socket timed out",
        r"Connection (refused|timed out)",
        r"Communication connection",
    ),
    _temporary(
        "",
        "no Slurm is configured here: set SLURM_CONF, or use a login node",
        r"Could not establish a configuration source",
        r"Unable to process configuration",
        r"DNS SRV lookup",
    ),
    _temporary(
        "",
        "this machine and the controller do not trust each other: use a login node",
        r"Protocol authentication error",
        r"Munge",
        r"Incompatible versions of client",
    ),
    _temporary(
        "",
        "the controller is busy; try again",
        r"Unable to create job record",
        r"temporarily",
        r"Resource temporarily unavailable",
        r"Slurm is busy",
    ),
    _temporary(
        "partition constraint exclude",
        "the nodes for it are down, drained or reserved now",
        r"Required node not available",
        r"Requested partition configuration not available now",
        r"Requested nodes are busy",
    ),
    _temporary(
        "partition reservation",
        "it is closed now; `sinfo` shows more",
        r"Required partition not available",
        r"Partition in DOWN state",
        r"System submissions disabled",
        r"Requested reservation not usable now",
    ),
    _permanent(
        "qos account",
        f"fewer jobs may be queued at once: lower replicas, or raise cluster.replicas_per_job; {_LIMITS}",
        r"QOSMaxSubmitJob",
        r"MaxSubmitJobsPerAccount",
        r"AssocMaxSubmitJob",
        r"Grp(Submit)?JobsLimit",
        r"GrpSubmitJobs",
    ),
    _permanent(
        "walltime qos",
        f"a shorter time is allowed there; {_LIMITS}",
        r"MaxWallDurationPerJob",
        r"QOSTimeLimit",
        r"AssociationTimeLimit",
    ),
    _permanent("cpus qos account", f"fewer CPUs are allowed; {_LIMITS}", r"(QOS|Assoc)Max(Cpu|CPU)"),
    _permanent(
        "gpus qos account",
        f"fewer GPUs are allowed; {_LIMITS}",
        r"(QOS|Assoc)Max(GRES|Gres)",
        r"(QOS|Assoc)Grp(GRES|Gres)",
    ),
    _permanent("memory_gb qos account", f"less memory is allowed; {_LIMITS}", r"(QOS|Assoc)MaxMem"),
    _permanent("nodes qos account", f"fewer nodes are allowed; {_LIMITS}", r"(QOS|Assoc)MaxNode"),
    _permanent("cpus qos", f"more CPUs must be asked for; {_LIMITS}", r"QOSMin(Cpu|CPU)"),
    _permanent("gpus qos", f"more GPUs must be asked for; {_LIMITS}", r"QOSMin(GRES|Gres)"),
    _permanent("memory_gb qos", f"more memory must be asked for; {_LIMITS}", r"QOSMinMem"),
    _permanent("nodes qos", f"more nodes must be asked for; {_LIMITS}", r"QOSMinNode"),
    _permanent(
        "partition",
        "`sinfo --summarize` lists them",
        r"Invalid partition name",
        r"invalid partition specified",
        r"No partition specified",
    ),
    _permanent(
        "partition account qos",
        f"this partition is for others; {_ACCOUNTS}",
        r"User's group not permitted",
        r"not permitted to use this partition",
        r"(account|group|QOS|user).{0,40}not (permitted|allowed)",
    ),
    _permanent(
        "account partition",
        _ACCOUNTS,
        r"Invalid account",
        r"account.{0,30}(required|missing|specif)",
        r"specify an? .{0,20}account",
    ),
    _permanent("account qos", "its share is used up", r"Requested account has breached", r"usage threshold"),
    _permanent("qos account", _ACCOUNTS, r"Invalid qos"),
    _permanent(
        "reservation account",
        "`scontrol show reservation` lists them",
        r"Access denied to requested reservation",
        r"reservation.{0,20}(is )?invalid",
        r"Requested reservation",
    ),
    _permanent(
        "constraint", "`sinfo --format='%R %f'` lists the features", r"Invalid feature", r"feature specification"
    ),
    _permanent(
        "walltime partition",
        "`sinfo --format='%R %l'` lists the limits",
        r"Invalid --?time",
        r"Requested time limit",
        r"time limit.{0,30}(required|missing|exceeds)",
        r"Invalid time specified",
        r"Invalid time-min",
    ),
    _permanent(
        "memory_gb partition",
        "`sinfo --format='%R %m'` lists what nodes have, in MB; a site without a memory option wants null",
        r"Memory required by task",
        r"Memory specification can ?not be satisfied",
        r"Invalid --mem",
        r"--mem\b.{0,40}mutually",
        r"(mem|memory).{0,30}(required|missing|must be specified)",
        r"requires? .{0,20}--mem",
    ),
    _permanent(
        "gpus gpu_type",
        "`sinfo --format='%R %G'` lists what nodes have; some sites want cluster.gpu_request=gpus_per_node",
        r"Invalid generic resource",
        r"Invalid gres",
        r"GRES",
        r"--gpus",
    ),
    _permanent(
        "cpus partition",
        "`sinfo --format='%R %c'` lists what nodes have",
        r"CPU count specification",
        r"More processors requested",
        r"Invalid numeric value .* for --cpus",
    ),
    _permanent(
        "nodes partition",
        "`scontrol show partition` shows the least and the largest number",
        r"Node count specification",
        r"Job size specification",
        r"Task count specification",
    ),
    _permanent(
        "exclude partition", "`sinfo --Node` lists them", r"Invalid node name", r"Requested nodes not in this partition"
    ),
    _permanent(
        "sbatch.nodelist nodes",
        "a job of one node can name one node; cluster.exclude names the nodes on which no job may start",
        r"invalid number of nodes",
    ),
    _permanent("sbatch", "`scontrol show licenses` lists them", r"Invalid license"),
    _permanent(
        "sbatch.dependency",
        "Slurm knows no such job, or has forgotten it: five minutes after its end by default; `sacct --jobs=ID` shows "
        "how it ended, and a dependency that was met can be left out. Or it knows no such kind of dependency: "
        "`man sbatch` lists them",
        r"Job dependency problem",
    ),
    _permanent(
        "sbatch",
        "`sbatch --help` lists the options of this version",
        r"unrecognized option",
        r"unrecognised option",
        r"option requires an argument",
        r"ambiguous option",
        r"Invalid --[\w-]+ specification",
        r"mutually exclusive",
        r"Invalid directive",
    ),
    _permanent(
        "gpus cpus memory_gb constraint gpu_type partition nodes exclude",
        "no node has all of this at once; `sinfo --exact --format='%R %D %c %m %G %f'` lists what they have",
        r"Requested node configuration is not available",
        r"Requested operation not supported",
    ),
    _permanent(
        "qos account walltime",
        f"a limit of the account or the qos is below what is asked for; {_LIMITS}",
        r"violates accounting/QOS policy",
    ),
    _permanent("account partition", _ACCOUNTS, r"Access/permission denied", r"Permission denied"),
    _permanent(
        "runs",
        "use a shorter path on a file system that is not full",
        r"Pathname .* too long",
        r"I/O error writing script",
    ),
)
"""The first match counts, so the texts of single limits stand before the general ones that Slurm adds to them."""
_NOISE: Final = re.compile(
    r"^((sbatch|srun|salloc): )?((error|fatal): )?((allocation failure|Batch job submission failed): )?"
)


def find(text: str) -> SubmitError | None:
    """Returns the known error that matches the text of sbatch; None if there is none."""
    return next((error for error in TABLE if error.pattern.search(text)), None)


def is_temporary(text: str) -> bool:
    """Returns whether sbatch's error text says that Slurm cannot accept the job now, but may accept it later."""
    error = find(text)
    return error is not None and error.temporary


def one_line(text: str) -> str:
    """Returns the error text in one line."""
    lines = (_NOISE.sub("", line.strip()) for line in text.splitlines())
    kept = [line for line in lines if line and not line.startswith('Try "')]
    return "; ".join(dict.fromkeys(kept)) or "no reason given"


def explain(text: str, deployment: Deployment, expert: str) -> str:
    """Returns one line for the user: the config keys to edit with their values, sbatch's error, and advice. `expert`:
    the expert (or `router`) whose job was refused."""
    message, error = one_line(text), find(text)
    if error is not None and error.temporary:
        return f"Slurm cannot take it now: {message} ({error.advice})"
    values_of = {name: _values(name, deployment, expert) for name in (error.keys if error else (*_OPTIONS, *_SIZES))}
    values = [f"{key}={value}" for key, value, is_set in chain.from_iterable(values_of.values()) if is_set]
    if error is None:
        return f"Slurm refuses it: {message} (asked for: {', '.join(values)})"
    unset = [f"{key} is not set" for key, _, is_set in values_of[error.keys[0]] if not is_set]
    return f"{', '.join([*unset, *values]) or error.keys[0]}: Slurm refuses it: {message} ({error.advice})"


def _values(name: str, deployment: Deployment, expert: str) -> list[tuple[str, str, bool]]:
    """Returns (config key, value, whether it is set) for each config key that sets the option `name` for `expert`."""
    at, resources = resources_of(deployment, expert)
    if name == "runs":
        return [(name, deployment.runs, True)]
    if name == "sbatch":
        return _extra_options(at, resources, deployment)
    if name.startswith("sbatch."):
        return [value for value in _extra_options(at, resources, deployment) if value[0].endswith(f".{name}")]
    if name in _SIZES:
        value = getattr(resources, name)
        return [(f"{at}.{name}", f"{value or 0:g}", bool(value))]
    key, text = configured_at(at, resources, deployment.cluster, name)
    return [(key, text or "", text is not None)]


def _extra_options(at: str, resources: ResourceConfig, deployment: Deployment) -> list[tuple[str, str, bool]]:
    return [
        (f"{at if name in resources.sbatch else 'cluster'}.sbatch.{name}", str(value), value is not None)
        for name, value in effective_options(deployment.cluster, resources).sbatch.items()
    ]
