"""A moving window lets in what its limit says at any moment, and no more."""

from __future__ import annotations

import asyncio
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits.aio.storage import MemoryStorage

from service.errors import RateLimited
from service.rates import MAX_AMOUNT, Limiter, MemoryWindows, Windows, read_rate_limits


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def hit(limiter: Limiter, who: str, limits: str, count: int = 1) -> bool:
    """Whether that many hits of `who` are let in."""
    try:
        asyncio.run(limiter.hit(who, read_rate_limits(limits), count))
    except RateLimited:
        return False
    return True


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("600/minute", ["600 per 1 minute"]),
        ("10 per 5 seconds", ["10 per 5 second"]),
        ("1000/day;600/minute; 10/second", ["10 per 1 second", "600 per 1 minute", "1000 per 1 day"]),
        ("9/minute;3/60 seconds", ["3 per 60 second", "9 per 1 minute"]),
    ],
)
def test_limits_are_read_the_tightest_first(text: str, meaning: list[str]) -> None:
    assert [str(limit) for limit in read_rate_limits(text)] == meaning


@pytest.mark.parametrize(
    "text",
    ["", "600", "minute", "600/fortnight", "-1/minute", "1.5/minute", "0/minute", "5/minute;0/hour", "10/second;",
     f"{MAX_AMOUNT + 1}/day", "1/2 years", "1/" + "9" * 400 + " seconds", "9" * 5000 + "/day"],
)  # fmt: skip
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^should be "):
        read_rate_limits(text)


def test_a_window_moves_it_does_not_start_anew_by_the_clock() -> None:
    clock = Clock()
    limiter = Limiter(MemoryWindows(clock))
    assert hit(limiter, "a", "2/minute")
    clock.now += 50
    assert hit(limiter, "a", "2/minute")
    assert not hit(limiter, "a", "2/minute")
    clock.now += 10  # the first is a minute old
    assert hit(limiter, "a", "2/minute")
    assert not hit(limiter, "a", "2/minute")


def test_row_49_one_who_sends_everything_takes_nothing_from_another() -> None:
    limiter = Limiter(MemoryWindows(Clock()))
    assert [hit(limiter, "greedy", "2/minute") for _ in range(5)] == [True, True, False, False, False]
    assert hit(limiter, "other", "2/minute")


def test_what_is_refused_does_not_count() -> None:
    clock = Clock()
    limiter = Limiter(MemoryWindows(clock))
    assert hit(limiter, "a", "1/minute")
    for _ in range(6):
        clock.now += 9.9
        assert not hit(limiter, "a", "1/minute")
    clock.now += 1
    assert hit(limiter, "a", "1/minute")


def test_of_several_limits_each_holds() -> None:
    clock = Clock()
    limiter = Limiter(MemoryWindows(clock))
    assert [hit(limiter, "a", "3/minute;2/second") for _ in range(3)] == [True, True, False]
    clock.now += 1
    assert [hit(limiter, "a", "3/minute;2/second") for _ in range(2)] == [True, False]


def test_several_hits_count_all_or_none() -> None:
    limiter = Limiter(MemoryWindows(Clock()))
    assert hit(limiter, "a", "5/minute", 3)
    assert not hit(limiter, "a", "5/minute", 3)
    assert hit(limiter, "a", "5/minute", 2)


def test_a_refusal_says_when_there_is_room_again() -> None:
    clock = Clock()
    limiter = Limiter(MemoryWindows(clock))
    assert hit(limiter, "a", "1/minute")
    clock.now += 20
    with pytest.raises(RateLimited) as caught:
        asyncio.run(limiter.hit("a", read_rate_limits("1/minute")))
    assert caught.value.retry_after_s == pytest.approx(40, abs=1)
    assert caught.value.limit == 1
    assert caught.value.detail == "the rate limit is 1 per 1 minute"


@given(st.lists(st.tuples(st.floats(0, 9), st.integers(1, 4)), max_size=60))
def test_a_window_is_neither_too_strict_nor_too_lenient(arrivals: list[tuple[float, int]]) -> None:
    clock, limit, period_s = Clock(), 5, 10
    windows = MemoryWindows(clock)
    let_in = list[float]()
    for pause_s, amount in arrivals:
        clock.now += pause_s
        recent = sum(when > clock.now - period_s for when in let_in)
        allowed = asyncio.run(windows.acquire_entry("a", limit, period_s, amount))
        assert allowed == (recent + amount <= limit)
        if allowed:
            let_in += [clock.now] * amount


def test_the_window_that_was_least_recently_used_is_forgotten() -> None:
    limiter = Limiter(MemoryWindows(Clock(), max_windows=2))
    assert hit(limiter, "a", "1/minute")
    assert hit(limiter, "b", "1/minute")
    assert not hit(limiter, "a", "1/minute")
    assert hit(limiter, "c", "1/minute")  # in the place of b
    assert not hit(limiter, "a", "1/minute")
    assert hit(limiter, "b", "1/minute")


def test_hits_that_are_over_take_no_memory() -> None:
    clock = Clock()
    windows = MemoryWindows(clock)
    for _ in range(5):
        clock.now += 1000
        assert asyncio.run(windows.acquire_entry("a", 10_000, 60, 10_000))
    assert sys.getsizeof(windows._windows["a"]) < 200_000


def test_a_storage_of_the_library_can_stand_in_the_place_of_our_windows() -> None:
    async def scenario() -> None:
        windows: Windows = MemoryStorage()
        limiter, limits = Limiter(windows), read_rate_limits("2/minute")
        await limiter.hit("a", limits, 2)
        with pytest.raises(RateLimited) as caught:
            await limiter.hit("a", limits)
        assert caught.value.retry_after_s == pytest.approx(60, abs=2)
        await limiter.hit("b", limits)

    asyncio.run(scenario())
