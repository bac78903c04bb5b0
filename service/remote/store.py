"""Everything Redis: the names of keys, then one function for each use of the queue. `shared.py` holds the other uses,
except for jobs, whose keys and functions are in `jobs/store.py`.

| key | type | what |
|---|---|---|
| `clarifier:work:DIGEST` | stream, group `workers` | images for one bundle, until they are answered or unwanted |
| `clarifier:answers:GATEWAY` | stream | outcomes for the gateway that holds the requests |
| `clarifier:gone` | channel | entries that nobody waits for any more |
| `clarifier:gateway:GATEWAY` | string, expires | that gateway lives |
| `clarifier:added:GATEWAY` | hash, expires | what became of that gateway's last hand-over, request by request |
| `clarifier:workers`, `clarifier:worker:WORKER` | set; string, expires | what each living worker serves |
| `clarifier:bundle:DIGEST` | string, expires | a bundle's manifest and report |
| `clarifier:parked` | stream, bounded | which entries were given up because every worker that took them died |
| `clarifier:rate:LIMIT` | list, expires | when the hits of a rate limit came, written by `limits` |
| `clarifier:cache:SHA256` | string, expires | an answer that may come again |
| `clarifier:families`, `clarifier:families:before` | hash, expires | who are near-duplicates, written by `families` |
| `clarifier:families:salt` | string | the secret that makes their hashes |
| `clarifier:probe` | string, expires | nothing: Redis takes writes if it takes this one |
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, ValidationError
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from service.remote.wire import Fields

UNREACHABLE = (RedisError, OSError, TimeoutError)
"""What every method raises where Redis cannot be reached, or refuses."""
WORK = "clarifier:work:"
ANSWERS = "clarifier:answers:"
GATEWAY = "clarifier:gateway:"
WORKERS = "clarifier:workers"
WORKER = "clarifier:worker:"
BUNDLE = "clarifier:bundle:"
ADDED = "clarifier:added:"
GONE = "clarifier:gone"
PARKED = "clarifier:parked"
GROUP = "workers"
RATE = "clarifier:rate"
CACHE = "clarifier:cache:"
PROBE = "clarifier:probe"
FAMILIES = "clarifier:families"
FAMILIES_BEFORE = "clarifier:families:before"
FAMILIES_SALT = "clarifier:families:salt"

COMMAND_TIMEOUT_S = 1.0
"""For Redis to answer what it need not wait for. No request waits for an error here: the loops of gateways and workers
do. A tenth of it would take a large hand-over on a slow network for a Redis that is gone."""
WORKER_LIFE_MS = 3000
"""How long a worker counts as alive after its last beat."""
GATEWAY_LIFE_MS = 60_000
"""The same of a gateway: a stalled one must not lose answers."""
ADDED_S = 600
"""How long a hand-over that had no answer can be asked for again; longer than any deadline lets it matter."""
KEPT_S = 86_400
"""How long streams and bundles outlive the last beat of whoever uses them."""
MAX_PARKED = 1000
MAX_ANSWERS = 100_000
"""Of a gateway that does not read; one that does removes what it has read."""

ADD = """
-- KEYS: work stream, what became of the last hand-over. ARGV: hand-over, request, seconds to know it, limit, entries,
-- fields and values of one entry, then all of them.
-- Answers how many entries are there, and the new ones' ids; without ids none was added, for lack of room. What this
-- hand-over has added already is not added again: its gateway had no answer, and asks a second time.
local again = redis.call('HGET', KEYS[2], 'hand-over') == ARGV[1]
local known = again and redis.call('HGET', KEYS[2], ARGV[2])
if known then return cjson.decode(known) end
local length, entries, width = redis.call('XLEN', KEYS[1]), tonumber(ARGV[5]), tonumber(ARGV[6])
if length + entries > tonumber(ARGV[4]) then return {length} end
local reply = {length + entries}
for entry = 0, entries - 1 do  -- the first write: a Redis without memory refuses no other in a script
    local first = 7 + entry * width
    reply[#reply + 1] = redis.call('XADD', KEYS[1], '*', unpack(ARGV, first, first + width - 1))
end
if not again then redis.call('DEL', KEYS[2]) end
redis.call('HSET', KEYS[2], 'hand-over', ARGV[1], ARGV[2], cjson.encode(reply))
redis.call('EXPIRE', KEYS[2], ARGV[3])
return reply
"""
FINISH = """
-- KEYS: work stream, answer stream, gateway. ARGV: group, entry, most answers, seconds to keep them, fields and values.
-- Only the first to come answers, and only a gateway that lives.
if redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) == 0 then return 0 end
redis.call('XDEL', KEYS[1], ARGV[2])
if redis.call('EXISTS', KEYS[3]) == 1 then
    redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[3], '*', unpack(ARGV, 5))
    redis.call('EXPIRE', KEYS[2], ARGV[4])
