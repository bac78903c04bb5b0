from __future__ import annotations

from pathlib import Path

import torch

from training.progress import Progress

OF = {"attack": "pgd", "settings": {"steps": 3}, "images": [0, 4]}


def test_a_finding_is_there_again_for_the_next_evaluation(tmp_path: Path) -> None:
    assert Progress(tmp_path).find(OF) is None
    Progress(tmp_path).add(OF, {"right": [1, 0]})
    found = Progress(tmp_path).find(dict(reversed(OF.items())))
    assert found is not None
    assert found["right"] == [1, 0]
    assert found["of"] == OF


def test_whatever_it_depends_on_makes_another_finding(tmp_path: Path) -> None:
    progress = Progress(tmp_path)
    progress.add(OF, {"right": [1]})
    for change in ({"attack": "fgsm"}, {"settings": {"steps": 4}}, {"images": [4, 4]}, {"seed": 1}):
        assert progress.find({**OF, **change}) is None


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    progress = Progress(tmp_path)
    progress.add(OF, {"right": [1]})
    progress.add({**OF, "seed": 1}, {"right": [0]})
    lines = tmp_path / "findings.jsonl"
    lines.write_text(lines.read_text()[:-9])

    again = Progress(tmp_path)

    assert again.find(OF) is not None
    assert again.find({**OF, "seed": 1}) is None
    again.add({**OF, "seed": 2}, {"right": [1]})
    assert Progress(tmp_path).find({**OF, "seed": 2}) is not None


def test_images_are_kept_whole(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    progress = Progress(tmp_path)
    assert progress.images(OF) is None
    progress.keep_images(OF, images)
    kept = Progress(tmp_path).images(OF)
    assert kept is not None
    assert torch.equal(kept, images)
    assert [path.suffix for path in (tmp_path / "images").iterdir()] == [".safetensors"]
