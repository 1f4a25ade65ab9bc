"""A trained classifier as a folder: `artefact.json` (settings, clusters, experts) and `tables.safetensors`.

Every training method writes this format, and `classifier` reads it. The value of a prompt for a cluster is

    sum over its terms of weights[term, cluster]  /  length  +  offset[cluster]

`weights` combines all linear steps of the training in one table. With norm `terms` the length is that of the prompt's
TF-IDF row, sqrt(sum of idf^2); with norm `space` it is that of the prompt's vector, |sum of space[term]|. Offsets are
0, or -|centroid|^2 / 2 if the nearest centroid is chosen. With `soft` clusters the values do not choose a cluster but
weight the measured quality of the experts (`classifier`). Further columns of `weights` belong to `topics`, which are
the domain of no expert: no prompt is sent to them, but the score and the margin of a prompt are relative to the nearest
one.

The files contain no pickles and no timestamps, so the same training gives the same bytes. They are read and checked
completely instead of memory-mapped, because a stalled or replaced file on a shared file system would crash the router.
This module must not know policies or deployments.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from hpc_router.errors import ArtefactError
from hpc_router.routing.confidence import Calibration
from hpc_router.routing.features import Features
from hpc_router.routing.quality import Quality, stored_quality

SCHEMA = 2
SOFT_SCHEMA = 3
"""Schema of artefacts with soft clusters, which versions that know schema 2 alone would decide wrongly."""
TOPIC_SCHEMA = 4
"""Schema of artefacts with topics."""
MANIFEST = "artefact.json"
TABLES = "tables.safetensors"
NORM_TERMS = "terms"
NORM_SPACE = "space"

_SECTIONS: Final = ("soft", "calibration", "parts")
"""Parts of the manifest that only some artefacts have; each is a dataclass of numbers."""
_VOCABULARY = "vocabulary"
# Each row: name of the tensor in the file, attribute of Artefact, type.
_TENSORS: Final = (
    ("weights", "weights", "float32"),
    ("idf", "idf", "float32"),
    ("telling", "discriminative", "uint8"),
    ("offsets", "offsets", "float32"),
    ("space", "space", "float32"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftDecision:
    """How soft clusters decide. The `nearest` clusters of a prompt count, with the weights softmax(`sharpness` *
    value). An expert whose cost is higher by one unit must be better by `cost_weight` (correctness, 0 to 1)."""

    sharpness: float
    nearest: int
    cost_weight: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PartDecision:
    """When a part of a prompt decides alone: if its margin is at least `clear_margin`, and if it has at least
    `question_terms` discriminative terms (the question in a message) or `message_terms` (a message of a
    conversation)."""

    clear_margin: float
    question_terms: int
    message_terms: int


_Section = TypeVar("_Section", SoftDecision, Calibration, PartDecision)
_WHOLE_NUMBERS: Final = ("nearest", "question_terms", "message_terms")


@dataclass(frozen=True, kw_only=True, eq=False)
class Artefact:
    """The tables of a trained classifier. Raises ValueError if the values do not fit together.

    `weights[i, j]` belongs to the term `terms[i]` and to the cluster `clusters[j]`, whose expert is `experts[j]`; the
    columns after those of the clusters belong to `topics`.
    `idf[i]` and `discriminative[i]` belong to a term, `offsets[j]` to a cluster. `space` has a row per term and a
    column per dimension of the feature space. `discriminative[i]` is 1 if the term distinguishes clusters; a
    prompt without such a term counts as unknown. `training`: data fingerprint, settings, scores and package versions,
    as JSON values.
    """

    features: Features
    method: str
    clusters: tuple[str, ...]
    experts: tuple[str | None, ...]
    margin_threshold: float
    terms: tuple[str, ...]
    weights: NDArray[np.float32]
    idf: NDArray[np.float32]
    discriminative: NDArray[np.uint8]
    offsets: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    space: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    norm: str = NORM_TERMS
    training: Mapping[str, object] = field(default_factory=dict)
    soft: SoftDecision | None = None
    """How the measured quality in `training` decides; None if each cluster belongs to one expert."""
    calibration: Calibration | None = None
    """The probability that a decision is right; None if it is unknown."""
    parts: PartDecision | None = None
    """When a part of a prompt decides; None if the whole text always does."""
    topics: tuple[str, ...] = ()
    """Names of topics that are the domain of no expert (see the module)."""

    def __post_init__(self) -> None:
        if not self.offsets.size:
            object.__setattr__(self, "offsets", np.zeros(len(self.clusters), np.float32))
        if not self.space.size:
            object.__setattr__(self, "space", np.zeros((len(self.terms), 0), np.float32))
        _validate(self)

    @cached_property
    def tables(self) -> bytes:
        """Returns the content of `tables.safetensors`."""
        vocabulary = np.frombuffer("\n".join(self.terms).encode(), np.uint8)
        arrays = {name: np.ascontiguousarray(getattr(self, attribute)) for name, attribute, _ in _TENSORS}
        return bytes(save({_VOCABULARY: vocabulary, **arrays}))

    @cached_property
    def quality(self) -> Quality | None:
        """Returns the measured quality of the experts by cluster; None without training by method=measured."""
        return stored_quality(self.training, self.clusters)

    @cached_property
    def version(self) -> str:
        """Returns a hash of the whole content, including the table of experts."""
        return _version(self._content())

    def _content(self) -> dict[str, object]:
        optional = {key: asdict(value) for key in _SECTIONS if (value := getattr(self, key)) is not None}
        return {
            "schema": TOPIC_SCHEMA if self.topics else SCHEMA if self.soft is None else SOFT_SCHEMA,
            "method": self.method,
            "features": _features_content(self.features),
            "norm": self.norm,
            "clusters": list(self.clusters),
            "experts": list(self.experts),
            "margin_threshold": self.margin_threshold,
            **({"topics": list(self.topics)} if self.topics else {}),
            **optional,
            "tables_sha256": hashlib.sha256(self.tables).hexdigest(),
            "training": dict(self.training),
        }

    def write(self, folder: Path) -> None:
        """Writes the artefact to `folder`, completely or not at all. Replaces an older artefact there. Raises
        ArtefactError."""
        folder = folder.absolute()
        manifest = json.dumps({"version": self.version, **self._content()}, indent=1, ensure_ascii=False) + "\n"
        try:
            _check_replaceable(folder)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
                new, old = Path(temporary, "new"), Path(temporary, "old")
                new.mkdir()
                _write_synced(new / TABLES, self.tables)
                _write_synced(new / MANIFEST, manifest.encode())
                if folder.exists():
                    folder.rename(old)
                new.rename(folder)
        except OSError as error:
            raise ArtefactError(f"cannot write the artefact {folder}: {error.strerror or error}") from error


def read(folder: Path) -> Artefact:
    """Loads and checks an artefact. Raises ArtefactError with the reason if it is not valid."""
    if not folder.is_dir():
        raise ArtefactError(f"no artefact at {folder}: it must be a folder with {MANIFEST} and {TABLES}")
    manifest = _read_manifest(folder / MANIFEST)
    tables = _read_bytes(folder / TABLES)
    try:
        if hashlib.sha256(tables).hexdigest() != manifest.get("tables_sha256"):
            raise ValueError(f"{TABLES} is damaged or from another training: its hash is not that in {MANIFEST}")
        artefact = _parse(manifest, load(tables))
    except (ValueError, TypeError, SafetensorError) as error:
        raise ArtefactError(f"the artefact {folder} cannot be used: {error}; train it again") from error
    # Sets the cached property to the version in the manifest, which was verified above.
    artefact.__dict__["version"] = manifest["version"]
    return artefact


def read_training(folder: Path) -> tuple[str, dict[str, Any]]:
    """Returns the version and the training record of an artefact without reading its tables. Raises ArtefactError."""
    manifest = _read_manifest(folder / MANIFEST)
    training = manifest.get("training")
    return str(manifest["version"]), training if isinstance(training, dict) else {}


def read_experts(folder: Path) -> set[str]:
    """Returns the experts that an artefact's clusters belong to, without reading its tables. Raises ArtefactError."""
    experts = _read_manifest(folder / MANIFEST)["experts"]
    assert isinstance(experts, list)
    return {expert for expert in experts if expert is not None}


