"""The Open Inference Protocol over HTTP: as tritonclient speaks it, and as nobody should."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from service.app import create_app
from service.images import to_floats
from service.oip.routes import EXTENSIONS
from service.oip.steps import JSON_FLOAT_BYTES
from service.settings import Settings
from service.work import Floats, Pixels
from tests.service.conftest import Running, running, until
from tests.service.fakes import NAN_VALUE, POISON_VALUE, FakeBundle, encoded, green, marked, png
from tests.service.manifests import SIDE, fake_manifest

GOOD = png(green())
INFER = "/v2/models/colors/infer"
JSON = {"content-type": "application/json"}
ROUTE = "/v2/models/{name}/infer"


@pytest.fixture
def client(service: Running) -> Iterator[triton.InferenceServerClient]:
    """Triton's own client."""
    client = triton.InferenceServerClient(f"127.0.0.1:{service.port}")
    yield client
    client.close()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def files(*images: bytes, binary: bool = True) -> list[Any]:
    """The input `image` of tritonclient."""
    elements = list(images) if binary else [base64_of(image) for image in images]
    tensor = triton.InferInput("image", [len(images)], "BYTES")
    tensor.set_data_from_numpy(np.array(elements, np.object_), binary_data=binary)
    return [tensor]


def numbers(*images: Floats, binary: bool = True) -> list[Any]:
    """The input `images` of tritonclient, from (H, W, 3) each."""
    array = np.stack(images).transpose(0, 3, 1, 2)
    tensor = triton.InferInput("images", list(array.shape), "FP32")
    tensor.set_data_from_numpy(np.ascontiguousarray(array), binary_data=binary)
    return [tensor]


def wanted(*names: str, binary: bool = True) -> list[Any]:
    return [triton.InferRequestedOutput(name, binary_data=binary) for name in names]


def request(*images: bytes, **members: Any) -> dict[str, Any]:
    """A JSON request for files."""
    data = [base64_of(image) for image in images]
    return {"inputs": [{"name": "image", "shape": [len(data)], "datatype": "BYTES", "data": data}], **members}


def probabilities(service: Running, image: bytes, query: str) -> list[float]:
    """What /classify answers."""
    top = service.client.post(f"/classify?{query}", content=image).json()["top"]
    return [verdict["probability"] for verdict in sorted(top, key=lambda verdict: verdict["index"])]


