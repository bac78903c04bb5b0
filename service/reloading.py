"""SIGHUP: look at the model repository again, and serve what is there now, without a restart.

What is new is loaded and warmed while everything goes on, then takes the place of what was served; whoever was let in
before is answered by what was served then, which is forgotten when nobody needs it any more. What goes wrong is logged,
and changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable

from service.errors import UnknownModel
from service.loading import Loaded, in_loader
from service.metrics import Metrics
from service.repository import Catalog

logger = logging.getLogger(__name__)

Swap = Callable[[Loaded], Awaitable[None]]
"""Serve what is loaded now; back when nobody needs what was served before."""


def on_hangup(call: Callable[[], None]) -> None:
    """Have the running event loop `call` at every SIGHUP, on systems that have it. Main thread only."""
    if hasattr(signal, "SIGHUP"):
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, call)


async def load_noted(load: Callable[[], Loaded], metrics: Metrics) -> Loaded:
    """What `load` gives, in a thread of its own; metrics tell how long it took and whether every bundle was sound."""
    started = time.monotonic()
    try:
        loaded = await in_loader(load)
    except Exception:
        metrics.bundle_success.set(0)
        raise
    metrics.bundle_load.set(time.monotonic() - started)
    metrics.bundle_success.set(not loaded.catalog.refused)
    return loaded


async def reload_when_asked(
    asked: asyncio.Event, loaded: Loaded, swap: Swap, metrics: Metrics, default_model: str
) -> None:
    """For ever: whenever `asked`, one time after the other. However often that is meanwhile, it means once more."""
    while True:
        await asked.wait()
        asked.clear()
        served = await _reload(loaded, swap, metrics, default_model)
        if served is not None:
            loaded = served  # before it settles: what nobody holds any more is freed then
            await in_loader(loaded.settle)


async def _reload(old: Loaded, swap: Swap, metrics: Metrics, default_model: str) -> Loaded | None:
    """What is served afterwards: what was found, or `old` if that will not do. None if nothing has changed."""
    if old.again is None:
        return None
    logger.info("looking at the model repository again")
    new = await _found(old.again, old.catalog, metrics, default_model)
    if new is None:
        return old
    if _same(old.catalog, new.catalog):
        logger.info("nothing has changed in the model repository")
        return None
    logger.info("serving %s from now on", ", ".join(new.catalog.bundles))
    await swap(new)
    return new


async def _found(load: Callable[[], Loaded], old: Catalog, metrics: Metrics, default_model: str) -> Loaded | None:
    """What `load` gives; None if it fails, or must not be served instead of `old`."""
    try:
        new = await load_noted(load, metrics)
    except Exception:
        logger.exception("reloading failed: what was served goes on")
        return None
    problem = _why_not(old, new.catalog, default_model)
    if problem is not None:
        metrics.bundle_success.set(0)
        logger.error("%s: what was served goes on", problem)
        return None
    return new


def _why_not(old: Catalog, new: Catalog, default_model: str) -> str | None:
    """Why `new` must not be served; None if it may."""
    if old.bundles and not new.bundles:
        return "no bundle would be left"
    if _has(old, default_model) and not _has(new, default_model):
        return f"the default model {default_model} would be gone"
    return None


def _has(catalog: Catalog, model: str) -> bool:
    try:
        catalog.find(model)
    except UnknownModel:
        return False
    return True


def _same(old: Catalog, new: Catalog) -> bool:
    return (old.digests, old.refused) == (new.digests, new.refused)
