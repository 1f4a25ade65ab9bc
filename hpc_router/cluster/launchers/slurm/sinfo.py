"""The partitions of this Slurm site and their kinds of nodes, from one call of `sinfo`. Parsing is pure.

The nodes of a partition often differ, so they are grouped by their resources. Sites may leave out GPU types, memory and
features. `node_fit` decides whether a deployment fits.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from hpc_router.cluster.launchers.commands import run_slurm_command
from hpc_router.config.walltime import walltime_s

TIMEOUT_S: Final = 30.0
FORMAT: Final = "%R|%P|%a|%l|%D|%c|%m|%t|%f|%G"
"""Fields of a line: partition, the same with the mark `*` of the default one, up or down, time limit, number of nodes,
CPUs, memory in MB, state of the nodes, features, generic resources."""
_MANY: Final = {"K": 1024, "M": 1024**2}
_USABLE: Final = frozenset({"idle", "mix", "alloc", "comp", "resv", "plnd", "maint", "boot", "pow_dn", "pow_up"})
"""States of nodes that run jobs, or will run them without an administrator's help."""


@dataclass(frozen=True, slots=True)
class NodeKind:
    """Nodes of a partition with equal resources. `nodes`: their number. `gpus`: number of GPUs per node by type; the
    type is "" if the site names none."""

    nodes: int
    cpus: int
    memory_mb: int | None
    gpus: Mapping[str, int]
    features: frozenset[str]
    state: str

    def gpus_of(self, kind: str | None) -> int:
        """Returns the number of GPUs of the type `kind` per node; if `kind` is None, of all types."""
        return sum(self.gpus.values()) if kind is None else self.gpus.get(kind, 0)

    @property
    def usable(self) -> bool:
        return re.sub(r"[^a-z_]+$", "", self.state) in _USABLE and not self.state.endswith("*")


@dataclass(frozen=True, slots=True)
class Partition:
    name: str
    limit_s: float
    default: bool
    state: str
    kinds: tuple[NodeKind, ...]


@dataclass(frozen=True, slots=True)
class SlurmSite:
    partitions: Mapping[str, Partition]

    @property
    def default(self) -> str | None:
        return next((p.name for p in self.partitions.values() if p.default), None)


def ask_site() -> SlurmSite:
    """Returns the site's partitions, from one call of `sinfo`. Raises SlurmCommandError."""
    argv = ["sinfo", "--all", "--noheader", "--exact", f"--format={FORMAT}"]
    return parse_site(run_slurm_command(argv, timeout_s=TIMEOUT_S))


def parse_site(text: str) -> SlurmSite:
    """Returns the partitions in the output of sinfo. Ignores lines that do not have the fields of FORMAT."""
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        words = [word.strip() for word in line.split("|")]
        if len(words) != FORMAT.count("|") + 1:
            continue
        name, marked, state, limit, nodes, cpus, memory, node_state, features, gres = words
        kind = NodeKind(
            nodes=_count(nodes),
            cpus=_count(cpus),
            memory_mb=_count(memory) if _count(memory) > 1 else None,  # 1: the site does not configure memory
            gpus=parse_gres(gres),
            features=frozenset(f for f in features.split(",") if f and f != "(null)"),
            state=node_state,
        )
        seconds = walltime_s(limit)
        known = found.get(name)
        found[name] = Partition(
            name=name,
            limit_s=math.inf if seconds is None else seconds,
            default=marked.endswith("*"),
            state=state,
            kinds=(*(known.kinds if known else ()), *([kind] if kind.nodes else [])),
        )
    return SlurmSite(found)


def parse_gres(text: str) -> dict[str, int]:
    """Returns the number of GPUs by type: `gpu:a100:4(S:0-1),gpu:v100:2,nvme:1` -> {"a100": 4, "v100": 2}. Without a
    type, `gpu:4` -> {"": 4}."""
    gpus: dict[str, int] = {}
    for entry in re.sub(r"\([^()]*\)", "", text).split(","):
        name, *words = [word for word in entry.strip().split(":") if word != "no_consume"]
        if name != "gpu":
            continue
        count = re.fullmatch(r"(\d+)([KM]?)", words[-1]) if words else None
        kind = ":".join(words[:-1] if count else words)
        gpus[kind] = gpus.get(kind, 0) + (int(count[1]) * _MANY.get(count[2], 1) if count else 1)
    return gpus


def _count(text: str) -> int:
    """Returns the number in `16000` or `16000+`; 0 for other text."""
    match = re.match(r"\d+", text)
    return int(match[0]) if match else 0
