"""What is found again, for how long, and in how many bytes."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from service.cache import ENTRY_BYTES, MemoryCache, answer_keys
from service.work import Answer, Classified, Detected, Key, Operation, Purified
from tests.service.clock import Clock
from tests.service.fakes import green

KEY = Key(Operation.CLASSIFY, "colors@1", "atop", 4, True)
TTL_S = 10.0


def find(cache: MemoryCache, key: bytes) -> Answer | None:
    (answer,) = asyncio.run(cache.find([key]))
    return answer


def keep(cache: MemoryCache, key: bytes, answer: Answer) -> None:
    asyncio.run(cache.keep({key: answer}))


def size(answer: Answer) -> int:
    """Bytes of its arrays."""
    if isinstance(answer, Detected):
        return 0
    if isinstance(answer, Purified):
        return answer.image.nbytes
    return answer.probabilities.nbytes + (0 if answer.undefended is None else answer.undefended.nbytes)


def test_every_part_of_the_question_and_every_pixel_makes_another_key() -> None:
    image, other = green(), green()
    other[-1, -1, -1] += 1
    keys = [
        *answer_keys("", "digest", KEY, 1, [image, other]),
        *answer_keys("a", "digest", KEY, 1, [image]),
        *answer_keys("ad", "igest", KEY, 1, [image]),
        *answer_keys("", "another", KEY, 1, [image]),
        *answer_keys("", "digest", KEY, 2, [image]),
        *answer_keys("", "digest", KEY, None, [image]),
        *answer_keys("", "digest", replace(KEY, operation=Operation.PURIFY), 1, [image]),
        *answer_keys("", "digest", replace(KEY, defense="atop:rt1"), 1, [image]),
        *answer_keys("", "digest", replace(KEY, votes=5), 1, [image]),
        *answer_keys("", "digest", replace(KEY, explain=False), 1, [image]),
    ]
    assert len(set(keys)) == len(keys) == 11
    assert answer_keys("", "digest", KEY, 1, [image.copy()]) == keys[:1]
    assert answer_keys("", "digest", KEY, 1, [np.asfortranarray(image)]) == keys[:1]


def test_an_answer_is_found_until_its_time_is_over_however_often_it_was_asked_for() -> None:
    clock = Clock()
    cache = MemoryCache(TTL_S, clock=clock)
    keep(cache, b"a", Detected(0.25))
    for clock.now in (0.0, 5.0, 9.9):
        assert find(cache, b"a") == Detected(0.25)
    clock.now = 10.0
    assert find(cache, b"a") is None
    assert cache.held == 0


def test_an_answer_that_comes_again_has_its_time_again() -> None:
    clock = Clock()
    cache = MemoryCache(TTL_S, clock=clock)
    keep(cache, b"a", Detected(0.25))
    clock.now = 8.0
    keep(cache, b"a", Detected(0.5))
    clock.now = 12.0
    assert find(cache, b"a") == Detected(0.5)
    assert cache.held == ENTRY_BYTES


def test_what_was_asked_for_least_recently_makes_room() -> None:
    cache = MemoryCache(TTL_S, limit=2 * ENTRY_BYTES, clock=Clock())
    keep(cache, b"a", Detected(0.1))
    keep(cache, b"b", Detected(0.2))
    assert find(cache, b"a") is not None
    keep(cache, b"c", Detected(0.3))
    assert [find(cache, key) is not None for key in (b"a", b"b", b"c")] == [True, False, True]


def test_an_answer_larger_than_the_cache_is_not_kept_and_drives_nobody_out() -> None:
    cache = MemoryCache(TTL_S, limit=2 * ENTRY_BYTES, clock=Clock())
    keep(cache, b"a", Detected(0.1))
    keep(cache, b"b", Purified(np.zeros((20, 20, 3), np.float32), 0.0))
    assert find(cache, b"a") is not None
    assert find(cache, b"b") is None


@pytest.mark.parametrize("explain", [False, True])
def test_what_is_kept_is_a_copy_that_nobody_can_change(explain: bool) -> None:
    batch = np.random.default_rng(0).random((32, 3), np.float32)
    answer = Classified(batch[1], batch[2] if explain else None, 0.5, "none")
    cache = MemoryCache(TTL_S, clock=Clock())
    keep(cache, b"a", answer)
    expected = batch.copy()
    batch[:] = 0
    found = find(cache, b"a")
    assert isinstance(found, Classified)
    assert (found.probabilities == expected[1]).all()
    assert (found.aid_score, found.ran) == (0.5, "none")
    arrays = [found.probabilities] if found.undefended is None else [found.probabilities, found.undefended]
    assert len(arrays) == 1 + explain
    assert all(array.base is None and not array.flags.writeable for array in arrays)


class Bounded(RuleBasedStateMachine):
    """Against a list that knows who was asked for last: the same answers, within the same bytes."""

    LIMIT = 6 * ENTRY_BYTES

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.cache = MemoryCache(TTL_S, self.LIMIT, self.clock)
        self.known = list[tuple[bytes, Answer, float]]()
        """Key, answer and when it was kept; asked for last, last."""

    @rule(key=st.binary(max_size=1), samples=st.integers(0, 600))
    def keep(self, key: bytes, samples: int) -> None:
        answer = Classified(np.full(samples, 1, np.float32), np.full(samples, 2, np.float32))
        keep(self.cache, key, answer)
        if ENTRY_BYTES + size(answer) > self.LIMIT:
            return
        self.known = [*(one for one in self.known if one[0] != key), (key, answer, self.clock.now)]
        while sum(ENTRY_BYTES + size(answer) for _, answer, _ in self.known) > self.LIMIT:
            self.known.pop(0)

    @rule(key=st.binary(max_size=1))
    def find(self, key: bytes) -> None:
        found = find(self.cache, key)
        mine = next((one for one in self.known if one[0] == key), None)
        if mine is not None:
            self.known.remove(mine)
        if mine is None or self.clock.now >= mine[2] + TTL_S:
            assert found is None
            return
        self.known.append(mine)
        assert isinstance(found, Classified)
        assert size(found) == size(mine[1])

    @rule(seconds=st.integers(0, 4))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @invariant()
    def holds_what_it_says_and_no_more_than_it_may(self) -> None:
        kept = sum(ENTRY_BYTES + size(answer) for _, answer, _ in self.known)
        assert self.cache.held == kept <= self.LIMIT


TestBounded = Bounded.TestCase


async def fill(cache: MemoryCache, samples: int, count: int) -> None:
    """Keep `count` answers, each of two rows of a batch of 16."""
    for number in range(count):
        batch = np.zeros((16, samples), np.float32)
        answer = Classified(batch[0], batch[1], number / 7, f"defense {number}")
        await cache.keep({number.to_bytes(32, "big"): answer})


@pytest.mark.parametrize("samples", [0, 10, 3 * 32 * 32])
def test_the_process_grows_by_no_more_than_the_limit(samples: int) -> None:
    limit = 1000 * (ENTRY_BYTES + 8 * samples)

    async def grown(cache: MemoryCache) -> int:
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        await fill(cache, samples, 2500)
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before

    cache = MemoryCache(TTL_S, limit, Clock())
    tracemalloc.start()
    try:
        measured = asyncio.run(grown(cache))
    finally:
        tracemalloc.stop()
    assert limit / 2 < measured <= cache.held <= limit
