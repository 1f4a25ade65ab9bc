"""Counts the requests that have ended and their tokens, and writes one line about each request to a file, in batches,
without waiting for the file system.

At the end of a request, only what is needed later is appended to a list: the request's group, and the values that it
does not have in common with the rest of its group. Everything else is done for `BATCH` requests at once, because code
that runs many times in a row costs less than half of what it costs between other code. The file thread writes the lines
every `FLUSH_S` seconds, or once there are `MAX_LINES`. While the file system hangs, at most `MAX_UNWRITTEN_BYTES` are
kept; further lines are dropped and counted. A line has no text of a prompt or a response, and no token. Prompts are
written into other files, and only if `router.sample_prompts` is set.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final

import orjson

from hpc_router.config.schema import RouterConfig
from hpc_router.relay.stream_summary import StreamSummary, TokenUsage, stated_usage, stated_usages
from hpc_router.router.access.user_access import TokenSource
from hpc_router.router.metrics import Metrics
from hpc_router.router.replicas.replica import Replica
from hpc_router.routing.policy import Decision, RouteReason
from hpc_router.routing.prompt_text import prompt_text
from hpc_router.state.io_thread import MAX_UNWRITTEN_BYTES, FileThread
from hpc_router.state.request_records import LineFile, part_bytes
from hpc_router.state.run_directory import RunDir

if TYPE_CHECKING:
    from hpc_router.router.worker.routed_request import RoutedRequest

logger = logging.getLogger(__name__)

BATCH: Final = 256
"""Number of requests that are counted, and whose lines are made, at once. It is small enough not to delay other
requests: this takes about half a millisecond."""
MAX_LINES: Final = 2048
"""Number of lines after which they are written before `FLUSH_S` has passed. It is large, because each write wakes the
file thread, to which the event loop then passes the interpreter for a moment."""
MAX_KEPT_BYTES: Final = 4096
"""Maximum length in bytes of a response, or of the end of a stream, that is kept until its tokens are counted. From a
longer one they are read at once."""
FLUSH_S: Final = 0.5
"""Maximum time in seconds between the end of a request and the write of its record."""
ANSWERED: Final = "answered"
REFUSED: Final = "refused"
BROKEN: Final = "broken"
CANCELLED: Final = "cancelled"
"""How a request ended: with the complete response of a replica, with an error response of the router, with a failure
after the first byte, or with the client's disconnect."""
_MAX_GROUPS: Final = 4096
_NO_USAGE: Final = TokenUsage(None, None)
_dumps: Final = orjson.dumps
_LINE_BEGIN: Final = b'{"kind":'
_USAGE, _CHUNKS = TokenSource.USAGE, TokenSource.CHUNKS  # attribute look-ups in the enum cost more
EndedResponse = bytes | StreamSummary | TokenUsage | None
"""What the tokens of a response are known from: its body, if it is complete and no stream; its summary; or their
numbers. None if no engine has accepted the request."""
_Key = tuple[Any, ...]
_Ended = tuple["RequestGroup", str, float, float | None, float, float | None, EndedResponse, Decision | None]
"""A request that has ended: its group, its id, its arrival on the clock of `time.perf_counter`, the durations in
seconds until its end (None for a short response: as until its first byte), in queues, and until its first byte, its
response, and the policy's decision."""
_group_of: Final = itemgetter(0)
_OWN_KEYS: Final = (
    *("id", "at", "prompt_tokens", "cached_tokens", "generated_tokens", "token_source"),
    *("queue_s", "first_byte_s", "total_s"),
)
"""The keys of a line whose values differ between requests."""
_DECISION_KEYS: Final = ("cluster", "score", "margin", "runner_up")


@dataclass(slots=True, eq=False)
class RequestGroup:
    """Requests whose lines have most members in common, because their keys are equal (see `group_of`).

    `members`: the common ones, as JSON after the key `kind`. `expert`, `replica`: their names. `labels`: those of the
    metric of answered requests; None if the requests of the group were not answered. `classified`: whether a classifier
    has chosen the expert. The other fields are what the metrics do not contain yet: the times in seconds to the first
    byte of short responses, the numbers of prompt tokens and of generated tokens that the responses state, and the
    number of chunks of streams that state none.
    """

    members: orjson.Fragment
    expert: str
    replica: str
    labels: tuple[str, RouteReason, int | None] | None
    classified: bool
    first_bytes_s: list[float] = field(default_factory=list, init=False)
    prompt: int = field(default=0, init=False)
    generated: int = field(default=0, init=False)
    chunks: int = field(default=0, init=False)


