"""The routes of the contract, over HTTP, with a fake bundle."""

from __future__ import annotations

import io
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

import numpy as np
import psutil
import pytest
from PIL import Image

from service.app import decoder_threads
from service.images import BYTES_PER_DECODED_PIXEL, to_floats
from service.work import Pixels
from tests.service.conftest import Running, running, until
from tests.service.fakes import (
    NAN_SCORE_VALUE,
    NAN_VALUE,
    POISON_VALUE,
    FakeBundle,
    encoded,
    green,
    marked,
    png,
)
from tests.service.manifests import fake_manifest

GOOD = png(green())
ANSWER = {
    "request_id", "model", "digest", "defense", "ran", "degraded", "seed", "label", "index", "probability", "top",
    "undefended", "aid_score", "suspicious", "timing_ms",
}  # fmt: skip


def test_classify_answers_what_the_contract_says(service: Running) -> None:
    answer = service.client.post("/classify?defense=none", content=GOOD).json()
    assert set(answer) == ANSWER
    assert (answer["model"], answer["defense"], answer["ran"], answer["digest"]) == (
        "colors@1",
        "none",
        "none",
        "d" * 64,
    )
    assert (answer["label"], answer["index"]) == ("green", 1)
    assert [verdict["label"] for verdict in answer["top"]] == ["green", "red", "blue"]
    assert answer["probability"] == answer["top"][0]["probability"]
    assert sum(verdict["probability"] for verdict in answer["top"]) == pytest.approx(1, abs=1e-5)
    assert (answer["undefended"], answer["aid_score"], answer["suspicious"]) == (None, None, None)
    assert set(answer["timing_ms"]) == {"decode", "queue", "inference", "total"}
    parts = [answer["timing_ms"][stage] for stage in ("decode", "queue", "inference")]
    assert answer["timing_ms"]["total"] >= max(parts)


def test_auto_says_which_chain_an_image_got() -> None:
    images = (GOOD, png(np.full((8, 8, 3), 40, np.uint8)))
    with running(FakeBundle(fake_manifest(auto=True))) as server:
        answers = [server.client.post("/classify?defense=auto", content=image).json() for image in images]
    assert [(answer["defense"], answer["ran"]) for answer in answers] == [("auto", "none"), ("auto", "zeropur")]


def test_the_default_defense_is_the_bundles(service: Running) -> None:
    assert service.client.post("/classify", content=GOOD).json()["defense"] == "atop"


def test_the_defense_is_named_as_it_ran(service: Running) -> None:
    response = service.client.post("/classify?defense=atop:rt3,aid:code", content=GOOD)
    assert response.json()["defense"] == "atop,aid"


def test_top_k_limits_the_list(service: Running) -> None:
    assert len(service.client.post("/classify?top_k=2", content=GOOD).json()["top"]) == 2


def test_explain_adds_the_undefended_answer_and_the_verdict(service: Running) -> None:
    answer = service.client.post("/classify?explain=true&defense=aid", content=GOOD).json()
    assert set(answer["undefended"]) == {"label", "index", "probability"}
    assert answer["undefended"]["label"] == "green"
    score = float(to_floats(green()).mean())
    assert answer["aid_score"] == pytest.approx(score, abs=6e-4)
    assert answer["suspicious"] is (score < 0.5)
    bright = np.full((8, 8, 3), 250, np.uint8)
    assert service.client.post("/classify?explain=true", content=png(bright)).json()["suspicious"] is False


def test_a_model_without_a_detector_explains_without_a_verdict_and_cannot_detect() -> None:
    with running(FakeBundle(fake_manifest("plain", aid=False))) as server:
        answer = server.client.post("/classify?explain=true", content=GOOD).json()
        assert answer["undefended"]["label"] == "green"
        assert (answer["aid_score"], answer["suspicious"]) == (None, None)
        server.refuses(server.client.post("/detect", content=GOOD), 422, "no_detector")


def test_row_68_the_same_seed_gives_the_same_answer_and_a_drawn_one_is_returned(service: Running) -> None:
    first = service.client.post("/classify", content=GOOD).json()
    again = service.client.post(f"/classify?seed={first['seed']}", content=GOOD).json()
    other = service.client.post("/classify", content=GOOD).json()
    assert again["top"] == first["top"]
    assert again["seed"] == first["seed"]
    assert other["seed"] != first["seed"]
    assert 0 <= first["seed"] < 2**53
    assert other["top"] != first["top"]


