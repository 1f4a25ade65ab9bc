"""Writes one line to a file about each request that has ended, in batches, without waiting for the file system.

At the end of a request, its line is only appended to a list; the file thread writes the list every `FLUSH_S` seconds,
or once it has `BATCH` lines. While the file system hangs, at most `MAX_UNWRITTEN_BYTES` are kept; further lines are
dropped and counted. A line has no text of a prompt or a response, and no token. Prompts are written into other files,
and only if `router.sample_prompts` is set.
"""

import asyncio
import logging
import random
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import orjson

from hpc_router.config.schema import RouterConfig
from hpc_router.relay.stream_summary import TokenUsage
from hpc_router.router.access.user_access import TokenSource
from hpc_router.router.metrics import Metrics
from hpc_router.router.replicas.replica import Replica
from hpc_router.routing.policy import RouteReason
from hpc_router.routing.prompt_text import prompt_text
from hpc_router.state.io_thread import MAX_UNWRITTEN_BYTES, FileThread
from hpc_router.state.request_records import LineFile, part_bytes
from hpc_router.state.run_directory import RunDir

if TYPE_CHECKING:
    from hpc_router.router.worker.routed_request import RoutedRequest

logger = logging.getLogger(__name__)

BATCH: Final = 2048
"""Number of lines after which they are written before `FLUSH_S` has passed. It is large, because each write wakes the
file thread, to which the event loop then passes the interpreter for a moment."""
FLUSH_S: Final = 0.5
"""Maximum time in seconds between the end of a request and the write of its record."""
ANSWERED: Final = "answered"
REFUSED: Final = "refused"
BROKEN: Final = "broken"
CANCELLED: Final = "cancelled"
"""How a request ended: with the complete response of a replica, with an error response of the router, with a failure
after the first byte, or with the client's disconnect."""
_MAX_STARTS: Final = 4096
_PARTS: Final = 4
"""Number of parts in which lines are kept until they are written, since joining each line would cost a copy."""
_NO_USAGE: Final = TokenUsage(None, None)
_dumps: Final = orjson.dumps


def _members(value: dict[str, Any]) -> bytes:
    """Returns the members of `value` as JSON text, without the braces around it and with a comma at the end."""
    return _dumps(value)[1:-1] + b","


_NOT_DECIDED: Final = _members(dict.fromkeys(("cluster", "score", "margin", "runner_up")))
_NO_FAILURES: Final = _members({"error": None, "attempts": 1, "failed": []})
_LAST_KEYS: Final = (
    *("id", "at", "prompt_tokens", "cached_tokens", "generated_tokens", "queue_s", "first_byte_s", "total_s"),
)


