"""What is known of the engine's pace."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.pace import LAST_BATCHES, MAX_KEYS, Pace
from service.work import Key, Operation

FAST, SLOW = Key(Operation.CLASSIFY, "a@1", "none"), Key(Operation.CLASSIFY, "a@1", "zeropur")


def paced() -> Pace:
    """Eight images of a key run together."""
    return Pace(lambda key: 8 // key.votes)


def test_what_has_not_run_counts_as_nothing() -> None:
    assert paced().expected_s([(FAST, 100)]) == 0


def test_images_are_expected_in_batches_that_are_as_full_as_they_can_be() -> None:
    pace = paced()
    pace.note(FAST, 8, 2.0)
    pace.note(FAST, 1, 1.0)
    pace.note(SLOW, 1, 7.0)
    assert pace.expected_s([(FAST, 8)]) == 2.0
    assert pace.expected_s([(FAST, 17), (SLOW, 1)]) == 2 * 2.0 + 1.0 + 7.0
    twice = replace(FAST, votes=2)
    pace.note(twice, 4, 3.0)
    assert pace.expected_s([(twice, 8)]) == 2 * 3.0


def test_what_is_not_known_is_taken_to_be_fast() -> None:
    pace = paced()
    pace.note(FAST, 2, 1.0)
    assert pace.expected_s([(FAST, 8)]) == 1.0, "no slower than the largest that ran"
    pace.note(FAST, 6, 2.0)
    assert pace.expected_s([(FAST, 1)]) == 0.5, "its share of the smallest that ran"
    assert pace.expected_s([(FAST, 5)]) == pytest.approx(2.0 * 5 / 6), "its share of the next larger"
    assert pace.expected_s([(FAST, 3)]) == 1.0, "and no faster than the next smaller"


def test_a_machine_that_stood_still_is_not_slow_for_all_that_come_after() -> None:
    pace = paced()
    for seconds in (1.0, 1.0, 60.0, 1.0, 60.0):
        pace.note(FAST, 1, seconds)
    assert pace.expected_s([(FAST, 1)]) == 1.0
    for _ in range(LAST_BATCHES):
        pace.note(FAST, 1, 2.0)
    assert pace.expected_s([(FAST, 1)]) == 2.0


def test_it_remembers_so_many_keys_and_forgets_what_ran_longest_ago() -> None:
    pace = paced()
    keys = [Key(Operation.CLASSIFY, "a@1", f"chain{number}") for number in range(MAX_KEYS)]
    for key in [*keys, keys[0], FAST]:
        pace.note(key, 1, 1.0)
    assert [pace.expected_s([(key, 1)]) for key in (keys[0], keys[1], FAST)] == [1.0, 0.0, 1.0]


def test_the_last_batch_is_what_is_left_of_full_ones() -> None:
    pace = paced()
    for images in (1, 8):
        pace.note(FAST, images, float(images))
    assert [pace.last_batch_s(FAST, count) for count in (1, 8, 9, 16)] == [1.0, 8.0, 1.0, 8.0]
    assert pace.last_batch_s(SLOW, 3) == 0


def test_a_batch_larger_than_what_runs_together_here_counts_by_its_share() -> None:
    pace = paced()
    pace.note(FAST, 32, 4.0)
    assert pace.expected_s([(FAST, 8)]) == 1.0
