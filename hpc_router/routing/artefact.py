"""A trained classifier as a folder: `artefact.json` (settings, clusters, experts) and `tables.safetensors`.

Every training method writes this one format and one run time reads it. A prompt's value for a cluster is
    sum over its terms of weights[term, cluster]  /  length  +  offset[cluster]
where `weights` is everything linear folded into one vocabulary x clusters table. The length is that of the prompt's
TF-IDF row, sqrt(sum of idf^2) (norm kind `terms`), or of its place in the space of the clusters, |sum of space[term]|
(norm kind `space`). Offsets are 0, or -|centre|^2 / 2 where the nearest centre is wanted. No pickles, no clock: the
same training gives the same bytes. Read whole and checked, not mapped: a stalled or replaced shared file must not fault
the router. This module knows no policy and no deployment.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from hpc_router.errors import ArtefactError
from hpc_router.routing.features import Features

SCHEMA = 2
MANIFEST = "artefact.json"
TABLES = "tables.safetensors"
NORM_TERMS = "terms"
NORM_SPACE = "space"

_DTYPES = {
    "vocabulary": "uint8",
    "weights": "float32",
    "idf": "float32",
    "telling": "uint8",
    "offsets": "float32",
    "space": "float32",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Artefact:
    """Row i of every table is `terms[i]`, column j of `weights` is `clusters[j]`, which `experts[j]` serves.

    `telling[i]`: the term speaks for some clusters against others; a prompt without such a term is not known.
    `training`: data fingerprint, settings, scores and package versions, as JSON values.
    """

    features: Features
    method: str
    clusters: tuple[str, ...]
    experts: tuple[str | None, ...]
    margin_threshold: float
    terms: tuple[str, ...]
    weights: NDArray[np.float32]
    idf: NDArray[np.float32]
    telling: NDArray[np.uint8]
    offsets: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    space: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    norm: str = NORM_TERMS
    training: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.offsets.size:
            object.__setattr__(self, "offsets", np.zeros(len(self.clusters), np.float32))
        if not self.space.size:
            object.__setattr__(self, "space", np.zeros((len(self.terms), 0), np.float32))
        _check(self)

    @cached_property
    def tables(self) -> bytes:
        blob = "\n".join(self.terms).encode()
        return bytes(
            save(
                {
                    "vocabulary": np.frombuffer(blob, np.uint8),
                    "weights": np.ascontiguousarray(self.weights),
                    "idf": np.ascontiguousarray(self.idf),
                    "telling": np.ascontiguousarray(self.telling),
                    "offsets": np.ascontiguousarray(self.offsets),
                    "space": np.ascontiguousarray(self.space),
                }
            )
        )

    @cached_property
    def version(self) -> str:
        """Names the whole content, the cluster -> expert table included."""
        return _version(self._content())

    def _content(self) -> dict[str, object]:
        return {
            "schema": SCHEMA,
            "method": self.method,
            "features": asdict(self.features),
            "norm": self.norm,
            "clusters": list(self.clusters),
            "experts": list(self.experts),
            "margin_threshold": self.margin_threshold,
            "tables_sha256": hashlib.sha256(self.tables).hexdigest(),
            "training": dict(self.training),
        }

    def write(self, folder: Path) -> None:
        """Put the artefact at `folder`, whole or not at all; an artefact already there is replaced."""
        folder = folder.absolute()
        manifest = json.dumps({"version": self.version, **self._content()}, indent=1, ensure_ascii=False) + "\n"
        try:
            _refuse_to_replace(folder)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
                fresh, old = Path(temporary, "new"), Path(temporary, "old")
                fresh.mkdir()
                _write_synced(fresh / TABLES, self.tables)
                _write_synced(fresh / MANIFEST, manifest.encode())
                if folder.exists():
                    folder.rename(old)
                fresh.rename(folder)
        except OSError as error:
            raise ArtefactError(f"cannot write the artefact {folder}: {error.strerror or error}") from error


def read(folder: Path) -> Artefact:
    """Load and check an artefact; every way it can be unusable is an ArtefactError that says which."""
    if not folder.is_dir():
        raise ArtefactError(f"no artefact at {folder}: it must be a folder with {MANIFEST} and {TABLES}")
    manifest = _manifest(folder / MANIFEST)
    tables = _bytes(folder / TABLES)
    try:
        if hashlib.sha256(tables).hexdigest() != manifest.get("tables_sha256"):
            raise ValueError(f"{TABLES} is damaged or of another training: its hash is not the one in {MANIFEST}")
        artefact = _parse(manifest, load(tables))
    except (ValueError, TypeError, SafetensorError) as error:
        raise ArtefactError(f"the artefact {folder} cannot be used: {error}; train it again") from error
    # Known already, and computing it again from the parsed values would only repeat the check.
    artefact.__dict__["version"] = manifest["version"]
    return artefact


def training_of(folder: Path) -> tuple[str, dict[str, Any]]:
    """The version of an artefact and what its training said, without its tables."""
    manifest = _manifest(folder / MANIFEST)
    training = manifest.get("training")
    return str(manifest["version"]), training if isinstance(training, dict) else {}


def experts_of(folder: Path) -> set[str]:
    """Those to whom the clusters of an artefact that was read before lead, without its tables."""
    experts = _manifest(folder / MANIFEST)["experts"]
    assert isinstance(experts, list)
    return {expert for expert in experts if expert is not None}


def _manifest(path: Path) -> dict[str, object]:
    try:
        manifest = json.loads(_bytes(path))
    except ValueError as error:
        raise ArtefactError(f"{path} is damaged: not JSON ({error}); train the artefact again") from error
    if not isinstance(manifest, dict):
        raise ArtefactError(f"{path} is damaged: not a JSON object; train the artefact again")
    schema = manifest.get("schema")
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        advice = "update hpc_router" if newer else "train the artefact again"
        raise ArtefactError(f"{path} has schema {schema!r}; this version reads {SCHEMA}: {advice}")
    content = {key: value for key, value in manifest.items() if key != "version"}
    if manifest.get("version") != _version(content):
        raise ArtefactError(f"{path} is damaged or was edited by hand: its version does not fit its content")
    return manifest


def _parse(manifest: Mapping[str, object], tensors: Mapping[str, NDArray[np.generic]]) -> Artefact:
    for name, dtype in _DTYPES.items():
        if name not in tensors:
            raise ValueError(f"{TABLES} lacks the tensor '{name}'")
        if tensors[name].dtype != dtype:
            raise ValueError(f"tensor '{name}' is {tensors[name].dtype}, not {dtype}")
    text = tensors["vocabulary"].tobytes().decode()
    threshold = manifest.get("margin_threshold")
    if not isinstance(threshold, (int, float)):
        raise TypeError("margin_threshold must be a number")
    training = manifest.get("training")
    return Artefact(
        features=_features(manifest.get("features")),
        method=_string(manifest, "method"),
        clusters=tuple(str(name) for name in _list(manifest, "clusters")),
        experts=tuple(None if name is None else str(name) for name in _list(manifest, "experts")),
        margin_threshold=float(threshold),
        terms=tuple(text.split("\n")) if text else (),
        weights=tensors["weights"].astype(np.float32, copy=False),
        idf=tensors["idf"].astype(np.float32, copy=False),
        telling=tensors["telling"].astype(np.uint8, copy=False),
        offsets=tensors["offsets"].astype(np.float32, copy=False),
        space=tensors["space"].astype(np.float32, copy=False),
        norm=_string(manifest, "norm"),
        training=training if isinstance(training, dict) else {},
    )


def _check(artefact: Artefact) -> None:
    rows, columns = len(artefact.terms), len(artefact.clusters)
    if columns == 0 or len(set(artefact.clusters)) != columns:
        raise ValueError("clusters must be one or more distinct names")
    if len(artefact.experts) != columns:
        raise ValueError(f"{columns} clusters need {columns} entries in experts, not {len(artefact.experts)}")
    if len(set(artefact.terms)) != rows:
        raise ValueError("the vocabulary holds a term twice")
    if artefact.norm not in (NORM_TERMS, NORM_SPACE):
        raise ValueError(f"norm is '{artefact.norm}'; this version knows '{NORM_TERMS}' and '{NORM_SPACE}'")
    dimensions = artefact.space.shape[1] if artefact.norm == NORM_SPACE else 0
    shapes: dict[str, tuple[int, ...]] = {
        "weights": (rows, columns),
        "idf": (rows,),
        "telling": (rows,),
        "offsets": (columns,),
        "space": (rows, dimensions),
    }
    for name in shapes:
        table = getattr(artefact, name)
        if table.shape != shapes[name]:
            raise ValueError(f"tensor '{name}' has shape {table.shape}, not {shapes[name]}")
        if not np.isfinite(table).all():
            raise ValueError(f"tensor '{name}' holds values that are not finite numbers (NaN or infinity)")
    if not np.isfinite(artefact.margin_threshold):
        raise ValueError("margin_threshold is not a finite number")


def _features(value: object) -> Features:
    if not isinstance(value, dict):
        raise TypeError("features must be an object")
    types = {"kind": str, "fold_numbers": bool, "window_bytes": int, "ngrams": int, "prefix": int}
    if value.keys() != {entry.name for entry in fields(Features)}:
        raise ValueError(f"features must have exactly the keys {', '.join(types)}")
    for key, expected in types.items():
        if type(value[key]) is not expected:
            raise TypeError(f"features.{key} must be of type {expected.__name__}")
    return Features(**value)


def _list(manifest: Mapping[str, object], key: str) -> list[object]:
    value = manifest.get(key)
    if not isinstance(value, list):
        raise TypeError(f"{key} must be a list")
    return value


def _string(manifest: Mapping[str, object], key: str) -> str:
    value = manifest.get(key)
    if not isinstance(value, str):
        raise TypeError(f"{key} must be a string")
    return value


def _version(content: Mapping[str, object]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ArtefactError(f"{path} is missing: an artefact is {MANIFEST} and {TABLES} together") from error
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror or error}") from error


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _refuse_to_replace(folder: Path) -> None:
    """A mistyped output folder must never cost its owner anything but an artefact."""
    if folder.is_dir():
        foreign = sorted({entry.name for entry in folder.iterdir()} - {MANIFEST, TABLES})
        if foreign:
            raise ArtefactError(f"will not replace {folder}: it holds other files ({foreign[0]}); name another folder")
    elif folder.exists():
        raise ArtefactError(f"will not replace {folder}: it is not a folder")
