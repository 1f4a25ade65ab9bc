"""The last responses of `/v1/responses`, which later requests can continue (`previous_response_id`) or read by their
ids.

Their number is limited; the oldest is dropped first.
"""

from collections import OrderedDict
from collections.abc import Callable

from hpc_router.sim.generation import ParsedPrompt
from hpc_router.sim.tokens import Completion

MAX_RESPONSES = 1024


class ResponseStore:
    """Maps the id of a response to the conversation up to its end, and to the function that makes its body."""

    def __init__(self, *, max_responses: int = MAX_RESPONSES) -> None:
        self._max_responses = max_responses
        self._stored: OrderedDict[str, tuple[ParsedPrompt, Callable[[], bytes]]] = OrderedDict()

    def add(self, response_id: str, prompt: ParsedPrompt, completion: Completion, body: Callable[[], bytes]) -> None:
        text = f"{prompt.text}\nassistant: {completion.text}"
        self._stored[response_id] = ParsedPrompt(text, prompt.tokens + completion.tokens), body
        if len(self._stored) > self._max_responses:
            self._stored.popitem(last=False)

    def body(self, response_id: str) -> bytes | None:
        """Returns the body of a response; None if the response is not stored."""
        stored = self._stored.get(response_id)
        return None if stored is None else stored[1]()

    def continued(self, response_id: str, prompt: ParsedPrompt) -> ParsedPrompt | None:
        """Returns the stored conversation with `prompt` added to it; None if the response is not stored."""
        stored = self._stored.get(response_id)
        if stored is None:
            return None
        before, _ = stored
        return ParsedPrompt(f"{before.text}\n{prompt.text}", before.tokens + prompt.tokens)