def test_a_seed_of_64_bits_is_kept_whole(service: Running) -> None:
    text = service.client.post("/classify?seed=18446744073709551615", content=GOOD).text
    assert json.loads(text)["seed"] == 2**64 - 1


def test_an_answer_does_not_depend_on_its_neighbors(service: Running) -> None:
    def ask(seed: int) -> list[object]:
        response = service.client.post(f"/classify?seed={seed}", content=GOOD)
        top: list[object] = response.json()["top"]
        return top

    alone = ask(5)
    service.bundle.batches.clear()
    with ThreadPoolExecutor(16) as clients:
        together = list(clients.map(ask, [5, *range(100, 131)]))
    assert together[0] == alone
    assert together[1] != alone


@pytest.mark.parametrize(("accept", "kind"), [("*/*", "PNG"), ("image/png", "PNG"), ("image/webp", "WEBP")])
def test_purify_answers_an_image_and_says_how_it_was_made(service: Running, accept: str, kind: str) -> None:
    from PIL import Image

    response = service.client.post("/purify?defense=zeropur&seed=4", content=GOOD, headers={"accept": accept})
    assert response.headers["content-type"] == f"image/{kind.lower()}"
    assert response.headers["x-clarifier-model"] == "colors@1"
    assert response.headers["x-clarifier-defense"] == "zeropur"
    assert response.headers["x-clarifier-seed"] == "4"
    assert response.headers["x-content-type-options"] == "nosniff"
    picture = Image.open(io.BytesIO(response.content))
    assert picture.format == kind
    assert (np.asarray(picture) == green()[::-1]).all()


def test_purify_answers_floats_on_request(service: Running) -> None:
    gradient = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    headers = {"accept": "application/x-npy"}
    response = service.client.post("/purify?defense=zeropur", content=png(gradient), headers=headers)
    array = np.load(io.BytesIO(response.content), allow_pickle=False)
    assert (array.shape, array.dtype) == ((8, 8, 3), np.float32)
    assert np.allclose(array, to_floats(gradient[::-1]), atol=1e-6)
    distance = abs(to_floats(gradient[::-1]) - to_floats(gradient)).max()
    assert float(response.headers["x-clarifier-linf"]) == pytest.approx(distance, abs=1e-5)


def test_purify_cannot_make_other_types(service: Running) -> None:
    response = service.client.post("/purify", content=GOOD, headers={"accept": "image/gif"})
    service.refuses(response, 406, "not_acceptable")


def test_purify_at_the_original_size_carries_the_change_over(service: Running) -> None:
    from PIL import Image

    photo = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    same = service.client.post("/purify?defense=none&size=original", content=png(photo))
    assert (np.asarray(Image.open(io.BytesIO(same.content))) == photo).all()
    changed = service.client.post("/purify?defense=atop&size=original&seed=1", content=png(photo))
    pixels = np.asarray(Image.open(io.BytesIO(changed.content))).astype(int)
    assert pixels.shape == photo.shape
    assert (pixels[:, :20] == photo[:, :20]).all()  # outside the center crop
    assert (pixels[:, 20:80] >= photo[:, 20:80].astype(int) - 1).all()  # the fake only adds
    assert (pixels[:, 20:80] - photo[:, 20:80]).mean() > 5


def test_floats_and_huge_webp_are_not_made_at_the_original_size(service: Running) -> None:
    url = "/purify?defense=none&size=original"
    floats = service.client.post(url, content=GOOD, headers={"accept": "application/x-npy"})
    service.refuses(floats, 406, "not_acceptable")
    huge = png(np.zeros((400, 16384, 3), np.uint8))
    webp = service.client.post(url, content=huge, headers={"accept": "image/webp"})
    service.refuses(webp, 406, "not_acceptable")
    either = service.client.post(url, content=huge, headers={"accept": "image/webp, image/png;q=0.5"})
    assert either.headers["content-type"] == "image/png"


def test_detect_answers_score_verdict_and_threshold(service: Running) -> None:
    answer = service.client.post("/detect", content=GOOD).json()
    score = float(to_floats(green()).mean())
    assert answer["aid_score"] == pytest.approx(score, abs=6e-4)
    assert (answer["suspicious"], answer["threshold"]) == (True, 0.5)
    assert (answer["model"], answer["digest"]) == ("colors@1", "d" * 64)


