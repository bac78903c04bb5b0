"""What is known of the engine's pace."""

from __future__ import annotations

import pytest

from service.pace import LAST_BATCHES, MAX_KEYS, Pace
from service.work import Key, Operation

FAST, SLOW = Key(Operation.CLASSIFY, "a@1", "none"), Key(Operation.CLASSIFY, "a@1", "zeropur")


def test_the_last_batches_tell_how_long_images_take() -> None:
    pace = Pace()
    assert pace.expected_s([(FAST, 100)]) == 0
    pace.note(FAST, 10, 1.0)
    pace.note(SLOW, 2, 4.0)
    assert pace.expected_s([(FAST, 5), (SLOW, 3)]) == pytest.approx(6.5)
    pace.note(SLOW, 4, 16.0)
    assert pace.expected_s([(SLOW, 1)]) == pytest.approx(3.0)


def test_a_machine_that_stood_still_is_not_slow_for_all_that_come_after() -> None:
    pace = Pace()
    for seconds in (1.0, 1.0, 60.0, 1.0, 60.0):
        pace.note(FAST, 1, seconds)
    assert pace.expected_s([(FAST, 1)]) == 1.0
    for _ in range(LAST_BATCHES):
        pace.note(FAST, 1, 2.0)
    assert pace.expected_s([(FAST, 1)]) == 2.0


def test_it_remembers_so_many_keys_and_forgets_what_ran_longest_ago() -> None:
    pace = Pace()
    keys = [Key(Operation.CLASSIFY, "a@1", f"chain{number}") for number in range(MAX_KEYS)]
    for key in [*keys, keys[0], FAST]:
        pace.note(key, 1, 1.0)
    assert [pace.expected_s([(key, 1)]) for key in (keys[0], keys[1], FAST)] == [1.0, 0.0, 1.0]
