"""The promise of the README, on the shipped bundle and a real service: a photograph, then an attack on it."""

from __future__ import annotations

import io
import os
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
from training.attacks import foolbox_pgd

ROOT = Path(__file__).parent.parent
BUNDLE = ROOT / "models" / "bundles" / "cifar10" / "1"
CAT = 3


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(BUNDLE)


@pytest.fixture(scope="module")
def service() -> Iterator[httpx.Client]:
    """`python -m service` with nothing but a free port set."""
    environment = os.environ | {"CLARIFIER_PORT": "0", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "service"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = next(line.split()[-1] for line in process.stdout if "documentation" in line)
        with httpx.Client(base_url=address.removesuffix("/docs"), timeout=60) as client:
            yield client
        process.terminate()
        assert process.wait(60) == 0


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
        assert bundle.report["recipe"]
        for row in rows:
            assert {"standard", "grey_box", "adaptive", "worst_case", "credible", "reasons", "cost"} <= row.keys()
            for cell in (row["standard"], *row["grey_box"].values()):
                low, high = cell["interval"]
                assert 0 <= low <= cell["accuracy"] <= high <= 1
                assert cell["n"] > 0


def test_the_provenance_names_no_path_of_the_machine_that_made_it() -> None:
    text = (BUNDLE / "bundle.json").read_text() + (BUNDLE / "report.json").read_text()

    assert "/home/" not in text
    assert "../" not in text
    assert str(ROOT) not in text
