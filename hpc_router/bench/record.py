"""The record of a measurement point: one flat JSON line with its figures, its load and its provenance.

Each call of the benchmark writes files of its own and replaces them atomically after every point. So an interrupted
call keeps its finished points, and several calls can use one folder. Prompts, responses, headers and tokens are not
recorded.
"""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from hpc_router.bench.config import BenchConfig
from hpc_router.bench.point import MeasuredPoint
from hpc_router.bench.provenance import Provenance
from hpc_router.state.atomic_files import replace_text

SCHEMA: Final = 2


@dataclass(slots=True)
class ResultFiles:
    """The result files of one call of the benchmark: `bench-<time>-<random>.jsonl`, and if `raw` is set
    `bench-<time>-<random>.requests.jsonl` with one line per request."""

    folder: Path
    raw: bool
    name: str = field(default_factory=lambda: f"bench-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
    records: list[dict[str, Any]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.jsonl"

    def add(self, measured: MeasuredPoint, *, config: BenchConfig, origin: Provenance) -> None:
        """Writes a finished measurement point to the files."""
        point = f"{self.name}.{len(self.records)}"
        self.records.append(record(point, measured, config=config, origin=origin))
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.path, lines(self.records))
        if self.raw:
            self.requests += raw_lines(point, measured)
            replace_text(self.folder / f"{self.name}.requests.jsonl", lines(self.requests))


def record(point: str, measured: MeasuredPoint, *, config: BenchConfig, origin: Provenance) -> dict[str, Any]:
    """Returns the record of a measurement point as one flat JSON object.

    Its key `direct` has the figures without the router, and `router` has the latency that the router adds. Both are
    None if the point was not measured without the router.
    """
    load, at = measured.load, measured.point
    return {
        "schema": SCHEMA,
        "point": point,
        "started_at": load.started_at,
        "topology": origin.choices.get("topology"),
        "policy": origin.config["policy"]["kind"] if origin.config is not None else None,
        "users": at.users,
        "rate_per_s": at.rate_per_s,
        "trace": at.trace,
        "repeat": at.repeat,
        "model": config.model,
        "seed": config.seed,
        "evidence": origin.evidence,
        "simulated": origin.simulated,
        "gpus": origin.gpus,
        "valid": not measured.invalid,
        "invalid": list(measured.invalid),
        "notes": list(measured.notes),
        **asdict(measured.figures),
        "direct": None if measured.direct is None else asdict(measured.direct),
        "router": measured.overhead,
        "load_cpu_share": load.cpu_share,
        "load_wait_share": load.wait_share,
        "bench": asdict(config),
        "provenance": asdict(origin),
    }


def raw_lines(point: str, measured: MeasuredPoint) -> list[dict[str, Any]]:
    """Returns one JSON value per request of the measurement point, for a `.requests.jsonl` file."""
    return [{"point": point, "users": measured.point.users, **asdict(o)} for o in measured.load.observations]


def lines(values: Sequence[Mapping[str, Any]]) -> str:
    """Formats values as JSON Lines. Raises ValueError for NaN, which JSON does not have."""
    return "".join(json.dumps(value, allow_nan=False) + "\n" for value in values)
