"""What is known about one request."""

from __future__ import annotations

import time

import pytest

from service.entropy import Entropy
from service.record import new_record, record_of


def test_a_sound_id_is_kept_and_another_is_replaced() -> None:
    assert new_record("a.B_c-9", Entropy()).request_id == "a.B_c-9"
    assert len(new_record("x" * 128, Entropy()).request_id) == 128
    for offered in ("", "x" * 129, "a b", "a\n"):
        assert new_record(offered, Entropy()).request_id != offered


def test_time_runs_from_the_requests_arrival() -> None:
    record = new_record("", Entropy())
    record.started = time.monotonic() - 2
    assert record.elapsed_ms() == pytest.approx(2000, abs=500)


def test_the_record_is_found_in_its_scope() -> None:
    record = new_record("", Entropy())
    assert record_of({"clarifier.record": record}) is record
