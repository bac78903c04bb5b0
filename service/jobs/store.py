"""Jobs in Redis: the names of keys, then one function for each use. All keys of a job expire together.

| key | type | what |
|---|---|---|
| `clarifier:jobs` | sorted set | jobs that are not done, by when they were made |
| `clarifier:job:ID` | hash | `spec`, and how many of its images have `failed` |
| `clarifier:job:ID:inputs` | hash | chunks of prepared images by the number of their first, until the job is done |
| `clarifier:job:ID:results` | hash | an answer for each image, by its number; the first one counts |
| `clarifier:job:ID:lease` | string, expires | the gateway that works on it |
| `clarifier:job-key:HASH` | string | the job that was made with an `Idempotency-Key`, and what of |
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError

from service.jobs.records import Found, Spec, read_spec
from service.remote.wire import Malformed

JOBS = "clarifier:jobs"
JOB = "clarifier:job:"
JOB_KEY = "clarifier:job-key:"
INPUTS, RESULTS, LEASE = ":inputs", ":results", ":lease"
COMMAND_TIMEOUT_S = 5.0
"""For Redis to answer, which may have megabytes to send."""

CREATE = """
-- KEYS: jobs, job, inputs, results, job-key or ''.
-- ARGV: id, spec, images, chunks, failed, ms to live, most jobs, hash of what was sent.
-- Answers {'made'}, {'lost'}, {'full', count}, or what this idempotency key has made: {'known', id, hash}.
if KEYS[5] ~= '' then
    local id, hash = string.match(redis.call('GET', KEYS[5]) or '', '^(%x+) (%x+)$')
    if id and redis.call('EXISTS', 'clarifier:job:' .. id) == 1 then return {'known', id, hash} end
