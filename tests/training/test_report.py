"""The page that people read: whole, self-contained, and true to the report."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models import load_bundle, transforms
from models.atop import AtopPurifier
from tests.networks import SIZE, tiny_bundle
from tests.training.evaluations import report_of
from tests.training.tiny import Workshop
from training.attacks.looks import Looks
from training.budgets import BUDGETS
from training.evaluation import every_level
from training.glossary import what_it_does
from training.pictures import data_url, magnified, pictures
from training.plan import Planner
from training.report import below, better_attacked, curve, histogram, page, table
from training.statistics import binomial
from training.subject import Subject


def page_of(workshop: Workshop) -> str:
    return (workshop.bundle / "report.html").read_text()


class Outline(HTMLParser):
    """Tags that are open, and everything that a tag refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.headings = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br", "link", "path", "use", "rect"):
            self.open.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href") and value]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href") and value]

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings += f"{data.strip()}|"


def test_the_page_needs_nothing_else(finished: Workshop) -> None:
    outline = Outline()
    outline.feed(page_of(finished))
    assert outline.open == []  # every tag is closed
    assert outline.references
    assert all(reference.startswith(("data:image/png;base64,", "#")) for reference in outline.references)
    assert "<script" not in page_of(finished)


def test_the_page_says_what_the_report_says(finished: Workshop) -> None:
    report, text = report_of(finished), page_of(finished)
    assert "Robustness of colors@1" in text
    for row in (report["undefended"], *report["defenses"].values()):
        assert f'<td class="worst">{100 * row["worst_case"]["accuracy"]:.1f}<' in text
        for cell in (*row["grey_box"].values(), *row["adaptive"].values()):
            low, high = (100 * end for end in cell["interval"])
            assert f"{low:.1f} to {high:.1f}" in text
        for reason in row["reasons"]:
            assert reason in text
    assert text.count("not credible") >= sum(not row["credible"] for row in report["defenses"].values())
    outline = Outline()
    outline.feed(text)
    for name in ("atop", "atop:rt3", "aid", "zeropur", "Pictures", "What AID sees"):
        assert name in outline.headings


def test_a_defense_that_was_measured_grey_box_only_has_no_worst_case_to_believe(finished: Workshop) -> None:
    report = report_of(finished)
    reasons = ["no attack that knows the defense was run"]
    unknown = {**report["defenses"]["zeropur"], "worst_case": None, "credible": False, "reasons": reasons}
    unknown.pop("against_static")
    text = page({**report, "defenses": {}, "grey_box_only": {"zeropur:coarse": unknown}}, {}, {"clean": [0.5]})
    assert "because no attack that knows them was run: zeropur:coarse." in text
    assert "zeropur:coarse is not credible" not in text
    assert '<td class="worst">not measured</td>' in text


def test_text_from_a_bundle_cannot_become_markup(finished: Workshop) -> None:
    report = report_of(finished)
    report["recipe"]["bundle"] = "<b>bold</b>@1"
    report["undefended"]["reasons"] = ["<script>alert(1)</script>"]
    text = page(report, {}, {"clean": [0.5]})
    assert "<b>bold" not in text
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_a_bundle_without_a_detector_has_a_page_too(finished: Workshop) -> None:
    report = {key: value for key, value in report_of(finished).items() if key != "detection"}
    assert "What AID sees" not in page(report, {}, {})


def row_with(curves: dict[str, Any]) -> dict[str, Any]:
    return {"curves": curves}


def test_curves_are_drawn_for_the_rows_that_have_them() -> None:
    point = {"accuracy": 0.5, "interval": [0.4, 0.6], "n": 10}
    rows = {
        "one": row_with({"eps": [{"eps": 0.01, **point}, {"eps": 0.03, **point}]}),
        "two": row_with({}),
    }
    drawn = curve(rows, "eps")
    assert drawn.startswith("<svg")
    assert ">one<" in drawn
    assert ">two<" not in drawn
    assert curve(rows, "steps") == ""
    assert drawn == curve(rows, "eps")
    averaged = curve({"one": row_with({"draws": [{"draws": 1, **point}, {"draws": 20, **point}]})}, "draws")
    assert "draws that the gradient is the mean of" in averaged


def test_every_attack_is_explained(finished: Workshop) -> None:
    bundle = load_bundle(finished.bundle)
    names = ("fgsm", "pgd20", "mim", "deepfool", "cw", "cw20", "di2", "pgd_l2", "autoattack")
    budget = BUDGETS["paper"].model_copy(update={"grey_box": names})
    planner = Planner(bundle.classifier, budget, 8 / 255, 0, {"other@1": bundle}, 10, bundle.aid)
    for defense in ("none", "atop", "aid", "zeropur", "auto"):
        for attack in every_level(planner, Subject(defense, bundle.defended(defense))):
            assert what_it_does(attack.name, attack.level), attack.name
    assert what_it_does("pgd20", "L1") != what_it_does("pgd_l2", "L1") == what_it_does("pgd20_l2", "L1")
    assert what_it_does("pgd20_l2", "L6") == ""  # a recipe's own name, for an attack on the whole defense


