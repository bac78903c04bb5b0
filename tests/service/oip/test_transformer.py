"""A transformer with a predictor behind it, both on sockets: as Triton's client asks it, and as predictors fail."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from starlette.responses import JSONResponse, Response

from service.images import to_floats
from service.oip import predictor as predictor_module
from service.transformer import settings_of
from tests.service.conftest import Running, running
from tests.service.fakes import NAN_VALUE, FakeBundle, green, marked, png
from tests.service.manifests import SIDE
from tests.service.oip.own_predictor import OwnPredictor, predicting
from tests.service.oip.test_routes import INFER, files, numbers, refuses, request, wanted

GOOD = png(green())
Pair = Callable[..., tuple[Running, OwnPredictor]]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A transformer, and the predictor behind it."""
    with ExitStack() as stack:

        def start(predictor: OwnPredictor | None = None, **settings: Any) -> tuple[Running, OwnPredictor]:
            own = stack.enter_context(predicting(predictor or OwnPredictor()))
            server = stack.enter_context(running(FakeBundle(), predictor_url=own.url, **settings))
            return server, own

        yield start


def asked(server: Running, **members: Any) -> httpx.Response:
    return server.client.post(INFER, json=request(GOOD, **members))


def upside_down() -> Any:
    """A green image with a red line at the top, and what `zeropur` of the fake makes of it: (H, W, 3) in [0, 1]."""
    pixels = green()
    pixels[0] = (255, 0, 0)
    return pixels, to_floats(pixels[::-1])


# --- what a predictor gets


def test_tritons_client_gets_the_predictors_answer_to_the_purified_image(pair: Pair) -> None:
    server, own = pair()
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    pixels, purified = upside_down()
    answer = client.infer("colors", files(png(pixels)), parameters={"defense": "zeropur"}, outputs=wanted("means"))
    np.testing.assert_allclose(answer.as_numpy("means"), purified.mean((0, 1))[None], atol=1e-6)
    np.testing.assert_array_equal(own.tensors[0], purified.transpose(2, 0, 1)[None])
    client.close()


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("datatype", ["FP32", "UINT8"])
def test_every_kind_of_predictor_gets_what_its_input_takes(pair: Pair, datatype: str, last: bool, binary: bool) -> None:
    shape = [-1, SIDE, SIDE, 3] if last else [-1, 3, -1, -1]
    server, own = pair(OwnPredictor(datatype, shape, ["binary_tensor_data"] if binary else []))
    pixels, purified = upside_down()
    response = server.client.post(INFER, json=request(png(pixels), GOOD, parameters={"defense": "zeropur"}))
    assert response.status_code == 200, response.text
    expected = purified if datatype == "FP32" else pixels[::-1]
    (got,) = own.tensors
    assert got.shape == (2, SIDE, SIDE, 3) if last else (2, 3, SIDE, SIDE)
    np.testing.assert_array_equal(got[0], expected if last else expected.transpose(2, 0, 1))
    assert ("data" in own.heads[0]["inputs"][0]) != binary


def test_numbers_are_purified_too(pair: Pair) -> None:
    server, own = pair()
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    pixels, purified = upside_down()
    client.infer("colors", numbers(to_floats(pixels), to_floats(green())), parameters={"defense": "zeropur"})
    np.testing.assert_array_equal(own.tensors[0][0], purified.transpose(2, 0, 1))
    client.close()


def test_the_answer_says_what_was_done(pair: Pair) -> None:
    server, own = pair()
    answer = asked(server, id="mine", parameters={"seed": 7})
    assert answer.json()["id"] == "mine"
    assert answer.headers["x-clarifier-seed"] == "7"
    assert answer.headers["x-clarifier-defense"] == "atop"
    assert answer.headers["x-clarifier-model"] == "colors@1"
    assert own.headers[0]["x-request-id"] == answer.headers["x-request-id"]
    again = asked(server, parameters={"seed": 7})
    assert again.json()["outputs"] == answer.json()["outputs"]
    np.testing.assert_array_equal(own.tensors[0], own.tensors[1])
    assert server.metric("clarifier_stage_duration_seconds_count", stage="predict") == 2


def test_what_is_asked_of_the_answer_is_passed_on(pair: Pair) -> None:
    server, own = pair()
    outputs = [{"name": "means", "parameters": {"binary_data": False, "classification": 2}}]
    assert asked(server, outputs=outputs).status_code == 200
    assert own.heads[0]["outputs"] == outputs
    answer = asked(server, parameters={"binary_data_output": True})
    length = int(answer.headers["inference-header-content-length"])
    assert json.loads(answer.content[:length])["outputs"][0]["parameters"] == {"binary_data_size": 12}
    assert len(answer.content) == length + 12


