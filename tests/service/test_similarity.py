"""Near-duplicates are told from distinct images, and from the very same one."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.similarity import SimilarityWatch
from service.work import Pixels
from tests.service.conftest import Running
from tests.service.fakes import encoded, green, png

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10" / "test-00000-of-00001.parquet"


def scene(seed: int, side: int = 32) -> Pixels:
    """A smooth picture of its own for each seed."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC))


def square_attack(image: Pixels, queries: int, eps: int = 8) -> Iterator[Pixels]:
    """The queries of a Square attack (Andriushchenko et al., ECCV 2020, L-infinity): stripes, then shrinking squares.

    Whether a square is kept is left to chance, since there is no model to ask.
    """
    rng = np.random.default_rng(0)
    side, clean = image.shape[0], image.astype(int)
    best = np.clip(clean + eps * rng.choice([-1, 1], (1, side, 3)), 0, 255)
    yield best.astype(np.uint8)
    for query in range(1, queries):
        length = max(1, round(side * (0.05 * 0.5 ** (8 * query / queries)) ** 0.5))
        row, column = rng.integers(0, side + 1 - length, 2)
        place = slice(row, row + length), slice(column, column + length)
        tried = best.copy()
        tried[place] = np.clip(clean[place] + eps * rng.choice([-1, 1], (1, 1, 3)), 0, 255)
        yield tried.astype(np.uint8)
        best = tried if rng.random() < 0.3 else best


@pytest.mark.parametrize("side", [32, 224])
def test_row_84_a_square_attack_is_an_alert_soon_and_until_its_end(side: int) -> None:
    watch = SimilarityWatch(50)
    excess = [watch.note("one", query) for query in square_attack(scene(1, side), 500)]
    assert not any(excess[:50])
    assert sum(count > 0 for count in excess) > 400
    assert excess[-1] > 300


def test_row_84_other_images_between_the_queries_of_an_attack_do_not_hide_it() -> None:
    watch = SimilarityWatch(50)
    alerts = 0
    for number, query in enumerate(square_attack(scene(1), 300)):
        alerts += watch.note("one", query) > 0
        assert all(not watch.note("one", scene(1000 + 5 * number + other)) for other in range(5))
    assert alerts > 200


def test_distinct_images_are_no_alert() -> None:
    watch = SimilarityWatch(1)
    assert not any(watch.note("one", scene(seed)) for seed in range(1000))


def test_the_same_image_again_and_again_is_no_alert() -> None:
    watch = SimilarityWatch(1)
    assert not any(watch.note("one", scene(1)) for _ in range(100))


def test_what_one_sends_is_not_held_against_another() -> None:
    watch = SimilarityWatch(3)
    queries = list(square_attack(scene(1), 40))
    assert not any(watch.note(f"client {number}", query) for number, query in enumerate(queries))
    assert any(watch.note("one", query) for query in queries)


def test_tiny_and_single_colored_images_and_floats_have_fingerprints_too() -> None:
    watch = SimilarityWatch(0)
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    assert [watch.note("one", image) for image in (black, white, black + 1)] == [0, 0, 1]
    assert watch.note("one", (scene(1) / 255).astype(np.float32)) == 0
    assert watch.note("one", scene(1)) == 1


def test_memory_is_bounded() -> None:
    watch = SimilarityWatch(50, capacity=500)
    for seed in range(200):
        watch.note("one", scene(seed))
    assert len(watch._seen) + len(watch._seen_before) <= 2 * 550


@pytest.mark.skipif(not CIFAR10.exists(), reason="the CIFAR-10 parquet files are not in ../shared/data/cifar10")
def test_row_84_no_two_of_ten_thousand_real_images_alert_and_attacks_on_them_do() -> None:
    from pyarrow import parquet

    files = parquet.read_table(CIFAR10).column(0).to_pylist()
    images = [np.asarray(Image.open(io.BytesIO(file["bytes"]))) for file in files]
    watch = SimilarityWatch(2, capacity=1_000_000)
    assert sum(watch.note("one", image) > 0 for image in images) == 0
    for image in images[:10]:
        watch = SimilarityWatch(50)
        assert sum(watch.note("one", query) > 0 for query in square_attack(image, 1000)) > 900


def test_row_84_alerts_are_counted_and_logged_once_for_each_image(
    start: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    server = start(similarity_limit=10)
    for query in square_attack(scene(1, 8), 40):
        assert server.client.post("/classify?defense=none", content=png(query)).status_code == 200
    alerts = server.metric("clarifier_query_similarity_alerts_total")
    assert 10 < alerts <= 30
    lines = [record for record in caplog.records if "near-duplicates" in record.getMessage()]
    assert [record.__dict__["fields"] for record in lines] == [{"from": "127.0.0.1"}]


def test_by_default_nobody_looks(start: Callable[..., Running]) -> None:
    server = start()
    assert server.gateway.similarity is None
    assert server.client.post("/classify?defense=none", content=encoded(green(), "PNG")).status_code == 200
