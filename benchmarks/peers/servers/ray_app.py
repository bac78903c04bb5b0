"""Ray Serve: a proxy process that speaks HTTP, and replicas that batch, decode and run."""

from __future__ import annotations

import signal

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse
from tiny_classifier import DELAY_MS, MAX_BATCH_SIZE, PORT, WORKERS, TinyClassifier, decode


@serve.deployment(num_replicas=WORKERS, max_ongoing_requests=4 * MAX_BATCH_SIZE, ray_actor_options={"num_cpus": 0.5})
class Classify:
    """Raw bytes in, JSON out."""

    def __init__(self) -> None:
        self.classifier = TinyClassifier()

    @serve.batch(max_batch_size=MAX_BATCH_SIZE, batch_wait_timeout_s=DELAY_MS / 1000)
    async def run(self, images: list[bytes]) -> list[dict]:
        """A batch."""
        return self.classifier.classify([decode(image) for image in images])

    async def __call__(self, request: Request) -> JSONResponse:
        """One request."""
        return JSONResponse(await self.run(await request.body()))


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(Classify.bind(), route_prefix="/classify")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
