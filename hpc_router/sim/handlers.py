"""Handlers of the paths for texts, embeddings and scores: each checks a request, chooses answer and fault, waits for
admission, and responds.

A `status` fault is injected before admission, like the refusal of an overloaded engine. Every other fault applies to an
admitted request. The answer is chosen before the first token is due, so `streaming` handles only time and faults.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Final

from aiohttp import web

from hpc_router.errors import ConfigError, suggest
from hpc_router.sim.admission import Ticket
from hpc_router.sim.api_error import ApiError
from hpc_router.sim.context import EngineContext
from hpc_router.sim.fault_injection import inject
from hpc_router.sim.faults import EXPRESSIBLE, Fault, FaultKind, ResponseForm, parse_fault
from hpc_router.sim.generation import Api, Embedding, Generation, ParsedPrompt
from hpc_router.sim.kv_cache import SequenceBlocks, block_hashes
from hpc_router.sim.latency import LatencySchedule, TokenSchedule
from hpc_router.sim.logprobs import prompt_logprobs, token_logprobs
from hpc_router.sim.messages_format import MessagesFormat
from hpc_router.sim.request_parsing import (
    check_prompt,
    parse_chat,
    parse_completion,
    parse_count_tokens,
    parse_embedding,
    parse_message,
    parse_response,
    token_limit,
)
from hpc_router.sim.response_formats import (
    CachedTokens,
    Choice,
    CompletionsFormat,
    Envelope,
    ResponseFormat,
    embeddings_body,
    encode,
)
from hpc_router.sim.responses_format import ResponsesFormat
from hpc_router.sim.scoring import Scoring, parse_rerank, parse_score, scores_body
from hpc_router.sim.streaming import RunningRequest, answer_body, answer_embedding, answer_stream, json_answer
from hpc_router.sim.tokenizer import parse_detokenize, parse_tokenize
from hpc_router.sim.tokens import Completion, complete_literal, complete_text, unit_vector

FAULT_HEADER = "x-sim-fault"
_FORMATS: Final[Mapping[Api, Callable[[Envelope, Generation, CachedTokens], ResponseFormat]]] = {
    Api.CHAT: CompletionsFormat,
    Api.TEXT: CompletionsFormat,
    Api.RESPONSE: ResponsesFormat,
    Api.MESSAGE: MessagesFormat,
}
_ID_PREFIXES: Final = {Api.CHAT: "chatcmpl-", Api.TEXT: "cmpl-", Api.RESPONSE: "resp_", Api.MESSAGE: "msg_"}


class InferenceHandlers:
    """The handlers of one engine, one method per path."""

    def __init__(self, context: EngineContext) -> None:
        self._context = context
        self._config = context.config

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, parse_chat(await request.read()))

    async def completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, parse_completion(await request.read()))

    async def responses(self, request: web.Request) -> web.StreamResponse:
        generation = parse_response(await request.read())
        previous = generation.previous_response_id
        if previous is not None:
            prompt = self._context.responses.continued(previous, generation.prompts[0])
            if prompt is None:
                raise _no_response(previous)
            generation = replace(generation, prompts=(prompt,))
        return await self._generate(request, generation)

    async def messages(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, parse_message(await request.read()))

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        embedding = parse_embedding(await request.read())
        self._check_model(embedding.model)
        for item in embedding.inputs:
            check_prompt(item, max_model_len=self._config.max_model_len)
        return await self._pool(request, embedding, prefix="embd-", body=partial(self._embed, embedding))

    async def score(self, request: web.Request) -> web.StreamResponse:
        return await self._score(request, parse_score(await request.read()))

    async def rerank(self, request: web.Request) -> web.StreamResponse:
        return await self._score(request, parse_rerank(await request.read()))

    async def _score(self, request: web.Request, scoring: Scoring) -> web.StreamResponse:
        self._check_model(scoring.model)
        body = partial(scores_body, scoring=scoring, seed=self._config.seed)
        return await self._pool(request, scoring, prefix="score-", body=body)

    async def _pool(
        self, request: web.Request, asked: Embedding | Scoring, *, prefix: str, body: Callable[[Envelope], bytes]
    ) -> web.StreamResponse:
        """Responds to a request for embeddings or scores, for which no tokens are generated. `prefix`: start of the
        response's id. `body`: makes the response's body."""
        factor, fault = await self._fault(request, asked, answer=ResponseForm.BODY)
        made = body(self._envelope(request, asked, prefix=prefix))
        async with (
            self._context.admission.admit(prompt_tokens=asked.prompt_tokens, priority=asked.priority) as ticket,
            self._schedule(asked.prompt_tokens, factor, priority=asked.priority) as schedule,
        ):
            running = self._running(request, asked, ticket, schedule=schedule, fault=fault)
            return await answer_embedding(running, made)

    async def count_tokens(self, request: web.Request) -> web.StreamResponse:
        model, tokens = parse_count_tokens(await request.read())
        self._check_model(model)
        return json_answer(encode({"input_tokens": tokens, "simulated": True}))

    async def tokenize(self, request: web.Request) -> web.StreamResponse:
        asked = parse_tokenize(await request.read())
        self._check_model(asked.model)
        body = self._context.tokenizer.tokenize_body(asked, max_model_len=self._config.max_model_len)
        return json_answer(body)

    async def detokenize(self, request: web.Request) -> web.StreamResponse:
        model, tokens = parse_detokenize(await request.read())
        self._check_model(model)
        return json_answer(self._context.tokenizer.detokenize_body(tokens))

    async def stored_response(self, request: web.Request) -> web.StreamResponse:
        body = self._stored_body(request)
        if request.query.get("stream") == "true":
            raise ApiError("The simulated engine cannot stream a stored response.", param="stream")
        return json_answer(body)

    async def cancel_response(self, request: web.Request) -> web.StreamResponse:
        """Refuses to cancel a response, as vLLM does if it is no background response; the simulated engine makes none
        of those."""
        self._stored_body(request)
        raise ApiError("Cannot cancel a synchronous response.", param="response_id")

    def _stored_body(self, request: web.Request) -> bytes:
        response_id = request.match_info["response_id"]
        body = self._context.responses.body(response_id)
        if body is None:
            raise _no_response(response_id)
        return body

    async def _generate(self, request: web.Request, generation: Generation) -> web.StreamResponse:
        self._check_model(generation.model)
        max_model_len = self._config.max_model_len
        limits = [token_limit(generation, prompt, max_model_len=max_model_len) for prompt in generation.prompts]
        answer = ResponseForm.STREAM if generation.stream else ResponseForm.BODY
        factor, fault = await self._fault(request, generation, answer=answer)
        choices = [
            self._choice(generation, prompt, limit, index)
            for prompt, limit in zip(generation.prompts, limits, strict=True)
            for index in range(generation.n)
        ]
        own_id = generation.api is Api.RESPONSE
        envelope = self._envelope(request, generation, prefix=_ID_PREFIXES[generation.api], own=own_id)
        send = answer_stream if generation.stream else answer_body
        async with (
            self._context.admission.admit(
                prompt_tokens=generation.prompt_tokens, priority=generation.priority
            ) as ticket,
            self._schedule(
                generation.prompt_tokens,
                factor,
                hashes=self._block_hashes(generation, choices[0]),
                reads=generation.prompt_logprobs is None,
                priority=generation.priority,
            ) as schedule,
        ):
            running = self._running(request, generation, ticket, schedule=schedule, fault=fault)
            form = _FORMATS[generation.api](envelope, generation, lambda: schedule.cached_tokens)
            if generation.store:
                completion, body = choices[0].completion, partial(form.body, choices)
                running.store = partial(
                    self._context.responses.add, envelope.id, generation.prompts[0], completion, body
                )
            return await send(running, choices, form)

    def _check_model(self, model: str | None) -> None:
        names = self._config.names
        if model is not None and model not in names:
            message = f"The model `{model}` does not exist{suggest(model, names)}."
            raise ApiError(message, status=404, param="model")

    async def _fault(
        self, request: web.Request, asked: Generation | Embedding | Scoring, *, answer: ResponseForm
    ) -> tuple[float, Fault | None]:
        """Returns the factor by which this request is slowed down, and the fault that it gets or None: those that the
        request specifies for itself, else those of the schedule."""
        context = self._context
        own = request.headers.get(FAULT_HEADER, asked.fault)
        if own is None:
            factor, fault = context.faults.select(request.path, model=asked.model, answer=answer)
        else:
            factor, fault = _own_fault(own, answer=answer)
        if factor != 1.0:
            context.admission.counts.faults[FaultKind.SLOW] += 1
        if fault is not None and fault.kind is FaultKind.STATUS:
            context.admission.counts.faults[FaultKind.STATUS] += 1
            await inject(fault, request, crash=context.crash, clock=context.clock)
        return factor, fault

    def _choice(self, generation: Generation, prompt: ParsedPrompt, limit: int, index: int) -> Choice:
        completion = self._complete(generation, prompt, limit, index)
        if generation.max_tokens == 0:  # valid with echo: one token is computed, and only the prompt is sent
            completion = replace(completion, pieces=(), generated=())
        seed = f"{self._config.seed}/{self._config.answering(generation.model)}"
        tokens, top, top_prompt = completion.generated, generation.top_logprobs, generation.prompt_logprobs
        text = prompt.text if prompt.token_text is None else prompt.token_text
        return Choice(
            completion=completion,
            echo=prompt.echo if generation.echo else "",
            logprobs=None if top is None else token_logprobs(tokens, seed=seed, count=top, position=prompt.tokens),
            prompt_logprobs=None if top_prompt is None else prompt_logprobs(text, seed=seed, count=top_prompt),
        )

    def _complete(self, generation: Generation, prompt: ParsedPrompt, limit: int, index: int) -> Completion:
        if generation.literal is not None:
            reason = "stop" if generation.tool is None else "tool_calls"
            return complete_literal(generation.literal, limit=limit, finish_reason=reason)
        return complete_text(
            prompt.text,
            model=self._config.answering(generation.model),
            seed=f"{self._config.seed}/{generation.seed}/{index}",
            limit=limit,
            mean_tokens=self._config.max_tokens_default,
            min_tokens=generation.min_tokens,
            ignore_eos=generation.ignore_eos,
            stop=generation.stop,
        )

    def _embed(self, embedding: Embedding, envelope: Envelope) -> bytes:
        config = self._config
        dimensions, model = embedding.dimensions or config.embedding_dimensions, config.answering(embedding.model)
        vectors = [
            unit_vector(item.text, model=model, seed=config.seed, dimensions=dimensions) for item in embedding.inputs
        ]
        return embeddings_body(envelope, vectors, as_base64=embedding.base64, prompt_tokens=embedding.prompt_tokens)

    def _envelope(
        self, request: web.Request, asked: Generation | Embedding | Scoring, *, prefix: str, own: bool = False
    ) -> Envelope:
        """Returns the common fields of a response. As in vLLM, its id is `prefix` followed by the client's
        x-request-id. Without that header, or if `own` is true, random text replaces it."""
        given = None if own else request.headers.get("x-request-id")
        name = given or f"{self._context.ids.getrandbits(128):032x}"
        created = int(self._context.clock.unix_s())
        return Envelope(
            id=f"{prefix}{name}",
            created=created,
            model=self._config.answering(asked.model),
            prompt_details=self._config.enable_prompt_tokens_details,
        )

    def _block_hashes(self, generation: Generation, choice: Choice) -> list[int]:
        """Returns the hashes of the request's cache blocks. The request is one sequence: all of its prompts, then its
        first choice. Roles count as no tokens, so they are not hashed either."""
        if not self._config.enable_prefix_caching:
            return []
        tokens = [
            word
            for prompt in generation.prompts
            for word in (prompt.text if prompt.token_text is None else prompt.token_text).split()
        ]
        tokens += [piece.strip() for piece in choice.completion.generated]
        adapter = generation.model if generation.model in self._config.adapters else None
        return block_hashes(tokens, block_size=self._config.block_size, seed=(adapter, generation.cache_salt))

    @asynccontextmanager
    async def _schedule(
        self, prompt_tokens: int, factor: float, *, hashes: Sequence[int] = (), reads: bool = True, priority: int = 0
    ) -> AsyncIterator[TokenSchedule]:
        """Yields the token schedule of one request. `factor` multiplies its latencies, except in a batch, where all
        requests share the steps. `hashes`, `reads`: see `SequenceBlocks`."""
        context = self._context
        if context.batch is not None:
            async with context.batch.slot(prompt_tokens, hashes, reads=reads, priority=priority) as slot:
                yield slot
            return
        blocks = SequenceBlocks(context.pool, hashes, reads)
        try:
            yield LatencySchedule(context.latency, clock=context.clock, factor=factor, blocks=blocks)
        finally:
            blocks.release()

    def _running(
        self,
        request: web.Request,
        asked: Generation | Embedding | Scoring,
        ticket: Ticket,
        *,
        schedule: TokenSchedule,
        fault: Fault | None,
    ) -> RunningRequest:
        context = self._context
        return RunningRequest(
            request=request,
            prompt_tokens=asked.prompt_tokens,
            ticket=ticket,
            counts=context.admission.counts,
            clock=context.clock,
            crash=context.crash,
            schedule=schedule,
            fault=fault,
        )


def _no_response(response_id: str) -> ApiError:
    return ApiError(f"Response with id '{response_id}' not found.", status=404, param="response_id")


def _own_fault(value: object, *, answer: ResponseForm) -> tuple[float, Fault | None]:
    try:
        fault = parse_fault(value, where=FAULT_HEADER if isinstance(value, str) else "sim_fault")
    except ConfigError as exc:
        raise ApiError(str(exc)) from exc
    if fault.kind not in EXPRESSIBLE[answer]:
        valid = ", ".join(sorted(EXPRESSIBLE[answer]))
        raise ApiError(f"The fault '{fault.kind}' cannot be injected into an answer of this form (valid: {valid}).")
    return (fault.factor, None) if fault.kind is FaultKind.SLOW else (1.0, fault)
