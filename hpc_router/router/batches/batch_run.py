"""Runs one batch: checks its input, sends its lines, and writes the results in the order of the input.

Everything that must survive the process is in the folder of the batch (see `stored_batches` and `journal`), so a run
that is killed at any moment is continued by calling `run` again, in this or another process. Lines without a result
are then sent again. The input is read while the lines are sent, and only a bounded number of lines is in memory.
"""

import asyncio
import heapq
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from hpc_router.router.batches.input_lines import InputLine, check_input, input_lines, parse_line
from hpc_router.router.batches.journal import (
    ERRORS,
    OUTPUT,
    RESULTS,
    Done,
    Journal,
    Result,
    read_done,
    remove_working_files,
    write_results,
)
from hpc_router.router.batches.line_results import LineResponse, error_line, judge
from hpc_router.router.batches.send_window import SendWindow
from hpc_router.router.batches.stored_batches import ENDED, BatchState, Status, StoredBatch, StoredBatches
from hpc_router.router.batches.stored_files import StoredFile, StoredFiles, new_id

logger = logging.getLogger(__name__)

FLUSH_S: Final = 0.1
"""Maximum time in seconds that a result is only in memory."""
FLUSH_COUNT: Final = 64
"""Maximum number of results that are only in memory."""
REPORT_S: Final = 2.0
"""Interval in seconds at which the counts in `state.json` are updated."""
CHECK_S: Final = 0.5
"""Interval in seconds at which a run notices that its batch was cancelled."""
GRACE_S: Final = 5.0
"""Time in seconds that requests in flight have to end when the executor stops."""
MAX_RETRYING: Final = 256
"""Number of lines that wait for another attempt, above which no new lines are sent."""
MAX_SENT_BYTES: Final = 4 * 2**20
"""Length of the lines in flight, in bytes, above which no more lines are sent."""
UNSENT: Final = {
    Status.EXPIRED: ("batch_expired", "this request could not be executed before the completion window expired"),
    Status.CANCELLED: ("batch_cancelled", "the batch was cancelled before this request was executed"),
}
"""Code and message of the error of a line that was not executed, by the status in which the batch has ended."""


class Send(Protocol):
    """Sends one request to the router and returns the response; see `RouterSender.send`."""

    def __call__(
        self, endpoint: str, body: bytes, *, request_id: str, token_id: str | None
    ) -> Awaitable[LineResponse]: ...


@dataclass(frozen=True, slots=True)
class RunLimits:
    """Limits of a run: lines of a batch, bytes of a line, and requests in flight."""

    max_lines: int
    max_line_bytes: int
    in_flight: int


@dataclass(frozen=True, slots=True, order=True)
class _Attempt:
    """A line that waits for an attempt, from `due_at` on (monotonic seconds). `offset`, `length`: where it is in the
    input, in bytes. `attempt`, `failures`: as for `judge`."""

    due_at: float
    index: int
    offset: int
    length: int
    attempt: int = 0
    failures: int = 0


