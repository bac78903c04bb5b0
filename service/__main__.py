"""`python -m service`: settings from the environment, one process, and an orderly end on SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import math
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn
from prometheus_client import disable_created_metrics

from service.allocator import keep_freed_memory
from service.app import create_app, decoder_threads
from service.cache import MAX_CACHE_BYTES, MemoryCache
from service.connections import KEEP_ALIVE_S, bounded_http
from service.gateway import Gateway
from service.images import BYTES_PER_DECODED_PIXEL, BYTES_PER_PURIFIED_SAMPLE
from service.keys import read_keys
from service.loading import (
    ENGINE_DIED,
    MISCONFIGURED,
    Loaded,
    check_device,
    check_repository,
    leave_if_loading,
    leave_now,
    load_engine,
)
from service.logs import configure_logging
from service.memory import find_memory
from service.middleware import MAX_ACTIVE_REQUESTS
from service.reloading import on_hangup
from service.settings import PREFIX, Settings, SettingsError, load_settings
from service.tracing import check_tracing
from service.uploads import batch_body_bytes
from service.watch.evidence import check_evidence

logger = logging.getLogger("service")

EXAMPLE = "examples/cat.jpg"
"""A photograph that is there for whoever starts the service in a clone."""
ENGINE_WATCH_S = 1.0
"""Between two looks at the engine: probes have the time to see that it has ended."""
SOCKET_BUFFER_BYTES = 64 * 1024
"""That uvicorn reads ahead of a request."""
SWITCH_INTERVAL_S = 0.0001
"""How long the event loop may keep the interpreter from the engine, which needs it between operations."""
COLLECTION_THRESHOLD = 10_000
"""New objects between two looks for cycles: Python's 700 is a handful of requests."""


class Server(uvicorn.Server):
    """uvicorn with the time line of a drain: not ready, still accepting, refusing, finishing, exit 0.

    It ends by itself, with `engine_died` set, if the engine does.
    """

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        super().__init__(config)
        self.engine_died = False
        self._gateway = gateway
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        on_hangup(self._gateway.reload)
        beside = [
            asyncio.create_task(_announce_when_ready(self._gateway, self.config.port)),
            asyncio.create_task(self._end_with_the_engine()),
        ]
        try:
            await super().serve(sockets)
        finally:
            for task in beside:
                task.cancel()

    async def _end_with_the_engine(self) -> None:
        while not self._gateway.engine_died:
            await asyncio.sleep(ENGINE_WATCH_S)
        logger.critical("the engine has ended: so does this process, to be started again")
        self.engine_died = self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the drain, the second ends the process now."""
        if self._gateway.draining:
            os._exit(128 + sig)
        self._gateway.draining = True
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        settings = self._gateway.settings
        logger.info("draining: not ready, accepting for another %g s", settings.drain_delay_s)
        assert self._loop is not None
        self._loop.call_later(settings.drain_delay_s, self._refuse)

    def _refuse(self) -> None:
        assert self._loop is not None
        self._gateway.begin_drain()
        self._loop.call_later(self._gateway.settings.drain_timeout_s, self._gateway.abandon)
        self.should_exit = True


async def _announce_when_ready(gateway: Gateway, port: int) -> None:
    """Tell whoever started us by hand what to type next."""
    elsewhere = gateway.settings.queue == "redis"  # workers may come at any time
    while (reason := gateway.why_not_ready()) in ("loading", "the engine is silent") or (elsewhere and reason):
        await asyncio.sleep(0.05)
    if gateway.why_not_ready() is not None:
        return
    settings, worst = gateway.settings, f"{worst_case_bytes(gateway) // 2**20} MiB, beside the models"
    if gateway.memory.spare < math.inf:
        worst += f"; {gateway.memory.spare / 2**20:.0f} MiB are left here, and then 503"
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    photo = EXAMPLE if Path(EXAMPLE).exists() else "PHOTO.jpg"
    address = f"{'[' + host + ']' if ':' in host else host}:{port}"
    key, explain = ("", "&explain=true") if settings.api_keys_file is None else ("-H 'X-API-Key: KEY' ", "")
    print(
        f"Clarifier is ready.\n"
        f"  documentation  http://{address}/docs\n"
        f"  models         http://{address}/models\n"
        f"  try            curl {key}-F image=@{photo} 'http://{address}/classify?defense=atop{explain}'\n"
        f"  queue          {settings.max_queue_size} images\n"
        f"  memory         uploads and images take at worst {worst}",
        flush=True,
    )


def worst_case_bytes(gateway: Gateway) -> int:
    """What requests can take at once if every limit is reached, without models and what an engine needs for a batch."""
    settings = gateway.settings
    inputs = (bundle.manifest.input_size for bundle in gateway.catalog.bundles.values())
    samples = max((3 * height * width for height, width in inputs), default=0)
    body = batch_body_bytes(settings.max_batch_size, settings.max_image_bytes)
    decoding = BYTES_PER_DECODED_PIXEL * settings.max_image_pixels + 2 * body  # a part, and a file without metadata
    waiting = samples * (settings.max_queue_size + settings.max_batch_size)
    answering = MAX_ACTIVE_REQUESTS * (SOCKET_BUFFER_BYTES + BYTES_PER_PURIFIED_SAMPLE * samples)  # batches: uploads
    cached = MAX_CACHE_BYTES if isinstance(gateway.cache, MemoryCache) else 0
    return gateway.uploads.limit + body + decoder_threads() * decoding + waiting + answering + cached


def _listen(settings: Settings) -> socket.socket:
    """A bound socket. Raises SettingsError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        place = f"{PREFIX}HOST and {PREFIX}PORT: cannot listen on {settings.host} port {settings.port}"
        raise SettingsError(f"{place}: {error.strerror}") from None
    return listener