def test_a_defense_that_reads_attacked_images_better_than_clean_ones_is_explained(finished: Workshop) -> None:
    report = report_of(finished)
    row = report["defenses"]["zeropur"]
    row["standard"] = {"accuracy": 0.2, "interval": [0.15, 0.25], "n": 256}
    row["grey_box"]["fgsm"] |= {"accuracy": 0.28, "interval": [0.23, 0.33]}
    row["grey_box"]["pgd3"] |= {"accuracy": 0.22, "interval": [0.18, 0.27]}
    assert better_attacked(row) == ""  # chance explains it
    row["grey_box"]["pgd3"] |= {"accuracy": 0.6, "interval": [0.55, 0.65]}
    assert better_attacked(row) == "pgd3"
    assert "zeropur reads images of pgd3 better (60.0) than clean ones (20.0)" in page(report, {}, {})
    assert better_attacked({"grey_box": {}, "standard": row["standard"]}) == ""


def test_votes_are_explained_where_there_are_several(finished: Workshop) -> None:
    report = report_of(finished)
    assert "is the mean of" not in page(report, {}, {})
    report["recipe"]["votes"] = 8
    assert "is the mean of 8 draws, for the attacker too" in page(report, {}, {})


def test_the_histogram_names_what_it_shows() -> None:
    drawn = histogram({"clean": [0.9, 0.8], "pgd20": [0.1, 0.2]}, 0.5)
    for name in ("clean", "pgd20", "threshold"):
        assert f">{name}<" in drawn


# Pictures


def decoded(url: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    data = base64.b64decode(url.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)))


def test_a_picture_is_the_image() -> None:
    image = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    expected = (255 * image).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(decoded(data_url(image)), expected)


def test_differences_are_magnified_around_grey() -> None:
    difference = torch.tensor([0.0, 0.05, -0.05, 1.0, -1.0])
    torch.testing.assert_close(magnified(difference), torch.tensor([0.5, 0.9, 0.1, 1.0, 0.0]))


@pytest.mark.parametrize("defense", ["atop:rt2", "zeropur"])
def test_every_stage_is_shown_with_what_is_read_in_it(defense: str) -> None:
    bundle = tiny_bundle()
    defended = bundle.defended(defense)
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    adversarial = (images + 0.05).clamp(0, 1)
    labels = torch.tensor([1, 3])

    first, _ = pictures(defended, bundle.classes, images, labels, adversarial, Looks(5, range(2)))

    purified = defended.purify(adversarial, Looks(5, range(2)).next())
    assert first.label == "b"
    assert np.array_equal(decoded(first.original), decoded(data_url(images[0])))
    assert np.array_equal(decoded(first.purified), decoded(data_url(purified[0])))
    assert np.array_equal(decoded(first.correction), decoded(data_url(magnified(purified[0] - adversarial[0]))))
    assert first.read_purified == bundle.classes[int(defended.classifier(purified)[0].argmax())]
    assert (first.transformed is not None) == (defense == "atop:rt2")
    if first.transformed is not None:
        shown = decoded(first.transformed)
        assert (shown == 128).all(-1).mean() == pytest.approx(0.25, abs=0.05)  # what is hidden is mid-grey
        atop = defended.chain[0]
        assert isinstance(atop, AtopPurifier)
        seeds = defended.step_seeds(Looks(5, range(2)).next(), 0, 0)
        mask = atop.draw_masks(seeds, images.device)[0]
        hidden = transforms.hide(atop.noisy(adversarial, seeds), mask)
        assert np.array_equal(shown, decoded(data_url(hidden[0])))
        torch.testing.assert_close(atop.inpainter(hidden, mask)[-1].clamp(0, 1), purified)


def test_every_field_of_a_picture_is_on_the_page(finished: Workshop) -> None:
    text = page_of(finished)
    shown = len(re.findall(r'alt="original"', text))
    assert shown == 4 * 4  # four defenses, the four images of a batch


def test_a_gate_names_every_defense_that_is_too_weak_or_not_credible() -> None:
    strong = {"worst_case": binomial(50, 100), "credible": True, "reasons": []}
    doubted = {**strong, "credible": False, "reasons": ["its gradient is zero"]}
    report = {"defenses": {"a": strong, "b": doubted}, "grey_box_only": {}, "recipe": {"grey_box_only": []}}
    assert below(report, 0.5) == ["b: not credible: its gradient is zero"]
    assert below(report, 0.6)[:2] == [
        "a: the worst case is 0.5000, below 0.6",
        "b: the worst case is 0.5000, below 0.6",
    ]
    assert below({**report, "defenses": {"a": strong}}, 0.5) == []


def test_a_gate_is_not_passed_by_what_was_not_measured() -> None:
    strong = {"worst_case": binomial(50, 100), "credible": True, "reasons": []}
    beside = {"grey_box_only": {"b": {}, "c": {}}, "recipe": {"grey_box_only": ["c"]}}
    assert below({"defenses": {"a": strong}, **beside}, 0.5) == ["b: no attack that knows it was run"]
    nothing = {"defenses": {}, "grey_box_only": {"c": {}}, "recipe": {"grey_box_only": ["c"]}}
    assert below(nothing, 0.5) == ["no defense has a worst case in this report"]


def test_a_table_without_detection_has_no_line_for_it(finished: Workshop) -> None:
    report = {key: value for key, value in report_of(finished).items() if key != "detection"}
    assert "AUROC" not in table(report)
