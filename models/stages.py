"""What of a chain's time goes into which stage: whoever wants to know it asks for it around the call."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_clock: ContextVar[dict[str, float] | None] = ContextVar("stages", default=None)


@contextmanager
def timed_stages() -> Iterator[dict[str, float]]:
    """Seconds by stage, of what this thread runs inside the block: `transform`, AToP's random transforms.

    On an accelerator each stage waits for its kernels to end, which costs a little; outside such a block none does.
    """
    seconds = dict[str, float]()
    token = _clock.set(seconds)
    try:
        yield seconds
    finally:
        _clock.reset(token)


@contextmanager
def stage(name: str, device: torch.device) -> Iterator[None]:
    """The block is a part of stage `name`, on `device`."""
    seconds = _clock.get()
    if seconds is None:
        yield
        return
    _finish(device)
    started = time.monotonic()
    yield
    _finish(device)
    seconds[name] = seconds.get(name, 0.0) + time.monotonic() - started


def _finish(device: torch.device) -> None:
    """Let queued kernels end, so that a stage's time is its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
