"""`python -m service.worker`: an engine that takes its images from Redis. Start as many as there are devices."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial

import uvicorn
from prometheus_client import disable_created_metrics
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.connections import KEEP_ALIVE_S, bounded_http
from service.loading import (
    ENGINE_DIED,
    MISCONFIGURED,
    Loaded,
    check_device,
    check_repository,
    leave_if_loading,
    load_engine,
)
from service.logs import configure_logging
from service.metrics import Metrics
from service.probes import health
from service.reloading import load_noted, on_hangup, reload_when_asked
from service.remote.engine import RemoteEngine
from service.remote.store import Store
from service.settings import Settings, SettingsError, load_settings
from service.tracing import check_tracing, create_tracing

logger = logging.getLogger("service.worker")


async def work(settings: Settings, load: Callable[[Settings], Loaded] = load_engine) -> int:
    """Load, then take images until a signal; the exit status: 0 after a drain, 70 if the engine has ended by itself.

    A second signal ends the process at once, and so does the first while it loads.
    """
    metrics, loop = Metrics(), asyncio.get_running_loop()
    engine: RemoteEngine | None = None

    def end(number: int) -> None:
        if engine is None or engine.draining:
            os._exit(0 if engine is None else 128 + number)
        engine.draining = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)
    asked = asyncio.Event()
    on_hangup(asked.set)
    metrics.watch_readiness(lambda: "loading" if engine is None else engine.why_not_ready())
    probes = _probes(settings, metrics, lambda: engine)
    loaded = await load_noted(partial(load, settings), metrics)
    store = Store(settings.redis_address)
    tracing = create_tracing("worker")
    engine = RemoteEngine(settings, loaded, store, metrics, tracing)
    reloading = reload_when_asked(asked, loaded, engine.swap, metrics, settings.default_model)
    del loaded  # or what was served first would be kept
    beside = [asyncio.create_task(reloading), *([] if probes is None else [probes])]
    try:
        await engine.run()
    finally:
        for task in beside:
            task.cancel()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)
    status = ENGINE_DIED if engine.died else 0
    leave_if_loading(status)
    return status


def _probes(
    settings: Settings, metrics: Metrics, engine: Callable[[], RemoteEngine | None]
) -> asyncio.Task[None] | None:
    """/livez, /readyz and /metrics on their own port, where one is set."""
    if settings.worker_port is None:
        return None

    async def livez(_: Request) -> Response:
        here = engine()
        return health("live", None if here is None else here.why_not_live())

    async def readyz(_: Request) -> Response:
        here = engine()
        return health("ready", "loading" if here is None else here.why_not_ready())

    async def page(_: Request) -> Response:
        return Response(metrics.page(), media_type="text/plain; version=1.0.0; charset=utf-8")

    app = Starlette(routes=[Route("/livez", livez), Route("/readyz", readyz), Route("/metrics", page)])
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.worker_port,
        http=bounded_http(metrics, head_timeout_s=settings.body_timeout_s, idle_timeout_s=KEEP_ALIVE_S),
        lifespan="off",  # it has nothing to start or stop
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    return asyncio.create_task(_Unsignaled(config).serve())


class _Unsignaled(uvicorn.Server):
    """A server that leaves signals to the worker."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def main() -> None:
    """Work until a signal; exit 0 after a drain, 2 with one line if a setting is wrong, 70 if the engine ends."""
    argparse.ArgumentParser(
        prog="python -m service.worker",
        description="Run engines for gateways with CLARIFIER_QUEUE=redis. Settings are environment variables, see "
        "service/README.md.",
    ).parse_args()
    try:
        settings = load_settings()
        check_repository(settings)
        check_device(settings)
        check_tracing()
    except SettingsError as error:
        print(error, file=sys.stderr)
        sys.exit(MISCONFIGURED)
    configure_logging(settings.log_level, settings.log_format)
    logger.info("settings", extra={"fields": settings.model_dump(mode="json")})
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter
    sys.exit(asyncio.run(work(settings)))


if __name__ == "__main__":
    main()