class RequestRecords:
    """The records of the requests of one worker. `writer`: the first part of its files' names. `window`: maximum number
    of characters of a sampled prompt."""

    def __init__(
        self, run: RunDir, files: FileThread, writer: str, metrics: Metrics, config: RouterConfig, *, window: int
    ) -> None:
        self._files, self._metrics = files, metrics
        metrics.settle = self.settle
        self._ended: list[_Ended] = []  # requests that are not counted yet
        self._records, self._samples = LineFile(run.records, writer), LineFile(run.samples, writer)
        self._lines: list[bytes] = []  # that are not written yet; an element may have many lines
        self._line_count = 0
        self._sampled: list[bytes] = []
        self._groups: dict[_Key, RequestGroup] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._posted = self._written = 0  # bytes; `_written` is changed by the file thread only, as is `_failed`
        self._failed = self._counted = 0  # lines that could not be written; those of them that are counted
        self.configure(config, window=window)

    def configure(self, config: RouterConfig, *, window: int) -> None:
        """Applies the settings to requests that end later. `window`: as in the class."""
        self.settle()
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
        response: EndedResponse = None,
        error: str | None = None,
        *,
        short: bool = False,
    ) -> None:
        """Records the end of a request. If its outcome is `ANSWERED`, it is counted in the metrics, and so are the
        tokens of its response. `expert`, `replica`: those of its last attempt; no `replica` if there was none.
        `status`: status of the response that the client got; None if it got none. `outcome`: `ANSWERED` or one of the
        constants beside it. `error`: error code if the response was an error of the router. `short`: whether the
        response was received as a whole. The time to its first byte is then that to its end, and is counted here."""
        endpoint, fields, reason, failures = routed.endpoint, routed.call.fields, routed.reason, None
        if expert != routed.experts[0]:
            reason = RouteReason.UNAVAILABLE
        if routed.attempts != 1 or error is not None or routed.failovers:
            failures = error, routed.attempts, routed.failovers
        if isinstance(response, bytes):
            if len(response) > MAX_KEPT_BYTES:
                response = stated_usage(response)
        elif isinstance(response, StreamSummary) and len(response.last) + len(response.before_last) > MAX_KEPT_BYTES:
            response.shorten()
        key = (
            replica, endpoint.path, endpoint.request_class, fields["model"], fields.get("stream") is True, expert,
            reason, routed.user, routed.artefact, status, outcome, failures,
        )  # fmt: skip
        ended = self._ended
        ended.append((
            self._groups.get(key) or self._new_group(key),
            routed.request_id, routed.started, None if short else time.perf_counter() - routed.started,
            routed.queued_s, routed.first_byte_s, response, routed.decision,
        ))  # fmt: skip
        if self._timer is None:
            self._schedule()
        elif len(ended) >= BATCH:
            self.settle()
        if self._share and status is not None and 200 <= status < 300 and random.random() < self._share:
            self._sample(routed, expert, reason)

    def settle(self) -> None:
        """Counts the requests that have ended and their tokens, and makes their lines."""
        ended, self._ended = self._ended, []
        stated = iter(stated_usages([one[6] for one in ended if isinstance(one[6], bytes)]))
        to_wall = time.time() - time.perf_counter()
        lines = []
        for group, request_id, started, total_s, queue_s, first_byte_s, response, decision in ended:
            if total_s is None:
                total_s = first_byte_s or 0.0
                group.first_bytes_s.append(total_s)
            source = _USAGE
            if isinstance(response, bytes):
                usage = next(stated)
            elif isinstance(response, StreamSummary):
                usage, source = _usage_of(response)
                if response.streamed and usage is not None and first_byte_s is not None:
                    self._count_token_time(usage, total_s - first_byte_s, group.expert)
            else:
                usage = response
            prompt, generated, cached = usage or _NO_USAGE
            if prompt is not None:
                group.prompt += prompt
            if generated is not None:
                if source is _USAGE:
                    group.generated += generated
                else:
                    group.chunks += generated
            if not self.enabled:
                continue
            line = {
                "kind": group.members,
                "id": request_id,
                "at": started + to_wall,
                "prompt_tokens": prompt,
                "cached_tokens": cached,
                "generated_tokens": generated,
                "token_source": None if generated is None else source,
                "queue_s": queue_s,
                "first_byte_s": first_byte_s,
                "total_s": total_s,
            }
            if decision is not None and group.classified:
                _, _, line["cluster"], line["score"], line["margin"], line["runner_up"] = decision
            lines.append(_dumps(line, None, orjson.OPT_APPEND_NEWLINE))
        for group, count in Counter(map(_group_of, ended)).items():
            self._count(group, count)
        if lines:
            self._add(b"".join(lines), len(lines))

    def refused(self, request_id: str, path: str, status: int, error: str, *, user: str | None) -> None:
        """Records a request that the router refused before it chose an expert. `error`: the error code. `user`: the
        user of the request's token; None for the owner."""
        if not self.enabled:
            return
        key = (None, path, None, None, False, None, None, user, None, status, REFUSED, (error, 0, ()))
        group = self._groups.get(key) or self._new_group(key)
        line = {"kind": group.members, **dict.fromkeys(_OWN_KEYS)}
        self._add(_dumps(line | {"id": request_id, "at": time.time()}) + b"\n", 1)

    def feedback(self, request_id: str, score: float, *, user: str | None) -> None:
        """Records the score that a client gives to the earlier request `request_id`. `user`: None for the owner."""
        if self.enabled:
            line = {"kind": "feedback", "id": request_id, "at": time.time(), "user": user, "score": score}
            self._add(_dumps(line) + b"\n", 1)

    def flush(self) -> None:
        """Passes the lines of all ended requests to the file thread. Counts the lines that are lost."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._ended:
            self.settle()
        lines, self._lines = self._lines, []
        count, self._line_count = self._line_count, 0
        sampled, self._sampled = self._sampled, []
        lost = self._failed - self._counted
        self._counted += lost
        lost += self._post(self._records, lines, count)
        lost += self._post(self._samples, sampled, len(sampled))
        if lost:
            self._metrics.records_lost.add_many(lost)

    def close(self) -> None:
        """Passes all lines that were collected to the file thread, which writes them and then closes the files."""
        self.flush()
        self._files.post(self._records.close)
        self._files.post(self._samples.close)

    def _add(self, lines: bytes, count: int) -> None:
        """Adds `count` lines to those that are written next."""
        self._lines.append(lines)
        self._line_count += count
        if self._line_count >= MAX_LINES:
            self.flush()
        elif self._timer is None:
            self._schedule()

    def _schedule(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    def _new_group(self, key: _Key) -> RequestGroup:
        if len(self._groups) >= _MAX_GROUPS:
            self._groups.clear()
        group = self._groups[key] = group_of(key)
        return group

    def _count(self, group: RequestGroup, requests: int) -> None:
        """Adds the number of requests that have ended, and the counts of their group, to the metrics."""
        metrics, expert = self._metrics, group.expert
        if group.labels is not None:
            metrics.requests.add_many(requests, *group.labels)
        if group.first_bytes_s:
            metrics.first_byte.add_many(group.first_bytes_s, expert, group.replica)
            group.first_bytes_s.clear()
        for kind, count in (("prompt", group.prompt), (_USAGE, group.generated), (_CHUNKS, group.chunks)):
            if count:
                metrics.tokens.add_many(count, expert, kind)
        group.prompt = group.generated = group.chunks = 0

    def _count_token_time(self, usage: TokenUsage, streamed_s: float, expert: str) -> None:
        """Counts the mean time between two tokens of a stream that took `streamed_s` seconds from its first byte on."""
        if usage.generated is not None and usage.generated > 1:
            self._metrics.token_time.add(streamed_s / (usage.generated - 1), expert)

    def _sample(self, routed: "RoutedRequest", expert: str, reason: RouteReason) -> None:
        text = prompt_text(routed.call.fields, window=self._window, first=routed.endpoint.api_format.prompt_field)
        if text:
            row = {"id": routed.request_id, "at": time.time(), "user": routed.user, "expert": expert, "reason": reason}
            row["prompt"] = text.encode("utf-8", "replace").decode()  # without surrogates
            self._sampled.append(_dumps(row) + b"\n")

    def _post(self, file: LineFile, lines: list[bytes], count: int) -> int:
        """Passes `count` lines to the file thread, to be written to `file`. Returns the number of lines that were
        dropped: 0, or `count` if too many bytes wait already."""
        data = b"".join(lines)
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


def _usage_of(summary: StreamSummary) -> tuple[TokenUsage | None, TokenSource]:
    """Returns the numbers of tokens of a response, as far as they are known, and how that of a stream's generated
    tokens, which is always known, is known."""
    usage = summary.stated()
    if summary.streamed and (usage is None or usage.generated is None):
        return TokenUsage(None if usage is None else usage.prompt, summary.generated()), _CHUNKS
    return usage, _USAGE


def group_of(key: _Key) -> RequestGroup:
    """Returns a new group for the requests with this key: replica, path, class, model, whether it is a stream, expert,
    reason, user, version of the classifier, status, outcome; and error code, number of attempts, and failed attempts,
    or None for a request whose only attempt has not failed."""
    replica, path, request_class, model, stream, expert, reason, user, artefact, status, outcome, failures = key
    name = served = revision = job = node = None
    if replica is not None:
        record = replica.record
        name, job, node = record.replica, record.job_id, record.node
        served, revision = record.serves.get(expert), record.engine.revision
    error, attempts, failed = failures or (None, 1, ())
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
        "error": error,
        "attempts": attempts,
        "failed": [{"replica": name, "cause": cause} for name, cause in failed],
    }
    if artefact is None:
        members |= dict.fromkeys(_DECISION_KEYS)
    text = orjson.Fragment(_dumps(members)[len(_LINE_BEGIN) : -1])  # the JSON library writes a fragment as it is
    labels = (expert, reason, status) if outcome == ANSWERED else None
    return RequestGroup(text, expert or "", name or "", labels, classified=artefact is not None)
