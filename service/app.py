"""`create_app`: builds everything, starts it, stops it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from service.access import create_access
from service.batching import Batcher
from service.cache import AnswerCache, MemoryCache
from service.entropy import Entropy
from service.gateway import Gateway
from service.jobs.routes import jobs
from service.lag import watch_lag
from service.loading import Loaded, load_engine
from service.memory import UNLIMITED, Memory, watch_memory
from service.metrics import Metrics
from service.middleware import DirectMiddleware, RequestMiddleware
from service.oip.routes import oip, oip_server
from service.probes import probes
from service.problems import install_handlers
from service.rates import MemoryWindows
from service.reloading import load_noted, reload_when_asked
from service.repository import Catalog
from service.routes import catalog, direct, router
from service.settings import Settings
from service.tracing import create_tracing
from service.uploads import ByteBudget, budget_bytes
from service.watch.attack_watch import AttackWatch
from service.watch.families import MemoryFamilies

if TYPE_CHECKING:
    from service.jobs.board import Board
    from service.remote.queue import RemoteQueue
    from service.remote.shared import Shared

logger = logging.getLogger(__name__)

DESCRIPTION = (
    "Image classification and purification that withstand adversarial images better than the bare classifier "
    "does; how much better, and against what, each model's report says (GET /models). "
    "Errors are RFC 9457 problems."
)


def create_app(
    settings: Settings, load: Callable[[Settings], Loaded] = load_engine, memory: Memory = UNLIMITED
) -> FastAPI:
    """The application. It answers probes at once, and images as soon as `load` has come back; with `QUEUE=redis` as
    soon as a worker is there, and nothing is loaded. It takes no more memory than is left of `memory`.
    Raises SettingsError.
    """
    metrics = Metrics()
    shared = _share(settings, metrics)
    access = create_access(settings, MemoryWindows() if shared is None else shared.windows)
    guards = [] if access is None else access.guards()
    decoders = ThreadPoolExecutor(decoder_threads(), "decoder")
    budget = ByteBudget(budget_bytes(settings.max_batch_size, settings.max_image_bytes))
    cache = _create_cache(settings, shared)
    gateway = Gateway(
        settings,
        metrics,
        decoders,
        budget,
        Entropy(),
        cache=cache,
        access=access,
        memory=memory,
        tracing=create_tracing("gateway"),
    )
    if settings.similarity_limit or settings.shadow_rate or settings.evidence_dir is not None:
        gateway.watch = AttackWatch(gateway, MemoryFamilies() if shared is None else shared.families)
    models = oip
    if settings.predictor_url is not None:
        from service.oip.predictor import Predictor
        from service.oip.transformer import transformer

        gateway.predictor, models = Predictor(settings.predictor_url), transformer
    metrics.watch_readiness(gateway.why_not_ready)
    app = FastAPIOffline(
        title="Clarifier",
        description=f"{DESCRIPTION} {_limits(settings)}",
        redoc_url=None,
        swagger_ui_parameters={"tryItOutEnabled": True},
        lifespan=_lifespan(gateway, load, shared),
        telemetry={"tracing": False, "metrics": False, "logs": False},  # the framework's; ours are apart
    )
    app.state.gateway = gateway
    app.include_router(direct, dependencies=guards)
    app.include_router(catalog, dependencies=guards)
    app.include_router(jobs, dependencies=guards)
    app.include_router(router)
    app.include_router(probes)
    app.include_router(oip_server)
    app.include_router(models, dependencies=guards)
    app.add_middleware(DirectMiddleware, routes=direct.routes, access=access)
    app.add_middleware(RequestMiddleware, metrics=metrics, entropy=gateway.entropy, tracing=gateway.tracing)
    install_handlers(app)
    return app


def _share(settings: Settings, metrics: Metrics) -> Shared | None:
    """What is shared with other gateways in Redis; None if nothing is, or there is none."""
    url = settings.shared_redis_address
    if url is None or not _shares(settings):
        return None
    from service.remote.shared import Shared

    return Shared(url, metrics, tells=settings.queue == "memory")


def _shares(settings: Settings) -> bool:
    """Whether there is anything that gateways can share."""
    return bool(settings.cache_ttl_s or settings.rate_limit or settings.api_keys_file or settings.similarity_limit)


def _create_cache(settings: Settings, shared: Shared | None) -> AnswerCache | None:
    if not settings.cache_ttl_s:
        return None
    return MemoryCache(settings.cache_ttl_s) if shared is None else shared.cache(settings.cache_ttl_s)


def _limits(settings: Settings) -> str:
    return (
        f"Limits here: {settings.max_image_bytes:,} bytes and {settings.max_image_pixels:,} pixels an image, "
        f"{settings.max_batch_size} images a batch, {settings.request_timeout_ms / 1000:g} seconds an answer."
    )


def decoder_threads() -> int:
    """Enough to keep up, few enough to bound the memory of decoded originals."""
    return min(4, os.cpu_count() or 1)


def _lifespan(
    gateway: Gateway, load: Callable[[Settings], Loaded], shared: Shared | None
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_start(gateway, load))
        watching = [asyncio.create_task(watch_lag(gateway.metrics.event_loop_lag))]
        if gateway.memory.groups:
            watching.append(asyncio.create_task(watch_memory(gateway.memory, partial(allow, gateway))))
        if gateway.watch is not None:
            watching += map(asyncio.create_task, gateway.watch.loops())
        loading.add_done_callback(lambda task: _note_failure(gateway, task))
        if shared is not None:
            shared.start()
        try:
            yield
        finally:
            gateway.begin_drain()
            for task in watching:
                task.cancel()
            loading.cancel()
            await asyncio.wait([loading])
            if gateway.jobs is not None:
                await gateway.jobs.stop()
            if gateway.batcher is not None:
                await gateway.batcher.stop(gateway.drain_left_s())
            gateway.decoders.shutdown(wait=False, cancel_futures=True)
            if shared is not None:
                await shared.stop()
            if gateway.predictor is not None:
                await gateway.predictor.close()
            if gateway.tracing is not None:
                await asyncio.to_thread(gateway.tracing.close)

    return lifespan


def allow(gateway: Gateway) -> None:
    """Until the next look, uploads may have half of what requests may, since what they become takes memory too."""
    uploads, memory = gateway.uploads, gateway.memory
    uploads.allowed = (uploads.held + memory.promised + memory.spare) / 2


def _note_failure(gateway: Gateway, loading: asyncio.Task[None]) -> None:
    """Loading that failed is logged and leaves the service alive and not ready."""
    error = None if loading.cancelled() else loading.exception()
    if error is not None:
        logger.error("loading failed", exc_info=error)
        gateway.failure = "loading failed"


async def _start(gateway: Gateway, load: Callable[[Settings], Loaded]) -> None:
    """Open the queue: in this process once the engine is loaded, or the one in Redis."""
    if gateway.settings.queue == "redis":
        _meet_workers(gateway)
    else:
        await _start_engine(gateway, load)


def _meet_workers(gateway: Gateway) -> None:
    from service.remote.queue import RemoteQueue
    from service.remote.store import Store

    def learn(catalog: Catalog) -> None:
        gateway.catalog = catalog

    settings = gateway.settings
    store = Store(settings.redis_address)
    queue = RemoteQueue(
        store,
        max_queue_size=settings.max_queue_size,
        max_queue_wait_ms=settings.max_queue_wait_ms,
        max_batch_size=settings.max_batch_size,
        metrics=gateway.metrics,
        learn=learn,
    )
    gateway.metrics.watch_queue(queue)
    queue.start()
    gateway.batcher = queue
    gateway.jobs = _open_jobs(gateway, queue)


def _open_jobs(gateway: Gateway, queue: RemoteQueue) -> Board:
    from service.jobs.board import Board
    from service.jobs.runner import Runner
    from service.jobs.store import JobStore

    store = JobStore(gateway.settings.redis_address)
    board = Board(gateway.settings, store, Runner(gateway, queue, store), gateway.metrics)
    board.start()
    return board


async def _start_engine(gateway: Gateway, load: Callable[[Settings], Loaded]) -> None:
    """Load, serve what was loaded, and load again whenever that is asked for."""
    settings = gateway.settings
    loaded = await load_noted(partial(load, settings), gateway.metrics)
    batcher = Batcher(
        loaded.run_batch,
        engine_name=loaded.engine,
        max_batch_size=settings.max_batch_size,
        max_queue_delay_ms=settings.max_queue_delay_ms,
        max_queue_size=settings.max_queue_size,
        max_queue_wait_ms=settings.max_queue_wait_ms,
        metrics=gateway.metrics,
        tracing=gateway.tracing,
    )
    gateway.metrics.watch_queue(batcher)
    gateway.metrics.watch_device(loaded.memory_bytes)
    batcher.start()
    gateway.batcher = batcher
    _serve(gateway, loaded)
    if (reason := gateway.why_not_ready()) is not None:
        logger.error("not ready: %s", reason)

    async def swap(new: Loaded) -> None:
        _serve(gateway, new)
        await gateway.those_inside_leave()

    reloading = reload_when_asked(gateway.reload_asked, loaded, swap, gateway.metrics, settings.default_model)
    del loaded  # or what was served first would be kept
    await reloading


def _serve(gateway: Gateway, loaded: Loaded) -> None:
    """Requests that come from now on are for these bundles."""
    gateway.catalog = loaded.catalog
    gateway.metrics.note_bundles(loaded.catalog.digests, loaded.devices)
