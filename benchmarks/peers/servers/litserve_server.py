"""LitServe: an API process with FastAPI, and worker processes that batch, decode and run."""

import os
from typing import Annotated

import litserve
import numpy as np
from fastapi import Body
from tiny_classifier import DELAY_MS, MAX_BATCH_SIZE, PORT, WORKERS, TinyClassifier, decode

RawBody = Annotated[bytes, Body(media_type="image/jpeg")]


class Classify(litserve.LitAPI):
    """Raw bytes in, JSON out."""

    def setup(self, device: str) -> None:
        """Called in each worker."""
        self.classifier = TinyClassifier()

    def decode_request(self, request: RawBody) -> np.ndarray:  # LitServe reads the annotation
        """Called in the worker for each image of a batch."""
        return decode(request)

    def batch(self, inputs: list) -> list:
        """As the images come."""
        return list(inputs)

    def predict(self, x: list) -> list:
        """A batch."""
        return self.classifier.classify(x)

    def unbatch(self, output: list) -> list:
        """An answer for each."""
        return output

    def encode_response(self, output: dict) -> dict:
        """As it is."""
        return output


if __name__ == "__main__":
    api = Classify(max_batch_size=MAX_BATCH_SIZE, batch_timeout=DELAY_MS / 1000)
    fast_queue = os.environ.get("BENCH_FAST_QUEUE") == "1"
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=WORKERS, fast_queue=fast_queue, timeout=30)
    server.run(host="127.0.0.1", port=PORT, num_api_servers=1, generate_client_file=False, log_level="warning")