end
local count = redis.call('ZCARD', KEYS[1])
if count >= tonumber(ARGV[7]) then return {'full', count} end
local done = redis.call('HLEN', KEYS[4])
if redis.call('HLEN', KEYS[3]) ~= tonumber(ARGV[4]) or done ~= tonumber(ARGV[5]) then return {'lost'} end
redis.call('HSET', KEYS[2], 'spec', ARGV[2], 'failed', ARGV[5])
for key = 2, 4 do redis.call('PEXPIRE', KEYS[key], ARGV[6]) end
if done < tonumber(ARGV[3]) then redis.call('ZADD', KEYS[1], redis.call('TIME')[1], ARGV[1]) end
if KEYS[5] ~= '' then redis.call('SET', KEYS[5], ARGV[1] .. ' ' .. ARGV[8], 'PX', ARGV[6]) end
return {'made'}
"""
LEASE_JOBS = """
-- KEYS: jobs. ARGV: who, ms, most. Forgets jobs that have expired; answers how many there are, and those leased now.
local leased = {}
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
    local job = 'clarifier:job:' .. id
    if redis.call('EXISTS', job) == 0 then
        redis.call('ZREM', KEYS[1], id)
    elseif #leased < tonumber(ARGV[3]) and redis.call('SET', job .. ':lease', ARGV[1], 'PX', ARGV[2], 'NX') then
        leased[#leased + 1] = id
    end
end
return {redis.call('ZCARD', KEYS[1]), unpack(leased)}
"""
RENEW = """
-- KEYS: job, lease. ARGV: who, ms. 0 if the job is gone or somebody else's.
local holder = redis.call('GET', KEYS[2])
if redis.call('EXISTS', KEYS[1]) == 0 or (holder and holder ~= ARGV[1]) then return 0 end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
return 1
"""
RELEASE = """
-- KEYS: lease. ARGV: who.
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""
RECORD = """
-- KEYS: jobs, job, inputs, results. ARGV: id, images, then number, answer and whether it failed (1 or 0) of each.
-- Only the first answer to an image counts. Answers how many were new, and how many of those failed; -1: no such job.
local left = redis.call('PTTL', KEYS[2])
if left == -2 then return {-1, 0} end
local new, failed = 0, 0
for first = 3, #ARGV, 3 do
    if redis.call('HSETNX', KEYS[4], ARGV[first], ARGV[first + 1]) == 1 then
        new, failed = new + 1, failed + tonumber(ARGV[first + 2])
    end
end
if failed > 0 then redis.call('HINCRBY', KEYS[2], 'failed', failed) end
if left > 0 then redis.call('PEXPIRE', KEYS[4], left) end
if redis.call('HLEN', KEYS[4]) >= tonumber(ARGV[2]) then
    redis.call('ZREM', KEYS[1], ARGV[1])
    redis.call('DEL', KEYS[3])
end
return {new, failed}
"""

Arguments = ParamSpec("Arguments")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Made:
    """What became of a new job: `id` is its own, or that of the one that its idempotency key had made before."""

    outcome: str
    """`made`, `known`, `full` or `lost`."""
    id: str = ""
    hash: str = ""
    count: int = 0


@dataclass(frozen=True, slots=True)
class Answered:
    """The packed answer to an image, by its number."""

    number: int
    packed: bytes
    failed: bool


def _checked(method: Callable[Arguments, Awaitable[R]]) -> Callable[Arguments, Awaitable[R]]:
    """A key that is of another type than ours are is Malformed, not a Redis that cannot be reached."""

    @wraps(method)
    async def checked(*arguments: Arguments.args, **named: Arguments.kwargs) -> R:
        try:
            return await method(*arguments, **named)
        except ResponseError as error:
            if "WRONGTYPE" in str(error) or "not an integer" in str(error):
                raise Malformed(str(error)) from None
            raise

    return checked


class JobStore:
    """Connections to one Redis. Every method may raise one of `store.UNREACHABLE`, those that read also Malformed."""

    def __init__(self, url: str) -> None:
        never = Retry(NoBackoff(), 0)  # whoever calls decides what to do
        self._redis = Redis.from_url(
            url, socket_timeout=COMMAND_TIMEOUT_S, socket_connect_timeout=COMMAND_TIMEOUT_S, retry=never
        )
        scripts = (CREATE, LEASE_JOBS, RENEW, RELEASE, RECORD)
        self._create, self._lease, self._renew, self._release, self._record = map(self._redis.register_script, scripts)

    async def close(self) -> None:
        """Give the connections back."""
        await self._redis.aclose()

    # --- a job is made

    async def count(self) -> int:
        """Jobs that are not done."""
        return int(await self._redis.zcard(JOBS))

    async def put(self, job: str, start: int, chunk: bytes, failed: Sequence[Answered], kept_s: float) -> None:
        """A chunk of a job that is not made yet, and the answers to images that could not be read: for `kept_s`."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.hset(JOB + job + INPUTS, str(start), cast(Any, chunk))
        if failed:
            pipeline.hset(JOB + job + RESULTS, mapping=cast(Any, {each.number: each.packed for each in failed}))
        for part in (INPUTS, RESULTS):
            pipeline.pexpire(JOB + job + part, int(1000 * kept_s))
        await pipeline.execute()

    async def create(
        self, spec: Spec, failed: int, *, ttl_s: float, most: int, idempotency: str | None, sent: str
    ) -> Made:
        """The job, whose chunks are there. `sent` is a hash of what it was made of."""
        job = JOB + spec.id
        remembered = "" if idempotency is None else JOB_KEY + _hash(spec.owner, idempotency)
        keys = [JOBS, job, job + INPUTS, job + RESULTS, remembered]
        values: list[str | int] = [
            spec.id,
            spec.model_dump_json(),
            spec.images,
            len(spec.starts),
            failed,
            int(1000 * ttl_s),
            most,
            sent,
        ]
        outcome, *rest = await self._create(keys=keys, args=values)
        match outcome.decode():
            case "full":
                return Made("full", count=int(rest[0]))
            case "known":
                return Made("known", rest[0].decode(), rest[1].decode())
            case other:
                return Made(other, spec.id)

    # --- a job is looked at

    async def find(self, job: str) -> Found | None:
        """None if there is no such job."""
        return await self._find(job)

    @_checked
    async def _find(self, job: str) -> Found | None:
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.hmget(JOB + job, "spec", "failed")
        pipeline.hlen(JOB + job + RESULTS)
        pipeline.exists(JOB + job + LEASE)
        pipeline.pttl(JOB + job)
        (text, failed), done, leased, left_ms = await pipeline.execute()
        if left_ms == -2:
            return None
        spec = read_spec(text or b"")
        if spec.id != job or not (failed or b"").isdigit():
            raise Malformed("it is another job's")
        return Found(spec, min(done, spec.images), int(failed), bool(leased), left_ms / 1000)

    @_checked
    async def results(self, job: str, numbers: Sequence[int]) -> list[bytes | None]:
        """The packed answers of these images."""
        return list(await cast(Any, self._redis.hmget(JOB + job + RESULTS, [str(number) for number in numbers])))

    async def forget(self, job: str) -> bool:
        """Everything about it; whether it was there."""
        pipeline = self._redis.pipeline()
        pipeline.delete(JOB + job)
        pipeline.delete(*(JOB + job + part for part in (INPUTS, RESULTS, LEASE)))
        pipeline.zrem(JOBS, job)
        return bool((await pipeline.execute(raise_on_error=False))[0])

    # --- a job is worked on

    async def lease(self, who: str, ms: int, most: int) -> tuple[int, list[str]]:
        """How many jobs are not done, and at most `most` of them that nobody worked on and `who` does now."""
        count, *leased = await self._lease(keys=[JOBS], args=[who, ms, most])
        return int(count), [job.decode(errors="replace") for job in leased]

    async def renew(self, job: str, who: str, ms: int) -> bool:
        """Whether `who` still works on it."""
        return bool(await self._renew(keys=[JOB + job, JOB + job + LEASE], args=[who, ms]))

    async def release(self, job: str, who: str) -> None:
        """`who` works on it no more: somebody else may."""
        await self._release(keys=[JOB + job + LEASE], args=[who])

    @_checked
    async def answered(self, job: str) -> set[int]:
        """The numbers of the images that have their answer."""
        names = await cast(Any, self._redis.hkeys(JOB + job + RESULTS))
        return {int(name) for name in names if name.isdigit()}

    @_checked
    async def inputs(self, job: str, start: int) -> bytes | None:
        """The chunk that begins with the image `start`."""
        return cast(bytes | None, await cast(Any, self._redis.hget(JOB + job + INPUTS, str(start))))

    @_checked
    async def record(self, spec: Spec, answers: Sequence[Answered]) -> tuple[int, int] | None:
        """Keep answers; how many were the first to their image, and how many of those failed; None: no such job."""
        job = JOB + spec.id
        values = [value for each in answers for value in (each.number, each.packed, int(each.failed))]
        keys = [JOBS, job, job + INPUTS, job + RESULTS]
        new, failed = await self._record(keys=keys, args=[spec.id, spec.images, *values])
        return None if new < 0 else (int(new), int(failed))


def _hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
