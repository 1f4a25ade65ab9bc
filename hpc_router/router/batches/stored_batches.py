"""The batches of users in the run directory: `batches/ID/`, and a mark `batches/active/ID` until a batch has ended.

Each file has one writer, so that no locks are needed. A worker writes `batch.json` (what the user asked for, never
changed) and `cancel.json` (that the user cancelled it). The executor of the leading router writes `state.json`, at the
end `ended.json`, and its own journal of results (see `journal`). `input.jsonl` is a hard link of the uploaded file, so
the user may delete that. All functions block, so callers run them in a file thread.
"""

import contextlib
import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Self

from hpc_router.errors import BatchNotFoundError, QuotaExceededError
from hpc_router.router.batches.stored_files import StoredFiles, names_in
from hpc_router.state.atomic_files import create_text, read_json, replace_json, replace_text
from hpc_router.state.run_directory import RunDir, make_private_folder

BATCH_ID: Final = re.compile(r"batch_[0-9a-f]{31}")
INCOMPLETE_S: Final = 60.0
"""Age in seconds at which a mark of a batch without `batch.json` counts as left behind by a dead process."""


class Status(StrEnum):
    """The status of a batch, as in OpenAI's API."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


ENDED: Final = frozenset({Status.FAILED, Status.COMPLETED, Status.EXPIRED, Status.CANCELLED})
OUTCOMES: Final = (Status.COMPLETED, Status.EXPIRED, Status.CANCELLED)
"""The statuses in which a batch can end that was not found to be wrong."""
NEXT: Final[Mapping[Status, frozenset[Status]]] = {
    Status.VALIDATING: frozenset({Status.IN_PROGRESS, Status.FINALIZING, Status.FAILED}),
    Status.IN_PROGRESS: frozenset({Status.FINALIZING}),
    Status.FINALIZING: frozenset(OUTCOMES),
}
"""The statuses that `state.json` may have after each status. `cancelling` is not among them: a batch that has not ended
is shown as cancelling once `cancel.json` exists."""


@dataclass(frozen=True, slots=True)
class BatchError:
    """Why a batch has failed: a fault of its input file. `line`: number of the line, from 1; None: the whole file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class BatchState:
    """What `state.json` says of a batch. `at`: when it got each status, in Unix seconds. `outcome`: the status that it
    gets when its results are written; None until that is decided. `total`, `completed`, `failed`: numbers of lines."""

    status: Status = Status.VALIDATING
    at: Mapping[str, float] = field(default_factory=dict)
    outcome: Status | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    errors: Sequence[BatchError] = ()

    def to(self, status: Status, *, at: float, **changes: Any) -> Self:
        """Returns the state after the change to `status` at the Unix time `at`. Raises ValueError if that cannot follow
        the present status."""
        if status not in NEXT.get(self.status, ()):
            raise ValueError(f"a batch that is {self.status} cannot become {status}")
        return replace(self, status=status, at={**self.at, status.value: at}, **changes)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        outcome = value["outcome"]
        return cls(
            **{
                **value,
                "status": Status(value["status"]),
                "outcome": None if outcome is None else Status(outcome),
                "errors": tuple(BatchError(**error) for error in value["errors"]),
            }
        )


@dataclass(frozen=True, slots=True)
class StoredBatch:
    """What the user asked for. `user`: None is the deployment's owner; `token_id`: the token that created the batch,
    with whose limits its lines are sent. `output_file_id`, `error_file_id`: the files that its results will get.
    `results_expire_s`: seconds for which these files are kept. `created_at`, `expires_at`: Unix seconds."""

    id: str
    user: str | None
    token_id: str | None
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: float
    expires_at: float
    output_file_id: str
    error_file_id: str
    results_expire_s: float
    metadata: Mapping[str, str] | None = None

    def to_json(self, state: BatchState, cancelled_at: float | None) -> dict[str, Any]:
        """Returns the batch object of OpenAI's API. `cancelled_at`: when the user cancelled it; None: not."""
        status = state.status
        if cancelled_at is not None and status not in ENDED:
            status = Status.CANCELLING
        errors = [asdict(error) for error in state.errors]
        ended = state.status in OUTCOMES
        times = {f"{s.value}_at": _seconds(state.at.get(s.value)) for s in Status if s is not Status.VALIDATING}
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": errors} if errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": status.value,
            "output_file_id": self.output_file_id if ended and state.completed else None,
            "error_file_id": self.error_file_id if ended and state.failed else None,
            "created_at": int(self.created_at),
            "expires_at": int(self.expires_at),
            **times,
            "cancelling_at": _seconds(cancelled_at),
            "request_counts": {"total": state.total, "completed": state.completed, "failed": state.failed},
            "metadata": None if self.metadata is None else dict(self.metadata),
        }


