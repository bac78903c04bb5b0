"""Bodies of inference requests become what they ask."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.manifest import Manifest
from service.errors import BodyTooLarge, ClarifierError, InvalidInference, MalformedJson, MalformedTensor
from service.oip.messages import inputs_of, outputs_of, read_inference, read_json
from service.work import Floats
from tests.service.manifests import SIDE, fake_manifest

MANIFEST = fake_manifest()
IMAGE = {"name": "image", "shape": [1], "datatype": "BYTES", "data": ["QUI="]}


def read(
    request: object, binary: bytes = b"", length: int | None = None, manifest: Manifest = MANIFEST
) -> list[bytes] | Floats:
    """The images of a request that has `binary` behind its JSON."""
    message = json.dumps(request).encode()
    lengths = [str(len(message) if length is None else length)] if binary else []
    return read_inference(message + binary, lengths, manifest, 4, 1000)[1]


def with_input(**members: Any) -> dict[str, Any]:
    """A request with another input than IMAGE in these members; None takes one out."""
    tensor = {name: value for name, value in (IMAGE | members).items() if value is not None}
    return {"inputs": [tensor]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "{} {}",
        "nothing",
        "{'a': 1}",
        '{"a": 1,}',
        '{"a": 1, "a": 1}',
        '{"a": {"b": 1, "b": 2}}',
        '{"a": 1e400}',
        '{"a": -1e400}',
        '{"a": NaN}',
        '{"a": [-Infinity]}',
        '{"a": "\\ud800"}',
        '{"\\udc00": 1}',
        '{"a": "\\udc00\\ud800"}',
        '{"a": "\n"}',
        '{"a": ' + "1" * 5000 + "}",
        "[" * 4000,
        "[" * 4000 + "]" * 4000,
        '{"a":' * 1500 + "1" + "}" * 1500,
    ],
)
def test_row_20_what_is_not_strict_json_is_refused(text: str) -> None:
    with pytest.raises(MalformedJson):
        read_json(memoryview(text.encode()), 10_000)


@pytest.mark.parametrize(
    "data", [b'\xef\xbb\xbf{"a": 1}', '{"a": 1}'.encode("utf-16"), b'{"a": "\xff"}', b'{"a": "\xed\xa0\x80"}', b"\0"]
)
def test_row_20_what_is_not_plain_utf_8_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedJson):
        read_json(memoryview(data), 100)


def test_json_that_is_whole_is_read() -> None:
    text = '{"a": "\\ud83d\\ude00 \\\\ud800 é", "b": [1, 0.5e1, -0], "c": null}'
    assert read_json(memoryview(text.encode()), 100) == {"a": "😀 \\ud800 é", "b": [1, 5.0, 0], "c": None}


def test_json_of_too_many_values_is_refused_before_it_is_parsed() -> None:
    for flood in ("[" + "0," * 100 + "0]", "[" * 101, "[" + "{},[]," * 30, '{"":' * 101):
        with pytest.raises(BodyTooLarge):
            read_json(memoryview(flood.encode()), 100)


def test_a_whole_batch_of_numbers_is_not_too_many() -> None:
    images = np.full((4, 3, SIDE, SIDE), 0.5, np.float32)
    tensor = {"name": "images", "shape": list(images.shape), "datatype": "FP32", "data": images.tolist()}
    assert np.array_equal(read({"inputs": [tensor]}), images)


@given(st.binary(max_size=200))
def test_any_body_is_read_or_refused_in_our_words(body: bytes) -> None:
    for lengths in ([], ["0"], [str(len(body))], ["7"], ["x"], ["-1"], ["5", "5"]):
        with pytest.raises(ClarifierError):
            read_inference(body, lengths, MANIFEST, 4, 1000)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*IMAGE, "parameters", "x"]), inner),
    max_leaves=8,
)


@given(st.sampled_from([*IMAGE, "parameters", "x"]), JSON_VALUES)
def test_any_member_of_an_input_is_understood_or_refused_in_our_words(name: str, value: Any) -> None:
    try:
        images = read(with_input(**{name: value}))
    except ClarifierError:
        return
    assert isinstance(images, list)
    assert len(images) == 1


@given(st.sampled_from(["id", "model_name", "parameters", "outputs", "inputs", "x"]), JSON_VALUES)
def test_any_member_of_a_request_is_understood_or_refused_in_our_words(name: str, value: Any) -> None:
    try:
        assert read({"inputs": [IMAGE], name: value}) == [b"AB"]
    except ClarifierError:
        assert name != "id" or not isinstance(value, str)


@pytest.mark.parametrize(
    ("request_", "detail"),
    [
        ([], "valid dictionary"),
        ({}, "inputs: Field required"),
        ({"inputs": [IMAGE], "<b>": 1}, "?b?: is not a member"),
        ({"inputs": [IMAGE], "id": 5}, "id: "),
        ({"inputs": [IMAGE], "id": "x" * 1025}, "id: "),
        ({"inputs": [IMAGE], "model_name": "other"}, "model_name"),
        ({"inputs": []}, "one input, image or images"),
        ({"inputs": [IMAGE, IMAGE]}, "one input, image or images"),
        (with_input(name="x<y"), "x?y is not an input; known: image, images"),
        (with_input(extra=1), "inputs/0/extra: is not a member"),
        (with_input(parameters={"shared_memory_region": "x"}), "shared_memory_region: is not a member"),
        (with_input(parameters={"content_type": "str"}), "content_type"),
        (with_input(datatype="FP32"), "datatype of image is BYTES"),
        (with_input(shape=[]), "shape of image"),
        (with_input(shape=[0]), "shape of image"),
        (with_input(shape=[-1]), "shape of image"),
        (with_input(shape=[1, 1]), "shape of image"),
        (with_input(shape=[1.0]), "inputs/0/shape/0"),
        (with_input(shape=[True]), "inputs/0/shape/0"),
        (with_input(shape=["1"]), "inputs/0/shape/0"),
        (with_input(shape=[2]), "says 2 elements, the data have 1"),
        (with_input(data=None), "either data or a binary_data_size"),
        (with_input(parameters={"binary_data_size": 4}), "either data or a binary_data_size"),
        (with_input(name="images", datatype="FP32", shape=[1, 3, 8, 9]), "shape of images"),
        (with_input(name="images", datatype="FP64", shape=[1, 3, 8, 8]), "datatype of images is FP32"),
        (with_input(name="images", datatype="FP32", shape=[1, 3, 8, 8]), "says 192 numbers, the data have 1"),
        ({"inputs": [IMAGE], "outputs": [{"name": "logits"}]}, "logits is not an output; known: probabilities, label"),
        ({"inputs": [IMAGE], "outputs": [{"name": "label"}] * 2}, "asked for twice"),
        ({"inputs": [IMAGE], "outputs": [{"name": "label", "x": 1}]}, "outputs/0/x: is not a member"),
        ({"inputs": [IMAGE], "outputs": [{"name": "label", "parameters": {"x": 1}}]}, "x: is not a member"),
        ({"inputs": [IMAGE], "outputs": [{"name": "label", "parameters": {"classification": 1}}]}, "no classification"),
        ({"inputs": [IMAGE], "outputs": [{"name": "probabilities", "parameters": {"classification": 4}}]}, "3 classes"),
    ],
)
def test_what_is_not_known_or_contradicts_itself_is_named(request_: object, detail: str) -> None:
    with pytest.raises(InvalidInference) as refused:
        read(request_)
    assert detail in refused.value.detail


@pytest.mark.parametrize(
    "flood",
    [
        with_input(shape=["x"] * 4000),
        {"inputs": [IMAGE], **{str(number): 1 for number in range(4000)}},
        {"inputs": [IMAGE], "parameters": {str(number): 1 for number in range(4000)}},
        {"inputs": [IMAGE], "outputs": [{}] * 1000},
    ],
    ids=["shape", "members", "parameters", "outputs"],
)
def test_a_flood_of_what_is_wrong_is_not_listed(flood: dict[str, Any]) -> None:
    with pytest.raises(InvalidInference) as refused:
        read(flood)
    assert len(refused.value.detail) < 200


def test_optional_members_may_be_null() -> None:
    request = {"id": None, "parameters": None, "outputs": None, "inputs": [IMAGE | {"parameters": None}]}
    assert read(request) == [b"AB"]


@pytest.mark.parametrize("name", ["colors", "colors@1"])
def test_the_model_may_be_named_again_in_the_body(name: str) -> None:
    assert read({"inputs": [IMAGE], "model_name": name}) == [b"AB"]


def test_binary_data_stand_behind_the_json() -> None:
    request = with_input(data=None, parameters={"binary_data_size": 6})
    assert read(request, b"\2\0\0\0AB") == [b"AB"]
    assert read(with_input(), b"", 0) == [b"AB"]  # no header, and none of it binary


@pytest.mark.parametrize(("size", "binary"), [(6, b"\2\0\0\0ABC"), (7, b"\2\0\0\0AB"), (6, b"\3\0\0\0AB"), (0, b"")])
def test_binary_data_of_another_length_than_announced_are_refused(size: int, binary: bytes) -> None:
    with pytest.raises(MalformedTensor):
        read(with_input(data=None, parameters={"binary_data_size": size}), binary)


def test_binary_data_that_nothing_announces_are_refused() -> None:
    with pytest.raises(MalformedTensor):
        read(with_input(), b"AB")


@pytest.mark.parametrize("length", ["-1", "x", "9999", "", "1e1", "²", "1" * 30])
def test_a_length_of_the_json_that_is_none_is_refused(length: str) -> None:
    with pytest.raises(MalformedTensor):
        read_inference(json.dumps(with_input()).encode(), [length], MANIFEST, 4, 1000)


def test_a_model_says_what_it_takes_and_gives() -> None:
    assert inputs_of(MANIFEST) == {"image": ("BYTES", [-1]), "images": ("FP32", [-1, 3, SIDE, SIDE])}
    assert outputs_of(MANIFEST)["probabilities"] == ("FP32", [-1, 3])
    assert "aid_score" in outputs_of(MANIFEST)
    assert "aid_score" not in outputs_of(fake_manifest(aid=False))
