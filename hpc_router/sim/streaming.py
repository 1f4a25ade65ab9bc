"""Serves an admitted request until its last byte: waits for each token, injects the request's fault, counts, and sends.

Streams and bodies share `RunningRequest.step`. When it returns, either token k was produced, or the fault due at k was
injected instead. A body is sent only after its last token, as in vLLM. When the engine stops, a response ends regularly
after the tokens that it has, with the finish reason `abort`, again as in vLLM.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aiohttp import web

from hpc_router.sim.admission import EngineStopped, Ticket
from hpc_router.sim.fault_injection import Crash, StreamFault, break_connection, inject
from hpc_router.sim.faults import HEADERS, Fault, FaultKind
from hpc_router.sim.latency import Clock, TokenSchedule
from hpc_router.sim.metrics import Outcome, RequestCounts, RequestPhase
from hpc_router.sim.response_formats import Choice, ChoiceEvents, ResponseFormat

_OUTCOMES = {"length": Outcome.LENGTH, "abort": Outcome.ABORT}


@dataclass(slots=True, kw_only=True)
class RunningRequest:
    """One admitted request. `store` is called when the answer is complete, before the end of the response is sent."""

    request: web.Request
    prompt_tokens: int
    ticket: Ticket
    counts: RequestCounts
    clock: Clock
    crash: Crash
    schedule: TokenSchedule
    fault: Fault | None
    store: Callable[[], None] | None = None

    async def before_headers(self) -> None:
        await self._inject_at(HEADERS)

    async def step(self, k: int, *, choices: int) -> None:
        """Waits for token k, which `choices` choices produce in the same step, or injects the fault due at k."""
        if self.ticket.stopped:
            raise EngineStopped
        running, schedule = self.counts.running, self.schedule
        due = schedule.first(self.prompt_tokens, running=running) if k == 0 else schedule.next(running=running)
        await self.ticket.wait(due)
        await self._inject_at(k)
        self.counts.generation_tokens += choices

    async def end(self, steps: int) -> None:
        """If a fault is due after the last token (at k = `steps`), injects it before the regular end. Then stores the
        answer."""
        await self._inject_at(steps)
        if self.store is not None:
            self.store()

    async def _inject_at(self, k: int) -> None:
        fault = self.fault
        if fault is not None and fault.at == k and fault.kind is not FaultKind.PARTIAL_BODY:
            self.counts.faults[fault.kind] += 1
            await inject(fault, self.request, crash=self.crash, clock=self.clock)

    def finished(self, reason: str) -> None:
        self.ticket.outcome = _OUTCOMES.get(reason, Outcome.STOP)


async def answer_body(
    running: RunningRequest, choices: Sequence[Choice], format_: ResponseFormat
) -> web.StreamResponse:
    await running.before_headers()
    steps = _steps(choices)
    k = 0
    try:
        for k in range(steps):
            await running.step(k, choices=_unfinished(choices, k))
            running.ticket.phase = RequestPhase.GENERATING
        await running.end(steps)
    except EngineStopped:
        choices = [choice.aborted(k) for choice in choices]
    return await _send_body(running, format_.body(choices), reason=choices[0].completion.finish_reason)


async def answer_embedding(running: RunningRequest, body: bytes) -> web.StreamResponse:
    """Sends the response to a request for embeddings or scores, after one step that produces no token."""
    await running.before_headers()
    await running.step(0, choices=0)
    return await _send_body(running, body, reason="stop")


async def answer_stream(
    running: RunningRequest, choices: Sequence[Choice], format_: ResponseFormat
) -> web.StreamResponse:
    await running.before_headers()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(running.request)
    events = [format_.events(index, choice) for index, choice in enumerate(choices)]
    steps = _steps(choices)
    k = 0
    try:
        for k in range(steps):
            await running.step(k, choices=_unfinished(choices, k))
            running.ticket.phase = RequestPhase.STREAMING
            await response.write(_token(events, choices, k))
        await running.end(steps)
    except StreamFault as due:
        at = due.fault.at
        next_events = _token(events, choices, at) if at < steps else _closing(events, choices, format_)
        if due.fault.kind is FaultKind.CUT:
            await response.write(next_events[: len(next_events) // 2])
            break_connection(running.request)
        await response.write_eof(format_.error(due.fault.message))
        return response
    except EngineStopped:
        choices = [choice.aborted(k) for choice in choices]
        if k == 0:
            await response.write(b"".join(one.opening() for one in events))
    await response.write_eof(_closing(events, choices, format_))
    running.finished(choices[0].completion.finish_reason)
    return response


def _steps(choices: Sequence[Choice]) -> int:
    return max(choice.completion.tokens for choice in choices)


def _unfinished(choices: Sequence[Choice], k: int) -> int:
    """Returns how many of the choices have a token with the number k."""
    return sum(k < choice.completion.tokens for choice in choices)


def _token(events: Sequence[ChoiceEvents], choices: Sequence[Choice], k: int) -> bytes:
    """Returns the events of token k of all choices; empty if it is part of a removed stop string in each of them."""
    if len(events) == 1 and 0 < k < len(choices[0].completion.pieces):
        return events[0].token(choices[0].completion.pieces[k])
    made = [] if k else [one.opening() for one in events]
    for one, choice in zip(events, choices, strict=True):
        if k < len(choice.completion.pieces):
            made.append(one.token(choice.completion.pieces[k]))
    return b"".join(made)


def _closing(events: Sequence[ChoiceEvents], choices: Sequence[Choice], format_: ResponseFormat) -> bytes:
    made = [one.closing(choice) for one, choice in zip(events, choices, strict=True)]
    return b"".join((*made, format_.end(choices)))


def json_answer(body: bytes, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """Returns a response with the JSON `body`, for a path that computes nothing."""
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


async def _send_body(running: RunningRequest, body: bytes, *, reason: str) -> web.StreamResponse:
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    if running.fault is not None and running.fault.kind is FaultKind.PARTIAL_BODY:
        running.counts.faults[FaultKind.PARTIAL_BODY] += 1
        response = web.StreamResponse(headers=headers)
        await response.prepare(running.request)
        await response.write(body[: len(body) // 2])
        break_connection(running.request)
    running.finished(reason)
    return web.Response(body=body, headers=headers)
