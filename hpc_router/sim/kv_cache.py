"""The blocks of the KV cache, and the prefixes that can be found in them. No I/O, no time, no requests.

Follows vLLM 0.32 (vllm/v1/core/block_pool.py, kv_cache_manager.py). A block is found by a hash of its tokens and of all
tokens before them; only full blocks can be found. This is possible as soon as the computation of the block is planned,
so running requests share blocks. The last token of a prompt is always computed; if it ends a full block, the whole
block is computed, even if it is cached. Blocks without users stay in the cache until their space is needed. The least
recently used one is evicted first; within one prefix, the last block.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from hpc_router.sim.roofline import BLOCK


@dataclass(slots=True, eq=False)
class Block:
    """A block of the cache. `hash`: None until it is full. `users`: number of sequences that use it."""

    hash: int | None = None
    users: int = 0


@dataclass(slots=True)
class BlockPool:
    """All blocks of one engine. `queries`, `hits`: number of tokens that were looked up, and that were found."""

    total: int
    block_size: int = BLOCK
    caching: bool = True
    queries: int = 0
    hits: int = 0
    _empty: int = field(init=False)
    _evictable: OrderedDict[Block, None] = field(default_factory=OrderedDict)  # without users, next to be evicted first
    _by_hash: dict[int, list[Block]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._empty = self.total

    @property
    def tokens(self) -> int:
        return self.total * self.block_size

    @property
    def free(self) -> int:
        """Returns the number of blocks that can be taken."""
        return self._empty + len(self._evictable)

    @property
    def used(self) -> int:
        """Returns the number of blocks with users."""
        return self.total - self.free

    def find(self, hashes: Sequence[int]) -> list[Block]:
        """Returns the blocks of the longest cached prefix of `hashes`. Does not change the pool."""
        found = []
        for value in hashes:
            blocks = self._by_hash.get(value)
            if blocks is None:
                break
            found.append(blocks[0])
        return found

    def share(self, blocks: Sequence[Block]) -> None:
        """Adds one user to each of the blocks that `find` has returned."""
        for block in blocks:
            if not block.users:
                del self._evictable[block]
            block.users += 1

    def take(self, count: int) -> list[Block]:
        """Returns `count` (at most `free`) empty blocks with one user each. Evicts cached blocks if there are too few
        others."""
        unused = min(count, self._empty)
        self._empty -= unused
        for _ in range(count - unused):
            block, _ = self._evictable.popitem(last=False)
            self._forget(block)
        return [Block(users=1) for _ in range(count)]

    def keep(self, block: Block, value: int) -> None:
        """Caches a full block under its hash `value`. If several blocks have it, `find` returns the first one."""
        block.hash = value
        self._by_hash.setdefault(value, []).append(block)

    def release(self, blocks: Sequence[Block]) -> None:
        """Takes one user from each of a sequence's blocks, which are given in the order of their tokens."""
        for block in reversed(blocks):
            block.users -= 1
            if block.users:
                continue
            if block.hash is None:
                self._empty += 1
            else:
                self._evictable[block] = None

    def _forget(self, block: Block) -> None:
        assert block.hash is not None
        blocks = self._by_hash[block.hash]
        blocks.remove(block)
        if not blocks:
            del self._by_hash[block.hash]


@dataclass(slots=True, eq=False)
class SequenceBlocks:
    """The blocks of one sequence. `hashes`: the hash of each full block of its prompt and its answer; empty if its
    blocks must not be cached. `reads`: whether the sequence may use cached blocks. `cached_tokens`: prompt tokens that
    were found when the sequence was first admitted."""

    pool: BlockPool
    hashes: Sequence[int] = ()
    reads: bool = True
    cached_tokens: int = 0
    _blocks: list[Block] = field(default_factory=list)
    _kept: int = 0
    _counted: bool = False

    def find(self, tokens: int) -> list[Block]:
        """Returns the cached blocks that a sequence of `tokens` tokens can use. The block of the last token is never
        among them, because that token is always computed."""
        if not self.pool.caching or not self.reads:
            return []
        return self.pool.find(self.hashes[: (tokens - 1) // self.pool.block_size])

    def fits(self, tokens: int, found: Sequence[Block] = ()) -> bool:
        """Returns whether enough blocks are free for `tokens` tokens, of which those in `found` are cached."""
        from_free = sum(not block.users for block in found)
        return self._more(tokens) - len(found) + from_free <= self.pool.free

    def begin(self, tokens: int, found: Sequence[Block]) -> int:
        """Begins with the blocks `found`, and returns the number of their tokens. As in vLLM, only the first call adds
        to `queries` and `hits`, and not those after a preemption."""
        self.pool.share(found)
        self._blocks = list(found)
        self._kept = len(found)
        cached = len(found) * self.pool.block_size
        if not self._counted:
            self._counted, self.cached_tokens = True, cached
            if self.pool.caching and self.reads:
                self.pool.queries += tokens
                self.pool.hits += cached
        return cached

    def grow(self, tokens: int) -> None:
        """Takes blocks for `tokens` tokens in all, or as many as are free, and caches those that are full."""
        self._blocks += self.pool.take(min(max(0, self._more(tokens)), self.pool.free))
        if not self.pool.caching:
            return
        full = min(tokens // self.pool.block_size, len(self.hashes), len(self._blocks))
        for index in range(self._kept, full):
            self.pool.keep(self._blocks[index], self.hashes[index])
        self._kept = max(self._kept, full)

    def release(self) -> None:
        self.pool.release(self._blocks)
        self._blocks, self._kept = [], 0

    def _more(self, tokens: int) -> int:
        return -(-tokens // self.pool.block_size) - len(self._blocks)


def block_hashes(tokens: Sequence[str], *, block_size: int, seed: object) -> list[int]:
    """Returns the hash of each full block, which includes all tokens before it. `seed`: separates equal texts, for
    example of different adapters. The hashes are valid in this process only."""
    hashes: list[int] = []
    previous = hash(seed)
    for end in range(block_size, len(tokens) + 1, block_size):
        previous = hash((previous, *tokens[end - block_size : end]))
        hashes.append(previous)
    return hashes