def test_a_predictor_of_json_alone_is_not_asked_for_binary_tensors(pair: Pair) -> None:
    server, own = pair(OwnPredictor(extensions=[]))
    outputs = [{"name": "means", "parameters": {"binary_data": True}}]
    assert asked(server, outputs=outputs, parameters={"binary_data_output": True}).status_code == 200
    assert own.heads[0]["outputs"][0].get("parameters", {}) == {}
    assert "parameters" not in own.heads[0]


def test_a_version_is_the_predictors(pair: Pair) -> None:
    server, own = pair()
    answer = server.client.post("/v2/models/colors/versions/7/infer", json=request(GOOD))
    assert answer.status_code == 200, answer.text
    assert len(own.heads) == 1
    refuses(server, server.client.post("/v2/models/colors/versions/8/infer", json=request(GOOD)), 404, "unknown_model")


def test_a_clarifier_can_be_the_predictor(pair: Pair) -> None:
    with (
        running(FakeBundle()) as behind,
        running(FakeBundle(), predictor_url=f"http://127.0.0.1:{behind.port}") as server,
    ):
        answer = server.client.post(INFER, json=request(GOOD, parameters={"defense": "zeropur"}))
        assert answer.status_code == 200, answer.text
        found = {output["name"]: output["data"] for output in answer.json()["outputs"]}
        assert found["label"] == ["green"]
        assert behind.bundle.batches


def test_the_predictor_is_described_once_a_minute(pair: Pair) -> None:
    server, own = pair()
    for _ in range(3):
        assert asked(server).status_code == 200
    assert own.described == 1


def test_nothing_of_one_clients_answer_goes_with_anothers_question(pair: Pair) -> None:
    server, own = pair()
    own.answer = JSONResponse({"outputs": []}, headers={"Set-Cookie": "session=1; Path=/"})
    assert asked(server).status_code == 200
    assert asked(server).status_code == 200
    assert "cookie" not in own.headers[1]
    assert own.headers[1]["accept-encoding"] == "identity"


# --- what is there


def test_the_model_has_our_inputs_and_the_predictors_outputs(pair: Pair) -> None:
    server, _ = pair()
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    metadata = client.get_model_metadata("colors")
    assert (metadata["name"], metadata["versions"], metadata["platform"]) == ("colors", ["7"], "clarifier_transformer")
    assert [tensor["name"] for tensor in metadata["inputs"]] == ["image", "images"]
    assert metadata["outputs"] == [{"name": "means", "datatype": "FP32", "shape": [-1, 3]}]
    assert client.is_model_ready("colors")
    assert not client.is_model_ready("other")
    client.close()


def test_a_predictor_that_is_not_ready_makes_its_model_so_and_not_the_transformer(pair: Pair) -> None:
    server, own = pair()
    own.ready = False
    answer = server.client.get("/v2/models/colors/ready")
    assert (answer.status_code, answer.json()["ready"]) == (503, False)
    assert server.client.get("/v2/health/ready").status_code == 200
    assert server.client.get("/readyz").status_code == 200


# --- what a client gets wrong


@pytest.mark.parametrize("name", ["..", ".hidden", "a b", "%2e%2e%2fadmin", "x" * 129, "a%0d%0ab"])
def test_nothing_but_a_name_is_put_into_the_address(pair: Pair, name: str) -> None:
    server, own = pair()
    response = server.client.post(f"/v2/models/{name}/infer", json=request(GOOD))
    assert response.status_code == 404
    assert not own.described


def test_bad_questions_never_reach_the_predictor(pair: Pair) -> None:
    server, own = pair()
    refuses(server, asked(server, parameters={"votes": 2}), 422, "invalid_inference")
    refuses(server, asked(server, parameters={"defense": "magic"}), 422, "invalid_parameter")
    refuses(server, asked(server, model_name="other"), 422, "invalid_inference")
    refuses(server, server.client.post(INFER, json=request(b"no image")), 415, "unsupported_format")
    refuses(server, server.client.post(INFER, json=request(png(marked(NAN_VALUE)))), 500, "nan")
    assert not own.heads


def test_a_model_that_the_predictor_does_not_have_is_unknown(pair: Pair) -> None:
    server, _ = pair()
    response = server.client.post("/v2/models/other/infer", json=request(GOOD))
    text = refuses(server, response, 404, "unknown_model")
    assert text == "there is no such model: the predictor says: there is?no such model here"


# --- what a predictor gets wrong