def test_models_are_listed_with_their_reports(service: Running) -> None:
    listed = service.client.get("/models").json()
    assert listed["default_model"] == "colors"
    assert listed["models"][0]["report"] == {"undefended": {"standard": {"accuracy": 1.0}}}
    assert listed["refused"] == []
    assert service.client.get("/models/colors").json() == listed["models"]
    assert service.client.get("/models/colors@1").json() == listed["models"]
    service.refuses(service.client.get("/models/other"), 404, "unknown_model")


@pytest.mark.parametrize("model", ["other", "colors@2", ""])
def test_an_unknown_model_is_404(service: Running, model: str) -> None:
    response = service.client.post("/classify", params={"model": model}, content=GOOD)
    service.refuses(response, 404, "unknown_model")


def test_a_model_can_be_named_with_its_version(service: Running) -> None:
    for name in ("colors", "colors@1"):
        assert service.client.post(f"/classify?model={name}", content=GOOD).json()["model"] == "colors@1"


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/healthz", "/health", "/ping", "/metrics"])
def test_probes_answer_get_and_head(service: Running, path: str) -> None:
    assert service.client.get(path).status_code == 200
    head = service.client.head(path)
    assert (head.status_code, head.content) == (200, b"")


def test_the_documentation_is_served(service: Running) -> None:
    page = service.client.get("/docs").text
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert {PurePosixPath(source).suffix for source in sources} >= {".js", ".css"}
    assert all(source.startswith("/") for source in sources)  # from no other host
    assert all(service.client.get(source).status_code == 200 for source in sources)
    paths = service.client.get("/openapi.json").json()["paths"]
    assert {"/classify", "/classify/batch", "/purify", "/detect", "/models", "/livez", "/readyz"} <= set(paths)
    assert "multipart/form-data" in paths["/classify"]["post"]["requestBody"]["content"]
    batch = paths["/purify/batch"]["post"]
    assert "images" in batch["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    assert set(batch["responses"]["200"]["content"]) == {"application/zip"}
    assert "results.json" in batch["responses"]["200"]["description"]
    assert {parameter["name"] for parameter in batch["parameters"]} >= {"model", "defense", "seed", "size"}


# --- rows of the list of bad inputs that need a whole route


@pytest.mark.parametrize("content", [b"just text", b"%PDF-1.7", b"GIF89a" + bytes(30), b"<svg/>"])
def test_rows_25_and_26_what_is_no_image_is_415(service: Running, content: bytes) -> None:
    response = service.client.post("/classify", content=content, headers={"content-type": "image/png"})
    service.refuses(response, 415, "unsupported_format")


def test_row_28_a_truncated_image_is_422(service: Running) -> None:
    for kind in ("PNG", "JPEG", "WEBP", "BMP"):
        response = service.client.post("/classify", content=encoded(green(), kind)[:-5])
        service.refuses(response, 422, "undecodable")


def test_row_30_a_pixel_bomb_is_413(service: Running) -> None:
    from tests.service.test_headers import jpeg_of, png_of

    for bomb in (png_of(50_000, 50_000), jpeg_of(65_500, 65_500)):
        problem = service.refuses(service.client.post("/classify", content=bomb), 413, "too_many_pixels")
        assert problem["limit"] == 40_000_000
        assert problem["actual"] > problem["limit"]


def test_row_31_large_images_at_once_take_the_memory_that_the_banner_allows(service: Running) -> None:
    settings = service.gateway.settings
    side = int(settings.max_image_pixels**0.5)
    large = png(np.zeros((side, side, 3), np.uint8))
    process = psutil.Process()
    before = peak = process.memory_info().rss

    def ask(_: int) -> int:
        return service.client.post("/classify?defense=none", content=large).status_code

    with ThreadPoolExecutor(16) as clients:
        answers = [clients.submit(ask, number) for number in range(16)]
        while not all(answer.done() for answer in answers):
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.002)
    statuses = {answer.result() for answer in answers}
    assert 200 in statuses
    assert statuses <= {200, 429}
    assert peak - before < decoder_threads() * BYTES_PER_DECODED_PIXEL * settings.max_image_pixels + 2**26
    assert service.still_answers()


