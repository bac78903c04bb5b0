"""What a peer's handler does with an image: Pillow, one resize, TorchScript. The same for all of them."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIZE = 32
MAX_BATCH_SIZE = 32
DELAY_MS = float(os.environ.get("BENCH_DELAY_MS", "1"))
WORKERS = int(os.environ.get("BENCH_WORKERS", "1"))
PORT = int(os.environ.get("BENCH_PORT", "0"))

warnings.filterwarnings("ignore", category=DeprecationWarning)


def decode(data: bytes) -> np.ndarray:
    """The upload as RGB at the model's size, uint8 (SIZE, SIZE, 3)."""
    return to_pixels(Image.open(io.BytesIO(data)))


def to_pixels(file: Image.Image) -> np.ndarray:
    """As `decode`, for a file that is open."""
    image = file.convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(image)


class TinyClassifier:
    """The network and its classes from the folder that BENCH_MODEL names; it normalizes in its first layer."""

    def __init__(self, folder: str | None = None) -> None:
        torch.set_num_threads(1)
        path = Path(folder or os.environ["BENCH_MODEL"])
        self._classes = json.loads((path / "classes.json").read_text())
        self._network = torch.jit.optimize_for_inference(torch.jit.load(path / "network.pt"))
        for size in (1, 2, MAX_BATCH_SIZE) * 3:  # TorchScript compiles while it runs for the first times
            self.classify([np.zeros((SIZE, SIZE, 3), np.uint8)] * size)

    @torch.inference_mode()
    def classify(self, images: Sequence[np.ndarray]) -> list[dict[str, object]]:
        """The likeliest class of each image."""
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        probabilities, indices = self._network(batch).softmax(1).max(1)
        return [
            {"label": self._classes[index], "index": index, "probability": probability}
            for probability, index in zip(probabilities.tolist(), indices.tolist(), strict=True)
        ]