class RequestRecords:
    """The records of the requests of one worker. `writer`: the first part of its files' names. `window`: maximum number
    of characters of a sampled prompt."""

    def __init__(
        self, run: RunDir, files: FileThread, writer: str, metrics: Metrics, config: RouterConfig, *, window: int
    ) -> None:
        self._files, self._metrics = files, metrics
        self._records, self._samples = LineFile(run.records, writer), LineFile(run.samples, writer)
        self._parts: list[bytes] = []  # of the lines that are not written yet
        self._sampled: list[bytes] = []
        self._starts: dict[tuple[object, ...], bytes] = {}  # of lines: the members that many requests have in common
        self._to_wall = time.time() - time.perf_counter()
        self._timer: asyncio.TimerHandle | None = None
        self._posted = self._written = 0  # bytes; `_written` is changed by the file thread only, as is `_failed`
        self._failed = self._counted = 0  # lines that could not be written; those of them that are counted
        self.configure(config, window=window)

    def configure(self, config: RouterConfig, *, window: int) -> None:
        """Applies the settings to requests that end later. `window`: as in the class."""
        limit_bytes = int(config.records_gb * 1e9)
        self.enabled = limit_bytes > 0
        self._max_bytes = part_bytes(limit_bytes)
        self._share = config.sample_prompts if self.enabled else 0.0
        self._window = window

    def ended(
        self,
        routed: "RoutedRequest",
        expert: str,
        replica: Replica | None,
        status: int | None,
        outcome: str,
        usage: TokenUsage | None = None,
        source: TokenSource | None = None,
        error: str | None = None,
    ) -> None:
        """Records the end of a request. `expert`, `replica`: those of its last attempt; no `replica` if there was none.
        `status`: status of the response that the client got; None if it got none. `outcome`: `ANSWERED` or one of the
        constants beside it. `usage`: numbers of tokens of the response. `source`: how the number of generated tokens is
        known. `error`: error code if the response was an error of the router."""
        if not self.enabled:
            return
        started, fields = routed.started, routed.call.fields
        elapsed_s, reason = time.perf_counter() - started, routed.reason
        if expert != routed.experts[0]:
            reason = RouteReason.UNAVAILABLE
        key = (
            replica, routed.endpoint.path, routed.endpoint.request_class, fields["model"],
            fields.get("stream") is True, expert, reason, routed.user, routed.artefact, status, outcome, source,
        )  # fmt: skip
        decision, failures = _NOT_DECIDED, _NO_FAILURES
        if routed.decision is not None:
            _, _, cluster, score, margin, runner_up = routed.decision
            decision = _members({"cluster": cluster, "score": score, "margin": margin, "runner_up": runner_up})
        if routed.attempts != 1 or error is not None or routed.failovers:
            failed = [{"replica": name, "cause": cause} for name, cause in routed.failovers]
            failures = _members({"error": error, "attempts": routed.attempts, "failed": failed})
        prompt, generated, cached = usage or _NO_USAGE
        ending = _dumps(
            {
                "id": routed.request_id,
                "at": started + self._to_wall,
                "prompt_tokens": prompt,
                "cached_tokens": cached,
                "generated_tokens": generated,
                "queue_s": routed.queued_s,
                "first_byte_s": routed.first_byte_s,
                "total_s": elapsed_s,
            },
            None,
            orjson.OPT_APPEND_NEWLINE,
        )
        self._add((self._starts.get(key) or self._new_start(key), decision, failures, ending[1:]))
        if self._share and status is not None and 200 <= status < 300 and random.random() < self._share:
            self._sample(routed, expert, reason)

    def refused(self, request_id: str, path: str, status: int, error: str, *, user: str | None) -> None:
        """Records a request that the router refused before it chose an expert. `error`: the error code. `user`: the
        user of the request's token; None for the owner."""
        if not self.enabled:
            return
        start = _line_start((None, path, None, None, False, None, None, user, None, status, REFUSED, None))
        failures = _members({"error": error, "attempts": 0, "failed": []})
        ending = _dumps(dict.fromkeys(_LAST_KEYS) | {"id": request_id, "at": time.time()})
        self._add((start, _NOT_DECIDED, failures, ending[1:] + b"\n"))

    def feedback(self, request_id: str, score: float, *, user: str | None) -> None:
        """Records the score that a client gives to the earlier request `request_id`. `user`: None for the owner."""
        if self.enabled:
            line = {"kind": "feedback", "id": request_id, "at": time.time(), "user": user, "score": score}
            self._add((_dumps(line), b"\n", b"", b""))

    def flush(self) -> None:
        """Passes all lines that were collected to the file thread. Counts the lines that are lost."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        parts, self._parts = self._parts, []
        sampled, self._sampled = self._sampled, []
        lost = self._failed - self._counted
        self._counted += lost
        lost += self._post(self._records, parts, len(parts) // _PARTS)
        lost += self._post(self._samples, sampled, len(sampled))
        if lost:
            self._metrics.records_lost.add_many(lost)

    def close(self) -> None:
        """Passes all lines that were collected to the file thread, which writes them and then closes the files."""
        self.flush()
        self._files.post(self._records.close)
        self._files.post(self._samples.close)

    def _add(self, line: tuple[bytes, bytes, bytes, bytes]) -> None:
        """Adds a line, given as `_PARTS` pieces of its text, to the collected lines."""
        parts = self._parts
        parts += line
        if self._timer is None:
            self._to_wall = time.time() - time.perf_counter()
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self.flush)
        if len(parts) >= BATCH * _PARTS:
            self.flush()

    def _new_start(self, key: tuple[Any, ...]) -> bytes:
        if len(self._starts) >= _MAX_STARTS:
            self._starts.clear()
        start = self._starts[key] = _line_start(key)
        return start

    def _sample(self, routed: "RoutedRequest", expert: str, reason: RouteReason) -> None:
        text = prompt_text(routed.call.fields, window=self._window, first=routed.endpoint.api_format.prompt_field)
        if text:
            row = {"id": routed.request_id, "at": time.time(), "user": routed.user, "expert": expert, "reason": reason}
            row["prompt"] = text.encode("utf-8", "replace").decode()  # without surrogates
            self._sampled.append(_dumps(row) + b"\n")

    def _post(self, file: LineFile, parts: list[bytes], count: int) -> int:
        """Passes `count` lines to the file thread, to be written to `file`. `parts`: pieces of their text. Returns the
        number of lines that were dropped: 0, or `count` if too many bytes wait already."""
        data = b"".join(parts)
        if self._posted - self._written + len(data) > MAX_UNWRITTEN_BYTES:
            return count
        if data:
            self._posted += len(data)
            self._files.post(partial(self._write, file, data, count))
        return 0

    def _write(self, file: LineFile, data: bytes, count: int) -> None:
        """Writes `data`, which has `count` lines, to `file`. Called by the file thread."""
        try:
            file.write(data, at=time.time(), max_bytes=self._max_bytes)
        except OSError as error:
            self._failed += count
            logger.warning("%d records were not written: %s", count, error)
        finally:
            self._written += len(data)


def _line_start(key: tuple[Any, ...]) -> bytes:
    """Returns the first members of a request's line, which are the same for many requests. `key`: replica, path, class,
    model, whether it is a stream, expert, reason, user, version of the classifier, status, outcome, and how the number
    of generated tokens is known."""
    replica, path, request_class, model, stream, expert, reason, user, artefact, status, outcome, source = key
    name = served = revision = job = node = None
    if replica is not None:
        record = replica.record
        name, job, node = record.replica, record.job_id, record.node
        served, revision = record.serves.get(expert), record.engine.revision
    members = {
        "kind": "request",
        "user": user,
        "class": None if request_class is None else request_class.label,
        "path": path,
        "model": model,
        "stream": stream,
        "expert": expert,
        "replica": name,
        "served_model": served,
        "revision": revision,
        "job": job,
        "node": node,
        "reason": reason,
        "classifier": artefact,
        "status": status,
        "outcome": outcome,
        "token_source": source,
    }
    return b"{" + _members(members)
