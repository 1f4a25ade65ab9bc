"""Checks the values that become lines of a batch script: Slurm options, modules, setup lines, environment.

Each value becomes one line, so it may not contain a line break. Slurm options that the script sets itself are refused.
Every error names the key and what to use instead.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from hpc_router.config.schema import ClusterConfig, ContainerConfig, JobOptions
from hpc_router.config.walltime import VALID, walltime_s
from hpc_router.errors import ConfigError

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")
_INVALID: Final = re.compile(r"[\s'\"\\#$`;]")
"""Characters that an option's value may not contain, because sbatch has its own rules for quotes and comments."""
_OPTION: Final = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_MODULE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./+:@=-]*")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TICK_S: Final = 60
"""Slurm checks time limits once a minute, so it may send a signal up to this many seconds early."""
_WORDS: Final = ("partition", "account", "qos", "constraint", "reservation", "exclude", "gpu_type")

_SIZES: Final = {
    "nodes": "use resources.nodes",
    "ntasks": "resources.nodes gives one task per node",
    "ntasks-per-node": "resources.nodes gives one task per node",
    "cpus-per-task": "use resources.cpus",
    "mem": "use resources.memory_gb",
    "mem-per-cpu": "use resources.memory_gb",
    "mem-per-gpu": "use resources.memory_gb",
    "gres": "use resources.gpus, resources.gpu_type and cluster.gpu_request",
    "gpus": "use resources.gpus and resources.gpu_type",
    "gpus-per-node": "use resources.gpus and cluster.gpu_request=gpus_per_node",
    "gpus-per-task": "use resources.gpus and cluster.gpu_request",
    "output": "logs lie in the job's folder, `hpc-router logs` shows them",
    "error": "logs lie in the job's folder, `hpc-router logs` shows them",
    "open-mode": "logs are appended to",
    "job-name": "jobs are named after the deployment and the replica",
    "chdir": "jobs begin in the run directory; `cd` in cluster.setup",
}
SBATCH_OWNED: Final = _SIZES | {
    **{name: f"use resources.{name}, or cluster.{name} for all" for name in _WORDS if name != "gpu_type"},
    "time": "use resources.walltime, or cluster.walltime for all",
    "exclusive": "use resources.exclusive, or cluster.exclusive for all",
    "signal": "use cluster.warn_s",
    "requeue": "a job that ended is replaced by a new job",
    "no-requeue": "it is always set",
    "array": "every replica is a job of its own, or a step: cluster.replicas_per_job",
    "wrap": "use cluster.setup",
    "export": "use cluster.env",
    "export-file": "use cluster.env",
    "parsable": "a program reads the output of sbatch",
    "quiet": "a program reads the output of sbatch",
    "wait": "services do not end",
    "test-only": "`hpc-router plan` does it",
    "clusters": "jobs go to the cluster of this host's Slurm configuration; SLURM_CONF selects another",
}
SRUN_OWNED: Final = _SIZES | {
    "export": "use cluster.env",
    "jobid": "a step runs in its own job",
    "exact": "it is set where a job is shared",
    "overlap": "it is set where a job is shared",
    "kill-on-bad-exit": "it is always set",
    "unbuffered": "it is always set",
    "pty": "services have no terminal",
    "multi-prog": "a step is one program",
}


def check_options(at: str, options: JobOptions, *, warn_s: float) -> None:
    """Raises ConfigError if one of `options` is not valid. `at`: key of the options, such as `experts.math.resources`.
    `warn_s`: value of `cluster.warn_s`; a shorter walltime is refused."""
    for name in _WORDS:
        _check_word(f"{at}.{name}", getattr(options, name))
    _check_walltime(f"{at}.walltime", options.walltime, warn_s=warn_s)
    _check_further(f"{at}.sbatch", options.sbatch, SBATCH_OWNED)
    _check_dependency(f"{at}.sbatch", options.sbatch)
    _check_further(f"{at}.srun", options.srun, SRUN_OWNED)


def check_script(cluster: ClusterConfig) -> None:
    """Checks the values of `cluster` that become lines of batch scripts: modules, setup lines, environment, paths and
    container. Raises ConfigError."""
    for number, module in enumerate(cluster.modules):
        if not _MODULE.fullmatch(module):
            key = f"cluster.modules[{number}]"
            raise ConfigError(f"{key}={module!r}: not the name of a module (valid: for example cuda/12.4)", key=key)
    for number, line in enumerate(cluster.setup):
        key = f"cluster.setup[{number}]"
        if not line.strip():
            raise ConfigError(f"{key} is empty (valid: a line of bash)", key=key)
        check_one_line(key, line.replace("\t", " "), instead="give each line as an entry of its own")
    check_environment("cluster.env", cluster.env)
    for name, value in cluster.env.items():
        check_one_line(f"cluster.env.{name}", value)
    for name in ("python", "scratch", "login"):
        value = getattr(cluster, name)
        if value is not None:
            check_not_empty(f"cluster.{name}", value)
    _check_container(cluster.container)