def refuses(service: Running, response: httpx.Response, status: int, code: str) -> str:
    """Assert that `response` is an error of the protocol, counted as `code`; returns its text."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    answer = response.json()
    assert set(answer) == {"error"}
    if status != 500:
        service.refused[code] += 1
        until(lambda: service.metric("clarifier_rejected_total", reason=code) >= service.refused[code])
    assert service.still_answers()
    text: str = answer["error"]
    assert "Traceback" not in text
    return text


# --- what is there


def test_the_server_and_its_model_are_live_ready_and_described(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("colors")
    assert client.is_model_ready("colors", "1")
    assert not client.is_model_ready("colors", "2")
    assert not client.is_model_ready("other")
    server = client.get_server_metadata()
    assert (server["name"], set(server["extensions"])) == ("clarifier", set(EXTENSIONS))
    assert server["version"]
    metadata = client.get_model_metadata("colors")
    assert metadata == client.get_model_metadata("colors", "1")
    assert (metadata["name"], metadata["versions"], metadata["platform"]) == ("colors", ["1"], "clarifier_torch")
    assert metadata["inputs"] == [
        {"name": "image", "datatype": "BYTES", "shape": [-1]},
        {"name": "images", "datatype": "FP32", "shape": [-1, 3, SIDE, SIDE]},
    ]
    assert metadata["outputs"] == [
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]},
        {"name": "label", "datatype": "BYTES", "shape": [-1]},
        {"name": "purified", "datatype": "FP32", "shape": [-1, 3, SIDE, SIDE]},
        {"name": "aid_score", "datatype": "FP32", "shape": [-1]},
        {"name": "seed", "datatype": "UINT64", "shape": [-1]},
    ]


def test_health_says_what_kserves_client_reads(service: Running) -> None:
    assert service.client.get("/v2/health/live").json() == {"live": True}
    assert service.client.get("/v2/health/ready").json() == {"ready": True}
    assert service.client.get("/v2/models/colors/ready").json() == {"name": "colors", "ready": True}
    for path in ("/v2/health/live", "/v2/health/ready"):
        head = service.client.head(path)
        assert (head.status_code, head.content) == (200, b"")


def test_what_is_not_ready_says_so(start: Callable[..., Running]) -> None:
    server = start()
    server.gateway.draining = True
    for path in ("/v2/health/ready", "/v2/models/colors/ready"):
        response = server.client.get(path)
        assert response.status_code == 503
        assert (response.json()["ready"], response.json()["error"]) == (False, "not ready: draining")
    assert server.client.get("/v2/health/live").status_code == 200
    server.gateway.draining = False


def test_nothing_is_inferred_before_the_models_are_loaded() -> None:
    app = create_app(Settings(), lambda _: pytest.fail("nobody loads"))

    async def scenario() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            for response in (
                await client.post(INFER, json=request(GOOD)),
                await client.get("/v2/models/colors"),
                await client.get("/v2/models/colors/ready"),
            ):
                assert (response.status_code, set(response.json())) == (503, {"error"})
                assert int(response.headers["retry-after"]) >= 1

    asyncio.run(scenario())


@pytest.mark.parametrize("model", ["other", "colors@2", "x" * 500, "colors/versions/2", "colors@1/versions/1"])
def test_an_unknown_model_or_version_is_404(service: Running, model: str) -> None:
    address = f"/v2/models/{model}"
    refuses(service, service.client.get(address), 404, "unknown_model")
    refuses(service, service.client.get(f"{address}/ready"), 404, "unknown_model")
    refuses(service, service.client.post(f"{address}/infer", json=request(GOOD)), 404, "unknown_model")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v2/nothing", 404, "not_found"),
        ("GET", "/v2/models/colors/config", 404, "not_found"),
        ("POST", "/v2", 405, "method_not_allowed"),
        ("GET", INFER, 405, "method_not_allowed"),
    ],
)
def test_errors_of_the_framework_have_the_protocols_shape(
    service: Running, method: str, path: str, status: int, code: str
) -> None:
    response = service.client.request(method, path)
    refuses(service, response, status, code)
    assert ("allow" in response.headers) == (status == 405)


def test_an_unforeseen_error_is_500_and_says_nothing(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise LookupError("canary")

    with monkeypatch.context() as patch:
        patch.setattr("service.oip.routes.read_inference", fail)
        response = service.client.post(INFER, json=request(GOOD))
    assert "canary" not in refuses(service, response, 500, "internal_server_error")


def test_a_query_is_refused(service: Running) -> None:
    for path in ("/v2", "/v2/models/colors", "/v2/models/colors/ready"):
        refuses(service, service.client.get(f"{path}?seed=1"), 422, "invalid_parameter")
    refuses(service, service.client.post(f"{INFER}?model=colors", json=request(GOOD)), 422, "invalid_parameter")


def test_the_documentation_lists_the_routes(service: Running) -> None:
    paths = service.client.get("/openapi.json").json()["paths"]
    assert {"/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/{name}", ROUTE} <= set(paths)
    assert set(paths[ROUTE]["post"]["requestBody"]["content"]) == {"application/json", "application/octet-stream"}


# --- inference


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_files_get_the_answers_of_classify(
    service: Running, client: triton.InferenceServerClient, kind: str, binary: bool
) -> None:
    image = encoded(green(50), kind)
    result = client.infer("colors", files(image, binary=binary), parameters={"seed": 5, "defense": "atop:rt1"})
    expected = probabilities(service, image, "seed=5&defense=atop:rt1")
    assert result.as_numpy("probabilities").dtype == np.float32
    assert result.as_numpy("probabilities").tolist() == [pytest.approx(expected, abs=1e-6)]
    assert result.as_numpy("label").tolist() == [b"green"]
    answer = result.get_response()
    assert (answer["model_name"], answer["model_version"]) == ("colors", "1")
    assert answer["parameters"] == {"defense": "atop:rt1", "digest": "d" * 64}
    assert [output["name"] for output in answer["outputs"]] == ["probabilities", "label"]


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_numbers_get_the_answers_of_the_same_pixels(
    service: Running, client: triton.InferenceServerClient, binary: bool
) -> None:
    pixels = np.random.default_rng(0).integers(10, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    result = client.infer("colors", numbers(to_floats(pixels), binary=binary), parameters={"seed": 5})
    assert result.as_numpy("probabilities").tolist() == [
        pytest.approx(probabilities(service, png(pixels), "seed=5"), abs=1e-6)
    ]


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_numbers_are_not_rounded_to_8_bits(client: triton.InferenceServerClient, binary: bool) -> None:
    images = np.random.default_rng(1).random((3, SIDE, SIDE, 3), dtype=np.float32) * np.float32(0.9) + np.float32(0.1)
    result = client.infer(
        "colors",
        numbers(*images, binary=binary),
        outputs=wanted("purified", "label", binary=binary),
        parameters={"defense": "none"},
    )
    assert np.array_equal(result.as_numpy("purified"), images.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_every_output_is_there_on_request(service: Running, client: triton.InferenceServerClient, binary: bool) -> None:
    names = ("seed", "aid_score", "purified", "label", "probabilities")
    outputs = wanted(*names, binary=binary)
    result = client.infer("colors", files(GOOD), outputs=outputs, parameters={"seed": 7})
    assert [output["name"] for output in result.get_response()["outputs"]] == list(names)
    detected = service.client.post("/detect", content=GOOD).json()["aid_score"]
    assert result.as_numpy("aid_score").tolist() == [pytest.approx(detected, abs=1e-6)]
    response = service.client.post("/purify?seed=7", content=GOOD, headers={"accept": "application/x-npy"})
    purified = np.load(io.BytesIO(response.content)).transpose(2, 0, 1)
    assert np.array_equal(result.as_numpy("purified"), purified[None])
    assert (result.as_numpy("seed").dtype, result.as_numpy("seed").tolist()) == (np.uint64, [7])
    labels: NDArray[Any] = result.as_numpy("label")
    assert [label.decode() if binary else label for label in labels] == ["green"]
    assert result.as_numpy("probabilities").shape == (1, 3)


def test_outputs_can_be_binary_one_by_one_and_by_default(service: Running) -> None:
    some = [{"name": "probabilities", "parameters": {"binary_data": False}}, {"name": "label"}]
    body = request(GOOD, outputs=some, parameters={"binary_data_output": True})
    response = service.client.post(INFER, json=body)
    length = int(response.headers["inference-header-content-length"])
    assert response.headers["content-type"] == "application/octet-stream"
    answer = json.loads(response.content[:length])
    assert len(answer["outputs"][0]["data"]) == 3
    assert answer["outputs"][1] == {
        "name": "label",
        "datatype": "BYTES",
        "shape": [1],
        "parameters": {"binary_data_size": 9},
    }
    assert response.content[length:] == b"\5\0\0\0green"
    plain = service.client.post(INFER, json=request(GOOD, outputs=[]))
    assert plain.headers["content-type"] == "application/json"
    assert "inference-header-content-length" not in plain.headers
    assert plain.json()["outputs"][1]["data"] == ["green"]


def test_seeds_that_were_drawn_are_told_and_repeat_the_answer(client: triton.InferenceServerClient) -> None:
    outputs = wanted("probabilities", "seed")
    first = client.infer("colors", files(GOOD, GOOD), outputs=outputs)
    seeds = first.as_numpy("seed").tolist()
    assert len(set(seeds)) == 2
    for seed, expected in zip(seeds, first.as_numpy("probabilities"), strict=True):
        again = client.infer("colors", files(GOOD), outputs=outputs, parameters={"seed": seed})
        assert again.as_numpy("probabilities")[0] == pytest.approx(expected, abs=1e-6)


def test_votes_are_those_of_classify(service: Running, client: triton.InferenceServerClient) -> None:
    several = client.infer("colors", files(GOOD), parameters={"votes": 4, "seed": 1}).as_numpy("probabilities")
    assert several[0] == pytest.approx(probabilities(service, GOOD, "votes=4&seed=1"), abs=1e-6)
    response = service.client.post(INFER, json=request(GOOD, parameters={"votes": 9, "defense": "atop,aid"}))
    assert "votes: is at most 8" in refuses(service, response, 422, "invalid_parameter")


def test_a_class_count_lists_the_likeliest(client: triton.InferenceServerClient) -> None:
    output = triton.InferRequestedOutput("probabilities", class_count=2)
    result = client.infer("colors", files(GOOD, GOOD), outputs=[output], parameters={"defense": "none"})
    ranking = result.as_numpy("probabilities")
    assert ranking.shape == (2, 2)
    first, second = (entry.decode().split(":") for entry in ranking[0])
    assert (first[1:], second[1:]) == (["1", "green"], ["0", "red"])
    assert float(first[0]) > float(second[0])


def test_images_of_one_request_run_together_and_are_answered_in_order(
    service: Running, client: triton.InferenceServerClient
) -> None:
    red, blue = green()[..., [1, 0, 2]], green()[..., [0, 2, 1]]
    images = [png(red), encoded(blue, "BMP"), GOOD, png(blue)] * 8
    service.bundle.batches.clear()
    result = client.infer("colors", files(*images), parameters={"defense": "none"})
    assert result.as_numpy("label").tolist() == [b"red", b"blue", b"green", b"blue"] * 8
    assert service.bundle.batches == [32]


def test_the_id_is_echoed_and_the_version_can_be_named(client: triton.InferenceServerClient) -> None:
    result = client.infer("colors", files(GOOD), model_version="1", request_id="é-1")
    assert result.get_response()["id"] == "é-1"
    assert "id" not in client.infer("colors", files(GOOD)).get_response()


def test_triton_sends_many_requests_at_once(service: Running) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{service.port}", concurrency=4) as client:
        pending = [client.async_infer("colors", files(GOOD)) for _ in range(8)]
        assert [one.get_result().as_numpy("label").tolist() for one in pending] == [[b"green"]] * 8


def test_kserves_client_is_understood(service: Running) -> None:
    message = request(GOOD) | {"id": "1", "model_name": "colors"}
    binary = len(GOOD).to_bytes(4, "little") + GOOD
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(binary)}}
    head = json.dumps(message | {"inputs": [tensor]}).encode()
    headers = {"inference-header-content-length": str(len(head)), "content-type": "application/octet-stream"}
    for response in (
        service.client.post(INFER, content=json.dumps(message)),
        service.client.post(INFER, content=head + binary, headers=headers),
    ):
        assert response.json()["outputs"][1]["data"] == ["green"]


def test_a_data_uri_is_base64_too(service: Running) -> None:
    body = request(GOOD)
    body["inputs"][0]["data"] = ["data:image/png;base64," + base64_of(GOOD)]
    body["inputs"][0]["parameters"] = {"content_type": "base64"}
    assert service.client.post(INFER, json=body).json()["outputs"][1]["data"] == ["green"]


def test_numbers_and_files_never_share_a_batch(service: Running) -> None:
    service.bundle.gate.clear()
    service.bundle.entered.clear()
    service.bundle.batches.clear()
    floats = {"inputs": [floats_of(to_floats(green()))], "parameters": {"defense": "none"}}
    encoded_ = request(GOOD, GOOD, parameters={"defense": "none"})
    with ThreadPoolExecutor(4) as clients:
        pending = [clients.submit(service.client.post, INFER, json=encoded_)]
        assert service.bundle.entered.wait(20)
        pending += [clients.submit(service.client.post, INFER, json=body) for body in (floats, encoded_, floats)]
        until(lambda: service.metric("clarifier_queue_depth") == 4)
        service.bundle.gate.set()
        labels = [one.result().json()["outputs"][1]["data"] for one in pending]
    assert labels == [["green", "green"], ["green"], ["green", "green"], ["green"]]
    assert sorted(service.bundle.batches) == [2, 2, 2]


def floats_of(*images: Floats) -> dict[str, Any]:
    """The input `images` of a JSON request."""
    array = np.stack(images).transpose(0, 3, 1, 2)
    return {"name": "images", "shape": list(array.shape), "datatype": "FP32", "data": array.ravel().tolist()}


def test_requests_are_counted_under_their_route(start: Callable[..., Running]) -> None:
    server = start()
    server.client.post(INFER, json=request(GOOD, GOOD))
    labels = {"route": ROUTE, "model": "colors@1", "defense": "atop", "status": "200"}
    until(lambda: server.metric("clarifier_requests_total", **labels) == 1)
    assert server.metric("clarifier_predictions_total", model="colors@1", label="green") == 2


# --- memory


def test_files_are_out_of_memory_before_the_engine_runs_and_numbers_are_counted_until_it_has(
    start: Callable[..., Running],
) -> None:
    server = start()
    held = list[int]()
    small_json = [{"name": "images", "shape": [2, 3, SIDE, SIDE], "datatype": "FP32", "data": [1] * 6 * SIDE**2}]
    bodies: Sequence[dict[str, Any]] = (request(GOOD), {"inputs": small_json})
    for body in bodies:
        server.bundle.gate.clear()
        server.bundle.entered.clear()
        with ThreadPoolExecutor(1) as clients:
            answer = clients.submit(server.client.post, INFER, json=body)
            assert server.bundle.entered.wait(20)
            held.append(server.gateway.uploads.held)
            server.bundle.gate.set()
            assert answer.result().status_code == 200
    assert held == [0, 2 * 3 * SIDE**2 * 4]
    until(lambda: server.gateway.uploads.held == 0)


def test_purified_images_need_room_before_they_are_made(start: Callable[..., Running]) -> None:
    server = start()
    body = request(GOOD, outputs=[{"name": "purified"}])
    server.gateway.uploads.limit = 3 * SIDE**2 * JSON_FLOAT_BYTES  # too little for the answer, enough for the question
    response = server.client.post(INFER, json=body)
    refuses(server, response, 429, "queue_full")
    assert server.bundle.batches == [1]  # of the check that the service goes on
    assert server.gateway.uploads.held == 0
    server.gateway.uploads.limit *= 3
    assert server.client.post(INFER, json=body).status_code == 200


# --- bad requests


@pytest.mark.parametrize(
    ("status", "call"),
    [
        ("404", lambda client: client.infer("other", files(GOOD))),
        ("404", lambda client: client.get_model_config("colors")),
        ("415", lambda client: client.infer("colors", files(b"no image"))),
        ("415", lambda client: client.infer("colors", files(GOOD), request_compression_algorithm="gzip")),
        ("422", lambda client: client.infer("colors", files(GOOD), outputs=wanted("logits"))),
        ("422", lambda client: client.infer("colors", files(GOOD), parameters={"top_k": 1})),
        ("422", lambda client: client.infer("colors", files(GOOD), sequence_id=1)),
        ("422", lambda client: client.infer("colors", files(GOOD), priority=2)),
        ("422", lambda client: client.infer("colors", numbers(to_floats(green()) + 1))),
    ],
    ids=["model", "config", "no image", "compressed", "output", "parameter", "sequence", "priority", "numbers"],
)
def test_triton_raises_our_errors(
    client: triton.InferenceServerClient, status: str, call: Callable[[triton.InferenceServerClient], object]
) -> None:
    with pytest.raises(InferenceServerException) as raised:
        call(client)
    assert raised.value.status() == status
    assert raised.value.message()


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b'{"inputs": [], "inputs": []}',
        b"[" * 10_000 + b"]" * 10_000,
        b'{"inputs": 1e400}',
        b'{"inputs": NaN}',
        b'{"id": "\\ud800", "inputs": []}',
        b'\xef\xbb\xbf{"inputs": []}',
        json.dumps(request(GOOD)).encode("utf-16"),
    ],
    ids=["json", "duplicate", "deep", "1e400", "NaN", "surrogate", "BOM", "utf-16"],
)
def test_row_20_malformed_json_is_400(service: Running, body: bytes) -> None:
    refuses(service, service.client.post(INFER, content=body, headers=JSON), 400, "malformed_json")


@pytest.mark.parametrize("text", ["?", "QUI", "QU I=", "QU-_", "data:image/png,QUI="])
def test_row_21_bad_base64_is_400(service: Running, text: str) -> None:
    body = request(GOOD)
    body["inputs"][0]["data"] = [text]
    refuses(service, service.client.post(INFER, json=body), 400, "bad_base64")


def test_row_21_an_image_over_the_limit_is_413(service: Running) -> None:
    body = request(bytes(20 * 2**20))
    refuses(service, service.client.post(INFER, json=body), 413, "body_too_large")


def test_a_body_over_the_limit_is_413(start: Callable[..., Running]) -> None:
    server = start(max_image_bytes=1024, max_batch_size=1)
    refuses(server, server.client.post(INFER, content=b" " * 30_000), 413, "body_too_large")
    refuses(server, server.client.post(INFER, content=iter([b" " * 30_000])), 413, "body_too_large")


def test_no_body_is_400(service: Running) -> None:
    refuses(service, service.client.post(INFER), 400, "empty_body")


@pytest.mark.parametrize("kind", ["text/plain", "image/png", "multipart/form-data; boundary=b", "application/xml"])
def test_another_content_type_is_415(service: Running, kind: str) -> None:
    response = service.client.post(INFER, content=b"{}", headers={"content-type": kind})
    refuses(service, response, 415, "unsupported_media")
    assert response.headers["accept-post"] == "application/json, application/octet-stream"


def test_row_8_a_compressed_body_is_415(service: Running) -> None:
    response = service.client.post(INFER, content=b"{}", headers=JSON | {"content-encoding": "gzip"})
    refuses(service, response, 415, "unsupported_media")


def test_lengths_that_contradict_the_body_are_400(service: Running) -> None:
    for length in ("3000", "x"):
        headers = {"inference-header-content-length": length}
        response = service.client.post(INFER, content=json.dumps(request(GOOD)), headers=headers)
        refuses(service, response, 400, "malformed_tensor")


@pytest.mark.parametrize(
    ("parameters", "detail"),
    [
        ({"top_k": 1}, "top_k: is not a parameter of this route; known: defense, seed, votes, timeout"),
        ({"model": "colors"}, "model: is not a parameter"),
        ({"votes": 65}, "votes: "),
        ({"votes": "2"}, "votes: "),
        ({"votes": True}, "votes: "),
        ({"seed": -1}, "seed: "),
        ({"seed": 2**64}, "seed: "),
        ({"seed": 1.5}, "seed: "),
        ({"defense": "nothing"}, "defense: "),
        ({"timeout": -1}, "timeout: "),
        ({"timeout": 2**70}, "timeout: "),
        ({"priority": 2}, "priority: "),
        ({"binary_data_output": 1}, "binary_data_output: "),
    ],
)
def test_row_22_a_parameter_that_is_unknown_or_out_of_range_is_422(
    service: Running, parameters: dict[str, Any], detail: str
) -> None:
    response = service.client.post(INFER, json=request(GOOD, parameters=parameters))
    assert detail in refuses(service, response, 422, "invalid_parameter")


def test_what_the_model_does_not_have_is_422(service: Running) -> None:
    response = service.client.post(INFER, json=request(GOOD, outputs=[{"name": "logits"}]))
    assert "logits is not an output" in refuses(service, response, 422, "invalid_inference")
    with running(FakeBundle(fake_manifest("colors", aid=False))) as plain:
        names = [output["name"] for output in plain.client.get("/v2/models/colors").json()["outputs"]]
        assert "aid_score" not in names
        response = plain.client.post(INFER, json=request(GOOD, outputs=[{"name": "aid_score"}]))
        refuses(plain, response, 422, "invalid_inference")


def test_several_votes_have_no_purified_image(service: Running) -> None:
    body = request(GOOD, outputs=[{"name": "purified"}], parameters={"votes": 2})
    refuses(service, service.client.post(INFER, json=body), 422, "invalid_inference")
    body["parameters"]["defense"] = "zeropur"  # draws nothing, and runs once
    assert service.client.post(INFER, json=body).status_code == 200


@pytest.mark.parametrize(
    ("bad", "status", "code"),
    [
        (b"no image", 415, "unsupported_format"),
        (GOOD[:-20], 422, "undecodable"),
        (b"", 415, "unsupported_format"),
        (png(marked(NAN_VALUE)), 500, "nan"),
        (png(marked(POISON_VALUE)), 500, "inference_failed"),
    ],
)
def test_row_51_one_bad_image_fails_the_request_and_is_named(
    service: Running, bad: bytes, status: int, code: str
) -> None:
    parameters = {"defense": "none"}
    several = service.client.post(INFER, json=request(GOOD, GOOD, bad, GOOD, parameters=parameters))
    assert "image 2: " in refuses(service, several, status, code)
    alone = service.client.post(INFER, json=request(bad, parameters=parameters))
    assert "image 0" not in refuses(service, alone, status, code)


def test_row_51_no_image_is_422_and_too_many_are_413(service: Running) -> None:
    refuses(service, service.client.post(INFER, json=request()), 422, "invalid_inference")
    refuses(service, service.client.post(INFER, json=request(*[GOOD] * 33)), 413, "too_many_images")
    floats = {"inputs": [floats_of(*[to_floats(green())] * 33)]}
    refuses(service, service.client.post(INFER, json=floats), 413, "too_many_images")


# --- time


def test_a_timeout_in_microseconds_is_the_deadline(service: Running, client: triton.InferenceServerClient) -> None:
    service.bundle.gate.clear()
    with pytest.raises(InferenceServerException) as raised:
        client.infer("colors", files(GOOD), timeout=50_000)
    service.bundle.gate.set()
    assert raised.value.status() == "504"
    assert client.infer("colors", files(GOOD), timeout=36_000_000_000, priority=1).as_numpy("label") == [b"green"]


def test_row_50_a_deadline_that_has_passed_is_504_without_the_engine(start: Callable[..., Running]) -> None:
    server = start()
    response = server.client.post(INFER, json=request(GOOD, parameters={"timeout": 1}))
    assert (response.status_code, server.bundle.batches) == (504, [])
    refuses(server, response, 504, "deadline_exceeded")
    response = server.client.post(INFER, json=request(GOOD), headers={"x-request-timeout-ms": "0"})
    refuses(server, response, 504, "deadline_exceeded")
    assert server.client.post(INFER, json=request(GOOD, parameters={"timeout": 0})).status_code == 200


def test_a_timeout_can_only_shorten_the_deadline(start: Callable[..., Running]) -> None:
    server = start(request_timeout_ms=200)
    server.bundle.gate.clear()
    response = server.client.post(INFER, json=request(GOOD, parameters={"timeout": 36_000_000_000}))
    server.bundle.gate.set()
    refuses(server, response, 504, "deadline_exceeded")


def test_a_full_queue_is_429_with_retry_after(start: Callable[..., Running]) -> None:
    server = start(max_queue_size=2, max_batch_size=2)
    server.bundle.gate.clear()
    with ThreadPoolExecutor(2) as clients:
        running_ = clients.submit(server.client.post, INFER, json=request(GOOD))
        assert server.bundle.entered.wait(20)
        waiting = clients.submit(server.client.post, INFER, json=request(GOOD))
        until(lambda: server.metric("clarifier_queue_depth") == 1)
        response = server.client.post(INFER, json=request(GOOD, GOOD))
        server.bundle.gate.set()
        assert [running_.result().status_code, waiting.result().status_code] == [200, 200]
    refuses(server, response, 429, "queue_full")
    assert int(response.headers["retry-after"]) >= 1


def test_a_client_that_leaves_takes_its_images_out(start: Callable[..., Running]) -> None:
    server = start()
    server.bundle.gate.clear()
    with pytest.raises(httpx.ReadTimeout):
        server.client.post(INFER, json=request(GOOD), timeout=0.5)
    until(lambda: server.metric("clarifier_rejected_total", reason="client_left") == 1)
    server.bundle.gate.set()
    assert server.still_answers()


def test_pixels_of_any_value_are_numbers_too(client: triton.InferenceServerClient) -> None:
    edges: Pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    edges[0] = 255
    result = client.infer(
        "colors", numbers(to_floats(edges)), outputs=wanted("purified"), parameters={"defense": "none"}
    )
    assert set(result.as_numpy("purified").ravel().tolist()) == {0.0, 1.0}