@pytest.mark.parametrize(
    ("theirs", "status", "code"),
    [
        (400, 422, "invalid_inference"),
        (404, 404, "unknown_model"),
        (413, 413, "body_too_large"),
        (429, 429, "queue_full"),
        (500, 502, "predictor_failed"),
        (302, 502, "predictor_failed"),
        (503, 503, "not_ready"),
        (504, 504, "deadline_exceeded"),
    ],
)
def test_its_refusals_are_ours(pair: Pair, theirs: int, status: int, code: str) -> None:
    server, own = pair()
    own.answer = JSONResponse({"error": "because"}, theirs, headers={"Location": "/v2", "Retry-After": "40"})
    response = asked(server)
    text = refuses(server, response, status, code)
    assert ("because" in text) == (status != 502)
    if status in (429, 503):
        assert int(response.headers["retry-after"]) > 40
    own.answer = None
    assert asked(server).status_code == 200


@pytest.mark.parametrize(
    "answer",
    [
        Response("<html>", media_type="text/html"),
        Response("{}", headers={"Inference-Header-Content-Length": "9"}, media_type="application/octet-stream"),
        Response("{}", headers={"Inference-Header-Content-Length": "x"}, media_type="application/octet-stream"),
    ],
)
def test_what_is_no_answer_is_not_passed_on(pair: Pair, answer: Response) -> None:
    server, own = pair()
    own.answer = answer
    refuses(server, asked(server), 502, "predictor_failed")


def test_an_answer_without_end_is_cut_off(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor_module, "MAX_ANSWER_BYTES", 1000)
    server, own = pair()
    own.answer = JSONResponse({"outputs": "x" * 1000})
    assert "more than 1000 bytes" in refuses(server, asked(server), 502, "predictor_failed")


def test_one_that_is_not_there_is_said_to_be_out_of_reach(pair: Pair) -> None:
    with running(FakeBundle(), predictor_url="http://127.0.0.1:9") as server:
        assert "cannot be reached" in refuses(server, asked(server), 502, "predictor_failed")
        answer = server.client.get("/v2/models/colors/ready")
        assert (answer.status_code, answer.json()["ready"]) == (503, False)


def test_a_connection_that_breaks_is_tried_once_more(pair: Pair) -> None:
    server, own = pair()
    own.breaks = 1
    answer = asked(server)
    assert answer.status_code == 200, answer.text
    own.breaks = 2
    refuses(server, asked(server), 502, "predictor_failed")


def test_a_slow_one_is_not_waited_for_beyond_the_deadline(pair: Pair) -> None:
    server, own = pair()
    assert asked(server).status_code == 200
    own.delay_s = 3.0
    started = time.monotonic()
    response = server.client.post(INFER, json=request(GOOD), headers={"X-Request-Timeout-Ms": "700"})
    refuses(server, response, 504, "deadline_exceeded")
    assert time.monotonic() - started < 3.0


@pytest.mark.parametrize(
    "own",
    [
        OwnPredictor(datatype="FP16"),
        OwnPredictor(shape=[-1, 1, SIDE, SIDE]),
        OwnPredictor(shape=[3, SIDE, SIDE]),
        OwnPredictor(shape=[-1, 3, 2 * SIDE, SIDE]),
        OwnPredictor(shape=[2, 3, SIDE, SIDE]),
    ],
)
def test_one_that_takes_other_images_is_not_sent_ours(pair: Pair, own: OwnPredictor) -> None:
    server, _ = pair(own)
    refuses(server, asked(server), 502, "predictor_failed")
    assert not own.heads


def test_it_may_be_given_another_model_meanwhile(pair: Pair) -> None:
    server, own = pair()
    assert asked(server).status_code == 200
    own.answer = JSONResponse({"error": "pixels are UINT8 now"}, 400)
    refuses(server, asked(server), 422, "invalid_inference")
    own.answer, own.datatype = None, "UINT8"
    assert asked(server).status_code == 200
    assert own.tensors[-1].dtype == np.uint8


def test_what_it_answers_takes_memory_that_is_accounted_for(pair: Pair) -> None:
    server, own = pair()
    before = server.gateway.uploads.limit
    own.answer = JSONResponse({"outputs": ["x" * 4_000_000]})
    server.gateway.uploads.limit = 1_000_000
    refuses(server, asked(server), 429, "queue_full")
    server.gateway.uploads.limit = before
    assert server.gateway.uploads.held == 0


# --- the command


def test_kserves_arguments_become_settings() -> None:
    theirs = ["--model_name", "photos", "--predictor_host", "photos-predictor.shop", "--http_port", "8080"]
    assert settings_of(theirs) == {"predictor_url": "http://photos-predictor.shop", "port": 8080}
    assert settings_of(["--predictor_host=a:9000", "--predictor_use_ssl=True"]) == {"predictor_url": "https://a:9000"}


@pytest.mark.parametrize(
    "arguments", [[], ["--predictor_host", "a", "--predictor_protocol", "v1"], ["--predictor_host", "a", "--what", "1"]]
)
def test_other_arguments_stop_the_start(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        settings_of(arguments)
    assert stopped.value.code == 2
    assert "usage: python -m service.transformer" in capsys.readouterr().err
