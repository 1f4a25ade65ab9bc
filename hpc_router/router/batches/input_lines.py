"""The requests in a batch's input file: one JSON object per line, as OpenAI's Batch API defines it.

A file may have a million lines, so it is read in one pass with constant memory. Duplicates of `custom_id` are found by
their hashes, which are in a file: it is read several times, and each time only the hashes of one range are compared.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

import numpy as np

from hpc_router.net import protocol
from hpc_router.router.batches.stored_batches import BatchError

ENDPOINTS: Final = protocol.GENERATE_PATHS
"""The API paths to which the requests of a batch may go."""
MAX_ERRORS: Final = 50
"""Maximum number of faults of a file that are reported."""
MAX_CUSTOM_ID_CHARS: Final = 512
RANGE_HASHES: Final = 2**17
"""Number of hashes that are compared at once, about 1 MiB."""


class LineError(Exception):
    """A line is no request of the batch. `code` and `param`: as in `BatchError`."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


@dataclass(frozen=True, slots=True)
class InputLine:
    """One line. `index`: its number among the requests, from 0; blank lines are not counted. `number`: its number in
    the file, from 1. `offset`, `length`: where it is in the file, in bytes."""

    index: int
    number: int
    offset: int
    length: int
    raw: bytes


@dataclass(frozen=True, slots=True)
class LineRequest:
    """The request in a line. `body`: its JSON object as bytes, without line breaks."""

    custom_id: str
    model: str
    body: bytes


@dataclass(frozen=True, slots=True)
class InputCheck:
    """The result of checking an input file: the number of requests, and its faults."""

    total: int
    errors: tuple[BatchError, ...]


def input_lines(content: BinaryIO, *, max_bytes: int) -> Iterator[InputLine]:
    """Yields the lines of an input file that are not blank. Of a line longer than `max_bytes`, `raw` has only the
    first `max_bytes + 1` bytes."""
    index = number = offset = 0
    while raw := content.readline(max_bytes + 1):
        length, number = len(raw), number + 1
        if length > max_bytes and not raw.endswith(b"\n"):
            while rest := content.readline(max_bytes + 1):
                length += len(rest)
                if rest.endswith(b"\n"):
                    break
        if raw.strip():
            yield InputLine(index, number, offset, length, raw)
            index += 1
        offset += length


def parse_line(raw: bytes, *, endpoint: str) -> LineRequest:
    """Returns the request in a line of a batch for the API path `endpoint`. Raises LineError."""
    try:
        value = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise LineError("invalid_json_line", f"this line is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise LineError("invalid_json_line", "this line is not a JSON object")
    custom_id, body = value.get("custom_id"), value.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        raise LineError(
            "missing_required_parameter", f"custom_id is a text of 1 to {MAX_CUSTOM_ID_CHARS} characters", "custom_id"
        )
    if value.get("method") != "POST":
        raise LineError("invalid_method", "the method must be POST", "method")
    if value.get("url") != endpoint:
        raise LineError("invalid_url", f"the url must be the endpoint of the batch, {endpoint}", "url")
    if not isinstance(body, dict):
        raise LineError("missing_required_parameter", "the body must be a JSON object", "body")
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise LineError("missing_required_parameter", "the body must name a model", "body.model")
    if body.get("stream"):
        raise LineError("invalid_request", "responses of a batch cannot be streamed", "body.stream")
    return LineRequest(custom_id, model, json.dumps(body).encode())


def check_input(
    path: Path, *, endpoint: str, max_lines: int, max_bytes: int, stopped: Callable[[], bool] = lambda: False
) -> InputCheck:
    """Checks an input file: each line is a request for `endpoint`, all name one model, no two have the same custom_id,
    and there are at most `max_lines`, each of at most `max_bytes`. Returns early once `stopped` returns True."""
    errors: list[BatchError] = []
    total, model = 0, None
    with path.open("rb", buffering=2**20) as content, tempfile.TemporaryFile(dir=path.parent) as hashes:
        for line in input_lines(content, max_bytes=max_bytes):
            if len(errors) >= MAX_ERRORS or stopped():
                break
            total = line.index + 1
            if total > max_lines:
                message = f"the file has more than {max_lines} requests, the limit of router.batch.max_lines"
                errors.append(BatchError("too_many_tasks", message, line.number))
                break
            try:
                if line.length > max_bytes:
                    raise LineError("invalid_request", f"this line is longer than {max_bytes} bytes")
                request = parse_line(line.raw, endpoint=endpoint)
                if model is not None and request.model != model:
                    message = (
                        f"all lines must name one model: this one names {request.model[:80]!r}, the first {model!r}"
                    )
                    raise LineError("mismatched_model", message, "body.model")
            except LineError as error:
                errors.append(BatchError(error.code, str(error), line.number, error.param))
                continue
            model = model or request.model[:80]
            hashes.write(_hash(request.custom_id))
        if not total:
            errors.append(BatchError("empty_file", "the file has no requests"))
        duplicates = set() if errors else _duplicates(hashes, total)
    if duplicates:
        errors += _named_duplicates(path, duplicates, endpoint=endpoint, max_bytes=max_bytes)
    return InputCheck(total, tuple(errors))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _hash(custom_id: str) -> bytes:
    return hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _duplicates(hashes: Any, count: int) -> set[int]:
    """Returns up to `MAX_ERRORS` of the hashes that occur several times among the `count` in the file `hashes`."""
    found: set[int] = set()
    ranges = max(1, -(-count // RANGE_HASHES))
    for part in range(ranges):
        hashes.seek(0)
        chosen = []
        while block := hashes.read(8 * RANGE_HASHES):
            values = np.frombuffer(block, dtype="<u8")
            chosen.append(values[values % ranges == part])
        ordered = np.sort(np.concatenate(chosen))
        found.update(ordered[1:][ordered[1:] == ordered[:-1]][:MAX_ERRORS].tolist())
        if len(found) >= MAX_ERRORS:
            break
    return found


def _named_duplicates(path: Path, hashes: set[int], *, endpoint: str, max_bytes: int) -> list[BatchError]:
    """Returns an error for each line whose custom_id has one of these hashes and occurred before."""
    errors: list[BatchError] = []
    seen: set[str] = set()
    with path.open("rb", buffering=2**20) as content:
        for line in input_lines(content, max_bytes=max_bytes):
            custom_id = parse_line(line.raw, endpoint=endpoint).custom_id
            if int.from_bytes(_hash(custom_id), "little") not in hashes:
                continue
            if custom_id in seen:
                message = f"the custom_id {custom_id[:80]!r} occurs in an earlier line"
                errors.append(BatchError("duplicate_custom_id", message, line.number, "custom_id"))
            if len(errors) >= MAX_ERRORS:
                break
            seen.add(custom_id)
    return errors
