"""The files of a model: which are copied, what identifies their content, and the SHA-256 that is recorded for them."""

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
"""A folder with a second copy of the weights in many repositories on the hub. vLLM does not download it either."""
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_DOWNLOADS: Final = Path(".cache", "huggingface", "download")
"""Where `hf download --local-dir` records what it has downloaded, inside the model's folder."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """`path`: inside the model's folder; `.` for a model that is one file."""

    path: Path
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model folder, or a model of one file, and the files that an engine may read."""

    source: Path
    files: tuple[ModelFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def key(self) -> str:
        """Changes with the location of the model, and with the name, size or time of change of any file."""
        lines = [str(self.source), *(f"{file.path}\t{file.size}\t{file.mtime_ns}" for file in self.files)]
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def are_at(self, target: Path) -> bool:
        """Whether `target` has all files with their sizes."""
        with suppress(OSError):
            return all((target / file.path).stat().st_size == file.size for file in self.files)
        return False

    def recorded_sha256(self, file: ModelFile) -> str | None:
        """The SHA-256 that the file should have, in hex: from the name of the blob in the hub's cache that it links to,
        from the record of a download, or from `FILE.sha256` beside it. None: there is no record."""
        path = self.source / file.path
        if path.is_symlink() and _SHA256.fullmatch(blob := path.readlink().name):
            return blob
        with suppress(OSError, ValueError, IndexError):
            _commit, etag, at = (self.source / _DOWNLOADS / f"{file.path}.metadata").read_text().split()[:3]
            # As in huggingface_hub: the record holds for a file that was not changed after the download.
            if _SHA256.fullmatch(etag) and file.mtime_ns / 1e9 - 1 <= float(at):
                return etag
        with suppress(OSError, ValueError, IndexError):
            word = path.with_name(f"{path.name}.sha256").read_text().split()[0].lower()
            return word if _SHA256.fullmatch(word) else None
        return None


def local_models(models: Iterable[str]) -> list[str]:
    """The models that are folders or files, each once. A hub id may have the name of a file, but is not absolute."""
    return [m for m in dict.fromkeys(models) if Path(m).is_dir() or (Path(m).is_absolute() and Path(m).is_file())]


def list_files(model: Path) -> ModelFiles:
    """Links are followed; hidden entries and `original/` are left out. Raises OSError or StagingError."""
    # The name of a link to a file is kept: in the hub's cache the file itself is named by its hash.
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
    """Files by name. A loop of links ends with an OSError of the kernel, a broken link with FileNotFoundError."""
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
