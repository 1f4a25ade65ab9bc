"""Extracts from an API request the text on which a routing decision is based.

The text consists of the user's messages, oldest first, up to a window. Of a message that is longer than the window, the
start and the end are taken, because a question often follows what it is about. Later turns of a conversation append to
the text, so a conversation keeps its expert without stored state. The latest turns are also returned one by one, so
that the classifier can see a change of topic. System prompts and answers are ignored. Images, audio and token ids have
no text. This module does not validate: a value of an unexpected form has no text, and the engine decides whether it is
valid. This module must not know HTTP, experts or terms.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from hpc_router.routing.features import WINDOW_BYTES, ends_of

_CONVERSATIONS: Final = ("messages", "input")
"""Fields whose value may be a list of messages."""
_TEXT_PARTS: Final = ("text", "input_text")  # not a set, because the type of a part may be unhashable


LAST_TURNS: Final = 6
"""Maximum number of turns of a conversation that are read one by one."""
_LAST_MESSAGES: Final = 60
"""Maximum number of messages, counted from the last one, among which these turns are looked for."""


class UserTurns(NamedTuple):
    """The user's part of a conversation. `text`: the messages, oldest first, up to the window. `turns`: the latest
    messages with text, oldest first, each up to the window."""

    text: str
    turns: tuple[str, ...]


Prompt = str | UserTurns
"""What a routing decision reads: the text of a single message, or a conversation."""


def user_prompt(body: object, *, window: int = WINDOW_BYTES, first: str = "messages") -> Prompt:
    """Returns what the user says in a decoded body: a text as `prompt_text` does, or a conversation if at least two
    messages of the user have text. `window`, `first`: see `prompt_text`."""
    if not isinstance(body, dict):
        return ""
    name = _field(body, first)
    if name is None:
        return ""
    value = body[name]
    text = _text(name, value, window)
    if not text or name not in _CONVERSATIONS or type(value) is not list or len(value) == 1:
        return text
    turns: list[str] = []
    for item in reversed(value[-_LAST_MESSAGES:]):
        if type(item) is dict and item.get("role") == "user" and item.get("type", "message") == "message":
            turn = _text("messages", [item], window)
            if turn:
                turns.append(turn)
                if len(turns) == LAST_TURNS:
                    break
    return UserTurns(text, tuple(reversed(turns))) if len(turns) > 1 else text


def prompt_text(body: object, *, window: int = WINDOW_BYTES, first: str = "messages") -> str:
    """Returns at most `window` characters of the user's text in a decoded body of any API; empty if there is no text.

    Chat completions and Anthropic messages use the field `messages`. Completions and `POST /route` use `prompt`.
    Responses and embeddings use `input`. `first`: the field that the body's API uses. It is preferred, because another
    API's field may have a different meaning (`prompt` in the responses API, for example).
    """
    if not isinstance(body, dict):
        return ""
    name = _field(body, first)
    return "" if name is None else _text(name, body[name], window)


def _text(name: str, value: object, window: int) -> str:
    """Returns at most `window` characters of the user's text in `value`, the value of the field `name`."""
    if name == "messages" and type(value) is list and len(value) == 1:  # fast path for the usual first turn
        only = value[0]
        if type(only) is dict and only.get("role") == "user" and "type" not in only:
            content = only.get("content")
            if type(content) is str:
                return content if len(content) <= window else ends_of(content, window)
    texts, size = [], 0
    for text in _READERS[name](value):
        if text:
            texts.append(ends_of(text, window))
            size += len(text) + 1
            if size > window:
                break
    return "\n".join(texts)[:window]


def _field(body: Mapping[str, Any], first: str) -> str | None:
    """Returns the field of the body that has its prompt; None if there is none. `first`: see `prompt_text`."""
    return first if first in body else next((name for name in PROMPT_FIELDS if name in body), None)


def _conversation(value: object) -> Iterator[str]:
    """Yields the texts of `messages` or `input`, which is a string or a list of messages, strings, token ids and other
    items."""
    if isinstance(value, str):
        yield value
    for item in _items(value):
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict) and item.get("role") == "user" and item.get("type", "message") == "message":
            content = item.get("content")
            if isinstance(content, str):
                yield content
            else:
                yield from _parts(content)


def _parts(content: object) -> Iterator[str]:
    for part in content if isinstance(content, list) else ():
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict) and part.get("type", "text") in _TEXT_PARTS:
            text = part.get("text")
            if isinstance(text, str):
                yield text


def _prompts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for item in _items(value):
        if isinstance(item, str):
            yield item


def _items(value: object) -> Sequence[object]:
    """Returns the items of a list; none if the list starts with a token id, because such lists are long and have no
    text."""
    return value if isinstance(value, list) and not (value and type(value[0]) is int) else ()


_READERS: Final[Mapping[str, Callable[[object], Iterator[str]]]] = {
    "messages": _conversation,
    "prompt": _prompts,
    "input": _conversation,
}
PROMPT_FIELDS: Final = tuple(_READERS)
"""Fields of a body that may contain its prompt."""