def _read_manifest(path: Path) -> dict[str, object]:
    try:
        manifest = json.loads(_read_bytes(path))
    except ValueError as error:
        raise ArtefactError(f"{path} is damaged: not JSON ({error}); train the artefact again") from error
    if not isinstance(manifest, dict):
        raise ArtefactError(f"{path} is damaged: not a JSON object; train the artefact again")
    schema = manifest.get("schema")
    if schema not in (SCHEMA, SOFT_SCHEMA, TOPIC_SCHEMA):
        newer = isinstance(schema, int) and schema > TOPIC_SCHEMA
        advice = "update hpc_router" if newer else "train the artefact again"
        raise ArtefactError(f"{path} has schema {schema!r}; this version reads {SCHEMA} to {TOPIC_SCHEMA}: {advice}")
    content = {key: value for key, value in manifest.items() if key != "version"}
    if manifest.get("version") != _version(content):
        raise ArtefactError(f"{path} is damaged or was edited by hand: its version does not match its content")
    return manifest


def _parse(manifest: Mapping[str, object], tensors: Mapping[str, NDArray[np.generic]]) -> Artefact:
    for name, dtype in ((_VOCABULARY, "uint8"), *((name, dtype) for name, _, dtype in _TENSORS)):
        if name not in tensors:
            raise ValueError(f"{TABLES} lacks the tensor '{name}'")
        if tensors[name].dtype != dtype:
            raise ValueError(f"tensor '{name}' is {tensors[name].dtype}, not {dtype}")
    text = tensors[_VOCABULARY].tobytes().decode()
    training = manifest.get("training")
    arrays: dict[str, Any] = {attribute: tensors[name] for name, attribute, _ in _TENSORS}
    return Artefact(
        features=_features(manifest.get("features")),
        method=_value(manifest, "method", str, "string"),
        clusters=tuple(str(name) for name in _value(manifest, "clusters", list, "list")),
        experts=tuple(None if name is None else str(name) for name in _value(manifest, "experts", list, "list")),
        margin_threshold=float(_value(manifest, "margin_threshold", (int, float), "number")),
        terms=tuple(text.split("\n")) if text else (),
        norm=_value(manifest, "norm", str, "string"),
        training=training if isinstance(training, dict) else {},
        soft=_section(manifest, "soft", SoftDecision),
        calibration=_section(manifest, "calibration", Calibration),
        parts=_section(manifest, "parts", PartDecision),
        topics=tuple(str(name) for name in _value({"topics": [], **manifest}, "topics", list, "list")),
        **arrays,
    )


