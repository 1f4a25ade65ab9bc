"""The properties of a request on which its user's limit of generated tokens depends. They are read from the request's
path and body, and only where such a limit is set."""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from hpc_router.net import protocol
from hpc_router.router.replicas.lifetime import MAX_TOKENS_KEYS, max_tokens_of

_new_tuple: Final = tuple.__new__  # written in C, while a named tuple's own constructor is Python code
_GENERATE: Final = frozenset(protocol.GENERATE_PATHS) - {protocol.EMBEDDINGS}


class RequestTraits(NamedTuple):
    """The traits of a request whose response consists of generated tokens. `choices`: number of responses that it asks
    for. `max_tokens`: the limit of the length of each response in tokens; None if the request states none."""

    choices: int = 1
    max_tokens: int | None = None


_NO_TRAITS: Final = RequestTraits()
_KEYS: Final = frozenset({"n", "best_of", "prompt", *MAX_TOKENS_KEYS})
"""Keys of a request that has traits of its own."""


def traits_of(path: str, fields: Mapping[str, Any]) -> RequestTraits | None:
    """Returns the traits of a request; None if its response has no generated tokens, like an embedding. `fields`: its
    body; a value that an engine would refuse counts as missing."""
    if path not in _GENERATE:
        return None
    if fields.keys().isdisjoint(_KEYS):
        return _NO_TRAITS
    choices = 1
    if "n" in fields or "best_of" in fields:
        choices = max(_count(fields.get("n")), _count(fields.get("best_of")))
    if "prompt" in fields:
        prompt = fields["prompt"]
        if type(prompt) is list and prompt and type(prompt[0]) is not int:
            choices *= len(prompt)  # a list of prompts
    return _new_tuple(RequestTraits, (choices, max_tokens_of(fields)))


def _count(value: object) -> int:
    return value if type(value) is int and value > 0 else 1
