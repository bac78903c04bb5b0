"""Near-duplicates are told from distinct images, and from the very same one."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from PIL import Image

from service.watch.families import CAPACITY, MemoryFamilies
from service.watch.fingerprints import Fingerprints
from service.work import Floats, Pixels
from tests.service.conftest import Running, until
from tests.service.fakes import encoded, green, png

CIFAR10 = Path(__file__).parents[4] / "shared" / "data" / "cifar10" / "test-00000-of-00001.parquet"

R = TypeVar("R")
SALT = 0x5EED
"""With one of many a family splits, and its count begins again."""


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


class Watch:
    """What is a service's answer's by-product, at once."""

    def __init__(self, limit: int, capacity: int = CAPACITY) -> None:
        self.limit = limit
        self.families = MemoryFamilies(capacity)
        self.fingerprints = Fingerprints(SALT)

    def note(self, who: str, image: Pixels | Floats) -> int:
        """How many near-duplicates more than may be."""
        (likenesses,) = now(self.families.note([self.fingerprints.take(who, image)]))
        return max(0, likenesses - self.limit)


def now(coroutine: Coroutine[None, None, R]) -> R:
    """What it returns, which waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        answer: R = end.value
        return answer
    raise AssertionError("it waits")


@pytest.mark.parametrize("side", [32, 224])
def test_row_84_a_square_attack_is_an_alert_soon_and_until_its_end(side: int) -> None:
    watch = Watch(50)
    excess = [watch.note("one", query) for query in square_attack(scene(1, side), 500)]
    assert not any(excess[:50])
    assert sum(count > 0 for count in excess) > 400
    assert excess[-1] > 300


def test_row_84_other_images_between_the_queries_of_an_attack_do_not_hide_it() -> None:
    watch = Watch(50)
    alerts = 0
    for number, query in enumerate(square_attack(scene(1), 300)):
        alerts += watch.note("one", query) > 0
        assert all(not watch.note("one", scene(1000 + 5 * number + other)) for other in range(5))
    assert alerts > 200


def test_distinct_images_are_no_alert() -> None:
    watch = Watch(1)
    assert not any(watch.note("one", scene(seed)) for seed in range(1000))


def test_the_same_image_again_and_again_is_no_alert() -> None:
    watch = Watch(1)
    assert not any(watch.note("one", scene(1)) for _ in range(100))


def test_what_one_sends_is_not_held_against_another() -> None:
    watch = Watch(3)
    queries = list(square_attack(scene(1), 40))
    assert not any(watch.note(f"client {number}", query) for number, query in enumerate(queries))
    assert any(watch.note("one", query) for query in queries)


def test_tiny_and_single_colored_images_and_floats_have_fingerprints_too() -> None:
    watch = Watch(0)
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    assert [watch.note("one", image) for image in (black, white, black + 1)] == [0, 0, 1]
    assert watch.note("one", (scene(1) / 255).astype(np.float32)) == 0
    assert watch.note("one", scene(1)) == 1


def test_memory_is_bounded() -> None:
    watch = Watch(50, capacity=500)
    for seed in range(200):
        watch.note("one", scene(seed))
    assert watch.families.size <= 2 * 550


@pytest.mark.skipif(not CIFAR10.exists(), reason="the CIFAR-10 parquet files are not in ../shared/data/cifar10")
def test_row_84_no_two_of_ten_thousand_real_images_alert_and_attacks_on_them_do() -> None:
    from pyarrow import parquet

    files = parquet.read_table(CIFAR10).column(0).to_pylist()
    images = [np.asarray(Image.open(io.BytesIO(file["bytes"]))) for file in files]
    watch = Watch(2, capacity=1_000_000)
    assert sum(watch.note("one", image) > 0 for image in images) == 0
    for image in images[:10]:
        watch = Watch(50)
        assert sum(watch.note("one", query) > 0 for query in square_attack(image, 1000)) > 900


def test_row_84_alerts_are_counted_and_logged_once_for_each_image(
    start: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    server = start(similarity_limit=10)
    for query in square_attack(scene(1, 8), 40):
        assert server.client.post("/classify?defense=none", content=png(query)).status_code == 200
    until(lambda: server.metric("clarifier_near_duplicates_total", key="(none)") >= 20)
    until(lambda: server.metric("clarifier_query_similarity_alerts_total") > 10)
    assert server.metric("clarifier_query_similarity_alerts_total") <= 30
    assert server.metric("clarifier_similarity_skipped_total") == 0
    lines = [record for record in caplog.records if "near-duplicates" in record.getMessage()]
    assert [record.__dict__["fields"] for record in lines] == [{"from": "127.0.0.1"}]


def test_by_default_nobody_looks(start: Callable[..., Running]) -> None:
    server = start()
    assert server.gateway.watch is None
    assert server.client.post("/classify?defense=none", content=encoded(green(), "PNG")).status_code == 200
