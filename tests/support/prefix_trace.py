"""A trace of conversations for prefix caches: the same token counts for a real engine and for the simulated one.

Conversations share system prompts, grow turn by turn with the engine's own answers, and take turns, so that a small
cache evicts some of them between two of their turns.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

Token = TypeVar("Token")

ANSWER_TOKENS: Final = 21
OPEN: Final = 12
"""Number of conversations that take turns."""
FIRST_ID: Final = 20
"""Token ids below are left out, because they may be special tokens."""


@dataclass(slots=True)
class Conversation(Generic[Token]):
    """A conversation so far."""

    history: list[Token]


def replay(
    ask: Callable[[list[Token]], list[Token]], token: Callable[[int], Token], *, ids: int, seed: int = 5
) -> None:
    """Sends the trace, one request after the other. `ask`: sends a prompt and returns the `ANSWER_TOKENS` tokens of its
    answer. `token`: a token for a number. `ids`: the vocabulary's size."""
    source = random.Random(seed)

    def drawn(count: int) -> list[Token]:
        return [token(source.randrange(FIRST_ID, ids)) for _ in range(count)]

    systems = [drawn(length) for length in (160, 100, 64, 33)]
    conversations: list[Conversation[Token]] = []
    for _ in range(100):
        if len(conversations) < OPEN or source.random() < 0.15:
            if len(conversations) == OPEN:
                conversations.pop(source.randrange(len(conversations)))
            system = source.choices(systems, [1 / rank for rank in range(1, len(systems) + 1)])[0]
            conversations.append(Conversation(list(system)))
        one = source.choice(conversations)
        one.history += drawn(source.randint(10, 120))
        one.history += ask(list(one.history))
