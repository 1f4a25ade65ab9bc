"""Continuous batching, step by step: who computes how many tokens next. Pure; knows neither time nor requests.

As vLLM schedules: every sequence that has its prompt gives one token per step; what the step's budget of tokens leaves
goes to prompts, cut where it ends (Orca, OSDI 2022; chunked prefill: Sarathi-Serve, arXiv 2403.02310); first come,
first served. Blocks of the KV cache are taken as contexts grow; when none is free, the newest gives its own back and
computes again later (preemption by recomputation, arXiv 2309.06180).
"""

from collections import deque
from dataclasses import dataclass, field

from hpc_router.sim.roofline import BLOCK, Piece


@dataclass(slots=True, eq=False)
class Sequence:
    """`computed`: tokens in the KV cache; `produced`: tokens of the answer."""

    prompt: int
    computed: int = 0
    produced: int = 0
    blocks: int = 0
    runs: bool = False

    @property
    def wanted(self) -> int:
        """Tokens that must be in the cache before the next token of the answer."""
        return self.prompt + self.produced


@dataclass(slots=True)
class Batch:
    kv_tokens: int
    max_seqs: int
    max_tokens: int
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    used_blocks: int = 0
    preempted: int = 0
    _step: list[tuple[Sequence, int]] = field(default_factory=list)

    @property
    def blocks(self) -> int:
        return self.kv_tokens // BLOCK

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    def add(self, prompt_tokens: int) -> Sequence:
        """A prompt longer than the whole cache is cut to it, so that it can ever run."""
        one = Sequence(max(1, min(prompt_tokens, self.kv_tokens - BLOCK)))
        self.waiting.append(one)
        return one

    def remove(self, one: Sequence) -> None:
        """It has all it wanted, or its client has left."""
        if one.runs:
            self.running.remove(one)
            self._free(one)
        elif one in self.waiting:
            self.waiting.remove(one)

    def plan(self) -> list[Piece]:
        """The next step; empty when nobody wants anything."""
        self._step = []
        budget = self.max_tokens
        for one in list(self.running):
            new = min(one.wanted - one.computed, budget) if one.runs else 0
            if new > 0 and self._has_room(one, new):
                self._step.append((one, new))
                budget -= new
        while self.waiting and budget > 0 and len(self.running) < self.max_seqs:
            one = self.waiting[0]
            new = min(one.wanted, budget)
            if not self._fits(one, new):
                break
            self.waiting.popleft()
            self.running.append(one)
            one.runs = True
            self._take(one, new)
            self._step.append((one, new))
            budget -= new
        self._step = [(one, new) for one, new in self._step if one.runs]
        return [Piece(new, one.computed) for one, new in self._step]

    def finish(self) -> list[Sequence]:
        """The planned step is over: who has a token more."""
        given = []
        for one, new in self._step:
            if not one.runs:
                continue  # it left meanwhile
            one.computed += new
            if one.computed == one.wanted:
                one.produced += 1
                given.append(one)
        self._step = []
        return given

    def _has_room(self, one: Sequence, new: int) -> bool:
        """Room for a running one, if need be by sending the newest others back to wait."""
        while not self._fits(one, new):
            newest = self.running[-1]
            self._preempt(newest)
            if newest is one:
                return False
        self._take(one, new)
        return True

    def _preempt(self, one: Sequence) -> None:
        self.running.remove(one)
        self._free(one)
        one.computed = 0
        self.waiting.appendleft(one)
        self.preempted += 1

    def _fits(self, one: Sequence, new: int) -> bool:
        return self.used_blocks + self._more(one, new) <= self.blocks

    def _take(self, one: Sequence, new: int) -> None:
        more = self._more(one, new)
        one.blocks += more
        self.used_blocks += more

    def _free(self, one: Sequence) -> None:
        self.used_blocks -= one.blocks
        one.blocks = 0
        one.runs = False

    def _more(self, one: Sequence, new: int) -> int:
        return max(0, -(-(one.computed + new) // BLOCK) - one.blocks)
