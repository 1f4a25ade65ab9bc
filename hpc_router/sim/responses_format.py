"""Response bodies and SSE events of /v1/responses (OpenAI), in vLLM's form (vllm/entrypoints/openai/responses).

A response has one item: a message with one text, or a forced function call. As in vLLM, a response that was cut at its
limit also ends with `response.completed`, but has the status `incomplete`. An aborted response has the status
`completed`.
"""

from collections.abc import Sequence

from hpc_router.sim.api_error import error_of
from hpc_router.sim.generation import Generation
from hpc_router.sim.logprobs import TokenLogprobs, chat_logprobs
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


class ResponsesFormat:
    """The format of /v1/responses."""

    def __init__(self, envelope: Envelope, generation: Generation, cached: CachedTokens) -> None:
        self.envelope, self.generation, self._cached = envelope, generation, cached

    def events(self, index: int, choice: Choice) -> "ResponseEvents":
        return ResponseEvents(self, choice)

    def end(self, choices: Sequence[Choice]) -> bytes:
        return b""

    def error(self, message: str) -> bytes:
        error = error_of(message, status=500)
        return named_event("error", code=str(error["code"]), message=message, param=None, error=error)

    def body(self, choices: Sequence[Choice]) -> bytes:
        return encode(self.completed(choices[0]))

    @property
    def item_id(self) -> str:
        prefix = "msg_" if self.generation.tool is None else "fc_"
        return f"{prefix}{self.envelope.id.removeprefix('resp_')}"

    def item(self, text: str, *, status: str, content: Sequence[object]) -> dict[str, object]:
        tool = self.generation.tool
        if tool is None:
            return {"id": self.item_id, "type": "message", "role": "assistant", "status": status, "content": content}
        call_id = f"call-{self.envelope.id}"
        call = {"call_id": call_id, "name": tool.name, "arguments": text}
        return {"id": self.item_id, "type": "function_call", "status": status, **call}

    def part(self, text: str, logprobs: Sequence[TokenLogprobs] | None) -> dict[str, object]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs(logprobs)}

    def logprobs(self, entries: Sequence[TokenLogprobs] | None) -> list[dict[str, object]]:
        return chat_logprobs(entries or (), top=self.generation.top_logprobs or 0)

    def completed(self, choice: Choice) -> dict[str, object]:
        """Returns the complete response as a JSON object."""
        completion = choice.completion
        status = status_of(completion)
        prompt_tokens = self.generation.prompt_tokens
        usage = {
            "input_tokens": prompt_tokens,
            "input_tokens_details": {"cached_tokens": self._cached(), "cache_write_tokens": 0},
            "output_tokens": completion.tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt_tokens + completion.tokens,
        }
        part = self.part(completion.text, choice.logprobs)
        return self.response(
            status,
            output=[self.item(completion.text, status=status, content=[part])],
            usage=usage,
            incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
        )

    def response(self, status: str, *, output: Sequence[object] = (), **more: object) -> dict[str, object]:
        generation = self.generation
        return {
            "id": self.envelope.id,
            "object": generation.api,
            "created_at": self.envelope.created,
            "model": self.envelope.model,
            "simulated": True,
            "status": status,
            "output": output,
            "error": None,
            "incomplete_details": None,
            "max_output_tokens": generation.max_tokens,
            "parallel_tool_calls": True,
            "previous_response_id": generation.previous_response_id,
            "store": generation.store,
            "tool_choice": "auto",
            "tools": [],
            "usage": None,
            **more,
        }


class ResponseEvents:
    """Makes the events of the only item of a response. The last field of every event is its sequence number."""

    def __init__(self, format_: ResponsesFormat, choice: Choice) -> None:
        self._format, self._choice = format_, choice
        self._number = self._sent = 0
        self._place: dict[str, object] = {"item_id": format_.item_id, "output_index": 0}
        self._delta = "response.function_call_arguments.delta"
        if format_.generation.tool is None:
            self._place["content_index"] = 0
            self._delta = "response.output_text.delta"
        delta = {**self._place, **self._logprobs(()), "delta": PLACEHOLDER, "sequence_number": 0}
        head, tail = around_placeholder(named_event(self._delta, **delta))
        self._head, self._tail = head, tail.rpartition(b"0")

    def opening(self) -> bytes:
        format_ = self._format
        item = format_.item("", status="in_progress", content=[])
        events = [
            self._event("response.created", response=format_.response("in_progress")),
            self._event("response.in_progress", response=format_.response("in_progress")),
            self._event("response.output_item.added", output_index=0, item=item),
        ]
        if format_.generation.tool is None:
            events.append(self._event("response.content_part.added", **self._place, part=format_.part("", None)))
        return b"".join(events)

    def token(self, text: str) -> bytes:
        logprobs = self._choice.logprobs
        if logprobs is not None:
            self._sent += 1
            entries = self._logprobs(logprobs[self._sent - 1 : self._sent])
            return self._event(self._delta, **self._place, **entries, delta=text)
        before, _, after = self._tail
        return b"%b%b%b%d%b" % (self._head, json_bytes(text), before, self._next(), after)

    def closing(self, choice: Choice) -> bytes:
        format_, text = self._format, choice.completion.text
        tool, part = format_.generation.tool, format_.part(text, choice.logprobs)
        item = format_.item(text, status=status_of(choice.completion), content=[part])
        if tool is None:
            logprobs = self._logprobs(choice.logprobs or ())
            done = [
                self._event("response.output_text.done", **self._place, text=text, **logprobs),
                self._event("response.content_part.done", **self._place, part=part),
            ]
        else:
            kind = "response.function_call_arguments.done"
            done = [self._event(kind, **self._place, name=tool.name, arguments=text)]
        return b"".join(
            (
                *done,
                self._event("response.output_item.done", output_index=0, item=item),
                self._event("response.completed", response=format_.completed(choice)),
            )
        )

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, object]:
        """Returns the field of an event that has the log probabilities; empty for a function call."""
        return {"logprobs": self._format.logprobs(entries)} if self._format.generation.tool is None else {}

    def _event(self, kind: str, /, **body: object) -> bytes:
        return named_event(kind, **body, sequence_number=self._next())

    def _next(self) -> int:
        self._number += 1
        return self._number - 1


def status_of(completion: Completion) -> str:
    return "incomplete" if completion.finish_reason == "length" else "completed"
