"""The registry: one small file per endpoint on the shared file system, written only by its owner.

Rules: a writer replaces its file atomically, without locks. A reader skips files that are missing, incomplete or of
another user, and keeps the last valid content of a file that it cannot read at the moment. Whether the owner of a
record is alive is not decided here: readers decide it by the changes of the beat counter and their own clock, because
the clocks of hosts differ.
"""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Self

from hpc_router.errors import RegistryError
from hpc_router.net.protocol import MODELS
from hpc_router.state.atomic_files import replace_json
from hpc_router.state.stamped_file import StampedFile

SCHEMA: Final = 1
_URL = re.compile(r"https?://[^\s\\/]+(/[^\s\\]*)?")
_REPLICA = re.compile(r"(?P<expert>[a-z0-9][a-z0-9_-]*)-(?P<slot>[a-z]*[0-9]+)\.g(?P<generation>[0-9]+)")


class RecordKind(StrEnum):
    """The kind of an endpoint."""

    EXPERT = "expert"
    ROUTER = "router"
    EXTERNAL = "external"


class State(StrEnum):
    """The published state of an endpoint, which says whether requests may be sent to it (docs/states.md)."""

    STARTING = "starting"  # takes no requests yet, or none while its engine restarts
    READY = "ready"  # takes requests
    DRAINING = "draining"  # finishes its requests, takes no new ones


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """The engine of an endpoint. A field is None if its value is not known."""

    kind: str | None = None
    version: str | None = None
    model: str | None = None
    revision: str | None = None
    quantization: str | None = None
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    frontend: str | None = None
    """vLLM's HTTP server: python or rust."""
    max_model_len: int | None = None
    """Maximum number of tokens of prompt and response together."""
    priority: bool | None = None
    """Whether the engine serves requests by their `priority`."""
    prefix_caching: bool | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """The published record of one endpoint: a replica or a router.

    `serves` maps each expert to the model name that its requests to the engine need; None: the router asks the engine.
    `probe`: path of the health probe of an external endpoint; None: the router only opens a connection. `load_s`:
    seconds from the start of the engine until it was ready. `accepts`: the kinds of input that the engine accepts, out
    of text, image, audio, tools and embeddings. `certificate`: the certificate of a router that serves HTTPS, in PEM.
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
    load_s: float | None = None
    accepts: tuple[str, ...] | None = None
    certificate: str | None = None
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        if self.kind is not RecordKind.EXTERNAL:
            del value["probe"]
        if self.certificate is None:
            del value["certificate"]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Parses a record. Raises RegistryError if `value` does not have this version's schema."""
        if value.get("schema") != SCHEMA:
            raise RegistryError(f"registry schema {value.get('schema')!r}; this version reads {SCHEMA}")
        try:
            given = {k: v for k, v in value.items() if k in _RECORD_KEYS}
            given["engine"] = _engine_info(value.get("engine") or {})
            given["accepts"] = None if value.get("accepts") is None else tuple(value["accepts"])
            record = cls(**given | {"kind": RecordKind(value["kind"]), "state": State(value["state"])})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RegistryError(f"not a registry record: {error}") from error
        _check_types(record)
        return record


_RECORD_KEYS: Final = frozenset(f.name for f in fields(Record))
_ENGINE_KEYS: Final = frozenset(f.name for f in fields(EngineInfo))


def _engine_info(value: Mapping[str, Any]) -> EngineInfo:
    return EngineInfo(**{key: item for key, item in value.items() if key in _ENGINE_KEYS})


def _check_types(record: Record) -> None:
    serves_ok = isinstance(record.serves, Mapping) and all(
        isinstance(expert, str) and isinstance(model, str | None) for expert, model in record.serves.items()
    )
    numbers_ok = all(
        value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        for value in (record.beat, record.beat_s, record.expires_at, record.capacity, record.load_s)
    )
    engine_ok = isinstance(record.engine.max_model_len, int | None) and all(
        isinstance(value, bool | None) for value in (record.engine.priority, record.engine.prefix_caching)
    )
    accepts_ok = all(isinstance(item, str) for item in record.accepts or ())
    generation_ok = isinstance(record.generation, int) and not isinstance(record.generation, bool)
    url_ok = isinstance(record.url, str) and _URL.fullmatch(record.url) is not None
    texts = (record.nonce, record.probe, record.certificate, record.engine.frontend)
    texts_ok = all(isinstance(text, str | None) for text in texts)
    if not (serves_ok and numbers_ok and engine_ok and accepts_ok and generation_ok and url_ok and texts_ok):
        raise RegistryError(f"record {record.replica!r} has a value of the wrong type")
    split_replica(record.replica)


def http_url(host: str, port: int, *, tls: bool = False) -> str:
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def replica_name(expert: str, slot: int | str, generation: int) -> str:
    return f"{expert}-{slot}.g{generation}"


def split_replica(name: str) -> tuple[str, str, int]:
    """Splits a replica's name into expert, slot and generation: `math-0.g3` -> ("math", "0", 3)."""
    match = _REPLICA.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise RegistryError(f"{name!r} is not a replica name such as 'math-0.g3'")
    return match["expert"], match["slot"], int(match["generation"])


def publish(folder: Path, record: Record) -> None:
    """Writes a record to its file in the registry folder."""
    replace_json(folder / f"{record.replica}.json", record.to_json())


def withdraw(folder: Path, replica: str) -> None:
    """Removes the record of a replica if there is one."""
    (folder / f"{replica}.json").unlink(missing_ok=True)


class RegistryReader:
    """Reads the registry folder, as often as `snapshot` is called. Parses only files that have changed since the last
    call."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, StampedFile[Record]] = {}

    def snapshot(self) -> dict[str, Record]:
        """Returns every valid record by replica name. Raises OSError if the folder cannot be listed."""
        with os.scandir(self._folder) as entries:
            names = sorted(e.name for e in entries if e.name.endswith(".json") and not e.name.startswith("."))
        self._files = {name: self._files.get(name) or record_file(self._folder / name) for name in names}
        for file in self._files.values():
            with suppress(OSError):
                file.read()
        return {file.value.replica: file.value for file in self._files.values() if file.value is not None}


def record_file(path: Path) -> StampedFile[Record]:
    """Returns a reader of the record at `path`. The record is valid only if the file is named after its replica."""

    def parse(content: Mapping[str, Any]) -> Record:
        record = Record.from_json(content)
        if f"{record.replica}.json" != path.name:
            raise RegistryError(f"it names the replica {record.replica!r}")
        return record

    return StampedFile(path, parse)


def leading_router(records: Mapping[str, Record]) -> Record | None:
    """Returns the ready router with the highest generation; None if no router is ready."""
    routers = [r for r in records.values() if r.kind is RecordKind.ROUTER and r.state is State.READY]
    return max(routers, key=lambda r: (r.generation, r.replica), default=None)