end
return 1
"""


class Announcement(BaseModel):
    """What a worker says of itself."""

    model_config = ConfigDict(strict=True, frozen=True)

    bundles: dict[str, str]
    """Digests by `name@version`."""
    device: str
    engine: str


@dataclass(frozen=True, slots=True)
class Request:
    """Entries that are added together, all with the same fields."""

    name: str
    digest: str
    """Of the bundle."""
    entries: Sequence[Mapping[bytes, bytes]]
    wanted: bool = True
    """False: only tell what was added of it before."""
    spare: int = 0
    """Places that must be free behind them, or none is added."""


@dataclass(frozen=True, slots=True)
class Taken:
    """An entry that this worker has, and how often it was handed out."""

    digest: str
    entry: str
    fields: Fields
    deliveries: int = 1


@dataclass(frozen=True, slots=True)
class Added:
    """How many entries wait or run with the new ones; None for `entries` if there was no room for all of them."""

    length: int
    entries: list[str] | None


class Store:
    """Connections to one Redis. Every method may raise one of `UNREACHABLE`.

    Pipelines with scripts are contexts: they ask for the scripts first, and keep their connection if that fails.
    """

    def __init__(self, url: str) -> None:
        never = Retry(NoBackoff(), 0)  # whoever calls decides what to do
        self._redis = Redis.from_url(
            url, socket_timeout=COMMAND_TIMEOUT_S, socket_connect_timeout=COMMAND_TIMEOUT_S, retry=never
        )
        self._waiting = Redis.from_url(  # for commands that wait for something to come
            url, socket_timeout=COMMAND_TIMEOUT_S + 1, socket_connect_timeout=COMMAND_TIMEOUT_S, retry=never
        )
        self._add, self._finish = self._redis.register_script(ADD), self._redis.register_script(FINISH)

    async def close(self) -> None:
        """Give the connections back."""
        await self._redis.aclose()
        await self._waiting.aclose()

    async def run_id(self) -> str:
        """Of the server: another one after every restart or failover."""
        return str((await self._redis.info("server"))["run_id"])

    # --- a gateway's side

    async def add(self, gateway: str, number: int, requests: Sequence[Request], limit: int) -> list[Added]:
        """Queue requests, each all of its entries or none. At most `limit` entries wait or run for one bundle.

        An error does not say that nothing was added. With the same `number` again, nothing is added twice.
        """
        async with self._redis.pipeline(transaction=False) as pipeline:
            for each in requests:
                values = [part for fields in each.entries for pair in fields.items() for part in pair]
                width = len(values) // len(each.entries)
                most = limit - each.spare if each.wanted else 0
                arguments: list[bytes | str | int] = [
                    number,
                    each.name,
                    ADDED_S,
                    most,
                    len(each.entries),
                    width,
                    *values,
                ]
                await self._add(keys=[WORK + each.digest, ADDED + gateway], args=arguments, client=pipeline)
            replies = await pipeline.execute()
        return [Added(int(length), [entry.decode() for entry in ids] or None) for length, *ids in replies]

    async def withdraw(self, entries: Iterable[tuple[str, str]]) -> None:
        """Nobody waits for these, each the digest of its bundle and its name: they need not be run."""
        pipeline = self._redis.pipeline(transaction=False)
        for digest, entry in entries:
            pipeline.xack(WORK + digest, GROUP, entry)
            pipeline.xdel(WORK + digest, entry)
            pipeline.publish(GONE, entry)
        await pipeline.execute()

    async def lost(self, entries: Sequence[tuple[str, str]]) -> list[bool]:
        """Which of these, each the digest of its bundle and its name, are not in Redis."""
        pipeline = self._redis.pipeline(transaction=False)
        for digest, entry in entries:
            pipeline.xrange(WORK + digest, entry, entry)
        return [not found for found in await pipeline.execute()]

    async def answers(self, gateway: str, after: str, wait_ms: int) -> list[tuple[str, Fields]]:
        """What came after the entry `after`; empty if nothing did for `wait_ms`."""
        found = await self._waiting.xread({ANSWERS + gateway: after}, count=256, block=wait_ms)
        return [(entry.decode(), fields) for _, entries in cast(Any, found) for entry, fields in entries]

    async def beat_gateway(self, gateway: str, read: str) -> None:
        """This gateway lives, and has read the answers up to the entry `read`."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.set(GATEWAY + gateway, 1, px=GATEWAY_LIFE_MS)
        pipeline.xtrim(ANSWERS + gateway, minid=read, approximate=False)
        await pipeline.execute()

    async def forget_gateway(self, gateway: str) -> None:
        """It ends: nobody need answer it."""
        await self._redis.delete(GATEWAY + gateway, ANSWERS + gateway, ADDED + gateway)

    async def roster(self) -> dict[str, Announcement]:
        """What each living worker says of itself, by its name; what cannot be read is left out."""
        names = sorted(name.decode() for name in await cast(Any, self._redis.smembers(WORKERS)))
        if not names:
            return {}
        found = await self._redis.mget([WORKER + name for name in names])
        said = dict(zip(names, found, strict=True))
        if dead := [name for name, text in said.items() if text is None]:
            await cast(Any, self._redis.srem(WORKERS, *dead))
        alive = dict[str, Announcement]()
        for name, text in said.items():
            with suppress(ValidationError):
                if text is not None:
                    alive[name] = Announcement.model_validate_json(text)
        return alive

    async def bundle(self, digest: str) -> Mapping[str, Any] | None:
        """The manifest and report that a worker has left."""
        text = await self._redis.get(BUNDLE + digest)
        return None if text is None else json.loads(text)

    async def lengths(self, digests: Sequence[str]) -> tuple[int, int]:
        """How many entries wait or run for these bundles, and how many of them no worker has taken."""
        pipeline = self._redis.pipeline(transaction=False)
        for digest in digests:
            pipeline.xlen(WORK + digest)
        for digest in digests:
            pipeline.xpending(WORK + digest, GROUP)
        found = await pipeline.execute(raise_on_error=False)
        for each in found:
            if isinstance(each, Exception) and not str(each).startswith("NOGROUP"):  # a group that comes soon
                raise each
        length = sum(found[: len(digests)])
        pending = sum(each["pending"] for each in found[len(digests) :] if isinstance(each, dict))
        return length, max(0, length - pending)

    # --- a worker's side

    async def prepare(self, bundles: Mapping[str, Mapping[str, object]]) -> None:
        """Streams to take from, and what gateways need to know, for bundles by their digest."""
        for digest, described in bundles.items():
            await self._redis.set(BUNDLE + digest, json.dumps(described), ex=KEPT_S)
            try:
                await self._redis.xgroup_create(WORK + digest, GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise

    async def beat_worker(self, worker: str, says: Announcement, digests: Iterable[str]) -> bool:
        """This worker lives; False if Redis has lost what `prepare` left there."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.sadd(WORKERS, worker)
        pipeline.set(WORKER + worker, says.model_dump_json(), px=WORKER_LIFE_MS)
        for digest in digests:
            pipeline.expire(WORK + digest, KEPT_S)
            pipeline.expire(BUNDLE + digest, KEPT_S)
        _, _, *kept = await pipeline.execute()
        return all(kept)

    async def forget_worker(self, worker: str) -> None:
        """It ends, and holds nothing."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.srem(WORKERS, worker)
        pipeline.delete(WORKER + worker)
        await pipeline.execute()

    async def take(self, digests: Iterable[str], worker: str, count: int, wait_ms: int) -> list[Taken]:
        """At most `count` entries of each bundle that nobody has yet; empty if none came for `wait_ms`."""
        streams: dict[Any, Any] = {WORK + digest: ">" for digest in digests}
        found = await self._waiting.xreadgroup(GROUP, worker, streams, count=count, block=wait_ms)
        return [
            Taken(stream.decode().removeprefix(WORK), entry.decode(), fields)
            for stream, entries in cast(Any, found)
            for entry, fields in entries
        ]

    async def touch(self, taken: Iterable[Taken], worker: str) -> None:
        """This worker still has these."""
        pipeline = self._redis.pipeline(transaction=False)
        for each in taken:
            pipeline.xclaim(WORK + each.digest, GROUP, worker, 0, [each.entry], justid=True)
        await pipeline.execute()

    async def claim(self, digests: Iterable[str], worker: str, idle_ms: int) -> Taken | None:
        """One entry whose worker has not touched it for `idle_ms`; None if there is none."""
        for digest in digests:
            stalled = await self._redis.xpending_range(WORK + digest, GROUP, "-", "+", 16, idle=idle_ms)
            for each in stalled:
                entry, deliveries = cast(bytes, each["message_id"]).decode(), int(each["times_delivered"])
                claimed = await self._redis.xclaim(WORK + digest, GROUP, worker, idle_ms, [entry])
                for _, fields in cast(Any, claimed):
                    return Taken(digest, entry, fields, deliveries + 1)
        return None

    async def finish(self, answers: Iterable[tuple[Taken, str, Mapping[bytes, bytes]]]) -> None:
        """Answer entries, each to its gateway; those that somebody else has answered, or nobody waits for, are left."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            for taken, gateway, fields in answers:
                keys = [WORK + taken.digest, ANSWERS + gateway, GATEWAY + gateway]
                values = [part for pair in fields.items() for part in pair]
                arguments: list[bytes | str | int] = [GROUP, taken.entry, MAX_ANSWERS, KEPT_S, *values]
                await self._finish(keys=keys, args=arguments, client=pipeline)
            await pipeline.execute()

    async def discard(self, taken: Taken) -> None:
        """Take an entry out without an answer."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.xack(WORK + taken.digest, GROUP, taken.entry)
        pipeline.xdel(WORK + taken.digest, taken.entry)
        await pipeline.execute()

    async def park(self, says: Mapping[str, str]) -> None:
        """Keep, for people to look at, what an entry was that is given up."""
        await self._redis.xadd(PARKED, cast(Any, dict(says)), maxlen=MAX_PARKED, approximate=True)

    async def gone(self) -> AsyncIterator[str]:
        """Entries that nobody waits for any more, as their gateways say so; for ever."""
        async with self._waiting.pubsub() as channel:
            await channel.subscribe(GONE)
            while True:
                message = await channel.get_message(ignore_subscribe_messages=True, timeout=COMMAND_TIMEOUT_S)
                if message is not None:
                    yield message["data"].decode()
