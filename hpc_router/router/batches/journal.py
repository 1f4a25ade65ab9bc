"""The results of a running batch, and how they become its output and error files.

Each executor appends results to a journal of its own, `journal-NONCE`, one line each: a checksum, the index of the
request, `+` or `-` (whether it has succeeded), and the line of the output or error file. A line that a killed process
left incomplete has a wrong checksum and is ignored. If an index occurs several times, because two executors ran the
request, its first result counts, in the order of the journals' names. So a request has exactly one result, whichever
process was killed, and no process has to lock or repair a file.

The results are written in the order of the input. The place of each result in the journals is stored in an index file
of 16 bytes per request, so the memory does not grow with their size; only one byte per request is kept.
"""

import contextlib
import os
import secrets
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

JOURNAL: Final = "journal-"
RESULTS: Final = "results"
OUTPUT: Final = "output.jsonl"
ERRORS: Final = "errors.jsonl"
_PLACE: Final = struct.Struct("<IIQ")
"""Place of a result: 1 + 2 * the number of its journal (+ 1 if it has succeeded), its length, its offset in bytes. All
zero: no result."""
_BUFFER: Final = 2**18


@dataclass(frozen=True, slots=True)
class Result:
    """The result of the request `index`. `line`: the line of the output file (`succeeded`) or the error file, without
    a line break."""

    index: int
    succeeded: bool
    line: bytes


class Journal:
    """A new journal in the folder of a batch, to which one process appends."""

    def __init__(self, folder: Path) -> None:
        path = folder / f"{JOURNAL}{secrets.token_hex(8)}"
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def append(self, results: Iterable[Result]) -> None:
        """Appends results. Raises OSError; some of the results may be stored then."""
        rest = memoryview(b"".join(map(_entry, results)))
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


@dataclass(slots=True)
class Done:
    """Which of a batch's `total` requests have a result."""

    total: int
    completed: int = 0
    failed: int = 0
    _seen: bytearray = field(init=False)

    def __post_init__(self) -> None:
        self._seen = bytearray(self.total)

    def __contains__(self, index: int) -> bool:
        return bool(self._seen[index])

    def add(self, index: int, *, succeeded: bool) -> bool:
        """Counts a result. Returns False, and does not count it, if the request has one or does not exist."""
        if not 0 <= index < self.total or self._seen[index]:
            return False
        self._seen[index] = 1
        if succeeded:
            self.completed += 1
        else:
            self.failed += 1
        return True


def journals(folder: Path) -> list[Path]:
    """Returns the journals of a batch, in the order in which their results count."""
    return sorted(path for path in folder.iterdir() if path.name.startswith(JOURNAL))


def read_done(folder: Path, total: int) -> Done:
    """Returns which requests have a result in the journals of a batch."""
    done = Done(total)
    for path in journals(folder):
        for index, succeeded, _, _ in _places(path):
            done.add(index, succeeded=succeeded)
    return done


def write_results(folder: Path, total: int, *, requests: Iterator[bytes], error_line: Callable[[bytes], bytes]) -> Done:
    """Writes the files `OUTPUT` and `ERRORS` into the folder `RESULTS` of a batch, both in the order of the input.
    `requests` yields the input line of each request; `error_line` makes from it the line for a request that has no
    result. Returns the numbers of lines.

    If the folder exists, it stays as it is, and the result has the numbers of its lines. It gets its name only when
    both files are complete, so of several processes that write it at once, one process has written all of it.
    """
    target, temporary = folder / RESULTS, folder / f".{RESULTS}.{secrets.token_hex(4)}"
    if not target.exists():
        temporary.mkdir(mode=0o700)
        try:
            _write_ordered(folder, temporary, total, requests, error_line)
            with contextlib.suppress(OSError):  # another process was faster
                temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    done = Done(total)
    done.completed, done.failed = _count_lines(target / OUTPUT), _count_lines(target / ERRORS)
    return done


def remove_working_files(folder: Path) -> None:
    """Removes what only a running batch needs, once its results are stored as files of the user."""
    for path in journals(folder):
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / RESULTS, ignore_errors=True)
    (folder / "input.jsonl").unlink(missing_ok=True)


def _write_ordered(
    folder: Path, target: Path, total: int, requests: Iterator[bytes], error_line: Callable[[bytes], bytes]
) -> None:
    paths, done = journals(folder), Done(total)
    with contextlib.ExitStack() as stack:
        places = stack.enter_context(open(target / "places", "x+b", buffering=0, opener=_open_private))
        for number, path in enumerate(paths):
            for index, succeeded, offset, length in _places(path):
                if done.add(index, succeeded=succeeded):
                    place = _PLACE.pack(1 + 2 * number + succeeded, length, offset)
                    os.pwrite(places.fileno(), place, index * _PLACE.size)
        os.ftruncate(places.fileno(), total * _PLACE.size)
        sources = [stack.enter_context(path.open("rb", buffering=0)).fileno() for path in paths]
        output = stack.enter_context(open(target / OUTPUT, "xb", buffering=_BUFFER, opener=_open_private))
        errors = stack.enter_context(open(target / ERRORS, "xb", buffering=_BUFFER, opener=_open_private))
        for (journal, length, offset), request in zip(_entries(places), requests, strict=True):
            line = os.pread(sources[(journal - 1) // 2], length, offset) if journal else error_line(request)
            (output if journal and not journal % 2 else errors).write(line + b"\n")
        for file in (output, errors):
            file.flush()
            os.fsync(file.fileno())
    (target / "places").unlink()


def _entries(places: BinaryIO) -> Iterator[tuple[int, int, int]]:
    places.seek(0)
    while block := places.read(_PLACE.size * 4096):
        yield from _PLACE.iter_unpack(block)


def _entry(result: Result) -> bytes:
    assert b"\n" not in result.line
    content = b"%d %b %b" % (result.index, b"+" if result.succeeded else b"-", result.line)
    return b"%08x %b\n" % (zlib.crc32(content), content)


def _places(path: Path) -> Iterator[tuple[int, bool, int, int]]:
    """Yields index, success, offset and length of each valid result in a journal. Ignores all other lines."""
    offset = 0
    with path.open("rb", buffering=_BUFFER) as file:
        for line in file:
            checksum, _, content = line[:-1].partition(b" ")
            if line.endswith(b"\n") and checksum == b"%08x" % zlib.crc32(content):
                index, sign, text = content.split(b" ", 2)
                yield int(index), sign == b"+", offset + len(line) - 1 - len(text), len(text)
            offset += len(line)


def _count_lines(path: Path) -> int:
    count = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(2**20):
            count += block.count(b"\n")
    return count


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
