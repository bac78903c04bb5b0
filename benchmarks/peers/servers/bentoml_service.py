"""BentoML: a worker process that speaks HTTP, batches adaptively, decodes and runs in a thread.

A batchable API takes a list, which over HTTP is a multipart form: the one peer that cannot take the raw body.
"""

import bentoml
from PIL import Image
from tiny_classifier import MAX_BATCH_SIZE, WORKERS, TinyClassifier, to_pixels


@bentoml.service(workers=WORKERS, traffic={"timeout": 30})
class Classify:
    """A list of one image in, a list of one JSON object out."""

    def __init__(self) -> None:
        self.classifier = TinyClassifier()

    # Its batching adapts how long it waits; `max_latency_ms` is the time beyond which it answers 503: the default.
    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH_SIZE)
    def classify(self, images: list[Image.Image]) -> list[dict]:
        """A batch."""
        return self.classifier.classify([to_pixels(image) for image in images])
