"""So many tokens a second, a burst at once, and none for nothing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.settings import Settings
from service.tokens import TokenBucket, strong_tokens
from tests.service.clock import Clock


def test_a_burst_at_once_then_as_many_as_come() -> None:
    clock = Clock(100.0)
    bucket = TokenBucket(2.0, 3, clock)
    assert [bucket.take() for _ in range(5)] == [True, True, True, False, False]
    clock.now += 0.25
    assert not bucket.take()
    clock.now += 0.25
    assert [bucket.take(), bucket.take()] == [True, False]


def test_what_nobody_takes_is_kept_up_to_the_burst() -> None:
    clock = Clock()
    bucket = TokenBucket(2.0, 3, clock)
    clock.now = 3600.0
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]


def test_who_takes_more_than_there_are_owes_them() -> None:
    clock = Clock()
    bucket = TokenBucket(1.0, 1, clock)
    assert bucket.take(8)
    for clock.now in (1.0, 7.0, 7.5):
        assert not bucket.take()
    clock.now = 8.0
    assert bucket.take()


@given(st.lists(st.tuples(st.integers(0, 64), st.integers(1, 8)), max_size=60))
def test_no_more_than_a_burst_and_what_came_is_ever_taken(turns: list[tuple[int, int]]) -> None:
    clock = Clock()
    bucket = TokenBucket(0.5, 4, clock)
    taken = 0
    for quarters, count in turns:
        clock.now += quarters / 4
        taken += count * bucket.take(count)
        assert taken <= 4 + 0.5 * clock.now + 7  # the last may owe all but one


def test_there_is_no_bucket_unless_a_rate_is_set() -> None:
    assert strong_tokens(Settings()) is None
    bucket = strong_tokens(Settings(auto_strong_per_s=1e-9, max_batch_size=2))
    assert bucket is not None
    assert [bucket.take() for _ in range(3)] == [True, True, False]
