"""Copies one file and checks the copy by its SHA-256.

The copy must have the hash that is recorded for the file; without a record, the hash of the bytes that were read. To
check it, the copy is read back from the disk, which also leaves it in the page cache for the engine. The pages of the
source are dropped during the copy, so that the page cache does not hold the model twice.
"""

import hashlib
import os
import threading
from io import FileIO
from pathlib import Path
from typing import Final

from hpc_router.errors import StagingError
from hpc_router.expert.staging.model_files import ModelFile, ModelFiles

CHUNK_BYTES: Final = 8 * 2**20


class CopyProgress:
    """Counts the copied bytes, and can end the copying. All threads that copy share it. After `stop`, every `add`
    raises StagingError."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stopped = False
        self.size = 0

    def add(self, size: int) -> None:
        """Counts `size` bytes, which were read and are about to be written. Raises StagingError once `stop` was called,
        so that the copying ends."""
        with self._lock:
            if self._stopped:
                raise StagingError("the copy was stopped")
            self.size += size

    def stop(self) -> None:
        with self._lock:
            self._stopped = True


def copy_file(files: ModelFiles, file: ModelFile, target: Path, progress: CopyProgress) -> str:
    """Copies `file` to the new file `target` and returns its SHA-256 in hex. Raises StagingError if the source has
    changed since it was listed, if the copy has another hash, or after `progress.stop`; and OSError."""
    path, recorded = files.source / file.path, files.recorded_sha256(file)
    with path.open("rb", buffering=0) as reading, target.open("xb", buffering=0) as writing:
        read = _copy(reading, writing, progress, hashing=recorded is None)
        status = os.fstat(reading.fileno())
        if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
            raise StagingError(f"{path} changed while it was copied")
        os.fsync(writing.fileno())  # only clean pages can be dropped
        os.posix_fadvise(writing.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    copied = _sha256(target, progress)
    if recorded is not None and copied != recorded:
        raise StagingError(f"{path}: the copy has the SHA-256 {copied}, but {recorded} is recorded for the file")
    if recorded is None and copied != read:
        raise StagingError(f"{target} differs from what was read from {path}")
    return copied


def _copy(reading: FileIO, writing: FileIO, progress: CopyProgress, *, hashing: bool) -> str | None:
    """Copies all bytes. Returns the SHA-256 of the bytes that were read if `hashing` is true, else None."""
    digest, buffer, at = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES)), 0
    os.posix_fadvise(reading.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
    while size := reading.readinto(buffer):
        progress.add(size)
        left = buffer[:size]
        if hashing:
            digest.update(left)
        while left:
            left = left[writing.write(left) :]
        os.posix_fadvise(reading.fileno(), at, size, os.POSIX_FADV_DONTNEED)
        at += size
    return digest.hexdigest() if hashing else None


def _sha256(path: Path, progress: CopyProgress) -> str:
    """Returns the SHA-256 of a file in hex. Raises StagingError after `progress.stop`."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as reading:
        while size := reading.readinto(buffer):
            progress.add(0)
            digest.update(buffer[:size])
    return digest.hexdigest()
