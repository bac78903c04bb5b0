"""How late the event loop is: whatever blocks it keeps everybody waiting, and shows here."""

from __future__ import annotations

import asyncio

from prometheus_client import Histogram

INTERVAL_S = 0.25
"""Between two looks."""


async def watch_lag(lag: Histogram) -> None:
    """Observe how many seconds later than it should this task wakes up, again and again."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + INTERVAL_S
        await asyncio.sleep(INTERVAL_S)
        lag.observe(max(0.0, loop.time() - due))
