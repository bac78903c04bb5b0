"""Random numbers that were fetched beforehand are as good as fresh ones."""

from __future__ import annotations

import copy
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.entropy import FETCHED_BYTES, Entropy


def test_no_byte_is_handed_out_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = list[bytes]()

    def urandom(count: int) -> bytes:
        fetched.append(bytes((len(fetched) + i) % 251 for i in range(count)))
        return fetched[-1]

    monkeypatch.setattr(os, "urandom", urandom)
    source = Entropy()
    taken = b"".join(source.take(16) for _ in range(2 * FETCHED_BYTES // 16))
    assert taken == b"".join(fetched)
    assert [len(each) for each in fetched] == [FETCHED_BYTES] * 2


def test_a_rest_that_is_too_short_is_thrown_away() -> None:
    source = Entropy()
    assert [len(source.take(count)) for count in (FETCHED_BYTES - 1, 16, FETCHED_BYTES)] == [
        FETCHED_BYTES - 1,
        16,
        FETCHED_BYTES,
    ]


@pytest.mark.parametrize("count", [1, 8, 53, 64])
def test_numbers_use_all_of_their_bits_and_no_more(count: int) -> None:
    source, seen = Entropy(), 0
    for _ in range(64):
        number = source.bits(count)
        assert 0 <= number < 2**count
        seen |= number
    assert seen == 2**count - 1


def test_threads_do_not_share_bytes() -> None:
    source = Entropy()
    with ThreadPoolExecutor(4) as threads:
        taken = list(threads.map(lambda _: source.take(16), range(5000)))
    assert len(set(taken)) == len(taken)


def test_a_forked_process_does_not_repeat_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Entropy()
    source.take(1)
    parent, child = copy.copy(source), copy.copy(source)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        theirs = child.take(16)
    assert theirs != parent.take(16)


@pytest.mark.parametrize(("rate", "least", "most"), [(0.0, 0, 0), (0.25, 800, 1200), (1.0, 4000, 4000)])
def test_a_rate_is_the_share_of_calls(rate: float, least: int, most: int) -> None:
    source = Entropy()
    assert least <= sum(source.happens(rate) for _ in range(4000)) <= most  # seven deviations
