"""Files and batches of tests, and a router that answers them by a script."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from hpc_router.router.batches.batch_run import BatchRun, RunLimits
from hpc_router.router.batches.line_results import LineResponse
from hpc_router.router.batches.stored_batches import StoredBatch, StoredBatches
from hpc_router.router.batches.stored_files import StoredFile, StoredFiles, new_id
from hpc_router.state.run_directory import RunDir

CHAT: Final = "/v1/chat/completions"
GB: Final = 10**9
LIMITS: Final = RunLimits(max_lines=1000, max_line_bytes=2**16, in_flight=4)


def line(number: int, **changes: Any) -> bytes:
    """A valid line; `changes` replaces keys of its object."""
    body = {"model": "math", "messages": [{"role": "user", "content": f"question {number}"}]}
    value = {"custom_id": f"line-{number}", "method": "POST", "url": CHAT, "body": body, **changes}
    return json.dumps(value).encode() + b"\n"


def stored_file(files: StoredFiles, content: bytes, *, user: str | None = None, **changes: Any) -> StoredFile:
    now = time.time()
    given = {"user": user, "filename": "in.jsonl", "purpose": "batch", "bytes": len(content), "created_at": now}
    file = StoredFile(**{"id": new_id("file-"), "expires_at": now + 1000, **given, **changes})
    with files.begin(file) as stream:
        stream.write(content)
    return files.complete(file, quota_bytes=GB)


def stored_batch(
    run: RunDir, content: bytes, *, user: str | None = None, **changes: Any
) -> tuple[StoredBatches, StoredBatch]:
    """A new batch with this input."""
    files = StoredFiles(run)
    batches, file, now = StoredBatches(run, files), stored_file(files, content, user=user), time.time()
    given = {
        "id": new_id("batch_"), "user": user, "token_id": None, "endpoint": CHAT, "input_file_id": file.id,
        "completion_window": "24h", "created_at": now, "expires_at": now + 86400, "output_file_id": new_id("file-"),
        "error_file_id": new_id("file-"), "results_expire_s": 86400.0,
    }  # fmt: skip
    batch = StoredBatch(**{**given, **changes})
    batches.create(batch, max_batches=100)
    return batches, batch


def answer(body: bytes) -> LineResponse:
    """The response of an expert that repeats the question."""
    text = json.loads(body)["messages"][0]["content"]
    return LineResponse(200, json.dumps({"text": text}).encode(), request_id="r")


Script = Callable[[bytes], Awaitable[LineResponse]]


class ScriptedRouter:
    """Answers each request by `script`, and keeps the bodies of all requests."""

    def __init__(self, script: Script | None = None) -> None:
        self.bodies: list[bytes] = []
        self.tokens: set[str | None] = set()
        self._script = script

    @property
    def questions(self) -> list[str]:
        return [json.loads(body)["messages"][0]["content"] for body in self.bodies]

    async def send(self, endpoint: str, body: bytes, *, request_id: str, token_id: str | None) -> LineResponse:
        assert endpoint == CHAT
        self.bodies.append(body)
        self.tokens.add(token_id)
        await asyncio.sleep(0)
        return answer(body) if self._script is None else await self._script(body)


def run_of(batches: StoredBatches, batch: StoredBatch, run: RunDir, router: ScriptedRouter, **changes: Any) -> BatchRun:
    given = {"slots": asyncio.Semaphore(LIMITS.in_flight), "limits": LIMITS, "stopping": asyncio.Event()}
    return BatchRun(batch, batches, StoredFiles(run), router.send, **{**given, **changes})


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_bytes().splitlines()]


def results_of(run: RunDir, batch: StoredBatch) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of the output file and of the error file; none if there is no such file."""
    files = StoredFiles(run)
    output, errors = files.content(batch.output_file_id), files.content(batch.error_file_id)
    return (read_lines(output) if output.exists() else [], read_lines(errors) if errors.exists() else [])
