"""What is done, and what a target refuses."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from service.bulk.places import BulkError, open_place
from service.bulk.targets import Run, find_done, missing, open_run, png_name, write_part
from service.work import Operation

RUN = Run(
    operation=Operation.CLASSIFY,
    source="/photos",
    column=None,
    model="tiny@1",
    digest="d" * 64,
    defense="atop",
    votes=1,
    top_k=5,
    max_image_bytes=1000,
    max_image_pixels=1000,
    seed=7,
    part_size=32,
)


def rows(*paths: str, error: str | None = None) -> pa.Table:
    return pa.table({"path": list(paths), "error": pa.array([error] * len(paths), pa.string())})


def test_a_run_goes_on_with_its_own_arguments_and_seed(tmp_path: Path) -> None:
    target = open_place(str(tmp_path / "target"))
    assert open_run(target, RUN, seed_given=False) == (RUN, False)
    later = RUN.model_copy(update={"seed": 8, "part_size": 64})
    assert open_run(target, later, seed_given=False) == (RUN, True)
    with pytest.raises(BulkError, match="seed was 7, now 8"):
        open_run(target, later, seed_given=True)
    other = RUN.model_copy(update={"defense": "none", "operation": Operation.PURIFY})
    with pytest.raises(BulkError, match="operation was classify, now purify; defense was atop, now none"):
        open_run(target, other, seed_given=False)


def test_a_target_that_is_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BulkError, match="is a file"):
        open_run(open_place(str(tmp_path / "file")), RUN, seed_given=False)
    with pytest.raises(BulkError, match="is not empty"):
        open_run(open_place(str(tmp_path)), RUN, seed_given=False)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(BulkError, match="not one of this version"):
        open_run(open_place(str(tmp_path)), RUN, seed_given=False)


def test_what_has_no_row_is_missing(tmp_path: Path) -> None:
    target, images = open_place(str(tmp_path)), pa.table({"path": ["a", "b", "c", "d"]})
    assert missing(images, find_done(target, ["path"]), ["path"]) == images
    write_part(target, ["path"], rows("c", "a"))
    write_part(target, ["path"], rows("x", error="undecodable"))
    done = find_done(target, ["path"])
    assert sorted(done["path"].to_pylist()) == ["a", "c", "x"]
    assert done["error"].null_count == 2
    assert missing(images, done, ["path"])["path"].to_pylist() == ["b", "d"]


def test_a_row_is_named_by_its_file_and_its_number(tmp_path: Path) -> None:
    keys = ["path", "row"]
    target, images = open_place(str(tmp_path)), pa.table({"path": ["a", "a", "b"], "row": [0, 1, 0]})
    write_part(target, keys, images.slice(1, 1).append_column("error", pa.array([None], pa.string())))
    assert missing(images, find_done(target, keys), keys).to_pylist() == [
        {"path": "a", "row": 0},
        {"path": "b", "row": 0},
    ]


def test_a_part_that_is_done_twice_replaces_itself(tmp_path: Path) -> None:
    target = open_place(str(tmp_path))
    for _ in range(2):
        write_part(target, ["path"], rows("a", "b"))
    write_part(target, ["path"], rows("a\nb"))
    assert len(list((tmp_path / "results").iterdir())) == 2
    assert len(find_done(target, ["path"])) == 3


def test_what_a_kill_left_is_deleted_and_what_is_damaged_is_named(tmp_path: Path) -> None:
    target = open_place(str(tmp_path))
    (target / "results" / ".part-half.parquet").write(b"PAR1")
    assert len(find_done(target, ["path"])) == 0
    assert list((tmp_path / "results").iterdir()) == []
    (target / "results" / "part-0.parquet").write(b"PAR1")
    with pytest.raises(BulkError, match=r"part-0\.parquet is damaged"):
        find_done(target, ["path"])


@pytest.mark.parametrize(
    ("path", "name"), [("a.png", "a.png"), ("sub/A.PNG", "sub/A.PNG"), ("a.jpg", "a.jpg.png"), ("b.webp", "b.webp.png")]
)
def test_a_purified_file_keeps_its_name(path: str, name: str) -> None:
    assert png_name(path) == name
