"""mosec: its Rust front batches, one kind of worker decodes and runs."""

from __future__ import annotations

from mosec import Server, Worker
from tiny_classifier import DELAY_MS, MAX_BATCH_SIZE, WORKERS, TinyClassifier, decode


class Classify(Worker):
    """Raw bytes in, JSON (mosec's default) out."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = TinyClassifier()

    def deserialize(self, data: bytes) -> object:
        """Called for each image of a batch."""
        return decode(data)

    def forward(self, data: list) -> list:
        """A batch."""
        return self.classifier.classify(data)


if __name__ == "__main__":
    server = Server()
    server.append_worker(Classify, num=WORKERS, max_batch_size=MAX_BATCH_SIZE, max_wait_time=int(DELAY_MS))
    server.run()
