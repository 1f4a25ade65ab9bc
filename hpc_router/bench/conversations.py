"""The conversations of a load: system prompts, turns, tool turns, pauses and cancellations. Pure functions of the seed.

A request of a conversation contains all earlier messages. An earlier answer in it is either a mark, which the load
generator replaces by what the engine has answered, or a prepared text, so that every run sends the same bytes. All
texts are random words from the prompts of one domain, so different conversations share a prefix only if they share a
system prompt.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from hpc_router.bench.config import Lengths, LoadClass
from hpc_router.bench.prompts import BenchPrompt

Message = dict[str, Any]
ANSWER_MARK: Final = "\x01"
"""With four digits: the content of the response to that step of the conversation, from 0000 (`load.c`)."""
MAX_STEPS: Final = 10_000


@dataclass(frozen=True, slots=True)
class ConversationStep:
    """One request of a conversation. `pause_s`: seconds between the previous response and this request. `turn`: number,
    from 1, of the user's message that it answers. `leave_after`: number of events of the response after which the
    client cancels; 0: never."""

    messages: Sequence[Message]
    max_tokens: int
    pause_s: float
    turn: int
    leave_after: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation. `load_class`: its class of the load. `domain`: the domain of its words; None if not known."""

    load_class: str
    domain: str | None
    steps: Sequence[ConversationStep]


def draw_length(source: random.Random, lengths: Lengths) -> int:
    """Draws a random length, at least 1."""
    if lengths.kind == "fixed":
        return max(1, round(lengths.mean))
    if lengths.kind == "uniform":
        return source.randint(lengths.low, lengths.high)
    # A log-normal distribution with mean m has mu = ln m - sigma^2/2.
    drawn = lengths.mean * source.lognormvariate(-lengths.sigma * lengths.sigma / 2, lengths.sigma)
    return min(lengths.high, max(lengths.low, round(drawn)))


class DomainWords:
    """The words that occur in the prompts, grouped by the domain of the prompt."""

    def __init__(self, prompts: Sequence[BenchPrompt]) -> None:
        words: dict[str | None, dict[str, None]] = {}
        for prompt in prompts:
            words.setdefault(prompt.domain, {}).update(dict.fromkeys(filter(str.isprintable, prompt.text.split())))
        self._words = {domain: list(found) for domain, found in words.items()}
        self.all = list(dict.fromkeys(word for found in self._words.values() for word in found))

    @property
    def domains(self) -> list[str | None]:
        return list(self._words)

    def text(self, source: random.Random, count: int, domain: str | None) -> str:
        """Returns `count` random words from the prompts of `domain`; None stands for the prompts without a domain."""
        return " ".join(source.choices(self._words[domain], k=count))


def conversations(
    classes: Mapping[str, LoadClass],
    prompts: Sequence[BenchPrompt],
    *,
    count: int,
    shared: str,
    own: str,
    prepared: bool,
) -> Iterator[Conversation]:
    """Yields `count` conversations. `shared`: seed of the system prompts. `own`: seed of everything else. `prepared`:
    whether earlier answers in a request are prepared texts, instead of marks for the engine's answers."""
    vocabulary, names = DomainWords(prompts), list(classes)
    weights = [one.weight for one in classes.values()]
    source = random.Random(f"{own}:conversations")
    for _ in range(count):
        name = source.choices(names, weights)[0]
        yield _conversation(name, classes[name], vocabulary, source, shared=f"{shared}:{name}", prepared=prepared)


def _conversation(
    name: str, one: LoadClass, vocabulary: DomainWords, source: random.Random, *, shared: str, prepared: bool
) -> Conversation:
    domain = source.choice(vocabulary.domains)
    history: list[Message] = []
    if one.system_words is not None:
        ranks = range(1, one.system_prompts + 1)
        family = source.choices(ranks, [rank**-one.zipf for rank in ranks])[0]
        own = random.Random(f"{shared}:system:{family}")
        text = vocabulary.text(own, draw_length(own, one.system_words), own.choice(vocabulary.domains))
        history.append({"role": "system", "content": text})
    steps: list[ConversationStep] = []

    def say(pause_s: float, turn: int, call: int | None) -> None:
        tokens = draw_length(source, one.output_tokens)
        leave_after = source.randint(1, tokens) if source.random() < one.cancel_share else 0
        steps.append(ConversationStep(tuple(history), tokens, pause_s, turn, leave_after))
        text = vocabulary.text(source, tokens, domain)
        if call is not None:
            history.append(_tool_call(call, text))
        else:
            answer = text if prepared else f"{ANSWER_MARK}{len(steps) - 1:04}"
            history.append({"role": "assistant", "content": answer})

    for turn in range(1, draw_length(source, one.turns) + 1):
        history.append(
            {"role": "user", "content": vocabulary.text(source, draw_length(source, one.input_words), domain)}
        )
        if len(steps) >= MAX_STEPS // 2:
            break
        tools = 0 if one.tool_turns is None else draw_length(source, one.tool_turns)
        pause_s = _pause(source, one.think_s) if turn > 1 else 0.0
        for tool in range(tools):
            call = len(history)
            say(pause_s if tool == 0 else _pause(source, one.tool_s), turn, call)
            text = vocabulary.text(source, draw_length(source, one.tool_words), domain)
            history.append({"role": "tool", "tool_call_id": f"call_{call}", "content": text})
        say(_pause(source, one.tool_s) if tools else pause_s, turn, None)
    return Conversation(name, domain, steps)


def _tool_call(number: int, text: str) -> Message:
    function = {"name": "run", "arguments": f'{{"text": "{text}"}}'.replace("\\", "")}
    call = {"id": f"call_{number}", "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _pause(source: random.Random, mean_s: float) -> float:
    return source.expovariate(1 / mean_s) if mean_s else 0.0