@dataclass(slots=True)
class BatchRun:
    """The run of one batch. `slots`: limits the requests of all batches together. `stopping`: ends the run early, in at
    most `GRACE_S` seconds. `token_valid` returns whether a user's token exists and has not expired. `now`: Unix
    seconds."""

    batch: StoredBatch
    batches: StoredBatches
    files: StoredFiles
    send: Send
    slots: asyncio.Semaphore
    limits: RunLimits
    stopping: asyncio.Event
    token_valid: Callable[[str], bool] = lambda token_id: True
    now: Callable[[], float] = time.time
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _results: list[Result] = field(default_factory=list)
    _retries: list[_Attempt] = field(default_factory=list)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _sent_bytes: int = 0
    _failure: BaseException | None = None
    _window: SendWindow = field(init=False)

    def __post_init__(self) -> None:
        self._window = SendWindow(self.limits.in_flight)

    @property
    def folder(self) -> Path:
        return self.batches.folder(self.batch.id)

    async def run(self) -> None:
        """Runs the batch to its end, or until `stopping` is set. Raises OSError; a later call then continues."""
        state = await asyncio.to_thread(self.batches.state, self.batch.id)
        if state.status is Status.VALIDATING:
            state = await self._check(state)
        if state.status is Status.IN_PROGRESS:
            state = await self._send_lines(state)
        if state.status is Status.FINALIZING and not self.stopping.is_set():
            state = await asyncio.to_thread(self._finalize, state)
        if state.status in ENDED:
            await asyncio.to_thread(self._leave)

    async def _check(self, state: BatchState) -> BatchState:
        """Checks the input, and returns the next state; the same one if the executor stops."""
        outcome = await self._outcome()
        if outcome is not None:
            return await self._write(state.to(Status.FINALIZING, at=self.now(), outcome=outcome))
        check = await asyncio.to_thread(
            check_input,
            self.folder / "input.jsonl",
            endpoint=self.batch.endpoint,
            max_lines=self.limits.max_lines,
            max_bytes=self.limits.max_line_bytes,
            stopped=self.stopping.is_set,
        )
        if self.stopping.is_set():
            return state
        if check.errors:
            return await self._write(state.to(Status.FAILED, at=self.now(), errors=check.errors))
        return await self._write(state.to(Status.IN_PROGRESS, at=self.now(), total=check.total))

    async def _write(self, state: BatchState) -> BatchState:
        await asyncio.to_thread(self.batches.write_state, self.batch.id, state)
        return state

    async def _outcome(self) -> Status | None:
        """Returns the status in which the batch ends early; None if it goes on."""
        if await asyncio.to_thread(self.batches.cancelled_at, self.batch.id) is not None:
            return Status.CANCELLED
        return Status.EXPIRED if self.now() >= self.batch.expires_at else None

    async def _send_lines(self, state: BatchState) -> BatchState:
        """Sends all lines without a result, and returns the next state; the same one if the executor stops."""
        done = await asyncio.to_thread(read_done, self.folder, state.total)
        journal = Journal(self.folder)
        try:
            with (self.folder / "input.jsonl").open("rb", buffering=2**18) as content:
                outcome = await self._send_all(state, content, done, journal)
        finally:
            await self._end_tasks()
            journal.close()
        if outcome is None:
            return state
        return await self._write(self._counted(state, done).to(Status.FINALIZING, at=self.now(), outcome=outcome))

    async def _send_all(self, state: BatchState, content: BinaryIO, done: Done, journal: Journal) -> Status | None:
        """Sends all lines without a result. Returns the outcome of the batch; None if the executor stops."""
        lines = (line for line in input_lines(content, max_bytes=self.limits.max_line_bytes) if line.index not in done)
        clock = asyncio.get_running_loop().time
        flushed_at = reported_at = checked_at = clock()
        outcome, complete = None, False
        while not (complete or outcome or self.stopping.is_set()):
            exhausted = self._start_lines(lines, content)
            complete = exhausted and not self._tasks and not self._retries
            if complete or len(self._results) >= FLUSH_COUNT or clock() - flushed_at >= FLUSH_S:
                await self._flush(journal, done)
                flushed_at = clock()
            if self._failure is not None:
                raise self._failure
            if clock() - reported_at >= REPORT_S:
                await asyncio.to_thread(journal.sync)
                await self._write(self._counted(state, done))
                reported_at = clock()
            if clock() - checked_at >= CHECK_S:
                outcome = await self._outcome()
                checked_at = clock()
            if not complete:
                await self._wait(clock)
        if self.stopping.is_set() and self._tasks:
            await asyncio.wait(self._tasks, timeout=GRACE_S)
        await self._flush(journal, done)
        await asyncio.to_thread(journal.sync)
        return Status.COMPLETED if complete else outcome

    def _start_lines(self, lines: Iterator[InputLine], content: BinaryIO) -> bool:
        """Sends lines while there is room: first those that are due for another attempt, then new ones. Returns whether
        all lines of the input were sent."""
        now = asyncio.get_running_loop().time()
        while self._has_room():
            if self._retries and self._retries[0].due_at <= now:
                attempt = heapq.heappop(self._retries)
                self._start(attempt, _read_again(content, attempt))
            elif len(self._retries) >= MAX_RETRYING:
                return False
            elif (line := next(lines, None)) is not None:
                self._start(_Attempt(now, line.index, line.offset, line.length), line.raw)
            else:
                return True
        return False

    def _has_room(self) -> bool:
        return len(self._tasks) < self._window.size and (not self._tasks or self._sent_bytes < MAX_SENT_BYTES)

    def _start(self, attempt: _Attempt, raw: bytes) -> None:
        self._sent_bytes += attempt.length
        task = asyncio.create_task(self._attempt(attempt, raw))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failure = task.exception()
        self._wake.set()

    async def _attempt(self, attempt: _Attempt, raw: bytes) -> None:
        """Sends one line once. Adds its result to `_results`, or the line to `_retries`."""
        try:
            request = parse_line(raw, endpoint=self.batch.endpoint)
            async with self.slots:
                response = await self.send(
                    self.batch.endpoint, request.body, request_id=new_id("batch_"), token_id=self.batch.token_id
                )
            if response.status == 401 and await self._is_known():
                response = LineResponse(None)  # the worker has not got the token yet
            verdict = judge(
                attempt.index, request.custom_id, response, attempt=attempt.attempt, failures=attempt.failures
            )
            if isinstance(verdict, Result):
                self._window.answered()
                self._results.append(verdict)
                return
            now = asyncio.get_running_loop().time()
            self._window.refused(now)
            due_at = now + verdict.pause_s * random.uniform(1.0, 1.25)
            again = replace(attempt, due_at=due_at, attempt=attempt.attempt + 1, failures=verdict.failures)
            heapq.heappush(self._retries, again)
        finally:
            self._sent_bytes -= attempt.length

    async def _is_known(self) -> bool:
        """Returns whether the token with which the lines are sent is valid, according to the run directory."""
        token_id = self.batch.token_id
        return token_id is None or await asyncio.to_thread(self.token_valid, token_id)

    async def _wait(self, clock: Callable[[], float]) -> None:
        """Waits until a response is received, a line is due, or a periodic step of the loop is."""
        pause_s = FLUSH_S if self._results else CHECK_S
        if self._retries and self._has_room():
            pause_s = max(0.0, min(self._retries[0].due_at - clock(), pause_s))
        try:
            async with asyncio.timeout(pause_s):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    async def _flush(self, journal: Journal, done: Done) -> None:
        """Stores the results that are only in memory. Of a request with two results, the first one counts."""
        results, self._results = self._results, []
        if results:
            await asyncio.to_thread(journal.append, results)
        for result in results:
            done.add(result.index, succeeded=result.succeeded)

    async def _end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._results.clear()
        self._retries.clear()
        self._failure = None

    def _counted(self, state: BatchState, done: Done) -> BatchState:
        return replace(state, completed=done.completed, failed=done.failed)

    def _finalize(self, state: BatchState) -> BatchState:
        """Writes the results, adds them to the user's files, and returns the last state. Blocks."""
        assert state.outcome is not None
        code, message = UNSENT.get(state.outcome, ("internal_error", "this request has no result"))
        with (self.folder / "input.jsonl").open("rb", buffering=2**18) as content:
            lines = input_lines(content, max_bytes=self.limits.max_line_bytes)
            written = write_results(
                self.folder,
                state.total,
                requests=(line.raw for line in islice(lines, state.total)),
                error_line=lambda raw: error_line(
                    parse_line(raw, endpoint=self.batch.endpoint).custom_id, code, message
                ),
            )
        results, now = self.folder / RESULTS, self.now()
        for count, file_id, name in (
            (written.completed, self.batch.output_file_id, OUTPUT),
            (written.failed, self.batch.error_file_id, ERRORS),
        ):
            if count:
                expires_at = now + self.batch.results_expire_s
                filename = f"{self.batch.id}_{name}"
                file = StoredFile(file_id, self.batch.user, filename, "batch_output", 0, now, expires_at)
                self.files.add(file, results / name)
        ended = self._counted(state, written).to(state.outcome, at=now)
        self.batches.write_state(self.batch.id, ended)
        logger.info("%s: %s, %d lines, %d of them failed", self.batch.id, ended.status, ended.total, ended.failed)
        return ended

    def _leave(self) -> None:
        """Removes what only a running batch needs. Blocks."""
        self.batches.ended(self.batch.id)
        remove_working_files(self.folder)


def _read_again(content: BinaryIO, attempt: _Attempt) -> bytes:
    """Returns the line of an attempt from the input. Keeps the position at which the input is read."""
    return os.pread(content.fileno(), attempt.length, attempt.offset)
