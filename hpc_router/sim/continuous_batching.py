"""Continuous batching: decides step by step which sequence computes how many tokens. No I/O, no time, no requests.

As in vLLM's scheduler, every sequence whose prompt is computed produces one token per step. The rest of the step's
token budget goes to prompts, first come, first served, and cut where the budget ends (Orca, OSDI 2022; chunked prefill:
Sarathi-Serve, arXiv 2403.02310). Sequences take blocks of the KV cache as they grow. If none is free, the newest
sequence gives back its blocks and is computed again later (preemption by recomputation, arXiv 2309.06180). With
`by_priority`, as in vLLM's policy of that name, sequences wait in the order of their priority, lowest value first, and
the one with the highest value is preempted. A waiting sequence preempts none that runs.
"""

from bisect import insort
from collections import deque
from collections.abc import Sequence as Values
from dataclasses import dataclass, field

from hpc_router.sim.kv_cache import BlockPool, SequenceBlocks
from hpc_router.sim.roofline import SequenceStep


@dataclass(slots=True, eq=False)
class Sequence:
    """A request in the batch. `computed`: tokens in the KV cache. `produced`: tokens of the answer. `number`:
    its position in the order of arrival."""

    prompt: int
    blocks: SequenceBlocks
    priority: int = 0
    number: int = 0
    computed: int = 0
    produced: int = 0
    running: bool = False

    @property
    def needed(self) -> int:
        """Returns the number of tokens that must be in the cache to produce the next token of the answer."""
        return self.prompt + self.produced


def _order(one: Sequence) -> tuple[int, int]:
    return one.priority, one.number


@dataclass(slots=True)
class Batch:
    """The sequences of one engine, and the blocks of its KV cache."""

    pool: BlockPool
    max_seqs: int
    max_tokens: int
    by_priority: bool = False
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    preempted: int = 0
    _arrived: int = 0
    _step: list[tuple[Sequence, int]] = field(default_factory=list)

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    def add(self, prompt_tokens: int, hashes: Values[int] = (), *, reads: bool = True, priority: int = 0) -> Sequence:
        """Adds a sequence with a prompt of `prompt_tokens` tokens. A prompt larger than the whole cache is cut, so that
        the sequence can run. `hashes`, `reads`: see `SequenceBlocks`."""
        most = self.pool.tokens - self.pool.block_size
        self._arrived += 1
        blocks = SequenceBlocks(self.pool, hashes, reads)
        one = Sequence(max(1, min(prompt_tokens, most)), blocks, priority if self.by_priority else 0, self._arrived)
        insort(self.waiting, one, key=_order)
        return one

    def remove(self, one: Sequence) -> None:
        """Removes a sequence from the batch, because it is complete or its client has disconnected."""
        if one.running:
            self.running.remove(one)
            self._free(one)
        elif one in self.waiting:
            self.waiting.remove(one)

    def plan(self) -> list[SequenceStep]:
        """Plans the next step. Returns the work of each sequence in it; empty if no sequence can compute anything."""
        self._step = []
        budget = self.max_tokens
        for one in list(self.running):
            new = min(one.needed - one.computed, budget) if one.running else 0
            if new > 0 and self._make_room(one, new):
                self._step.append((one, new))
                budget -= new
        while self.waiting and budget > 0 and len(self.running) < self.max_seqs:
            one = self.waiting[0]
            found = one.blocks.find(one.needed)
            if not one.blocks.fits(min(one.needed, self.pool.tokens), found):
                break
            self.waiting.popleft()
            self.running.append(one)
            one.running = True
            one.computed = one.blocks.begin(one.needed, found)
            new = min(one.needed - one.computed, budget)
            one.blocks.grow(one.computed + new)
            self._step.append((one, new))
            budget -= new
        self._step = [(one, new) for one, new in self._step if one.running]
        return [SequenceStep(new, one.computed) for one, new in self._step]

    def finish(self) -> list[Sequence]:
        """Ends the planned step. Returns the sequences that produced a token."""
        produced = []
        for one, new in self._step:
            if not one.running:
                continue  # the sequence was removed after the plan
            one.computed += new
            if one.computed == one.needed:
                one.produced += 1
                produced.append(one)
        self._step = []
        return produced

    def _make_room(self, one: Sequence, new: int) -> bool:
        """Takes blocks for `new` more tokens of the running sequence `one`. While too few blocks are free, preempts the
        last sequence. Returns False if `one` itself was preempted."""
        while not one.blocks.fits(one.computed + new):
            last = max(self.running, key=_order)
            self._preempt(last)
            if last is one:
                return False
        one.blocks.grow(one.computed + new)
        return True

    def _preempt(self, one: Sequence) -> None:
        self.running.remove(one)
        self._free(one)
        one.computed = 0
        insort(self.waiting, one, key=_order)
        self.preempted += 1

    def _free(self, one: Sequence) -> None:
        one.blocks.release()
        one.running = False
