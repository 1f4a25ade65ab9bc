"""What answers look like: vLLM's bodies and SSE events, each labelled simulated.

A streamed token must be cheap, so the JSON around it is serialised once per choice (`Frame`) and a token is two
concatenations. Stream and body are built from the same completions, so their texts and usage agree. Here are the
shapes of OpenAI's older APIs, whose events are all alike; `typed_shapes` has those whose events have names.
"""

import base64
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from hpc_router.sim.api_error import error_body
from hpc_router.sim.request_parsing import Api, Generation, Tool
from hpc_router.sim.tokens import Completion, json_bytes

DONE: Final = b"data: [DONE]\n\n"
OWNER: Final = "hpc_router-sim"
_PIECE: Final = "<piece>"


def event(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"


def encode(body: dict[str, object]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every chunk and body of one response shares."""

    id: str
    created: int
    model: str

    def wrap(self, kind: str, choices: Sequence[object], **more: object) -> dict[str, object]:
        """`choices` comes last: a frame is split at its piece from the right, where no caller's text can follow."""
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


class Frame(Protocol):
    """The events of one choice of a stream."""

    def opening(self) -> bytes:
        """Before the first token."""

    def piece(self, text: str) -> bytes:
        """One token; called once for each, in order."""

    def closing(self, completion: Completion) -> bytes:
        """After the last token."""


class Form(Protocol):
    """How one API puts an answer."""

    def frame(self, index: int) -> Frame: ...

    def end(self, completions: Sequence[Completion]) -> bytes:
        """What ends a stream, after every choice has ended."""

    def error(self, message: str) -> bytes:
        """What ends a stream that failed."""

    def whole(self, completions: Sequence[Completion]) -> bytes:
        """The answer in one piece."""


class Choices:
    """The form of chat and text completions."""

    def __init__(self, envelope: Envelope, asked: Generation) -> None:
        self._envelope, self._asked = envelope, asked

    def frame(self, index: int) -> Frame:
        return ChoiceFrame(self._envelope, api=self._asked.api, index=index, tool=self._asked.tool)

    def end(self, completions: Sequence[Completion]) -> bytes:
        usage = usage_event(self._envelope, self._asked, completions) if self._asked.include_usage else b""
        return usage + DONE

    def error(self, message: str) -> bytes:
        return error_event(message) + DONE

    def whole(self, completions: Sequence[Completion]) -> bytes:
        return whole_body(self._envelope, self._asked, completions)


class ChoiceFrame:
    """The events of one choice of a completion."""

    def __init__(self, envelope: Envelope, *, api: Api, index: int, tool: Tool | None) -> None:
        self._envelope, self._api, self._index, self._tool = envelope, api, index, tool
        if api is Api.TEXT:
            content: object = _PIECE
        elif tool is None:
            content = {"content": _PIECE}
        else:
            content = {"tool_calls": [{"index": 0, "function": {"arguments": _PIECE}}]}
        head, _, tail = self._event(content).rpartition(json_bytes(_PIECE))
        self._head, self._tail = head, tail

    def piece(self, text: str) -> bytes:
        return self._head + json_bytes(text) + self._tail

    def opening(self) -> bytes:
        """Chat streams name the role, and the tool if one is called, before their first content."""
        if self._api is Api.TEXT:
            return b""
        role = self._event({"role": "assistant", "content": ""})
        if self._tool is None:
            return role
        function = {"name": self._tool.name, "arguments": ""}
        call = {"index": 0, "id": _call_id(self._envelope, self._index), "type": "function", "function": function}
        return role + self._event({"tool_calls": [call]})

    def closing(self, completion: Completion) -> bytes:
        content = "" if self._api is Api.TEXT else {}
        return self._event(content, finish=completion.finish_reason, stop=completion.stop_reason)

    def _event(self, content: object, *, finish: str | None = None, stop: str | None = None) -> bytes:
        key, kind = ("text", "text_completion") if self._api is Api.TEXT else ("delta", "chat.completion.chunk")
        choice = {"index": self._index, key: content, "logprobs": None, "finish_reason": finish, "stop_reason": stop}
        return event(encode(self._envelope.wrap(kind, [choice])))


def usage(prompt_tokens: int, *, completion_tokens: int = 0) -> dict[str, object]:
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


def usage_event(envelope: Envelope, asked: Generation, completions: Sequence[Completion]) -> bytes:
    kind = "text_completion" if asked.api is Api.TEXT else "chat.completion.chunk"
    return event(encode(envelope.wrap(kind, [], usage=_usage_of(asked, completions))))


def error_event(message: str) -> bytes:
    return event(error_body(message, status=500))


def whole_body(envelope: Envelope, asked: Generation, completions: Sequence[Completion]) -> bytes:
    """The answer in one piece."""
    choices = [
        {
            "index": index,
            **_content(envelope, asked, completion, index=index),
            "logprobs": None,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        for index, completion in enumerate(completions)
    ]
    return encode(envelope.wrap(asked.api, choices, usage=_usage_of(asked, completions)))


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


def _content(envelope: Envelope, asked: Generation, completion: Completion, *, index: int) -> dict[str, object]:
    if asked.api is Api.TEXT:
        return {"text": completion.text}
    if asked.tool is None:
        return {"message": {"role": "assistant", "content": completion.text}}
    function = {"name": asked.tool.name, "arguments": completion.text}
    call = {"id": _call_id(envelope, index), "type": "function", "function": function}
    return {"message": {"role": "assistant", "content": None, "tool_calls": [call]}}


def _usage_of(asked: Generation, completions: Sequence[Completion]) -> dict[str, object]:
    return usage(asked.prompt_tokens, completion_tokens=sum(completion.tokens for completion in completions))


def _call_id(envelope: Envelope, index: int) -> str:
    return f"call-{envelope.id}-{index}"


def _base64(vector: tuple[float, ...]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
