"""The last responses of `/v1/responses`, so that `previous_response_id` finds them. Bounded in number."""

from collections import OrderedDict

from hpc_router.sim.request_parsing import ParsedPrompt
from hpc_router.sim.tokens import Completion

MAX_RESPONSES = 1024


class Kept:
    """Response id -> the conversation up to its end."""

    def __init__(self, *, most: int = MAX_RESPONSES) -> None:
        self._most = most
        self._conversations: OrderedDict[str, ParsedPrompt] = OrderedDict()

    def add(self, response_id: str, prompt: ParsedPrompt, completion: Completion) -> None:
        said = ParsedPrompt(
            text=f"{prompt.text}\nassistant: {completion.text}", tokens=prompt.tokens + completion.tokens
        )
        self._conversations[response_id] = said
        if len(self._conversations) > self._most:
            self._conversations.popitem(last=False)

    def continued(self, response_id: str, prompt: ParsedPrompt) -> ParsedPrompt | None:
        """The conversation with `prompt` added to it; None for a response that is not kept."""
        before = self._conversations.get(response_id)
        if before is None:
            return None
        return ParsedPrompt(text=f"{before.text}\n{prompt.text}", tokens=before.tokens + prompt.tokens)
