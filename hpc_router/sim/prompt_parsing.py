"""Parses the prompts of request bodies: chat messages, `input` items and texts become a text with a number of tokens.

Errors are those of vLLM, with status 400 and a message that names the key.
"""

from hpc_router.sim.api_error import ApiError
from hpc_router.sim.generation import ParsedPrompt
from hpc_router.sim.tokens import count_tokens

Turn = tuple[str, str]
"""The role and the content of one message."""

_ITEM_TYPES = frozenset({"reasoning", "function_call", "function_call_output", "custom_tool_call_output"})
"""Types of items without a role that vLLM's `construct_chat_messages_with_tool_call` accepts
(vllm/entrypoints/openai/responses/utils.py). They add no text here."""


def chat_prompt(turns: list[Turn], *, echo: bool = False) -> ParsedPrompt:
    """Returns the prompt of a chat. With `echo`, the answer repeats the last message if the assistant wrote it, as in
    vLLM."""
    tokens = sum(count_tokens(content) for _, content in turns)
    return ParsedPrompt(
        text="\n".join(f"{role}: {content}" for role, content in turns),
        tokens=max(1, tokens),
        echo=turns[-1][1] if echo and turns[-1][0] == "assistant" else "",
        token_text="\n".join(content for _, content in turns),
    )


def messages(value: object) -> list[Turn]:
    if not isinstance(value, list) or not value:
        raise ApiError("'messages' must be a non-empty list of messages.", param="messages")
    return [message(one, where=f"messages[{index}]") for index, one in enumerate(value)]


def items(value: object) -> list[Turn]:
    """Parses the `input` of a request for /v1/responses. Items other than messages add no text. Raises ApiError for
    types that vLLM does not know."""
    if isinstance(value, str):
        return [("user", value)]
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise ApiError("'input' must be a string or a non-empty list of items.", param="input")
    turns: list[Turn] = []
    for index, item in enumerate(value):
        kind = item.get("type")
        if kind == "message" or "role" in item or (kind is None and "content" in item):
            turns.append(message(item, where=f"input[{index}]"))
        elif kind not in _ITEM_TYPES:
            raise ApiError(f"Unsupported input item type: {kind}", param="input")
    return turns


def message(value: object, *, where: str) -> Turn:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise ApiError(f"'{where}' must be an object with a 'role'.", param=where)
    content = value.get("content")
    if content is None or isinstance(content, str):
        return value["role"], content or ""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ApiError(f"'{where}.content' must be a string or a list of parts.", param=f"{where}.content")
    texts = [part["text"] for part in content if isinstance(part.get("text"), str)]
    return value["role"], "\n".join(texts)


def inputs(value: object, *, key: str) -> tuple[ParsedPrompt, ...]:
    """Parses a string, a list of strings or of token ids, or a list of such lists. A token id's text is its number."""
    if isinstance(value, str):
        return (ParsedPrompt(text=value, tokens=max(1, count_tokens(value)), echo=value),)
    if isinstance(value, list) and value:
        if _is_token_ids(value):
            text = " ".join(map(str, value))
            return (ParsedPrompt(text=text, tokens=len(value), echo=text),)
        if all(isinstance(item, str) or _is_token_ids(item) for item in value):
            return tuple(prompt for item in value for prompt in inputs(item, key=key))
    raise ApiError(f"'{key}' must be a string, a list of strings or a list of token ids, and not empty.", param=key)


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, int) for item in value)
