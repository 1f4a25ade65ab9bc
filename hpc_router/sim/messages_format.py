"""Response bodies and SSE events of /v1/messages (Anthropic), in vLLM's form (vllm/entrypoints/anthropic).

A message has one block: a text or a forced tool call. An aborted message has no stop reason.
"""

import json
from collections.abc import Sequence

from hpc_router.sim.api_error import messages_error_body
from hpc_router.sim.generation import Generation
from hpc_router.sim.response_formats import (
    PLACEHOLDER,
    CachedTokens,
    Choice,
    Envelope,
    around_placeholder,
    encode,
    named_event,
)
from hpc_router.sim.tokens import Completion, json_bytes


class MessagesFormat:
    """The format of /v1/messages, which also makes the events of its only block."""

    def __init__(self, envelope: Envelope, generation: Generation, cached: CachedTokens) -> None:
        self._envelope, self._generation = envelope, generation
        self._cached = cached if envelope.prompt_details else None
        delta = {"type": "text_delta", "text": PLACEHOLDER}
        if generation.tool is not None:
            delta = {"type": "input_json_delta", "partial_json": PLACEHOLDER}
        self._head, self._tail = around_placeholder(named_event("content_block_delta", index=0, delta=delta))

    def events(self, index: int, choice: Choice) -> "MessagesFormat":
        return self

    def opening(self) -> bytes:
        return b"".join(
            (
                named_event("message_start", message=self._message(None)),
                named_event("ping"),
                named_event("content_block_start", index=0, content_block=self._block(None)),
            )
        )

    def token(self, text: str) -> bytes:
        return self._head + json_bytes(text) + self._tail

    def closing(self, choice: Choice) -> bytes:
        completion = choice.completion
        return b"".join(
            (
                named_event("content_block_stop", index=0),
                named_event("message_delta", delta=_stop_of(completion), usage=self._usage(completion)),
                named_event("message_stop"),
            )
        )

    def end(self, choices: Sequence[Choice]) -> bytes:
        return b""

    def error(self, message: str) -> bytes:
        return b"event: error\ndata: " + messages_error_body(message, kind="internal_error") + b"\n\n"

    def body(self, choices: Sequence[Choice]) -> bytes:
        return encode(self._message(choices[0].completion))

    def _block(self, completion: Completion | None) -> dict[str, object]:
        """Returns the block of a message; with None, at the start of a stream, an empty block."""
        tool = self._generation.tool
        if tool is None:
            return {"type": "text", "text": "" if completion is None else completion.text}
        # Arguments that max_tokens has cut are not valid JSON.
        whole = completion is not None and completion.finish_reason == "tool_calls"
        arguments = json.loads(completion.text) if completion is not None and whole else {}
        return {"type": "tool_use", "id": f"call-{self._envelope.id}", "name": tool.name, "input": arguments}

    def _message(self, completion: Completion | None) -> dict[str, object]:
        stop = {"stop_reason": None, "stop_sequence": None} if completion is None else _stop_of(completion)
        return {
            "id": self._envelope.id,
            "type": self._generation.api,
            "role": "assistant",
            "model": self._envelope.model,
            "simulated": True,
            "content": [] if completion is None else [self._block(completion)],
            **stop,
            "usage": self._usage(completion),
        }

    def _usage(self, completion: Completion | None) -> dict[str, int]:
        tokens, output = self._generation.prompt_tokens, 0 if completion is None else completion.tokens
        if self._cached is None:
            return {"input_tokens": tokens, "output_tokens": output}
        cached = self._cached()  # as in Anthropic's API, input_tokens does not include them
        return {"input_tokens": tokens - cached, "cache_read_input_tokens": cached, "output_tokens": output}


def _stop_of(completion: Completion) -> dict[str, str | None]:
    if completion.stop_reason is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": completion.stop_reason}
    reasons = {"length": "max_tokens", "abort": None, "tool_calls": "tool_use"}
    return {"stop_reason": reasons.get(completion.finish_reason, "end_turn"), "stop_sequence": None}
