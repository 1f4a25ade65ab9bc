"""One request from admission to its last byte: pace the tokens, strike the fault, count, send.

`step` is shared by streams and bodies: token k has been produced when it returns, and a fault due at k has struck
instead. A body is sent only when its last token is there, as vLLM does. When the engine stops, an answer ends after the
tokens that it has, in good form and with the finish reason `abort`, as vLLM's do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aiohttp import web

from hpc_router.sim import response_formats
from hpc_router.sim.admission import Stopped, Ticket
from hpc_router.sim.fault_injection import Crash, InStream, sever, strike
from hpc_router.sim.faults import HEADERS, Fault, FaultKind
from hpc_router.sim.latency import Clock, TokenSchedule
from hpc_router.sim.metrics import Outcome, RequestCounts, RequestPhase
from hpc_router.sim.request_parsing import Generation
from hpc_router.sim.tokens import Completion

_OUTCOMES = {"length": Outcome.LENGTH, "abort": Outcome.ABORT}


@dataclass(slots=True, kw_only=True)
class Job:
    """What one admitted request needs to run. `keep` is called once the answer is there, before its end is sent."""

    request: web.Request
    ticket: Ticket
    counts: RequestCounts
    clock: Clock
    crash: Crash
    pace: TokenSchedule
    fault: Fault | None
    keep: Callable[[], None] | None = None

    async def before_headers(self) -> None:
        await self._strike_at(HEADERS)

    async def step(self, k: int, *, prompt_tokens: int, choices: int) -> None:
        """Produce token k of every choice that still has one."""
        if self.ticket.stopped:
            raise Stopped
        running = self.counts.running
        due = self.pace.first(prompt_tokens, running=running) if k == 0 else self.pace.next(running=running)
        await self.ticket.wait(due)
        await self._strike_at(k)
        self.counts.generation_tokens += choices

    async def end(self, steps: int) -> None:
        """A fault at the length of the answer strikes after its last token, before its proper end."""
        await self._strike_at(steps)
        if self.keep is not None:
            self.keep()

    async def _strike_at(self, k: int) -> None:
        fault = self.fault
        if fault is not None and fault.at == k and fault.kind is not FaultKind.PARTIAL_BODY:
            self.counts.faults[fault.kind] += 1
            await strike(fault, self.request, crash=self.crash, clock=self.clock)

    def finished(self, reason: str) -> None:
        self.ticket.outcome = _OUTCOMES.get(reason, Outcome.STOP)


async def answer_whole(
    job: Job, asked: Generation, completions: Sequence[Completion], *, form: response_formats.Form
) -> web.StreamResponse:
    await job.before_headers()
    steps = max(completion.tokens for completion in completions)
    k = 0
    try:
        for k in range(steps):
            await job.step(k, prompt_tokens=asked.prompt_tokens, choices=_alive(completions, k))
            job.ticket.phase = RequestPhase.GENERATING
        await job.end(steps)
    except Stopped:
        completions = [completion.aborted(k) for completion in completions]
    return await _send_body(job, form.whole(completions), reason=completions[0].finish_reason)


async def answer_embedding(job: Job, body: bytes, *, prompt_tokens: int) -> web.StreamResponse:
    """One step of computing, no tokens out."""
    await job.before_headers()
    await job.step(0, prompt_tokens=prompt_tokens, choices=0)
    return await _send_body(job, body, reason="stop")


async def answer_stream(
    job: Job, asked: Generation, completions: Sequence[Completion], *, form: response_formats.Form
) -> web.StreamResponse:
    await job.before_headers()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(job.request)
    frames = [form.frame(index) for index in range(len(completions))]
    steps = max(completion.tokens for completion in completions)
    k = 0
    try:
        for k in range(steps):
            await job.step(k, prompt_tokens=asked.prompt_tokens, choices=_alive(completions, k))
            job.ticket.phase = RequestPhase.STREAMING
            await response.write(_events(frames, completions, k))
        await job.end(steps)
    except InStream as due:
        at = due.fault.at
        next_events = _events(frames, completions, at) if at < steps else _closing(frames, completions, form=form)
        if due.fault.kind is FaultKind.CUT:
            await response.write(next_events[: len(next_events) // 2])
            sever(job.request)
        await response.write_eof(form.error(due.fault.message))
        return response
    except Stopped:
        completions = [completion.aborted(k) for completion in completions]
        if k == 0:
            await response.write(b"".join(frame.opening() for frame in frames))
    await response.write_eof(_closing(frames, completions, form=form))
    job.finished(completions[0].finish_reason)
    return response


def _alive(completions: Sequence[Completion], k: int) -> int:
    return sum(k < completion.tokens for completion in completions)


def _events(frames: Sequence[response_formats.Frame], completions: Sequence[Completion], k: int) -> bytes:
    """Token k of every choice in one write; empty where a stop string swallowed them all."""
    if len(frames) == 1 and 0 < k < len(completions[0].pieces):
        return frames[0].piece(completions[0].pieces[k])
    events = [] if k else [frame.opening() for frame in frames]
    for frame, completion in zip(frames, completions, strict=True):
        if k < len(completion.pieces):
            events.append(frame.piece(completion.pieces[k]))
    return b"".join(events)


def _closing(
    frames: Sequence[response_formats.Frame], completions: Sequence[Completion], *, form: response_formats.Form
) -> bytes:
    events = [frame.closing(completion) for frame, completion in zip(frames, completions, strict=True)]
    return b"".join((*events, form.end(completions)))


async def _send_body(job: Job, body: bytes, *, reason: str) -> web.StreamResponse:
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    if job.fault is not None and job.fault.kind is FaultKind.PARTIAL_BODY:
        job.counts.faults[FaultKind.PARTIAL_BODY] += 1
        response = web.StreamResponse(headers=headers)
        await response.prepare(job.request)
        await response.write(body[: len(body) // 2])
        sever(job.request)
    job.finished(reason)
    return web.Response(body=body, headers=headers)