class StoredBatches:
    """The batches of all users of one run."""

    def __init__(self, run: RunDir, files: StoredFiles) -> None:
        self._folder, self._active = run.batches, run.batches / "active"
        self._files = files

    def folder(self, batch_id: str) -> Path:
        return self._folder / batch_id

    def create(self, batch: StoredBatch, *, max_batches: int) -> None:
        """Stores a new batch, which the executor then runs. Raises QuotaExceededError if the user has `max_batches`
        that have not ended."""
        make_private_folder(self._folder)
        make_private_folder(self._active)
        unfinished = [one for one in self.active() if one.user == batch.user]
        if len(unfinished) >= max_batches:
            raise QuotaExceededError(
                f"you have {len(unfinished)} batches that have not ended, the limit of router.batch.max_batches"
            )
        replace_text(self._active / batch.id, "")
        folder = self.folder(batch.id)
        make_private_folder(folder)
        (folder / "input.jsonl").hardlink_to(self._files.content(batch.input_file_id))
        replace_json(folder / "batch.json", asdict(batch))

    def get(self, batch_id: str, user: str | None) -> StoredBatch:
        """Returns a batch of the user. Raises BatchNotFoundError if there is none, also for another user's batch."""
        batch = self.read(batch_id) if BATCH_ID.fullmatch(batch_id) else None
        if batch is None or batch.user != user:
            raise BatchNotFoundError(f"there is no batch {batch_id[:80]!r}")
        return batch

    def read(self, batch_id: str) -> StoredBatch | None:
        content = read_json(self.folder(batch_id) / "batch.json")
        try:
            return None if content is None else StoredBatch(**content)
        except TypeError:
            return None

    def of_user(self, user: str | None) -> Iterator[StoredBatch]:
        """Yields the batches of the user, the newest first."""
        for name in self._names():
            batch = self.read(name)
            if batch is not None and batch.user == user:
                yield batch

    def shown(self, batch: StoredBatch) -> dict[str, Any]:
        """Returns the batch object of OpenAI's API with the batch's present state."""
        return batch.to_json(self.state(batch.id), self.cancelled_at(batch.id))

    def state(self, batch_id: str) -> BatchState:
        folder = self.folder(batch_id)
        content = read_json(folder / "ended.json") or read_json(folder / "state.json")
        return BatchState() if content is None else BatchState.from_json(content)

    def write_state(self, batch_id: str, state: BatchState) -> None:
        """Stores the state. The first state in which the batch has ended stays for ever."""
        folder = self.folder(batch_id)
        if state.status in ENDED:
            create_text(folder / "ended.json", json.dumps(asdict(state), indent=1) + "\n")
        else:
            replace_json(folder / "state.json", asdict(state))

    def cancel(self, batch_id: str) -> None:
        """Records that the user has cancelled the batch. Has no effect on one that has ended."""
        if self.state(batch_id).status not in ENDED:
            create_text(self.folder(batch_id) / "cancel.json", f'{{"at": {time.time()}}}\n')

    def cancelled_at(self, batch_id: str) -> float | None:
        """Returns when the user cancelled the batch, in Unix seconds; None if that was not done."""
        content = read_json(self.folder(batch_id) / "cancel.json")
        return None if content is None else float(content["at"])

    def any_active(self) -> bool:
        """Returns whether there may be a batch that has not ended."""
        return any(map(BATCH_ID.fullmatch, names_in(self._active)))

    def active(self) -> list[StoredBatch]:
        """Returns the batches that have not ended, the oldest first. Removes marks without a batch."""
        found = []
        for name in sorted(filter(BATCH_ID.fullmatch, names_in(self._active))):
            batch = self.read(name)
            if batch is not None:
                found.append(batch)
            else:
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - (self._active / name).stat().st_mtime > INCOMPLETE_S:
                        self.ended(name)
        return found

    def ended(self, batch_id: str) -> None:
        """Removes the mark of a batch, so that it is not run any more."""
        (self._active / batch_id).unlink(missing_ok=True)

    def remove_ended(self, *, before: float) -> int:
        """Removes the batches that were created before the Unix time `before` and have ended; returns their number."""
        removed = 0
        for name in self._names():
            batch, marked = self.read(name), (self._active / name).exists()
            created_at = self.folder(name).stat().st_mtime if batch is None else batch.created_at
            if not marked and created_at < before:
                shutil.rmtree(self.folder(name), ignore_errors=True)
                removed += 1
        return removed

    def _names(self) -> list[str]:
        return sorted(filter(BATCH_ID.fullmatch, names_in(self._folder)), reverse=True)


def _seconds(at: float | None) -> int | None:
    return None if at is None else int(at)
