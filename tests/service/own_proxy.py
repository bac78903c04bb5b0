"""What stands between a service and its Redis when a network misbehaves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from tests.service.own_redis import free_port


@dataclass
class Proxy:
    """Forwards to `target`, a port of this machine, as long as nothing is set."""

    target: int
    port: int = field(default_factory=free_port)
    delay_s: float = 0.0
    """Before each piece of an answer is handed on."""
    held: bool = False
    """Nothing is handed on, and nobody is told."""
    refusing: bool = False
    """Whoever connects is hung up on."""
    open: int = 0
    """Connections, now."""
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        """Of the Redis behind it."""
        return f"redis://127.0.0.1:{self.port}/0"

    def cut(self) -> None:
        """Hang up on everybody."""
        self._loop.call_soon_threadsafe(self._hang_up)

    def _hang_up(self) -> None:
        for writer in self._writers:
            writer.close()

    @contextmanager
    def running(self) -> Iterator[Proxy]:
        """It listens, in a thread of its own."""
        started = threading.Event()
        thread = threading.Thread(target=self._run, args=(started,))
        thread.start()
        assert started.wait(20)
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join(20)

    def _run(self, started: threading.Event) -> None:
        loop = self._loop
        server = loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", self.port))
        loop.call_soon(started.set)
        loop.run_forever()
        server.close()
        self._hang_up()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        self.open += 1
        self._writers.add(to_client)
        with suppress(OSError, asyncio.CancelledError):
            if not self.refusing:
                server, to_server = await asyncio.open_connection("127.0.0.1", self.target)
                self._writers.add(to_server)
                ways = [self._forward(client, to_server, 0.0), self._forward(server, to_client, None)]
                tasks = [asyncio.ensure_future(way) for way in ways]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    task.cancel()
                to_server.close()
                self._writers.discard(to_server)
        to_client.close()
        self._writers.discard(to_client)
        self.open -= 1

    async def _forward(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, delay_s: float | None) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                await asyncio.sleep(self.delay_s if delay_s is None else delay_s)
                while self.held:
                    await asyncio.sleep(0.05)
                target.write(data)
                await target.drain()
