"""What answers look like in the APIs whose events have names: OpenAI's responses and Anthropic's messages.

As in `shapes`, a token is a few concatenations, body and stream come from the same completion, and everything is
labelled simulated. Both APIs have one answer of one text. Stop reasons and statuses are vLLM's: a response that was
cut at its limit ends in `response.completed` all the same, with the status `incomplete`; one that was aborted says
`completed`, and a message that was aborted has no stop reason.
"""

from collections.abc import Sequence
from typing import Final

from hpc_router.sim.api_error import error_of, messages_error_body
from hpc_router.sim.request_parsing import Generation
from hpc_router.sim.response_formats import Envelope, encode
from hpc_router.sim.tokens import Completion, json_bytes

_PIECE: Final = "<piece>"


def named_event(name: str, **body: object) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), encode({"type": name, "simulated": True, **body}))


class ResponsesFormat:
    """The form of `/v1/responses`."""

    def __init__(self, envelope: Envelope, asked: Generation) -> None:
        self._envelope, self._asked = envelope, asked

    def frame(self, index: int) -> "ResponseFrame":
        return ResponseFrame(self)

    def end(self, completions: Sequence[Completion]) -> bytes:
        return b""

    def error(self, message: str) -> bytes:
        error = error_of(message, status=500)
        return named_event("error", code=str(error["code"]), message=message, param=None, error=error)

    def whole(self, completions: Sequence[Completion]) -> bytes:
        return encode(self.completed(completions[0]))

    @property
    def item_id(self) -> str:
        return f"msg_{self._envelope.id.removeprefix('resp_')}"

    def item(self, text: str, *, status: str, empty: bool = False) -> dict[str, object]:
        content = [] if empty else [_part(text)]
        return {"id": self.item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def completed(self, completion: Completion) -> dict[str, object]:
        """The response at its end."""
        status = status_of(completion)
        prompt_tokens = self._asked.prompt_tokens
        usage = {
            "input_tokens": prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": completion.tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt_tokens + completion.tokens,
        }
        return self.response(
            status,
            output=[self.item(completion.text, status=status)],
            usage=usage,
            incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
        )

    def response(self, status: str, *, output: Sequence[object] = (), **more: object) -> dict[str, object]:
        asked = self._asked
        return {
            "id": self._envelope.id,
            "object": asked.api,
            "created_at": self._envelope.created,
            "model": self._envelope.model,
            "simulated": True,
            "status": status,
            "output": output,
            "error": None,
            "incomplete_details": None,
            "max_output_tokens": asked.max_tokens,
            "parallel_tool_calls": True,
            "previous_response_id": asked.previous,
            "store": asked.store,
            "tool_choice": "auto",
            "tools": [],
            "usage": None,
            **more,
        }


class ResponseFrame:
    """Every event carries its number, which comes last."""

    def __init__(self, response: ResponsesFormat) -> None:
        self._response = response
        self._place: dict[str, object] = {"item_id": response.item_id, "output_index": 0, "content_index": 0}
        self._number = 0
        delta = {**self._place, "logprobs": [], "delta": _PIECE, "sequence_number": 0}
        head, _, tail = named_event("response.output_text.delta", **delta).rpartition(json_bytes(_PIECE))
        self._head, self._tail = head, tail.rpartition(b"0")

    def opening(self) -> bytes:
        response = self._response
        item = response.item("", status="in_progress", empty=True)
        return b"".join(
            (
                self._event("response.created", response=response.response("in_progress")),
                self._event("response.in_progress", response=response.response("in_progress")),
                self._event("response.output_item.added", output_index=0, item=item),
                self._event("response.content_part.added", **self._place, part=_part("")),
            )
        )

    def piece(self, text: str) -> bytes:
        before, _, after = self._tail
        return b"%b%b%b%d%b" % (self._head, json_bytes(text), before, self._next(), after)

    def closing(self, completion: Completion) -> bytes:
        response, text = self._response, completion.text
        item = response.item(text, status=status_of(completion))
        return b"".join(
            (
                self._event("response.output_text.done", **self._place, text=text, logprobs=[]),
                self._event("response.content_part.done", **self._place, part=_part(text)),
                self._event("response.output_item.done", output_index=0, item=item),
                self._event("response.completed", response=response.completed(completion)),
            )
        )

    def _event(self, name: str, **body: object) -> bytes:
        return named_event(name, **body, sequence_number=self._next())

    def _next(self) -> int:
        self._number += 1
        return self._number - 1


class MessagesFormat:
    """The form of `/v1/messages`, and the frame of its only text."""

    def __init__(self, envelope: Envelope, asked: Generation) -> None:
        self._envelope, self._asked = envelope, asked
        delta = {"type": "text_delta", "text": _PIECE}
        head, _, tail = named_event("content_block_delta", index=0, delta=delta).rpartition(json_bytes(_PIECE))
        self._head, self._tail = head, tail

    def frame(self, index: int) -> "MessagesFormat":
        return self

    def opening(self) -> bytes:
        return b"".join(
            (
                named_event("message_start", message=self._message(None)),
                named_event("ping"),
                named_event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
            )
        )

    def piece(self, text: str) -> bytes:
        return self._head + json_bytes(text) + self._tail

    def closing(self, completion: Completion) -> bytes:
        return b"".join(
            (
                named_event("content_block_stop", index=0),
                named_event("message_delta", delta=_stop_of(completion), usage=self._usage(completion)),
                named_event("message_stop"),
            )
        )

    def end(self, completions: Sequence[Completion]) -> bytes:
        return b""

    def error(self, message: str) -> bytes:
        return b"event: error\ndata: " + messages_error_body(message, kind="internal_error") + b"\n\n"

    def whole(self, completions: Sequence[Completion]) -> bytes:
        return encode(self._message(completions[0]))

    def _message(self, completion: Completion | None) -> dict[str, object]:
        stop = {"stop_reason": None, "stop_sequence": None} if completion is None else _stop_of(completion)
        return {
            "id": self._envelope.id,
            "type": self._asked.api,
            "role": "assistant",
            "model": self._envelope.model,
            "simulated": True,
            "content": [] if completion is None else [{"type": "text", "text": completion.text}],
            **stop,
            "usage": self._usage(completion),
        }

    def _usage(self, completion: Completion | None) -> dict[str, int]:
        return {
            "input_tokens": self._asked.prompt_tokens,
            "output_tokens": 0 if completion is None else completion.tokens,
        }


def status_of(completion: Completion) -> str:
    return "incomplete" if completion.finish_reason == "length" else "completed"


def _part(text: str) -> dict[str, object]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _stop_of(completion: Completion) -> dict[str, str | None]:
    if completion.stop_reason is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": completion.stop_reason}
    reason = {"length": "max_tokens", "abort": None}.get(completion.finish_reason, "end_turn")
    return {"stop_reason": reason, "stop_sequence": None}
