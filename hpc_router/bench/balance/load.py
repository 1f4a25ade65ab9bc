"""The load: all requests with the times at which they are due, the same for every policy.

The answers in the conversations' histories are prepared texts, so that every policy gets the same bytes.
"""

import json
import random
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Final

from hpc_router.bench.balance.options import CLASSES, EXPERT, TRACE, BalanceOptions
from hpc_router.bench.config import BenchConfig
from hpc_router.bench.conversations import Conversation, ConversationStep, DomainWords, conversations
from hpc_router.bench.figures import Observation
from hpc_router.bench.prompts import BenchPrompt
from hpc_router.bench.traces import TracedText, read_trace
from hpc_router.bench.workload import ChainStep, RequestBody, Workload, request_body
from hpc_router.sim.kv_cache import BlockPool, SequenceBlocks, block_hashes
from hpc_router.sim.prompt_parsing import chat_prompt, messages
from hpc_router.sim.roofline import BLOCK

FILLING_S: Final = 5.0
"""Seconds after the window in which requests still arrive, so that the measured ones end under load."""


def bench_config(options: BalanceOptions) -> BenchConfig:
    """Returns the load generator's values, in wall seconds."""
    return BenchConfig(
        model=EXPERT,
        duration_s=options.seconds * options.slowdown,
        warmup_s=options.warmup_s * options.slowdown,
        drain_s=60.0,
        extra={"ignore_eos": True},
        seed=options.seed,
    )


def mixed_load(options: BalanceOptions, prompts: Sequence[BenchPrompt]) -> Workload:
    """Returns the requests of all loads, in the order in which their conversations are due."""
    config, until_s = bench_config(options), options.warmup_s + options.seconds + FILLING_S
    due: list[tuple[float, Conversation]] = []
    for name, one in CLASSES.items():
        if name not in options.loads:
            continue
        arrivals = list(_arrivals(options.rates[name], until_s, seed=f"{options.seed}:{name}"))
        made = conversations(
            {name: one},
            prompts,
            count=len(arrivals),
            shared=str(options.seed),
            own=f"{options.seed}:{name}",
            prepared=True,
        )
        due += zip(arrivals, made, strict=True)
    if options.trace is not None and TRACE in options.loads:
        due += _traced(options.trace, options, prompts, until_s)
    due.sort(key=lambda one: one[0])
    bodies: list[RequestBody] = []
    chains: list[ChainStep] = []
    for _, talk in due:
        for step in talk.steps:
            last = step is talk.steps[-1]
            chains.append(ChainStep(len(bodies), 0, step.pause_s * options.slowdown, last=last))
            body = request_body(config, step.messages, max_tokens=step.max_tokens)
            encoded = json.dumps(body, separators=(",", ":")).encode()
            bodies.append(RequestBody(encoded, talk.domain, talk.load_class, step.turn))
    arrivals_s = [at_s * options.slowdown for at_s, _ in due]
    return Workload(bodies, (), (), config.connections, arrivals_s=arrivals_s, chains=chains)


def _arrivals(rate: float, until_s: float, *, seed: str) -> Iterator[float]:
    source = random.Random(f"{seed}:arrivals")
    for at_s in accumulate(source.expovariate(rate) for _ in range(int(until_s * rate * 2) + 100)):
        if at_s >= until_s:
            return
        yield at_s


def _traced(
    path: Path, options: BalanceOptions, prompts: Sequence[BenchPrompt], until_s: float
) -> Iterator[tuple[float, Conversation]]:
    text = TracedText(DomainWords(prompts).all, seed=str(options.seed), block_words=options.trace_block)
    for one in read_trace(path):
        at_s = one.at_s / options.trace_speed
        if at_s >= until_s:
            return
        message = {"role": "user", "content": text.prompt(one)}
        yield at_s, Conversation(TRACE, None, [ConversationStep([message], text.output_tokens(one), 0.0, 1, 0)])


def upper_bound(work: Workload, seen: Sequence[Observation], *, blocks: int) -> int:
    """Returns how many prompt tokens of the measured requests one cache of `blocks` blocks finds, if it gets the
    requests in the order in which they began, and has each prompt and answer at once."""
    pool, cached = BlockPool(blocks), 0
    for one in sorted(seen, key=lambda o: o.started_s):
        if one.question is None:
            continue
        tokens = prompt_tokens(work.bodies[one.question].body)
        sequence = SequenceBlocks(pool, block_hashes(tokens, block_size=BLOCK, seed=None))
        found = sequence.begin(len(tokens), sequence.find(len(tokens)))
        sequence.grow(len(tokens))
        sequence.release()
        if one.part == "measured" and one.error is None:
            cached += found
    return cached


def prompt_tokens(body: bytes) -> list[str]:
    """Returns the prompt's tokens as the simulated engine counts them."""
    return (chat_prompt(messages(json.loads(body)["messages"])).token_text or "").split()
