"""The last responses of `/v1/responses`, for `previous_response_id`. Their number is limited; the oldest is dropped."""

from collections import OrderedDict

from hpc_router.sim.generation import ParsedPrompt
from hpc_router.sim.tokens import Completion

MAX_RESPONSES = 1024


class ResponseStore:
    """Maps a response id to the conversation up to the end of that response."""

    def __init__(self, *, max_responses: int = MAX_RESPONSES) -> None:
        self._max_responses = max_responses
        self._conversations: OrderedDict[str, ParsedPrompt] = OrderedDict()

    def add(self, response_id: str, prompt: ParsedPrompt, completion: Completion) -> None:
        text = f"{prompt.text}\nassistant: {completion.text}"
        self._conversations[response_id] = ParsedPrompt(text, prompt.tokens + completion.tokens)
        if len(self._conversations) > self._max_responses:
            self._conversations.popitem(last=False)

    def continued(self, response_id: str, prompt: ParsedPrompt) -> ParsedPrompt | None:
        """Returns the stored conversation with `prompt` added to it; None if the response is not stored."""
        before = self._conversations.get(response_id)
        if before is None:
            return None
        return ParsedPrompt(f"{before.text}\n{prompt.text}", before.tokens + prompt.tokens)
