"""API request -> the text a decision reads.

The user's messages, oldest first, up to a window: later turns of a conversation only append, so they stay where the
first went, and no state is kept. System prompts and answers do not vote; images, audio and token ids have no text.
Shapes are checked here as far as routing reads them and no further: the engine judges the rest. An error names the
field and the valid shape and never quotes a prompt. Nothing here knows HTTP, experts or terms.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from hpc_router.errors import HpcRouterError
from hpc_router.routing.features import WINDOW_BYTES

_TEXT_PARTS = frozenset({"text", "input_text"})


class RequestError(HpcRouterError):
    """A request body of a shape that cannot be routed; the client must change it."""


def prompt_text(body: object, *, window: int = WINDOW_BYTES, first: str = "messages") -> str:
    """The first `window` characters of what the user wrote in a decoded body of any of the APIs.

    Chat and Anthropic's messages have `messages`, completions and `POST /route` have `prompt`, responses and embeddings
    have `input`. Where a body has several, `first` names the one that its API reads; responses, for one, mean something
    else by `prompt`.
    """
    if not isinstance(body, dict):
        raise RequestError(f"the body must be a JSON object, not {_kind(body)}")
    name = first if first in body else next((name for name in _READERS if name in body), None)
    if name is None:
        raise RequestError("the body has no text to route: it needs 'messages' (chat), 'prompt' or 'input'")
    # To the end even when the window is full: a bad shape is an error wherever it stands.
    texts = [text[:window] for text in _READERS[name](body[name]) if text]
    return "\n".join(texts)[:window]


def opening(fields: Mapping[str, object]) -> str | None:
    """What the user said first, of a conversation in any of the APIs; every later turn has it too. None: there is none,
    or not in a shape that could be read."""
    turns = fields.get("messages", fields.get("input"))
    if isinstance(turns, str):
        return turns
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict) and turn.get("role") == "user":
            content = turn.get("content")
            if isinstance(content, str):
                return content
            parts = content if isinstance(content, list) else ()
            texts = (part.get("text") for part in parts if isinstance(part, dict))
            return next((text for text in texts if isinstance(text, str)), None)
    return None


def _messages(value: object) -> Iterator[str]:
    if not isinstance(value, list):
        raise RequestError(f"'messages' must be a list of message objects, not {_kind(value)}")
    if not value:
        raise RequestError("'messages' is empty; it needs at least one message object")
    for index, message in enumerate(value):
        if type(message) is dict and message.get("role") == "user" and type(content := message.get("content")) is str:
            yield content  # as most are
        else:
            yield from _message(message, where=f"messages[{index}]")


def _message(message: object, *, where: str) -> Iterator[str]:
    if not isinstance(message, dict):
        raise RequestError(f"'{where}' must be an object with 'role' and 'content', not {_kind(message)}")
    role = message.get("role")
    if not isinstance(role, str):
        raise RequestError(f"'{where}.role' must be a string such as \"user\", not {_kind(role)}")
    if role == "user":
        yield from _content(message.get("content"), where=f"{where}.content")


def _content(content: object, *, where: str) -> Iterator[str]:
    if isinstance(content, str):
        yield content
        return
    if not isinstance(content, list):
        raise RequestError(f"'{where}' must be a string or a list of parts, not {_kind(content)}")
    for index, part in enumerate(content):
        if not isinstance(part, dict):
            raise RequestError(f"'{where}[{index}]' must be a part object with a 'type', not {_kind(part)}")
        if part.get("type") in _TEXT_PARTS:
            text = part.get("text")
            if not isinstance(text, str):
                raise RequestError(f"'{where}[{index}].text' must be a string, not {_kind(text)}")
            yield text


def _prompts(value: object) -> Iterator[str]:
    valid = "a string, a list of strings, or token ids"
    if isinstance(value, str):
        yield value
        return
    if not isinstance(value, list):
        raise RequestError(f"'prompt' must be {valid}, not {_kind(value)}")
    if not value:
        raise RequestError(f"'prompt' is an empty list; it must be {valid}")
    for index, item in enumerate(value):
        if isinstance(item, str):
            yield item
        elif not _token_ids(item):
            raise RequestError(f"'prompt[{index}]' must be a string or token ids, not {_kind(item)}")


def _inputs(value: object) -> Iterator[str]:
    valid = "a string, a list of strings or token ids, or a list of message objects"
    if isinstance(value, str):
        yield value
        return
    if not isinstance(value, list):
        raise RequestError(f"'input' must be {valid}, not {_kind(value)}")
    if not value:
        raise RequestError(f"'input' is an empty list; it must be {valid}")
    for index, item in enumerate(value):
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            # The responses API also lists tool calls, reasoning and the like here.
            if "role" in item and item.get("type", "message") == "message":
                yield from _message(item, where=f"input[{index}]")
        elif not _token_ids(item):
            raise RequestError(f"'input[{index}]' must be a string, token ids or an object, not {_kind(item)}")


_READERS: Final[Mapping[str, Callable[[object], Iterator[str]]]] = {
    "messages": _messages,
    "prompt": _prompts,
    "input": _inputs,
}


def _token_ids(item: object) -> bool:
    ids = item if isinstance(item, list) else [item]
    return all(isinstance(number, int) and not isinstance(number, bool) for number in ids)


def _kind(value: object) -> str:
    """A decoded value's type in JSON's words."""
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