def _check_keys(settings: Settings) -> None:
    """Raises SettingsError if there is a file of keys that cannot be used."""
    if settings.api_keys_file is not None:
        read_keys(settings.api_keys_file)


def _kept(loaded: Loaded) -> Loaded:
    """What is loaded stays: spare the collector walks over torch's many objects, which hold up every request."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECTION_THRESHOLD)
    return loaded


def serve(settings: Settings, listener: socket.socket, load: Callable[[Settings], Loaded] = load_engine) -> None:
    """Run the application on `listener` until a signal. Raises SystemExit(70) if the engine ends by itself."""
    keep_freed_memory()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter
    app = create_app(settings, lambda settings: _kept(load(settings)), find_memory())
    gateway = app.state.gateway
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=listener.getsockname()[1],
        http=bounded_http(gateway.metrics, head_timeout_s=settings.body_timeout_s, idle_timeout_s=KEEP_ALIVE_S),
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # anybody can send them: an address, for a rate limit, is the connection's
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings.drain_timeout_s) + 2,
    )
    server = Server(config, gateway)
    server.run([listener])
    if server.engine_died:
        sys.exit(ENGINE_DIED)
    leave_if_loading(0)
    if gateway.batcher is not None and gateway.batcher.alive:
        leave_now(0)


def start(**given: object) -> None:
    """Serve with the settings of the environment, and of `given` in their place, until a signal.

    Exit 0 after a drain, 2 with one line if a setting is wrong, 70 if the engine ends.
    """
    try:
        settings = load_settings(**given)
        if settings.queue == "memory":
            check_repository(settings)
            check_device(settings)
        _check_keys(settings)
        check_tracing()
        check_evidence(settings)
        listener = _listen(settings)
    except SettingsError as error:
        print(error, file=sys.stderr)
        sys.exit(MISCONFIGURED)
    configure_logging(settings.log_level, settings.log_format)
    logger.info("settings", extra={"fields": settings.model_dump(mode="json")})
    serve(settings, listener)


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m service",
        description="Serve a model repository. Settings are environment variables, see service/README.md.",
    ).parse_args()
    start()


if __name__ == "__main__":
    main()
