"""Requests are counted and logged as soon as those that ended with them."""

from __future__ import annotations

import asyncio

import pytest

from service.books import Books
from service.entropy import Entropy
from service.metrics import Metrics
from service.record import new_record


def test_what_ends_in_one_turn_is_written_after_it_in_its_order(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        metrics = Metrics()
        books = Books(metrics)
        for turn in ("ab", "c"):
            before = len(caplog.records)
            for name in turn:
                record = new_record(name, Entropy())
                record.status, record.route = 200, "/classify"
                books.enter(record)
            assert len(caplog.records) == before
            await asyncio.sleep(0)
            assert len(caplog.records) == before + len(turn)
        labels = {"route": "/classify", "model": "", "defense": "", "status": "200"}
        assert metrics.registry.get_sample_value("clarifier_requests_total", labels) == 3
        assert (
            metrics.registry.get_sample_value("clarifier_request_duration_seconds_count", {"route": "/classify"}) == 3
        )

    caplog.set_level("INFO", "service.requests")
    asyncio.run(scenario())
    assert [line.__dict__["fields"]["request_id"] for line in caplog.records] == ["a", "b", "c"]


def test_the_time_of_a_request_ends_when_it_does() -> None:
    async def scenario() -> None:
        record = new_record("", Entropy())
        Books(Metrics()).enter(record)
        took_ms = record.elapsed_ms()
        await asyncio.sleep(0.02)
        assert record.elapsed_ms() == took_ms

    asyncio.run(scenario())
