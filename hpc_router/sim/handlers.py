"""The handlers that compute: check a request, decide its answer and its fault, take a place, send.

A `status` fault refuses before the queue, as an engine that sheds load does; every other fault strikes a request that
holds a place. The answer is decided before the first token is paced, so only time and faults are left to `generate`.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Final

from aiohttp import web

from hpc_router.errors import ConfigError, suggest
from hpc_router.sim import response_formats, typed_response_formats
from hpc_router.sim.admission import Ticket
from hpc_router.sim.api_error import ApiError
from hpc_router.sim.context import Core
from hpc_router.sim.fault_injection import strike
from hpc_router.sim.faults import EXPRESSIBLE, Fault, FaultKind, ResponseForm, parse_fault
from hpc_router.sim.latency import SpacedPace, TokenSchedule
from hpc_router.sim.request_parsing import (
    Api,
    Embedding,
    Generation,
    ParsedPrompt,
    check_length,
    parse_chat,
    parse_completion,
    parse_embedding,
    parse_message,
    parse_response,
)
from hpc_router.sim.streaming import Job, answer_embedding, answer_stream, answer_whole
from hpc_router.sim.tokens import Completion, complete_text, complete_tool_call, unit_vector

FAULT_HEADER = "x-sim-fault"
_FORMS: Final[Mapping[Api, Callable[[response_formats.Envelope, Generation], response_formats.Form]]] = {
    Api.CHAT: response_formats.Choices,
    Api.TEXT: response_formats.Choices,
    Api.RESPONSE: typed_response_formats.ResponsesFormat,
    Api.MESSAGE: typed_response_formats.MessagesFormat,
}
_ID_PREFIXES: Final = {Api.CHAT: "chatcmpl-", Api.TEXT: "cmpl-", Api.RESPONSE: "resp_", Api.MESSAGE: "msg_"}


class Inference:
    def __init__(self, core: Core) -> None:
        self._core = core
        self._config = core.config

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, parse_chat(await request.read()))

    async def completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, parse_completion(await request.read()))

    async def responses(self, request: web.Request) -> web.StreamResponse:
        asked = parse_response(await request.read())
        if asked.previous is not None:
            prompt = self._core.kept.continued(asked.previous, asked.prompts[0])
            if prompt is None:
                message = f"Response with id '{asked.previous}' not found."
                raise ApiError(message, status=404, param="response_id")
            asked = replace(asked, prompts=(prompt,))
        return await self._generate(request, asked)

    async def messages(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, parse_message(await request.read()))

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        asked = parse_embedding(await request.read())
        self._check(asked.model, asked.inputs, max_tokens=None)
        factor, fault = await self._fault(request, asked, answer=ResponseForm.BODY)
        body = self._embed(asked, envelope=self._envelope(request, asked, prefix="embd-"))
        async with (
            self._core.scheduler.admit(prompt_tokens=asked.prompt_tokens) as ticket,
            self._pace(asked.prompt_tokens, factor) as pace,
        ):
            job = self._job(request, ticket, pace=pace, fault=fault)
            return await answer_embedding(job, body, prompt_tokens=asked.prompt_tokens)

    async def _generate(self, request: web.Request, asked: Generation) -> web.StreamResponse:
        self._check(asked.model, asked.prompts, max_tokens=asked.max_tokens)
        answer = ResponseForm.STREAM if asked.stream else ResponseForm.BODY
        factor, fault = await self._fault(request, asked, answer=answer)
        completions = [self._complete(asked, prompt, index) for prompt in asked.prompts for index in range(asked.n)]
        envelope = self._envelope(request, asked, prefix=_ID_PREFIXES[asked.api], own=asked.api is Api.RESPONSE)
        send = answer_stream if asked.stream else answer_whole
        async with (
            self._core.scheduler.admit(prompt_tokens=asked.prompt_tokens) as ticket,
            self._pace(asked.prompt_tokens, factor) as pace,
        ):
            job = self._job(request, ticket, pace=pace, fault=fault)
            if asked.store:
                job.keep = partial(self._core.kept.add, envelope.id, asked.prompts[0], completions[0])
            return await send(job, asked, completions, form=_FORMS[asked.api](envelope, asked))

    def _check(self, model: str | None, prompts: tuple[ParsedPrompt, ...], *, max_tokens: int | None) -> None:
        names = self._config.names
        if model is not None and model not in names:
            message = f"The model `{model}` does not exist{suggest(model, names)}."
            raise ApiError(message, status=404, param="model")
        for prompt in prompts:
            check_length(prompt, max_tokens=max_tokens, max_model_len=self._config.max_model_len)

    async def _fault(
        self, request: web.Request, asked: Generation | Embedding, *, answer: ResponseForm
    ) -> tuple[float, Fault | None]:
        """What strikes this request: its own fault if it brings one, else what the script says."""
        core = self._core
        own = request.headers.get(FAULT_HEADER, asked.fault)
        if own is None:
            factor, fault = core.script.select(request.path, model=asked.model, answer=answer)
        else:
            factor, fault = _own_fault(own, answer=answer)
        if factor != 1.0:
            core.scheduler.counts.faults[FaultKind.SLOW] += 1
        if fault is not None and fault.kind is FaultKind.STATUS:
            core.scheduler.counts.faults[FaultKind.STATUS] += 1
            await strike(fault, request, crash=core.crash, clock=core.clock)
        return factor, fault

    def _complete(self, asked: Generation, prompt: ParsedPrompt, index: int) -> Completion:
        if asked.tool is not None:
            return complete_tool_call(asked.tool.parameters, limit=asked.max_tokens)
        return complete_text(
            prompt.text,
            model=self._config.answering(asked.model),
            seed=f"{self._config.seed}/{asked.seed}/{index}",
            limit=asked.max_tokens,
            default=min(self._config.max_tokens_default, self._config.max_model_len - prompt.tokens),
            stop=asked.stop,
        )

    def _embed(self, asked: Embedding, *, envelope: response_formats.Envelope) -> bytes:
        dimensions = asked.dimensions or self._config.embedding_dimensions
        vectors = [
            unit_vector(
                item.text, model=self._config.answering(asked.model), seed=self._config.seed, dimensions=dimensions
            )
            for item in asked.inputs
        ]
        return response_formats.embeddings_body(
            envelope, vectors, as_base64=asked.base64, prompt_tokens=asked.prompt_tokens
        )

    def _envelope(
        self, request: web.Request, asked: Generation | Embedding, *, prefix: str, own: bool = False
    ) -> response_formats.Envelope:
        """vLLM's ids: a prefix and the caller's x-request-id, or random digits; always these where ids are `own`."""
        given = None if own else request.headers.get("x-request-id")
        name = given or f"{self._core.ids.getrandbits(128):032x}"
        created = int(self._core.clock.unix_s())
        return response_formats.Envelope(
            id=f"{prefix}{name}", created=created, model=self._config.answering(asked.model)
        )

    def _pace(self, prompt_tokens: int, factor: float) -> AbstractAsyncContextManager[TokenSchedule]:
        """When the request's tokens come. In a batch all share its steps: there `slow` slows nobody."""
        core = self._core
        if core.batching is not None:
            return core.batching.seat(prompt_tokens)
        return nullcontext(SpacedPace(core.latency, clock=core.clock, factor=factor))

    def _job(self, request: web.Request, ticket: Ticket, *, pace: TokenSchedule, fault: Fault | None) -> Job:
        core = self._core
        return Job(
            request=request,
            ticket=ticket,
            counts=core.scheduler.counts,
            clock=core.clock,
            crash=core.crash,
            pace=pace,
            fault=fault,
        )


def _own_fault(value: object, *, answer: ResponseForm) -> tuple[float, Fault | None]:
    try:
        fault = parse_fault(value, where=FAULT_HEADER if isinstance(value, str) else "sim_fault")
    except ConfigError as exc:
        raise ApiError(str(exc)) from exc
    if fault.kind not in EXPRESSIBLE[answer]:
        valid = ", ".join(sorted(EXPRESSIBLE[answer]))
        raise ApiError(f"The fault '{fault.kind}' cannot strike an answer of this form (valid: {valid}).")
    return (fault.factor, None) if fault.kind is FaultKind.SLOW else (1.0, fault)
