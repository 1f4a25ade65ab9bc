"""Extracts the text that a routing decision reads from an API request.

The text is the user's messages, oldest first, up to a window. Later turns of a conversation only append, so a
conversation keeps its expert without stored state. System prompts and answers are not read; images, audio and token ids
have no text. The shape of a body is checked only as far as routing reads it; the engine checks the rest. Errors name
the field and the valid shape, and never quote a prompt. This module must not know HTTP, experts or terms.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from hpc_router.errors import HpcRouterError
from hpc_router.routing.features import WINDOW_BYTES

_TEXT_PARTS = frozenset({"text", "input_text"})
_MAX_FIRST_ITEMS: Final = 1000
"""Turns, and parts of a turn, in which the first text of a conversation is searched."""


class RequestError(HpcRouterError):
    """The shape of a request body is invalid; the client must change it."""


def prompt_text(body: object, *, window: int = WINDOW_BYTES, first: str = "messages") -> str:
    """Return the first `window` characters of the user's text in a decoded body of any API. Raises RequestError.

    Chat completions and Anthropic messages use `messages`; completions and `POST /route` use `prompt`; responses and
    embeddings use `input`. `first` names the field of the body's API, which is read if a body has several of them:
    `prompt` has another meaning in the responses API, for example.
    """
    if not isinstance(body, dict):
        raise RequestError(f"the body must be a JSON object, not {_json_type(body)}")
    name = first if first in body else next((name for name in _READERS if name in body), None)
    if name is None:
        raise RequestError("the body has no text to route: it needs 'messages' (chat), 'prompt' or 'input'")
    # Reads to the end even if the window is full, because an invalid shape is an error at any position.
    texts = [text[:window] for text in _READERS[name](body[name]) if text]
    return "\n".join(texts)[:window]


def first_user_message(fields: Mapping[str, object]) -> str | None:
    """Return the first text of the user in a conversation of any API, which every later turn contains as well.

    None if the body has no such text or its shape is invalid.
    """
    turns = fields.get("messages", fields.get("input"))
    if isinstance(turns, str):
        return turns
    for turn in turns[:_MAX_FIRST_ITEMS] if isinstance(turns, list) else ():
        if isinstance(turn, dict) and turn.get("role") == "user":
            content = turn.get("content")
            if isinstance(content, str):
                return content
            parts = content[:_MAX_FIRST_ITEMS] if isinstance(content, list) else ()
            texts = (part.get("text") for part in parts if isinstance(part, dict))
            return next((text for text in texts if isinstance(text, str)), None)
    return None


def _messages(value: object) -> Iterator[str]:
    for index, message in enumerate(_items(value, "messages", "a list of message objects")):
        if type(message) is dict and message.get("role") == "user" and type(content := message.get("content")) is str:
            yield content  # fast path for most messages
        else:
            yield from _message(message, where=f"messages[{index}]")


def _message(message: object, *, where: str) -> Iterator[str]:
    if not isinstance(message, dict):
        raise RequestError(f"'{where}' must be an object with 'role' and 'content', not {_json_type(message)}")
    role = message.get("role")
    if not isinstance(role, str):
        raise RequestError(f"'{where}.role' must be a string such as \"user\", not {_json_type(role)}")
    if role == "user":
        yield from _content(message.get("content"), where=f"{where}.content")


def _content(content: object, *, where: str) -> Iterator[str]:
    if isinstance(content, str):
        yield content
        return
    if not isinstance(content, list):
        raise RequestError(f"'{where}' must be a string or a list of parts, not {_json_type(content)}")
    for index, part in enumerate(content):
        if not isinstance(part, dict):
            raise RequestError(f"'{where}[{index}]' must be a part object with a 'type', not {_json_type(part)}")
        if part.get("type") in _TEXT_PARTS:
            text = part.get("text")
            if not isinstance(text, str):
                raise RequestError(f"'{where}[{index}].text' must be a string, not {_json_type(text)}")
            yield text


def _prompts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
        return
    items = _items(value, "prompt", "a string, a list of strings, or token ids")
    if _token_ids(items):
        return
    for index, item in enumerate(items):
        if isinstance(item, str):
            yield item
        elif not _token_ids(item):
            raise RequestError(f"'prompt[{index}]' must be a string or token ids, not {_json_type(item)}")


def _inputs(value: object) -> Iterator[str]:
    valid = "a string, a list of strings or token ids, or a list of message objects"
    if isinstance(value, str):
        yield value
        return
    items = _items(value, "input", valid)
    if _token_ids(items):
        return
    for index, item in enumerate(items):
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            # In the responses API this list also contains tool calls and reasoning items.
            if "role" in item and item.get("type", "message") == "message":
                yield from _message(item, where=f"input[{index}]")
        elif not _token_ids(item):
            raise RequestError(f"'input[{index}]' must be a string, token ids or an object, not {_json_type(item)}")


_READERS: Final[Mapping[str, Callable[[object], Iterator[str]]]] = {
    "messages": _messages,
    "prompt": _prompts,
    "input": _inputs,
}


def _items(value: object, field: str, valid: str) -> list[object]:
    if not isinstance(value, list):
        raise RequestError(f"'{field}' must be {valid}, not {_json_type(value)}")
    if not value:
        raise RequestError(f"'{field}' is an empty list; it must be {valid}")
    return value


def _token_ids(value: object) -> bool:
    """Whether this is a token id or a list of them. Only the first id is checked, because such lists are long."""
    first = value[0] if isinstance(value, list) and value else value
    return type(first) is int or value == []


def _json_type(value: object) -> str:
    """Return the JSON name of a decoded value's type."""
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
