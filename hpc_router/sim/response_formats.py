"""Response bodies and SSE events of chat and text completions, embeddings and model lists, in vLLM's form.

A streamed token must be cheap: the JSON around its text is serialised once per choice, and each token costs two
concatenations. A stream and a body of the same request are built from the same completions, so their texts and usage
agree. Every response is labelled as simulated. `responses_format` and `messages_format` implement this module's
protocols for the APIs with named events.
"""

import base64
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from hpc_router.sim.api_error import error_body
from hpc_router.sim.generation import Api, Generation
from hpc_router.sim.logprobs import TokenLogprobs, chat_logprobs, completion_logprobs, prompt_logprobs_json
from hpc_router.sim.tokens import Completion, json_bytes

DONE: Final = b"data: [DONE]\n\n"
OWNER: Final = "hpc_router-sim"
PLACEHOLDER: Final = "<piece>"


CachedTokens = Callable[[], int]
"""Returns the number of prompt tokens that came from the prefix cache. It is known from the first token on."""


def event(body: bytes) -> bytes:
    """Returns an SSE event with this data."""
    return b"data: " + body + b"\n\n"


def named_event(kind: str, /, **body: object) -> bytes:
    """Returns an SSE event with a name, whose JSON data has the name as its `type`."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode({"type": kind, "simulated": True, **body}))


def encode(body: dict[str, object]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


def around_placeholder(event: bytes) -> tuple[bytes, bytes]:
    """Returns the bytes of `event` before and after its last placeholder, which stands for the text of a token."""
    head, _, tail = event.rpartition(json_bytes(PLACEHOLDER))
    return head, tail


@dataclass(frozen=True, slots=True)
class Envelope:
    """The fields that are the same in the body, or in all chunks, of one response. `prompt_details`: whether its
    `usage` says how many prompt tokens were cached."""

    id: str
    created: int
    model: str
    prompt_details: bool = False

    def wrap(self, kind: str, choices: Sequence[object], **more: object) -> dict[str, object]:
        """Returns a response or an event as a JSON object. `choices` comes last, because `around_placeholder` splits an
        event at the last placeholder; a client's text in a later field could contain one."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "simulated": True,
            "system_fingerprint": "simulated",
            **more,
            "choices": choices,
        }


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice of a response: its completion, and what the request asked for in addition to the text."""

    completion: Completion
    echo: str = ""
    logprobs: Sequence[TokenLogprobs] | None = None
    prompt_logprobs: Sequence[TokenLogprobs] | None = None

    def aborted(self, tokens: int) -> "Choice":
        """Returns the choice cut after `tokens` tokens, because the engine has stopped."""
        return replace(
            self,
            completion=self.completion.aborted(tokens),
            logprobs=None if self.logprobs is None else self.logprobs[:tokens],
        )


class ChoiceEvents(Protocol):
    """The events of one choice of a stream."""

    def opening(self) -> bytes:
        """Returns the events before the first token."""

    def token(self, text: str) -> bytes:
        """Returns the events of one token. Called once for each token, in order."""

    def closing(self, choice: Choice) -> bytes:
        """Returns the events after the last token."""


class ResponseFormat(Protocol):
    """The format in which one API writes a response."""

    def events(self, index: int, choice: Choice) -> ChoiceEvents: ...

    def end(self, choices: Sequence[Choice]) -> bytes:
        """Returns the bytes that end a stream after every choice has ended."""

    def error(self, message: str) -> bytes:
        """Returns the bytes that end a stream that has failed."""

    def body(self, choices: Sequence[Choice]) -> bytes:
        """Returns the body of a response that is not streamed."""


class CompletionsFormat:
    """The format of chat and text completions."""

    def __init__(self, envelope: Envelope, generation: Generation, cached: CachedTokens) -> None:
        self._envelope, self._generation = envelope, generation
        self._cached = cached if envelope.prompt_details else None

    def events(self, index: int, choice: Choice) -> ChoiceEvents:
        return CompletionEvents(self._envelope, self._generation, index, choice)

    def end(self, choices: Sequence[Choice]) -> bytes:
        return (self._usage_event(choices) if self._generation.include_usage else b"") + DONE

    def error(self, message: str) -> bytes:
        return error_event(message) + DONE

    def body(self, choices: Sequence[Choice]) -> bytes:
        generation = self._generation
        more: dict[str, object] = {}
        if generation.api is Api.CHAT and choices[0].prompt_logprobs is not None:
            more["prompt_logprobs"] = prompt_logprobs_json(choices[0].prompt_logprobs)
        made = [self._choice(index, choice) for index, choice in enumerate(choices)]
        return encode(self._envelope.wrap(generation.api, made, **more, usage=self._usage(choices)))

    def _usage_event(self, choices: Sequence[Choice]) -> bytes:
        kind = "text_completion" if self._generation.api is Api.TEXT else "chat.completion.chunk"
        return event(encode(self._envelope.wrap(kind, [], usage=self._usage(choices))))

    def _usage(self, choices: Sequence[Choice]) -> dict[str, object]:
        tokens = sum(choice.completion.tokens for choice in choices)
        made = usage(self._generation.prompt_tokens, completion_tokens=tokens)
        if self._cached is not None:
            made["prompt_tokens_details"] = {"cached_tokens": self._cached()}
        return made

    def _choice(self, index: int, choice: Choice) -> dict[str, object]:
        completion = choice.completion
        made = {
            "index": index,
            **_content(self._envelope, self._generation, choice, index=index),
            "logprobs": _logprobs(self._generation, choice, choice.logprobs, prompt=True),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if self._generation.api is Api.TEXT and choice.prompt_logprobs is not None:
            made["prompt_logprobs"] = prompt_logprobs_json(choice.prompt_logprobs)
        return made


class CompletionEvents:
    """The events of one choice of a completion. `_sent`, `_offset`: number of tokens and of characters sent so far."""

    def __init__(self, envelope: Envelope, generation: Generation, index: int, choice: Choice) -> None:
        self._envelope, self._generation, self._index, self._choice = envelope, generation, index, choice
        self._sent = self._offset = 0
        self._head, self._tail = around_placeholder(self._event(self._delta(PLACEHOLDER)))

    def token(self, text: str) -> bytes:
        if self._choice.logprobs is None:
            return self._head + json_bytes(text) + self._tail
        self._sent += 1
        return self._event(self._delta(text), entries=self._choice.logprobs[self._sent - 1 : self._sent])

    def opening(self) -> bytes:
        """Returns the events before the first content: in chat, one with the role and the tool of a tool call."""
        echo = self._choice.echo
        if self._generation.api is Api.TEXT:
            prompt = self._choice.prompt_logprobs if self._generation.top_logprobs is not None else None
            return self._event(echo, entries=prompt) if echo else b""
        role = self._event({"role": "assistant", "content": ""})
        tool = self._generation.tool
        if tool is None:
            return role + (self._event({"content": echo}) if echo else b"")
        function = {"name": tool.name, "arguments": ""}
        call = {"index": 0, "id": _call_id(self._envelope, self._index), "type": "function", "function": function}
        return role + self._event({"tool_calls": [call]})

    def closing(self, choice: Choice) -> bytes:
        """Returns the last event. It has the finish reason, and the log probabilities of the tokens that belong to a
        stop string and are therefore not in the text."""
        completion = choice.completion
        entries = None if choice.logprobs is None else choice.logprobs[self._sent :] or None
        content = "" if self._generation.api is Api.TEXT else {}
        return self._event(content, entries=entries, finish=completion.finish_reason, stop=completion.stop_reason)

    def _delta(self, text: str) -> object:
        if self._generation.api is Api.TEXT:
            return text
        if self._generation.tool is None:
            return {"content": text}
        return {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}

    def _event(
        self,
        content: object,
        *,
        entries: Sequence[TokenLogprobs] | None = None,
        finish: str | None = None,
        stop: str | None = None,
    ) -> bytes:
        text = self._generation.api is Api.TEXT
        logprobs = None
        if entries is not None:
            logprobs = _logprobs(self._generation, self._choice, entries, offset=self._offset)
            self._offset += sum(len(entry.token) for entry in entries)
        choice = {
            "index": self._index,
            "text" if text else "delta": content,
            "logprobs": logprobs,
            "finish_reason": finish,
            "stop_reason": stop,
        }
        return event(encode(self._envelope.wrap("text_completion" if text else "chat.completion.chunk", [choice])))


def _logprobs(
    generation: Generation,
    choice: Choice,
    entries: Sequence[TokenLogprobs] | None,
    *,
    offset: int = 0,
    prompt: bool = False,
) -> dict[str, object] | None:
    """Returns the log probabilities of a choice or of an event, made from `entries`. With `prompt`, those of the
    prompt, which the answer repeats, come first."""
    if entries is None or generation.top_logprobs is None:
        return None
    if generation.api is Api.CHAT:
        return {"content": chat_logprobs(entries, top=generation.top_logprobs)}
    before = choice.prompt_logprobs if prompt and choice.echo else None
    return completion_logprobs([*(before or ()), *entries], offset=offset)


def usage(prompt_tokens: int, *, completion_tokens: int = 0) -> dict[str, object]:
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


def error_event(message: str) -> bytes:
    return event(error_body(message, status=500))


def embeddings_body(
    envelope: Envelope, vectors: Sequence[tuple[float, ...]], *, as_base64: bool, prompt_tokens: int
) -> bytes:
    data = [
        {"object": "embedding", "index": index, "embedding": _base64(vector) if as_base64 else vector}
        for index, vector in enumerate(vectors)
    ]
    body = envelope.wrap("list", [], data=data, usage=usage(prompt_tokens))
    del body["choices"]
    return encode(body)


def models_body(names: Sequence[str], *, created: int, max_model_len: int) -> bytes:
    models = [
        {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": OWNER,
            "root": names[0],
            "parent": None,
            "max_model_len": max_model_len,
            "simulated": True,
        }
        for name in names
    ]
    return encode({"object": "list", "simulated": True, "data": models})


def _content(envelope: Envelope, generation: Generation, choice: Choice, *, index: int) -> dict[str, object]:
    text = choice.echo + choice.completion.text
    if generation.api is Api.TEXT:
        return {"text": text}
    if generation.tool is None:
        return {"message": {"role": "assistant", "content": text}}
    function = {"name": generation.tool.name, "arguments": choice.completion.text}
    call = {"id": _call_id(envelope, index), "type": "function", "function": function}
    return {"message": {"role": "assistant", "content": None, "tool_calls": [call]}}


def _call_id(envelope: Envelope, index: int) -> str:
    return f"call-{envelope.id}-{index}"


def _base64(vector: tuple[float, ...]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
