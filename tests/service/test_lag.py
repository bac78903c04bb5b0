"""A blocked event loop leaves its trace, and is no reason for a restart."""

from __future__ import annotations

import asyncio
import threading
import time

from service.batching import Batcher
from service.lag import watch_lag
from service.metrics import Metrics
from tests.service.conftest import Running, until


def test_a_wake_up_that_comes_late_is_observed() -> None:
    metrics = Metrics()

    async def scenario() -> None:
        watching = asyncio.create_task(watch_lag(metrics.event_loop_lag))
        await asyncio.sleep(0)
        time.sleep(1)  # nobody else can do anything meanwhile
        await asyncio.sleep(0.01)
        watching.cancel()

    asyncio.run(scenario())
    assert metrics.registry.get_sample_value("clarifier_event_loop_lag_seconds_sum") > 0.5  # type: ignore[operator]


def test_row_54_after_a_blocked_event_loop_the_service_is_live_and_ready_and_the_metric_shows_it(
    service: Running,
) -> None:
    batcher = service.gateway.batcher
    assert isinstance(batcher, Batcher)
    assert batcher._loop is not None
    until(lambda: service.metric("clarifier_event_loop_lag_seconds_count") > 0)
    blocked = threading.Event()

    def block() -> None:
        blocked.set()
        time.sleep(5)

    batcher._loop.call_soon_threadsafe(block)
    assert blocked.wait(20)
    assert service.gateway.why_not_live() is None  # the rule, while the loop cannot answer
    assert batcher.silence_s < 2
    for probe in ("/livez", "/readyz"):
        assert service.client.get(probe).status_code == 200
    until(lambda: service.metric("clarifier_event_loop_lag_seconds_sum") > 4)
    assert service.still_answers()
