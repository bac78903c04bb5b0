"""Sources of real images, and a repository with a real bundle."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from models import save_bundle
from tests.networks import real_bundle


def picture(seed: int, kind: str = "PNG") -> bytes:
    """Noise of 40 × 32 pixels, as a file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_cifar(path: Path, count: int, *, row_group_size: int = 7) -> None:
    """A parquet file with the columns of CIFAR-10 as Hugging Face has it."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": picture(row), "path": None} for row in range(count)], kind)
    table = pa.table({"img": images, "label": pa.array([row % 4 for row in range(count)])})
    pq.write_table(table, path, row_group_size=row_group_size)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six images in two folders; two are bad."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    (folder / "a.png").write_bytes(picture(0))
    (folder / "b.jpg").write_bytes(picture(1, "JPEG"))
    (folder / "bad.png").write_bytes(b"this is no image")
    (folder / "empty.webp").write_bytes(b"")
    (folder / "more" / "a.PNG").write_bytes(picture(2))
    (folder / "more" / "c.bmp").write_bytes(picture(3, "BMP"))
    (folder / "notes.txt").write_text("no image, and not meant to be one")
    (folder / ".hidden.png").write_bytes(picture(4))
    return folder


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It has `tiny@1`."""
    directory = tmp_path_factory.mktemp("repository")
    save_bundle(real_bundle(), directory / "tiny" / "1")
    return directory