def _validate(artefact: Artefact) -> None:
    rows, columns = len(artefact.terms), len(artefact.clusters)
    if columns == 0 or len(set(artefact.clusters)) != columns:
        raise ValueError("clusters must be one or more distinct names")
    if len(artefact.experts) != columns:
        raise ValueError(f"{columns} clusters need {columns} entries in experts, not {len(artefact.experts)}")
    if len(set(artefact.terms)) != rows:
        raise ValueError("the vocabulary contains a term twice")
    if artefact.norm not in (NORM_TERMS, NORM_SPACE):
        raise ValueError(f"norm is '{artefact.norm}'; valid: '{NORM_TERMS}', '{NORM_SPACE}'")
    dimensions = artefact.space.shape[1] if artefact.norm == NORM_SPACE else 0
    shapes = ((rows, columns + len(artefact.topics)), (rows,), (rows,), (columns,), (rows, dimensions))
    for (name, attribute, _), shape in zip(_TENSORS, shapes, strict=True):
        table = getattr(artefact, attribute)
        if table.shape != shape:
            raise ValueError(f"tensor '{name}' has shape {table.shape}, not {shape}")
        if not np.isfinite(table).all():
            raise ValueError(f"tensor '{name}' has values that are not finite (NaN or infinity)")
    if not np.isfinite(artefact.margin_threshold):
        raise ValueError("margin_threshold is not a finite number")
    if artefact.calibration is not None and not np.isfinite(list(asdict(artefact.calibration).values())).all():
        raise ValueError("calibration has a value that is not finite")
    if artefact.parts is not None and not 0 < artefact.parts.clear_margin < np.inf:
        raise ValueError("parts.clear_margin must be a positive number")
    if artefact.topics and (artefact.offsets.any() or artefact.soft is not None):
        raise ValueError("topics need clusters without offsets that are not soft")
    if artefact.soft is not None:
        _validate_soft(artefact, artefact.soft)


