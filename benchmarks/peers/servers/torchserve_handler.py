"""TorchServe: a Java front that batches, Python workers that run this handler."""

from __future__ import annotations

from tiny_classifier import TinyClassifier, decode


class Classify:
    """Raw bytes in, JSON out."""

    def initialize(self, context) -> None:
        """Called in each worker."""
        self.classifier = TinyClassifier(context.system_properties["model_dir"])

    def handle(self, data: list, context) -> list:
        """A batch."""
        return self.classifier.classify([decode(bytes(row["body"])) for row in data])
