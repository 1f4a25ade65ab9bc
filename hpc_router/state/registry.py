"""The registry: one small file per endpoint on the shared file system, written only by its owner.

Rules: a writer replaces its file atomically; nobody locks or appends; a reader lists and opens, passes over what is
missing, half-copied or another user's, and keeps its last good view of a file it cannot read now. Whether a record's
owner still lives is judged elsewhere, from the beat counter and the reader's own clock: wall clocks differ.
"""

import logging
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Self

from hpc_router.errors import RegistryError
from hpc_router.net.protocol import MODELS
from hpc_router.state.atomic_files import MAX_FILE_BYTES, read_json, replace_json

logger = logging.getLogger(__name__)

SCHEMA: Final = 1
_REPLICA = re.compile(r"(?P<expert>[a-z0-9][a-z0-9_-]*)-(?P<slot>[a-z]*[0-9]+)\.g(?P<generation>[0-9]+)")


class RecordKind(StrEnum):
    EXPERT = "expert"
    ROUTER = "router"
    EXTERNAL = "external"


class State(StrEnum):
    """What the owner of a record publishes: whether requests may be sent to it (docs/states.md)."""

    STARTING = "starting"  # takes no requests yet, or none while its engine restarts
    READY = "ready"  # takes requests
    DRAINING = "draining"  # finishes its requests, takes no new ones


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What computes behind an endpoint; unknown is None."""

    kind: str | None = None
    version: str | None = None
    model: str | None = None
    revision: str | None = None
    quantization: str | None = None
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One endpoint. `serves` maps an expert's name to the model name its engine answers to; None: to be asked.

    `probe`: of an external endpoint, the path that the router asks; None: only whether its port takes connections.
    """

    kind: RecordKind
    replica: str
    url: str
    state: State
    serves: Mapping[str, str | None]
    generation: int = 1
    nonce: str | None = None
    job_id: str | None = None
    node: str | None = None
    owner_uid: int = field(default_factory=os.getuid)
    expires_at: float | None = None
    beat: int | None = None
    beat_s: float | None = None
    capacity: int | None = None
    engine: EngineInfo = EngineInfo()
    probe: str | None = MODELS
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        if self.kind is not RecordKind.EXTERNAL:
            del value["probe"]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Raises RegistryError for what is no record of a schema known here."""
        if value.get("schema") != SCHEMA:
            raise RegistryError(f"registry schema {value.get('schema')!r}; this version reads {SCHEMA}")
        known = {f.name for f in fields(cls)}
        try:
            record = cls(**{k: v for k, v in value.items() if k in known})
            engine = _engine_info(value.get("engine") or {})
            record = replace(record, kind=RecordKind(record.kind), state=State(record.state), engine=engine)
        except (AttributeError, TypeError, ValueError) as error:
            raise RegistryError(f"not a registry record: {error}") from error
        _check_types(record)
        return record


def _engine_info(value: Mapping[str, Any]) -> EngineInfo:
    known = {f.name for f in fields(EngineInfo)}
    return EngineInfo(**{key: item for key, item in value.items() if key in known})


def _check_types(record: Record) -> None:
    serves_ok = isinstance(record.serves, Mapping) and all(
        isinstance(expert, str) and isinstance(model, str | None) for expert, model in record.serves.items()
    )
    numbers_ok = all(
        value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        for value in (record.beat, record.beat_s, record.expires_at, record.capacity)
    )
    generation_ok = isinstance(record.generation, int) and not isinstance(record.generation, bool)
    url_ok = isinstance(record.url, str) and record.url.startswith(("http://", "https://"))
    texts_ok = isinstance(record.nonce, str | None) and isinstance(record.probe, str | None)
    if not (serves_ok and numbers_ok and generation_ok and url_ok and texts_ok):
        raise RegistryError(f"record {record.replica!r} has a value of the wrong type")
    split_replica(record.replica)


def http_url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def replica_name(expert: str, slot: int | str, generation: int) -> str:
    return f"{expert}-{slot}.g{generation}"


def split_replica(name: str) -> tuple[str, str, int]:
    """`math-0.g3` -> ("math", "0", 3)."""
    match = _REPLICA.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise RegistryError(f"{name!r} is not a replica name such as 'math-0.g3'")
    return match["expert"], match["slot"], int(match["generation"])


def publish(folder: Path, record: Record) -> None:
    replace_json(folder / f"{record.replica}.json", record.to_json())


def withdraw(folder: Path, replica: str) -> None:
    (folder / f"{replica}.json").unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class _Seen:
    stamp: tuple[int, int, int]
    record: Record | None


class Reader:
    """Reads the folder again and again; opens only files that changed since the last look."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[str, _Seen] = {}

    def snapshot(self) -> dict[str, Record]:
        """Every valid record by replica name. Raises OSError when the folder cannot be listed: keep the last view."""
        with os.scandir(self._folder) as entries:
            names = sorted(e.name for e in entries if e.name.endswith(".json") and not e.name.startswith("."))
        self._seen = {name: seen for name in names if (seen := self._look(name)) is not None}
        return {seen.record.replica: seen.record for seen in self._seen.values() if seen.record is not None}

    def _look(self, name: str) -> _Seen | None:
        before = self._seen.get(name)
        path = self._folder / name
        try:
            status = path.lstat()
        except FileNotFoundError:
            return None
        except OSError:
            return before
        stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        if before is not None and before.stamp == stamp:
            return before
        if status.st_uid != os.getuid():
            logger.warning("registry file %s belongs to uid %d: refused", name, status.st_uid)
            return _Seen(stamp, None)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
            logger.warning("registry file %s is not a small regular file: refused", name)
            return _Seen(stamp, None)
        value = read_json(path)
        if value is None:
            logger.warning("registry file %s cannot be read now", name)
            return _Seen((0, 0, 0), before.record) if before else None
        try:
            record = Record.from_json(value)
            if f"{record.replica}.json" != name:
                raise RegistryError(f"it names the replica {record.replica!r}")
        except RegistryError as error:
            logger.warning("registry file %s: %s", name, error)
            return _Seen(stamp, None)
        return _Seen(stamp, record)


def leading_router(records: Mapping[str, Record]) -> Record | None:
    """The ready router of the highest generation."""
    routers = [r for r in records.values() if r.kind is RecordKind.ROUTER and r.state is State.READY]
    return max(routers, key=lambda r: (r.generation, r.replica), default=None)
