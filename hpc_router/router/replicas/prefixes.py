"""Which replicas have served which beginnings of prompts, by hashes only. No I/O.

An engine that has computed a prompt keeps it in its prefix cache, and later computes only what follows. So a worker
remembers, for the beginnings of the prompts that it has sent, to which replicas it sent them. A beginning is the hash
of the prompt's bytes up to one of the `ENDS`. The prompt is read as it is in the request body, because clients that
continue a conversation send the earlier messages as the same bytes again.

The memory is bounded and forgets: it has two generations, and when the young one is full or old enough, it takes the
place of the old one. What is used again moves to the young one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple
from zlib import crc32

import orjson

ENDS: Final = (
    *(128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768),
    *(49152, 65536, 98304, 131072, 196608, 262144),
)
"""Lengths in bytes of the hashed beginnings of a prompt."""
SAMPLED_BYTES: Final = 8192
"""Length in bytes from which on a beginning is told apart only by its last `SAMPLE_BYTES` bytes, to save time."""
SAMPLE_BYTES: Final = 1024
MAX_PREFIXES: Final = 2**15
"""Maximum number of beginnings in one generation of a worker's memory, per expert."""
LIFE_S: Final = 600.0
"""Age in seconds at which a generation is replaced, if it did not become full before."""
SHARED: Final = 1
"""Bit of an entry: prompts continue this beginning in several ways, as they do a system prompt."""
CONTINUED: Final = 2
"""Bit of an entry: a prompt has continued this beginning."""
FIRST_BIT: Final = 4
"""The lowest bit of an entry that stands for a replica."""
_new_tuple: Final = tuple.__new__  # written in C, while a named tuple's own constructor is Python code


class PromptPrefix(NamedTuple):
    """The beginnings of one prompt. `hashes`: the hash of each beginning; `ends`: the length of each in bytes. `total`:
    length of the prompt in bytes. `key`: the key of the client's session; None if the request names none."""

    hashes: Sequence[int]
    ends: Sequence[int]
    total: int
    key: int | None


NO_PREFIX: Final = PromptPrefix((), (), 0, None)


def prompt_prefix(raw: bytes, fields: Mapping[str, Any], session: bytes | None) -> PromptPrefix:
    """Returns the beginnings of the prompt in the request body `raw`, which was decoded to `fields`. `session`: the
    session that the request names, or None."""
    if "messages" in fields:
        name, end = b'"messages"', raw.rfind(b"}]") + 1 or len(raw)
    else:
        name, end = b'"input"' if "input" in fields else b'"prompt"', len(raw)
    start = raw.find(name) + len(name)
    if "tools" in fields or "system" in fields:  # long values that may follow the messages
        end = min(end, _next_key(raw, fields, name))
    hashes: list[int] = []
    value, before = 0, 0
    ends: Sequence[int] = ENDS
    if "system" in fields or "instructions" in fields:  # come before the messages, in /v1/messages and /v1/responses
        system = orjson.dumps(fields.get("system", fields.get("instructions")))
        before = len(system)
        hashes.append(value := crc32(system))
        ends = (before, *[before + one for one in ENDS])
    at, size = start, end - start
    for length in ENDS:
        if length > size:
            break
        to = start + length
        value = crc32(raw[at if length <= SAMPLED_BYTES else to - SAMPLE_BYTES : to], value)
        hashes.append(value)
        at = to
    key = None if session is None else crc32(session)
    return _new_tuple(PromptPrefix, (hashes, ends, max(0, size) + before, key))


def _next_key(raw: bytes, fields: Mapping[str, Any], name: bytes) -> int:
    """Returns the position in `raw` of the key after the key `name`, or its length if there is none. A decoded object
    has its keys in their order."""
    keys = list(fields)
    after = keys.index(name[1:-1].decode()) + 1 if name[1:-1].decode() in fields else len(keys)
    return raw.rfind(b'"%b"' % keys[after].encode()) % len(raw) if after < len(keys) else len(raw)


@dataclass(slots=True)
class PrefixMemory:
    """The beginnings of prompts that this worker has sent to the replicas of one expert. An entry is a set of bits:
    `SHARED`, `CONTINUED`, and the `prefix_bit` of each replica that has served a prompt with this beginning."""

    _young: dict[int, int] = field(default_factory=dict)
    _old: dict[int, int] = field(default_factory=dict)
    _since: float = 0.0

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def find(self, hashes: Sequence[int]) -> list[int]:
        """Returns the entries of the longest known beginning, from the shortest beginning on."""
        young, old = self._young, self._old
        found: list[int] = []
        for value in hashes:
            entry = young.get(value)
            if entry is None:
                entry = old.get(value)
                if entry is None:
                    break
            found.append(entry)
        return found

    def add(self, hashes: Sequence[int], bit: int, now: float) -> None:
        """Records that the replica with this bit serves a prompt with these beginnings."""
        young, old = self._young, self._old
        if len(young) >= MAX_PREFIXES or now - self._since > LIFE_S:
            self._old, self._young, self._since = young, {}, now
            young, old = self._young, self._old
        start = len(hashes)
        while start and not young.get(hashes[start - 1], 0) & bit:  # the shorter ones are then known as well
            start -= 1
        for at in range(start, len(hashes)):
            value = hashes[at]
            entry = young.get(value)
            if entry is None:
                entry = old.get(value)
                if entry is None:  # so the longer ones are not known either
                    start = at
                    break
            young[value] = entry | bit
        else:
            return
        if start:
            before = young[hashes[start - 1]]
            young[hashes[start - 1]] = before | (SHARED if before & CONTINUED else CONTINUED)
        for value in hashes[start:]:
            young[value] = bit | CONTINUED
        young[hashes[-1]] = bit

    def forget(self, bit: int) -> None:
        """Removes a replica from all entries."""
        for generation in (self._young, self._old):
            for value, entry in generation.items():
                if entry & bit:
                    generation[value] = entry ^ bit
