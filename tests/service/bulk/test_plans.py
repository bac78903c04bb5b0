"""What is asked is checked before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.bulk.__main__ import parser
from service.bulk.places import BulkError
from service.bulk.plans import Work, make_plan
from service.bulk.targets import RUN, find_done, write_part
from service.settings import Settings
from tests.service.bulk.conftest import write_cifar


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


def plan(source: Path, target: Path, repository: Path, *options: str) -> Work:
    arguments = ["--repository", str(repository), "--model", "tiny", *options, str(source), str(target)]
    return make_plan(parser().parse_args(arguments), Settings())


def test_a_plan_has_the_rules_of_a_request(photos: Path, target: Path, repository: Path) -> None:
    work = plan(photos, target, repository, "--votes", "4", "--batch-size", "8", "--seed", "5")
    run = work.plan.run
    assert (run.model, run.defense, run.votes, run.top_k, run.seed) == ("tiny@1", "atop", 4, 4, 5)
    assert (work.plan.batch_size, run.part_size) == (2, 8)
    assert len(work.left) == 6
    assert not work.begun
    assert (target / RUN).exists()


def test_what_draws_nothing_runs_once(photos: Path, target: Path, repository: Path) -> None:
    work = plan(photos, target, repository, "--votes", "4", "--defense", "zeropur")
    assert (work.plan.run.votes, work.plan.draws) == (1, False)


def test_a_seed_that_nobody_gave_is_kept(photos: Path, target: Path, tmp_path: Path, repository: Path) -> None:
    first = plan(photos, target, repository)
    assert plan(photos, target, repository).plan.run.seed == first.plan.run.seed
    assert plan(photos, tmp_path / "other", repository).plan.run.seed != first.plan.run.seed


def test_only_what_is_missing_is_left(tmp_path: Path, target: Path, repository: Path) -> None:
    write_cifar(tmp_path / "test.parquet", 10)
    first = plan(tmp_path / "test.parquet", target, repository, "--batch-size", "2")
    assert first.plan.run.part_size == 2
    keys = ["path", "row"]
    done = first.left.slice(4, 2).append_column("error", [["undecodable", None]])
    write_part(first.plan.target, keys, done)
    later = plan(tmp_path / "test.parquet", target, repository, "--batch-size", "6")
    assert later.left["row"].to_pylist() == [0, 1, 2, 3, 6, 7, 8, 9]
    assert (later.begun, later.done, later.failed, later.plan.run.part_size) == (True, 2, 1, 2)
    assert len(find_done(later.plan.target, keys)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--defense", "magic"], "--defense: model tiny offers"),
        (["--votes", "65"], "--votes: "),
        (["--votes", "9", "--defense", "atop,aid"], "--votes: is at most 8"),
        (["--top-k", "5"], "--top-k: the model has 4 classes"),
        (["--seed", "-1"], "--seed: "),
        (["--model", "nosuch"], r"--model: there is no nosuch in .*; there are: tiny@1"),
        (["--model", "tiny@2"], "--model: there is no tiny@2"),
        (["--repository", "/nowhere"], "there are: none"),
        (["--column", "img"], "no parquet files"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_begun(
    options: list[str], message: str, photos: Path, target: Path, repository: Path
) -> None:
    with pytest.raises(BulkError, match=message) as refused:
        plan(photos, target, repository, *options)
    assert "\n" not in str(refused.value)
    assert not target.exists()


def test_a_target_in_its_source_is_refused(photos: Path, repository: Path, tmp_path: Path) -> None:
    for target in (photos, photos / "out", tmp_path):
        with pytest.raises(BulkError, match="neither in SOURCE"):
            plan(photos, target, repository)


def test_a_bundle_that_is_not_sound_is_refused(photos: Path, target: Path, tmp_path: Path) -> None:
    directory = tmp_path / "repository" / "tiny" / "1"
    directory.mkdir(parents=True)
    (directory / "bundle.json").write_text("{}")
    with pytest.raises(BulkError, match=r"tiny is refused: bundle\.json"):
        plan(photos, target, tmp_path / "repository")


@pytest.mark.parametrize(("images", "size"), [(6, 4), (1000, 16), (10_000, 156), (10**6, 1024)])
def test_a_part_is_whole_batches(images: int, size: int) -> None:
    from service.bulk.plans import _part_size

    assert _part_size(images, 4, (32, 32)) == size
