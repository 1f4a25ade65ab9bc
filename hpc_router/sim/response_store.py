"""The last responses of `/v1/responses`, for `previous_response_id` and to be read again by their ids.

Bounded in number; the oldest is dropped first.
"""

from collections import OrderedDict
from collections.abc import Callable

from hpc_router.sim.generation import ParsedPrompt
from hpc_router.sim.tokens import Completion

MAX_RESPONSES = 1024


class ResponseStore:
    """Maps a response id to the conversation up to the end of that response, and to what makes its body."""

    def __init__(self, *, max_responses: int = MAX_RESPONSES) -> None:
        self._max_responses = max_responses
        self._stored: OrderedDict[str, tuple[ParsedPrompt, Callable[[], bytes]]] = OrderedDict()

    def add(self, response_id: str, prompt: ParsedPrompt, completion: Completion, body: Callable[[], bytes]) -> None:
        text = f"{prompt.text}\nassistant: {completion.text}"
        self._stored[response_id] = ParsedPrompt(text, prompt.tokens + completion.tokens), body
        if len(self._stored) > self._max_responses:
            self._stored.popitem(last=False)

    def body(self, response_id: str) -> bytes | None:
        """The response; None for one that is not stored."""
        stored = self._stored.get(response_id)
        return None if stored is None else stored[1]()

    def continued(self, response_id: str, prompt: ParsedPrompt) -> ParsedPrompt | None:
        """The conversation with `prompt` added to it; None for a response that is not stored."""
        stored = self._stored.get(response_id)
        if stored is None:
            return None
        before, _ = stored
        return ParsedPrompt(f"{before.text}\n{prompt.text}", before.tokens + prompt.tokens)
