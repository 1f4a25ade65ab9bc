"""The batch of `continuous_batching`, kept as counts, so that a step costs the same for any number of sequences.

A prediction over hours needs no list of what each sequence computes. This module keeps the sequences that generate as
their number, the sum of their contexts, and how many of them need another block of the KV cache in which step. It
follows the rules of `continuous_batching.Batch` step by step, without prefix cache and priorities; a test compares the
two. Only where the cache is full does a step look at every sequence. No I/O, no time.
"""

from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush

from hpc_router.sim.roofline import StepWork


@dataclass(slots=True, eq=False)
class CountedSequence:
    """A request in the batch. `output`: number of tokens of its whole answer. `computed`: its tokens in the KV cache,
    while it has not begun to generate. `produced`: tokens of the answer at its last (re)start. `offset`: while it
    generates, the number of finished steps minus its tokens in the cache. `ends_at`: number of finished steps at which
    it has its last token."""

    prompt: int
    output: int
    number: int = 0
    computed: int = 0
    produced: int = 0
    offset: int = 0
    ends_at: int = 0

    @property
    def needed(self) -> int:
        """Returns the number of tokens that must be in the cache before it generates."""
        return self.prompt + self.produced


def _number(one: CountedSequence) -> int:
    return one.number


@dataclass(slots=True)
class CountedBatch:
    """The sequences of one engine. `blocks`: blocks of its KV cache, of `block_size` tokens each."""

    blocks: int
    block_size: int
    max_seqs: int
    max_tokens: int
    free: int = field(init=False)
    waiting: deque[CountedSequence] = field(default_factory=deque)
    preempted: int = 0
    _running: dict[CountedSequence, None] = field(default_factory=dict)  # in the order of admission
    _finished_steps: int = 0
    _generating: int = 0  # number of sequences that generate
    _context: int = 0  # tokens of these in the cache
    _full_blocks: list[int] = field(init=False)  # how many of these have an `offset` with each rest of `block_size`
    _ends: list[tuple[int, int, CountedSequence]] = field(default_factory=list)  # heap of (ends_at, number, sequence)
    _prefill: CountedSequence | None = None  # the one sequence whose prompt is computed in part
    _chunks: list[tuple[CountedSequence, int]] = field(default_factory=list)  # prompt tokens of the planned step
    _arrived: int = 0

    def __post_init__(self) -> None:
        self.free = self.blocks
        self._full_blocks = [0] * self.block_size
        self.max_seqs = min(self.max_seqs, self.max_tokens)

    @property
    def running(self) -> int:
        return len(self._running)

    def add(self, prompt: int, output: int) -> CountedSequence:
        """Adds a sequence. If prompt and answer are larger than the whole cache, they are cut, so that the sequence can
        end."""
        self._arrived += 1
        most = (self.blocks - 1) * self.block_size
        prompt = max(1, min(prompt, most))
        one = CountedSequence(prompt, min(output, most - prompt + self.block_size), self._arrived)
        self.waiting.append(one)
        return one

    def plan(self) -> StepWork | None:
        """Plans the next step and returns its work; None if no sequence can compute anything."""
        self._chunks = []
        chunk = 0
        if self._prefill is not None:
            chunk = min(self._prefill.needed - self._prefill.computed, self.max_tokens - self._generating)
        growth = self._full_blocks[self._finished_steps % self.block_size]
        if self._prefill is not None:
            growth += self._more(self._prefill.computed, chunk)
        if growth > self.free:
            self._make_room(chunk)
        else:
            self.free -= growth
            if self._prefill is not None:
                self._chunks.append((self._prefill, chunk))
        budget = self.max_tokens - self._generating - sum(new for _, new in self._chunks)
        self._admit(budget)
        if not self._generating and not self._chunks:
            return None
        new = self._generating + sum(new for _, new in self._chunks)
        context = self._context + sum(one.computed for one, _ in self._chunks)
        pairs = self._context + self._generating / 2
        pairs += sum(new * (one.computed + new / 2) for one, new in self._chunks)
        return StepWork(self._generating + len(self._chunks), new, context, pairs)

    def equal_steps(self) -> int:
        """Returns how many steps, with the planned one, have the same sequences, each of which computes one token: at
        least 1. A sequence that is added meanwhile ends this, unless the batch is full."""
        if self._chunks:
            return 1
        count = self._ends[0][0] - self._finished_steps
        within = self.free // self._generating * self.block_size  # each takes one block in so many steps
        return max(1, min(count, within))

    def later_work(self, steps: int) -> StepWork:
        """Returns the work of the step that follows `steps` equal steps, from the planned one on."""
        context = self._context + steps * self._generating
        return StepWork(self._generating, self._generating, context, context + self._generating / 2)

    def finish(self, steps: int = 1) -> tuple[list[CountedSequence], list[CountedSequence]]:
        """Ends the planned step, or the first `steps` of the equal steps. Returns the sequences that have produced
        their first token, and those that have produced their last one, which are removed."""
        first, last = [], []
        at = self._finished_steps
        self.free -= sum(self._full_blocks[(at + n) % self.block_size] for n in range(1, steps))
        self._finished_steps = at + steps
        self._context += steps * self._generating
        self._prefill = None
        for one, new in self._chunks:
            one.computed += new
            if one.computed < one.needed:
                self._prefill = one
                continue
            one.produced += 1
            if one.produced == 1:
                first.append(one)
            if one.produced >= one.output:
                last.append(one)
                del self._running[one]
                self.free += self._blocks_of(one.computed)
                continue
            self._generate(one)
        while self._ends and self._ends[0][0] <= self._finished_steps:
            ends_at, _, one = heappop(self._ends)
            if one.ends_at == ends_at and one in self._running:
                last.append(one)
                self._leave(one, self._finished_steps - one.offset)
        self._drop_old_ends()
        self._chunks = []
        return first, last

    def _generate(self, one: CountedSequence) -> None:
        """Counts a sequence whose prompt has been computed among those that generate."""
        one.offset = self._finished_steps - one.computed
        one.ends_at = self._finished_steps + one.output - one.produced
        self._generating += 1
        self._context += one.computed
        self._full_blocks[one.offset % self.block_size] += 1
        heappush(self._ends, (one.ends_at, one.number, one))

    def _leave(self, one: CountedSequence, tokens: int, *, blocks_for: int | None = None) -> None:
        """Removes a generating sequence with `tokens` tokens in the cache, and frees its blocks. `blocks_for`: number
        of tokens for which it has blocks, if that is not `tokens`."""
        del self._running[one]
        self._generating -= 1
        self._context -= tokens
        self._full_blocks[one.offset % self.block_size] -= 1
        self.free += self._blocks_of(tokens if blocks_for is None else blocks_for)
        one.ends_at = 0

    def _drop_old_ends(self) -> None:
        """Removes the heap's first entries that belong to preempted sequences."""
        while self._ends and self._ends[0][0] != self._ends[0][2].ends_at:
            heappop(self._ends)

    def _admit(self, budget: int) -> None:
        waiting = self.waiting
        while waiting and budget > 0 and len(self._running) < self.max_seqs:
            one = waiting[0]
            if self._blocks_of(min(one.needed, self.blocks * self.block_size)) > self.free:
                return
            waiting.popleft()
            self._running[one] = None
            new = min(one.needed, budget)
            self.free -= self._blocks_of(new)
            self._chunks.append((one, new))
            budget -= new

    def _make_room(self, chunk: int) -> None:
        """Takes the blocks of the planned step, one sequence after the other in the order of admission. While too few
        are free, preempts the newest sequence. `chunk`: prompt tokens of the sequence in `_prefill`."""
        grown: set[CountedSequence] = set()
        for one in tuple(self._running):
            if one not in self._running:
                continue
            prefills = one is self._prefill
            tokens, new = (one.computed, chunk) if prefills else (self._finished_steps - one.offset, 1)
            need = self._more(tokens, new)
            while need > self.free:
                last = max(self._running, key=_number)
                self._preempt(last, grown=last in grown)
                if last is one:
                    break
            else:
                self.free -= need
                grown.add(one)
                if prefills:
                    self._chunks.append((one, new))

    def _preempt(self, one: CountedSequence, *, grown: bool) -> None:
        """Sends a running sequence back to those that wait. `grown`: whether it has the blocks of the planned step."""
        if one is self._prefill:
            assert not grown, "it takes its blocks last"
            del self._running[one]
            self.free += self._blocks_of(one.computed)
            self._prefill = None
        else:
            tokens = self._finished_steps - one.offset
            one.produced = tokens - one.prompt + 1
            self._leave(one, tokens, blocks_for=tokens + grown)
        one.computed = 0
        insort(self.waiting, one, key=_number)
        self.preempted += 1
        self._drop_old_ends()

    def _blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _more(self, tokens: int, new: int) -> int:
        """Returns how many blocks a sequence with `tokens` tokens needs for `new` more tokens."""
        return self._blocks_of(tokens + new) - self._blocks_of(tokens)