def test_row_34_sizes_at_the_edge(service: Running) -> None:
    assert service.client.post("/classify", content=png(green(1))).status_code == 200
    thin = np.zeros((1, 10_000, 3), np.uint8)
    service.refuses(service.client.post("/classify", content=png(thin)), 422, "extreme_aspect")


def test_row_35_an_animation_is_422(service: Running) -> None:
    from PIL import Image

    frames = [Image.fromarray(green()), Image.fromarray(green()[..., ::-1])]
    data = encoded(np.zeros((8, 8, 3), np.uint8), "WEBP", save_all=True, append_images=frames)
    service.refuses(service.client.post("/classify", content=data), 422, "animated")


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((40, 40, 3), np.uint8),
        np.full((40, 40, 3), 255, np.uint8),
        np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8),
        np.repeat((np.indices((40, 40)).sum(0) % 2 * 255)[..., None], 3, 2).astype(np.uint8),
        green(3),
        green(800),
    ],
    ids=["black", "white", "noise", "checkerboard", "small", "large"],
)
def test_rows_40_and_41_any_picture_gets_a_finite_answer(service: Running, pixels: Pixels) -> None:
    answer = service.client.post("/classify?defense=none", content=png(pixels)).json()
    assert sum(verdict["probability"] for verdict in answer["top"]) == pytest.approx(1, abs=1e-4)


def test_row_42_three_encodings_of_one_image_get_nearly_the_same_probabilities(service: Running) -> None:
    answers = [
        service.client.post("/classify?defense=none", content=encoded(green(64), kind, **options)).json()
        for kind, options in (("PNG", {}), ("JPEG", {"quality": 95}), ("WEBP", {"quality": 95}))
    ]
    probabilities = [answer["probability"] for answer in answers]
    assert max(probabilities) - min(probabilities) < 0.02


@pytest.mark.parametrize("route", ["/classify?defense=none", "/purify"])
def test_row_46_an_answer_that_is_not_finite_is_500_nan(service: Running, route: str) -> None:
    service.refuses(service.client.post(route, content=png(marked(NAN_VALUE))), 500, "nan")


@pytest.mark.parametrize("route", ["/detect", "/classify?defense=none&explain=true"])
def test_row_46_a_score_that_is_not_finite_is_500_nan(service: Running, route: str) -> None:
    image = png(marked(NAN_SCORE_VALUE))
    assert service.client.post("/classify?defense=none", content=image).status_code == 200
    service.refuses(service.client.post(route, content=image), 500, "nan")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_row_27_what_is_hidden_in_an_upload_does_not_come_back(service: Running, kind: str) -> None:
    upload = encoded(green(64), kind) + b"PK\x03\x04 canary <script>"
    response = service.client.post("/purify?size=original", content=upload)
    assert response.status_code == 200
    assert b"canary" not in response.content
    assert Image.open(io.BytesIO(response.content)).info == {}


def test_row_52_a_poisoned_image_fails_alone(service: Running) -> None:
    service.bundle.gate.clear()
    service.bundle.entered.clear()
    with ThreadPoolExecutor(4) as clients:
        first = clients.submit(service.client.post, "/classify?defense=none", content=GOOD)
        assert service.bundle.entered.wait(20)
        images = [GOOD, png(marked(POISON_VALUE)), GOOD]
        others = [clients.submit(service.client.post, "/classify?defense=none", content=i) for i in images]
        until(lambda: service.metric("clarifier_queue_depth") == 3)
        service.bundle.gate.set()
        assert first.result().status_code == 200
        assert [other.result().status_code for other in others] == [200, 500, 200]
        problem = others[1].result()
    service.refuses(problem, 500, "inference_failed")
    assert "poison" not in problem.text


def test_a_browser_that_comes_to_the_address_is_shown_the_documentation(service: Running) -> None:
    response = service.client.get("/")
    assert (response.status_code, response.headers["location"]) == (307, "/docs")


def test_the_documentation_lists_every_status_and_the_limits(service: Running) -> None:
    described = service.client.get("/openapi.json").json()
    responses = described["paths"]["/classify"]["post"]["responses"]
    assert {"200", "400", "404", "408", "413", "415", "422", "429", "500", "503", "504"} <= responses.keys()
    assert "`too-many-pixels`" in responses["413"]["description"]
    assert "10,485,760 bytes and 40,000,000 pixels" in described["info"]["description"]
