"""The files of a model: which ones are copied, how their content is identified, and which SHA-256 is recorded for a
file."""

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hpc_router.errors import StagingError

MAX_FILES: Final = 5_000
_ORIGINAL: Final = "original"
"""Name of a folder with a second copy of the weights in many repositories on the hub. vLLM does not download it
either."""
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_DOWNLOADS: Final = Path(".cache", "huggingface", "download")
"""Folder inside the model's folder in which `hf download --local-dir` records its downloads."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file of a model. `path`: relative to the model's folder; `.` for a model that is one file."""

    path: Path
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one model that an engine may read. `source`: the model's folder, or the file of a model that is one
    file."""

    source: Path
    files: tuple[ModelFile, ...]

    @property
    def size(self) -> int:
        """Returns the total size of all files, in bytes."""
        return sum(file.size for file in self.files)

    @property
    def key(self) -> str:
        """Returns a hash that changes with the location of the model, and with the name, size or modification time of
        any file."""
        lines = [str(self.source), *(f"{file.path}\t{file.size}\t{file.mtime_ns}" for file in self.files)]
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def are_at(self, target: Path) -> bool:
        """Returns whether the folder `target` has all files of the model, by their names and sizes."""
        with suppress(OSError):
            return all((target / file.path).stat().st_size == file.size for file in self.files)
        return False

    def recorded_sha256(self, file: ModelFile) -> str | None:
        """Returns the SHA-256 in hex that the file should have; None if it is not recorded. The record is the name of
        the file's blob in the hub's cache, the metadata of a download, or the file `FILE.sha256` in the same folder."""
        path = self.source / file.path
        if path.is_symlink() and _SHA256.fullmatch(blob := path.readlink().name):
            return blob
        with suppress(OSError, ValueError, IndexError):
            _commit, etag, at = (self.source / _DOWNLOADS / f"{file.path}.metadata").read_text().split()[:3]
            # As in huggingface_hub, the record is valid only for a file that was not changed after the download.
            if _SHA256.fullmatch(etag) and file.mtime_ns / 1e9 - 1 <= float(at):
                return etag
        with suppress(OSError, ValueError, IndexError):
            word = path.with_name(f"{path.name}.sha256").read_text().split()[0].lower()
            return word if _SHA256.fullmatch(word) else None
        return None


def local_models(models: Iterable[str]) -> list[str]:
    """Returns the models that are folders or files, without duplicates. Only an absolute path counts as a file, because
    a hub id may equal a relative file name."""
    return [m for m in dict.fromkeys(models) if Path(m).is_dir() or (Path(m).is_absolute() and Path(m).is_file())]


def list_files(model: Path) -> ModelFiles:
    """Returns the files of a model. Follows links; leaves out hidden entries and `original/`. Raises OSError or
    StagingError."""
    # A link to a file keeps its own name, because the hub's cache names the file itself by its hash.
    source = model.resolve() if model.is_dir() else model.absolute()
    files: list[ModelFile] = []
    for path, status in _walk(source) if source.is_dir() else [(Path(), source.stat())]:
        files.append(ModelFile(path, status.st_size, status.st_mtime_ns))
        if len(files) > MAX_FILES:
            raise StagingError(f"{model} has more than {MAX_FILES} files")
    if not files:
        raise StagingError(f"{model} has no files")
    return ModelFiles(source, tuple(files))


def _walk(source: Path, inside: Path = Path()) -> Iterator[tuple[Path, os.stat_result]]:
    """Yields the path and status of each file, sorted by name within each folder. Raises the kernel's OSError for a
    loop of links, and FileNotFoundError for a broken link."""
    with os.scandir(source / inside) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        path = inside / entry.name
        if entry.name.startswith(".") or path == Path(_ORIGINAL):
            continue
        if entry.is_dir():
            yield from _walk(source, path)
        elif stat.S_ISREG((status := entry.stat()).st_mode):
            yield path, status