def check_environment(at: str, environment: Mapping[str, str]) -> None:
    for name, value in environment.items():
        if "\0" in value:
            raise ConfigError(f"{at}.{name}: has a null character, which ends the value", key=f"{at}.{name}")
        if not _VARIABLE.fullmatch(name):
            valid = "letters, digits and '_', not beginning with a digit"
            raise ConfigError(f"{at}.{name}: cannot name a variable (valid: {valid})", key=f"{at}.{name}")


def check_run_path(path: Path, kind: str) -> None:
    """Raises ConfigError if `path`, the run directory, contains a character that Slurm would replace in the names of
    log files. `kind`: value of `cluster.kind`; with `local` every path is valid."""
    if kind == "local":
        return
    if found := re.search(r"[%\\]", str(path)) or _CONTROL.search(str(path)):
        raise ConfigError(
            f"the run directory {str(path)!r} has {found[0]!r}, which has another meaning in the names of Slurm's "
            f"log files (valid: a path without '%', backslashes and control characters; `--run DIR` names another)"
        )


def check_not_empty(key: str, value: str) -> None:
    """Raises ConfigError, which names `key`, if `value` is blank or has a line break or other control character."""
    if not value.strip():
        raise ConfigError(f"{key} is empty", key=key)
    check_one_line(key, value)


def check_one_line(key: str, value: str, *, instead: str = "it has to be one line of plain text") -> None:
    if found := _CONTROL.search(value):
        raise ConfigError(f"{key}: has the control character {found[0]!r}; {instead}", key=key)


def _check_word(key: str, value: str | None) -> None:
    if value is None:
        return
    check_not_empty(key, value)
    if found := _INVALID.search(value):
        valid = "as Slurm writes it, without blanks and quotes; null for none"
        raise ConfigError(f"{key}={value}: {found[0]!r} is not possible here (valid: {valid})", key=key)


def _check_walltime(key: str, value: str | None, *, warn_s: float) -> None:
    if value is None:
        return
    seconds = walltime_s(value)
    if seconds is None:
        raise ConfigError(f"{key}={value}: not a time in Slurm's format (valid: {VALID})", key=key)
    if seconds < warn_s + _TICK_S:
        raise ConfigError(
            f"{key}={value}: jobs drain cluster.warn_s={warn_s:g} s before their end, or up to a minute earlier, so "
            f"nothing would be left (valid: at least {warn_s + _TICK_S:g} s, or a shorter cluster.warn_s)",
            key=key,
        )


def _check_further(at: str, options: Mapping[str, Any], owned: Mapping[str, str]) -> None:
    for name, value in options.items():
        key = f"{at}.{name}"
        if not _OPTION.fullmatch(name):
            valid = "a long option without its dashes, such as mail-type"
            raise ConfigError(f"{key}: cannot be an option of Slurm (valid: {valid})", key=key)
        for other, instead in owned.items():
            if other.startswith(name):  # Slurm accepts any unique prefix of an option
                problem = "is not to be set here" if other == name else f"is short for --{other}, which is not set here"
                raise ConfigError(f"{key}: {problem}; {instead}", key=key)
        if value is not None and not isinstance(value, str | int | bool):
            raise ConfigError(f"{key}: {value!r} is not text, a whole number, true, false or null", key=key)
        if isinstance(value, str):
            check_one_line(key, value)
            if "'" in value or "\\" in value:
                raise ConfigError(f"{key}={value}: quotes and backslashes are not possible in an option", key=key)


def _check_dependency(at: str, options: Mapping[str, Any]) -> None:
    """Raises ConfigError if the option `dependency` is not in Slurm's format or contains '?', which means any one of
    several jobs. A router's standby must wait for all: the jobs that the user names and the serving router's job."""
    for name, value in options.items():
        key = f"{at}.{name}"
        if name != "dependency" and "dependency".startswith(name):
            raise ConfigError(f"{key}: is short for --dependency; write it out", key=key)
        if name != "dependency" or value is None or value is False:
            continue
        valid = "such as singleton, or afterok:1:2,afterany:3"
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f"{key}={value}: not a dependency in Slurm's format (valid: {valid})", key=key)
        if any(part.strip().lower().startswith("expand") for part in value.split(",")):
            problem = "'expand' gives the resources of this job to another one, so nothing could serve in it"
            raise ConfigError(f"{key}={value}: {problem} (valid: {valid})", key=key)
        if "?" in value:
            problem = "'?' (any of them) cannot be combined with a router's wait for its predecessor"
            raise ConfigError(f"{key}={value}: {problem} (valid: {valid})", key=key)


def _check_container(container: ContainerConfig) -> None:
    at = "cluster.container"
    check_not_empty(f"{at}.program", container.program)
    if container.image is not None:
        check_not_empty(f"{at}.image", container.image)
    for name, words in {"binds": container.binds, "options": container.options}.items():
        for number, word in enumerate(words):
            check_not_empty(f"{at}.{name}[{number}]", word)
    for number, bind in enumerate(container.binds):
        parts = bind.split(":")
        if len(parts) > 3 or not all(parts) or (len(parts) == 3 and parts[2] not in ("ro", "rw")):
            key = f"{at}.binds[{number}]"
            raise ConfigError(f"{key}={bind}: not a mount (valid: SOURCE, SOURCE:TARGET or SOURCE:TARGET:ro)", key=key)
