"""What the verb `usage` prints: requests, tokens and waiting time from the records of requests, and GPU hours."""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from hpc_router.cluster.control_loop.desired_state import gpus_by_expert, readable_deployment
from hpc_router.cluster.launchers.interface import ROUTER
from hpc_router.errors import ConfigError, suggest
from hpc_router.state.job_records import JobDir
from hpc_router.state.registry import split_replica
from hpc_router.state.request_records import read_records
from hpc_router.state.run_directory import RunDir

GROUPS: Final = ("user", "expert", "class", "reason", "status", "day")
"""The keys by which `--by` can group."""
OWNER: Final = "(owner)"
_UNITS_S: Final = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_SINCE: Final = re.compile(r"([0-9]{1,6})([mhdw])")
_SUMS: Final = ("requests", "failed", "prompt_tokens", "cached_tokens", "generated_tokens", "queue_s", "total_s")


def parse_since(text: str, *, now: float) -> float:
    """Returns the Unix time that is the duration `text`, such as `7d`, before `now`. Raises ConfigError."""
    if not (match := _SINCE.fullmatch(text)):
        raise ConfigError(
            f"--since {text[:80]!r}: not a duration (valid: a number and m, h, d or w, such as 12h or 7d)"
        )
    return max(0.0, now - int(match[1]) * _UNITS_S[match[2]])


def check_groups(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of groups without duplicates. Raises ConfigError for an unknown one."""
    for name in names:
        if name not in GROUPS:
            raise ConfigError(f"--by {name[:80]!r}: not a group{suggest(name, GROUPS)}")
    return tuple(dict.fromkeys(names))


def usage(run: RunDir, by: Sequence[str], *, since: float, now: float) -> dict[str, Any]:
    """Returns `{since, until, by, groups, gpu_hours}`. `groups`: for each combination of values of the keys in `by`,
    these values and the sums over its requests. `gpu_hours`: the GPU hours of each expert's jobs since `since`, for the
    requests of all users. Times are Unix seconds."""
    groups = summed((r for r in read_records(run, since=since) if r.get("kind") == "request"), by)
    return {"since": since, "until": now, "by": list(by), "groups": groups, "gpu_hours": gpu_hours(run, since, now)}


def summed(records: Iterable[Mapping[str, Any]], by: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the sums of each group of records, groups with most requests first. `by`: keys whose values define a
    group. A request failed if its status is 500 or above or its response broke off. Unknown numbers count as 0."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for record in records:
        key = tuple(_value(record, name) for name in by)
        group = groups.setdefault(key, dict(zip(by, key, strict=True)) | dict.fromkeys(_SUMS, 0))
        group["requests"] += 1
        status = record.get("status")
        group["failed"] += record.get("outcome") == "broken" or (isinstance(status, int) and status >= 500)
        for name in _SUMS[2:]:
            number = record.get(name)
            group[name] += number if isinstance(number, int | float) else 0
    for group in groups.values():
        group["queue_s"], group["total_s"] = round(group["queue_s"], 3), round(group["total_s"], 3)
    return sorted(groups.values(), key=lambda group: (-group["requests"], [group[name] for name in by]))


def _value(record: Mapping[str, Any], name: str) -> str:
    if name == "day":
        at = record.get("at")
        return time.strftime("%Y-%m-%d", time.gmtime(at if isinstance(at, int | float) else 0))
    value = record.get(name)
    if value is None:
        return OWNER if name == "user" else ""
    return str(value)


def gpu_hours(run: RunDir, since: float, now: float) -> dict[str, float]:
    """Returns the GPU hours of each expert's jobs between `since` and `now`. A job counts from its start to its end,
    with the GPUs that the config gives a replica now. Jobs whose records were removed do not count. Only experts with
    GPUs are listed; the GPUs of adapters count for their host."""
    gpus = gpus_by_expert(readable_deployment(run))
    seconds = {name: 0.0 for name, count in gpus.items() if count and name != ROUTER}
    for folder in run.jobs.iterdir() if run.jobs.is_dir() else ():
        if folder.name.startswith("."):
            continue
        expert = split_replica(folder.name)[0]
        job = JobDir(run, folder.name)
        if expert not in seconds or (process := job.process()) is None or process.started_at is None:
            continue
        end = job.exit()
        busy_s = min(now, now if end is None else end.at) - max(since, process.started_at)
        seconds[expert] += max(0.0, busy_s) * gpus[expert]
    return {name: round(total / 3600, 3) for name, total in seconds.items()}
