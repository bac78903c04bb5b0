"""A part is decoded, run and written, without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.bulk.places import open_place
from service.bulk.sources import list_source
from service.bulk.stages import Plan, decode, image_seed, outcomes_of, write
from service.bulk.targets import Run
from service.errors import InferenceFailed
from service.work import Classified, EngineFault, Key, Operation, Pixels, Ran
from tests.service.bulk.conftest import picture, write_cifar

KEY = Key(Operation.CLASSIFY, "tiny@1", "atop")
POISON = 13


def plan_for(source: Path, target: Path, operation: Operation = Operation.CLASSIFY) -> tuple[Plan, pa.Table]:
    listing = list_source(open_place(str(source)))
    run = Run(
        operation=operation,
        source=str(source),
        column=listing.source.column,
        model="tiny@1",
        digest="",
        defense="atop",
        votes=1,
        top_k=2,
        max_image_bytes=20_000,
        max_image_pixels=2000,
        seed=3,
        part_size=8,
    )
    plan = Plan(run, listing.source, open_place(str(target)), "", ("a", "b", "c"), (8, 8), draws=True, batch_size=4)
    return plan, listing.images


def test_an_image_has_the_seed_of_its_name() -> None:
    assert image_seed(3, "sub/cat.jpg") == 4216018240040884
    assert image_seed(3, "test.parquet", 7) == 1017321408726938
    names: list[tuple[str, int | None]] = [("a", None), ("b", None), ("a", 1), ("a", 11), ("a1", 1)]
    seeds = {image_seed(seed, *name) for seed in (0, 1) for name in names}
    assert len(seeds) == 10
    assert all(0 <= seed < 2**53 for seed in seeds)


def test_decoding_gives_pixels_seeds_and_a_code_for_what_is_bad(photos: Path, tmp_path: Path) -> None:
    (photos / "large.bmp").write_bytes(picture(9, "BMP") + bytes(20_000))
    plan, images = plan_for(photos, tmp_path / "target")
    (photos / "b.jpg").unlink()
    part = decode(images, replace(plan, run=plan.run.model_copy(update={"max_image_pixels": 40 * 32})))
    assert dict(zip(part["path"], part["error"], strict=True)) == {
        "a.png": "",
        "b.jpg": "unreadable",
        "bad.png": "unsupported_format",
        "empty.webp": "empty_body",
        "large.bmp": "body_too_large",
        "more/a.PNG": "",
        "more/c.bmp": "",
    }
    assert part["pixels"].shape == (7, 8, 8, 3)
    assert part["pixels"][0].any()
    assert part["seed"][0] == image_seed(3, "a.png")
    few = decode(images, replace(plan, run=plan.run.model_copy(update={"max_image_pixels": 1000})))
    assert few["error"][0] == "too_many_pixels"


def test_a_batch_that_fails_is_halved_until_only_the_guilty_has_failed() -> None:
    def run(key: Key, images: Sequence[Pixels], seeds: Sequence[int]) -> Ran:
        if any(image[0, 0, 0] == POISON for image in images):
            raise RuntimeError("a layer fails")
        return Ran([Classified(np.array([seed], np.float32)) for seed in seeds])

    images = [np.full((2, 2, 3), value, np.uint8) for value in (1, POISON, 3, 4, 5)]
    outcomes = outcomes_of(run, KEY, images, [10, 11, 12, 13, 14])
    assert isinstance(outcomes[1], InferenceFailed)
    answers = [outcome.probabilities[0] for outcome in outcomes if isinstance(outcome, Classified)]
    assert answers == [10, 12, 13, 14]


@pytest.mark.parametrize("kind", ["oom", "cuda"])
def test_a_device_that_fails_is_no_fault_of_an_image(kind: str) -> None:
    sizes = []

    def run(key: Key, images: Sequence[Pixels], seeds: Sequence[int]) -> Ran:
        sizes.append(len(images))
        raise EngineFault(kind)

    with pytest.raises(EngineFault):
        outcomes_of(run, KEY, [np.zeros((2, 2, 3), np.uint8)] * 4, [0] * 4)
    assert sizes == [4, 2, 1]


def test_verdicts_are_written_with_what_failed_among_them(photos: Path, tmp_path: Path) -> None:
    plan, images = plan_for(photos, tmp_path / "target")
    part = {**decode(images, plan), "probabilities": np.tile(np.array([0.1, 0.7, 0.2], np.float32), (6, 1))}
    assert {name: value.tolist() for name, value in write(part, plan).items()} == {"images": [6], "failed": [2]}
    first, _, bad, *_ = pq.read_table(tmp_path / "target" / "results").to_pylist()
    assert first == {
        "path": "a.png",
        "label": "b",
        "index": 1,
        "probability": pytest.approx(0.7),
        "top": [
            {"label": "b", "index": 1, "probability": pytest.approx(0.7)},
            {"label": "c", "index": 2, "probability": pytest.approx(0.2)},
        ],
        "seed": image_seed(3, "a.png"),
        "error": None,
    }
    assert bad == {
        "path": "bad.png",
        **dict.fromkeys(["label", "index", "probability", "top"]),
        "seed": image_seed(3, "bad.png"),
        "error": "unsupported_format",
    }


def test_a_defense_that_draws_nothing_has_no_seeds(photos: Path, tmp_path: Path) -> None:
    plan, images = plan_for(photos, tmp_path / "target")
    write({**decode(images, plan), "probabilities": np.ones((6, 3), np.float32)}, replace(plan, draws=False))
    assert pq.read_table(tmp_path / "target" / "results")["seed"].null_count == 6


def test_purified_rows_keep_their_column(tmp_path: Path) -> None:
    write_cifar(tmp_path / "test.parquet", 3)
    plan, images = plan_for(tmp_path / "test.parquet", tmp_path / "target", Operation.PURIFY)
    write({**decode(images, plan), "linf": np.full(3, 0.5, np.float32)}, plan)
    table = pq.read_table(tmp_path / "target" / "results")
    assert table.column_names == ["path", "row", "img", "linf", "seed", "error"]
    again, rows = plan_for(tmp_path / "target" / "results", tmp_path / "again", Operation.PURIFY)
    assert again.source.column == "img"  # what was written can be read
    assert (decode(rows, again)["pixels"] == decode(images, plan)["pixels"]).all()
