"""The load: clients in a closed loop, on connections that stay, lean enough to be the smaller part of a request.

`python -m benchmarks.peers.load PORT WARM_S SECONDS` reads a request from standard input and prints what became of it;
`python -m benchmarks.peers.load echo` answers any request with the same bytes, to see what the clients can do.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from typing import cast

import uvloop

CLIENTS = 32
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


class Client(asyncio.Protocol):
    """Sends a request, and again as soon as the answer is whole."""

    def __init__(self, request: bytes, failed: asyncio.Future[None]) -> None:
        self.answered_at = list[float]()
        self.took_s = list[float]()
        self._request = request
        self._failed = failed
        self._answer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self._ask()

    def _ask(self) -> None:
        self._sent_at = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        answer = self._answer = self._answer + data
        head, end, body = answer.partition(b"\r\n\r\n")
        if not end:
            return
        head = head.lower()
        if not head.startswith(b"http/1.1 200"):
            self._fail(f"an answer was {answer!r}")
            return
        length = head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
        if not length:
            self._fail(f"an answer had no length: {answer!r}")
        elif len(body) >= int(length):
            self._answer = b""
            now = time.perf_counter()
            self.answered_at.append(now)
            self.took_s.append(now - self._sent_at)
            self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail("a connection ended")

    def _fail(self, why: str) -> None:
        if not self._failed.done():
            self._failed.set_exception(RuntimeError(why))


async def measure(port: int, request: bytes, warm_s: float, seconds: float) -> dict[str, float]:
    """Answers per second of the `seconds` after `warm_s`, and the milliseconds that they took.

    Raises RuntimeError for any answer but 200.
    """
    loop = asyncio.get_running_loop()
    failed = loop.create_future()
    clients = [Client(request, failed) for _ in range(CLIENTS)]
    for client in clients:
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)  # type: ignore[misc]
    started = time.perf_counter() + warm_s
    await asyncio.wait([failed], timeout=warm_s + seconds)
    if failed.done():
        failed.result()
    ended = started + seconds
    took_s = [
        took
        for client in clients
        for at, took in zip(client.answered_at, client.took_s, strict=True)
        if started <= at < ended
    ]
    if len(took_s) < 2:
        raise RuntimeError(f"{len(took_s)} answers in {seconds:g} s")
    percentiles = statistics.quantiles(took_s, n=100)
    failed.cancel()
    return {
        "per_s": len(took_s) / seconds,
        "p50_ms": 1000 * percentiles[49],
        "p99_ms": 1000 * percentiles[98],
        "most_ms": 1000 * max(took_s),
    }


class Echo(asyncio.Protocol):
    """Takes every piece that arrives for a request, which on one machine it is, and answers it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        self._transport.write(ANSWER)


async def echo() -> None:
    """Serve, after a line with the port, until the process is ended."""
    server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1] == "echo":
        uvloop.run(echo())
    else:
        port, warm_s, seconds = sys.argv[1:]
        print(json.dumps(uvloop.run(measure(int(port), sys.stdin.buffer.read(), float(warm_s), float(seconds)))))
