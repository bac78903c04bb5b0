"""The promise of the README, on the shipped bundle and a real service: a photograph, then an attack on it."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from models import Bundle, load_bundle
from service.images import decode_image
from training.attacks.by_foolbox import foolbox_pgd
from training.config import DataRecipe
from training.data import load_split
from training.provenance import content_sha256

ROOT = Path(__file__).parent.parent
BUNDLE = ROOT / "models" / "bundles" / "cifar10" / "1"
CIFAR = ROOT.parent / "shared" / "data" / "cifar10"
CAT = 3


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(BUNDLE)


@pytest.fixture(scope="module")
def banner() -> Iterator[dict[str, str]]:
    """What `python -m service`, on a free port and patient with slow machines, prints when it is ready, by word."""
    settings = {"CLARIFIER_PORT": "0", "CLARIFIER_REQUEST_TIMEOUT_MS": "600000"}
    environment = os.environ | settings | {"PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "service"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = dict[str, str]()
        for line in process.stdout:
            name, _, value = line.strip().partition(" ")
            printed[name] = value.strip()
            if name == "memory":
                break
        assert "memory" in printed, "the service did not start"
        yield printed
        process.terminate()
        assert process.wait(60) == 0


@pytest.fixture(scope="module")
def service(banner: dict[str, str]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=banner["documentation"].removesuffix("/docs"), timeout=600) as client:
        yield client


def as_png(pixels: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def photograph() -> bytes:
    return as_png(skimage.data.chelsea())  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def adversarial(bundle: Bundle, photograph: bytes) -> bytes:
    """The photograph at the model's size after PGD-20 on the bare classifier, as a PNG of 8 bits."""
    pixels = decode_image(photograph, bundle.input_size, 10**8).pixels
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).unsqueeze(0).float() / 255
    attacked = foolbox_pgd(bundle.classifier, image, torch.tensor([CAT]), eps=8 / 255, steps=20, step_size=2 / 255)
    return as_png((attacked[0].permute(1, 2, 0) * 255).round().byte().numpy())


def classify(service: httpx.Client, image: bytes, query: str) -> dict[str, Any]:
    response = service.post(f"/classify?{query}", files={"image": image})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_command_that_is_printed_can_be_pasted(banner: dict[str, str]) -> None:
    command = shlex.split(banner["try"].replace("explain=true", "explain=true&seed=0"))
    ended = subprocess.run([*command, "--silent", "--show-error"], cwd=ROOT, capture_output=True, check=True)

    answer = json.loads(ended.stdout)
    assert command[0] == "curl"
    assert answer["label"] == answer["undefended"]["label"] == "cat"


@pytest.mark.parametrize("defense", ["none", "atop"])
def test_the_cat_is_a_cat(service: httpx.Client, photograph: bytes, defense: str) -> None:
    answer = classify(service, photograph, f"defense={defense}&explain=true&seed=0")

    assert answer["label"] == "cat"
    assert answer["undefended"]["label"] == "cat"
    assert answer["model"] == "cifar10@1"
    assert 0 <= answer["aid_score"] <= 1


def test_an_adversarial_image_fools_the_classifier_and_not_the_defended_one(
    service: httpx.Client, adversarial: bytes
) -> None:
    answer = classify(service, adversarial, "defense=atop&explain=true&seed=0&votes=8")

    assert answer["undefended"]["label"] != "cat"
    assert answer["label"] == "cat"


def test_the_answer_does_not_depend_on_the_neighbors(service: httpx.Client, bundle: Bundle, photograph: bytes) -> None:
    pixels = decode_image(photograph, bundle.input_size, 10**8).pixels
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
    others = torch.rand(64, 3, *bundle.input_size, generator=torch.Generator().manual_seed(0))
    others[40] = image
    for defense, tolerance in (("atop", 1e-4), ("aid", 0.02), ("zeropur", 0.02)):
        answer = classify(service, photograph, f"defense={defense}&seed=7&top_k=10")
        alone = {verdict["index"]: verdict["probability"] for verdict in answer["top"]}

        together = bundle.probabilities(defense, others, seed=7)[40]

        assert int(together.argmax()) == answer["index"]
        assert max(abs(alone[k] - float(together[k])) for k in alone) < tolerance


def test_row_42_three_encodings_of_a_photograph_get_nearly_the_same_answer(
    service: httpx.Client, photograph: bytes
) -> None:
    """The bound that service/README.md states: in what arrives, not in the model, which amplifies any difference."""
    picture = Image.open(io.BytesIO(photograph))
    probabilities = []
    for kind in ("PNG", "JPEG", "WEBP"):
        file = io.BytesIO()
        picture.save(file, kind, quality=95)
        answer = classify(service, file.getvalue(), "defense=none&top_k=10")
        probabilities.append([verdict["probability"] for verdict in sorted(answer["top"], key=lambda v: v["index"])])
    assert np.ptp(probabilities, axis=0).max() < 0.02