def _validate_soft(artefact: Artefact, soft: SoftDecision) -> None:
    if not (np.isfinite(soft.sharpness) and soft.sharpness > 0 and np.isfinite(soft.cost_weight) and soft.nearest >= 1):
        raise ValueError("soft must have a positive sharpness, nearest of 1 or more, and a finite cost_weight")
    if artefact.offsets.any():
        raise ValueError("soft clusters have no offsets")
    try:
        quality = artefact.quality
    except (KeyError, TypeError) as error:
        raise ValueError(f"training.quality is not complete: {error!r}") from error
    if quality is None:
        raise ValueError("soft clusters need training.quality")
    shape = len(artefact.clusters), len(quality.experts)
    if quality.rate.shape != shape or quality.cost.shape != shape[1:] or not np.isfinite(quality.rate).all():
        raise ValueError(f"training.quality must have {shape[0]} clusters x {shape[1]} experts")


def _features_content(features: Features) -> dict[str, object]:
    """Returns the settings as JSON values. Leaves out a `text_version` of 1: artefacts from before this key do not have
    it, and their version, a hash of the content, must not change."""
    content = asdict(features)
    if features.text_version == 1:
        del content["text_version"]
    return content


def _features(value: object) -> Features:
    if not isinstance(value, dict):
        raise TypeError("features must be an object")
    types = {"kind": str, "fold_numbers": bool, "window_bytes": int, "ngrams": int, "prefix": int, "text_version": int}
    value = {"text_version": 1, **value}
    if value.keys() != {entry.name for entry in fields(Features)}:
        raise ValueError(f"features must have exactly these keys: {', '.join(types)}")
    for key, expected in types.items():
        if type(value[key]) is not expected:
            raise TypeError(f"features.{key} must be of type {expected.__name__}")
    return Features(**value)


def _section(manifest: Mapping[str, object], key: str, schema: type[_Section]) -> _Section | None:
    """Returns the section `key` of the manifest, which has one number per field of `schema`; None if the manifest does
    not have the section. Raises ValueError for other fields."""
    value = manifest.get(key)
    if value is None:
        return None
    names = [entry.name for entry in fields(schema)]
    if not isinstance(value, dict) or value.keys() != set(names):
        raise ValueError(f"{key} must have exactly these keys: {', '.join(names)}")
    for name, number in value.items():
        if isinstance(number, bool) or not isinstance(number, int if name in _WHOLE_NUMBERS else (int, float)):
            raise TypeError(f"{key}.{name} must be a number")
    return schema(**value)


def _value(manifest: Mapping[str, object], key: str, types: type | tuple[type, ...], name: str) -> Any:
    value = manifest.get(key)
    if not isinstance(value, types):
        raise TypeError(f"{key} must be a {name}")
    return value


def _version(content: Mapping[str, object]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ArtefactError(f"{path} is missing: an artefact consists of {MANIFEST} and {TABLES}") from error
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror or error}") from error


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _check_replaceable(folder: Path) -> None:
    """Raises ArtefactError if `folder` has other files than an artefact, so that a wrong path deletes nothing."""
    if folder.is_dir():
        other_files = sorted({entry.name for entry in folder.iterdir()} - {MANIFEST, TABLES})
        if other_files:
            raise ArtefactError(
                f"will not replace {folder}: it has other files ({other_files[0]}); name another folder"
            )
    elif folder.exists():
        raise ArtefactError(f"will not replace {folder}: it is not a folder")
