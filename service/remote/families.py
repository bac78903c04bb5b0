"""Near-duplicates of all gateways' queries, in Redis: one table of at most some 200,000 hashes."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from service.remote.shared import Shared, Unshared
from service.remote.store import FAMILIES, FAMILIES_BEFORE, FAMILIES_SALT
from service.watch.families import CAPACITY, SALT_BITS, MemoryFamilies
from service.watch.fingerprints import Fingerprint

AT_ONCE = 8
"""Fingerprints in one go: 3 ms of a Redis that requests wait for too."""
KEPT_S = 3600
"""How long a table outlives the last image that was compared."""

NOTE = """
-- KEYS: table, the one before it. ARGV: capacity, seconds to keep them, names that make two images alike, exact hash, a
-- new family's name, then the image's names. In a table each name has its family, and each family how many
-- near-duplicates its first has had, and the exact hash of the last.
if redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[1]) then redis.call('RENAME', KEYS[1], KEYS[2]) end
local names = {unpack(ARGV, 6)}
local here, before = redis.call('HMGET', KEYS[1], unpack(names)), redis.call('HMGET', KEYS[2], unpack(names))
local counts, family, most = {}, nil, 0
for index = 1, #names do
    local known = here[index] or before[index]
    if known then
        counts[known] = (counts[known] or 0) + 1
        if counts[known] > most then family, most = known, counts[known] end
    end
end
local likenesses, answer = 0, 0
if family and most >= tonumber(ARGV[3]) then
    local said = redis.call('HGET', KEYS[1], family) or redis.call('HGET', KEYS[2], family) or ''
    local count, last = said:match('^(%d+) (%d+)$')
    likenesses = tonumber(count) or 0
    if last ~= ARGV[4] then
        likenesses = likenesses + 1
        answer = likenesses
    end
else
    family = ARGV[5]
end
local fields = {family, likenesses .. ' ' .. ARGV[4]}
for _, name in ipairs(names) do
    fields[#fields + 1], fields[#fields + 2] = name, family
end
redis.call('HSET', KEYS[1], unpack(fields))
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('EXPIRE', KEYS[2], ARGV[2])
return answer
"""


class SharedFamilies:
    """As `Families` says, for all gateways together; while Redis is away, of this one's images alone."""

    def __init__(self, shared: Shared, capacity: int = CAPACITY) -> None:
        self._shared = shared
        self._capacity = capacity
        self._alone = MemoryFamilies(capacity)
        self._script = shared.redis.register_script(NOTE)
        self._salt: int | None = None
        """None while Redis is away."""

    async def salt(self) -> int:
        """As `Families` says: the one that the first gateway has left in Redis."""
        try:
            self._salt = await self._shared.ask("similar", self._agree, beside=True)
        except Unshared:
            self._salt = None
        return await self._alone.salt() if self._salt is None else self._salt

    async def note(self, fingerprints: Sequence[Fingerprint]) -> list[int]:
        """As `Families` says. Those that Redis does not answer any more count as no near-duplicates."""
        if self._salt is None:
            return await self._alone.note(fingerprints)
        likenesses = list[int]()
        for start in range(0, len(fingerprints), AT_ONCE):
            likenesses += await self._note_some(fingerprints[start : start + AT_ONCE])
        return likenesses

    async def _note_some(self, fingerprints: Sequence[Fingerprint]) -> list[int]:
        try:
            return await self._shared.ask("similar", lambda: self._compare(fingerprints), beside=True)
        except Unshared:
            return [0] * len(fingerprints)

    async def _agree(self) -> int:
        async with self._shared.redis.pipeline(transaction=False) as pipeline:
            pipeline.set(FAMILIES_SALT, secrets.randbits(SALT_BITS), nx=True)
            pipeline.get(FAMILIES_SALT)
            _, salt = await pipeline.execute()
        try:
            agreed: int = int(salt) % 2**SALT_BITS
        except ValueError:  # none of ours has put it there
            self._shared.count_malformed()
            raise Unshared from None
        return agreed

    async def _compare(self, fingerprints: Sequence[Fingerprint]) -> list[int]:
        async with self._shared.redis.pipeline(transaction=False) as pipeline:
            for one in fingerprints:
                new = f"family {secrets.token_hex(8)}"
                arguments: list[Any] = [self._capacity, KEPT_S, one.shared, one.exact, new, *one.names]
                await self._script(keys=[FAMILIES, FAMILIES_BEFORE], args=arguments, client=pipeline)
            found = await pipeline.execute()
        return [int(likenesses) for likenesses in found]