def test_the_purified_image_has_the_size_that_was_asked_for(service: httpx.Client, photograph: bytes) -> None:
    sizes = {}
    for size in ("model", "original"):
        response = service.post(f"/purify?defense=atop&size={size}", files={"image": photograph})
        assert response.status_code == 200
        assert float(response.headers["x-clarifier-linf"]) > 0
        sizes[size] = Image.open(io.BytesIO(response.content)).size

    assert sizes == {"model": (32, 32), "original": (451, 300)}


def test_the_aid_score_falls_when_the_image_is_attacked(
    service: httpx.Client, photograph: bytes, adversarial: bytes
) -> None:
    scores = [
        service.post("/detect", files={"image": image}).json()["aid_score"] for image in (photograph, adversarial)
    ]

    assert scores[1] < scores[0]


def test_every_shipped_bundle_is_small_and_carries_its_report() -> None:
    manifests = list((ROOT / "models" / "bundles").glob("*/*/bundle.json"))
    assert manifests
    for manifest in manifests:
        bundle = load_bundle(manifest.parent)
        size = sum(path.stat().st_size for path in manifest.parent.iterdir())
        rows = [bundle.report["undefended"], *bundle.report["defenses"].values()]  # type: ignore[attr-defined]

        assert size < 40e6
        assert bundle.report["recipe"]["content_sha256"] == content_sha256(manifest.read_bytes())  # type: ignore[index]
        assert {"atop", "aid", "zeropur", "auto"} == bundle.report["defenses"].keys()  # type: ignore[attr-defined]
        for row in rows:
            assert {"standard", "grey_box", "adaptive", "worst_case", "credible", "reasons", "cost"} <= row.keys()
            for cell in (row["standard"], *row["grey_box"].values()):
                low, high = cell["interval"]
                assert 0 <= low <= cell["accuracy"] <= high <= 1
                assert cell["n"] > 0


def test_the_report_of_the_naturally_trained_bundle_reaches_what_was_aimed_at(bundle: Bundle) -> None:
    report: dict[str, Any] = bundle.report
    atop, zeropur = report["defenses"]["atop"], report["defenses"]["zeropur"]

    assert report["undefended"]["standard"]["accuracy"] >= 0.92
    assert report["undefended"]["grey_box"]["pgd20"]["accuracy"] < 0.01
    assert atop["standard"]["accuracy"] >= 0.85
    assert atop["grey_box"]["pgd20"]["accuracy"] >= 0.70
    assert zeropur["grey_box"]["pgd20"]["accuracy"] >= 0.55
    assert report["detection"]["attacks"]["pgd20"]["auroc"] >= 0.95


@pytest.mark.skipif(not CIFAR.is_dir(), reason="the CIFAR-10 parquet files are not in ../shared/data/cifar10")
def test_test_images_that_fool_the_classifier_are_mostly_right_behind_a_defense(
    service: httpx.Client, bundle: Bundle
) -> None:
    """64 images, PGD-20 on the bare classifier, as PNGs over HTTP; a share of 64 can be 6 points off by chance."""
    test = load_split(DataRecipe(name="CIFAR-10", source=str(CIFAR), input_size=32), "test")
    test = test.subset(torch.randperm(len(test), generator=torch.Generator().manual_seed(99))[:64])
    clean = test.images.float() / 255
    torch.manual_seed(0)
    attacked = foolbox_pgd(bundle.classifier, clean, test.labels, eps=8 / 255, steps=20, step_size=2 / 255)

    def right(images: torch.Tensor, defense: str) -> float:
        pngs = [as_png((image.permute(1, 2, 0) * 255).round().byte().numpy()) for image in images]
        labels = list[int]()
        for start in range(0, len(pngs), 32):
            files = [("images", png) for png in pngs[start : start + 32]]
            answer = service.post(f"/classify/batch?defense={defense}&seed=0", files=files)
            labels += [result["index"] for result in answer.json()["results"]]
        return float(np.mean(np.array(labels) == test.labels[: len(labels)].numpy()))

    assert right(clean, "none") > 0.85
    assert right(clean, "atop") > 0.79
    assert right(attacked, "none") < 0.05
    assert right(attacked, "atop") > 0.70
    assert right(attacked[:32], "zeropur") > 0.55


@pytest.mark.parametrize("directory", sorted((ROOT / "models" / "bundles").glob("*/*")), ids=lambda p: p.parent.name)
def test_the_provenance_names_no_path_of_the_machine_that_made_it(directory: Path) -> None:
    text = (directory / "bundle.json").read_text() + (directory / "report.json").read_text()

    assert "/home/" not in text
    assert "../" not in text
    assert str(ROOT) not in text
