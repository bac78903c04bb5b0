"""Tensors between their bytes or JSON and what is computed with."""

from __future__ import annotations

import base64
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from service.errors import BadBase64, BodyTooLarge, InvalidInference, MalformedTensor
from service.oip.tensors import read_base64, read_elements, read_floats, read_numbers, write_binary

LIMIT = 100
SHAPE = (2, 3, 1, 2)
ELEMENTS = st.lists(st.binary(max_size=LIMIT), max_size=5)
IMAGES = arrays(np.float32, SHAPE, elements=st.floats(0, 1, width=32))


def packed(elements: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


@given(ELEMENTS)
def test_elements_are_read_as_they_were_written(elements: list[bytes]) -> None:
    assert read_elements(memoryview(packed(elements)), len(elements), LIMIT) == elements


@given(st.binary(max_size=60), st.integers(0, 6))
def test_any_bytes_are_elements_that_write_the_same_bytes_or_refused(data: bytes, count: int) -> None:
    try:
        elements = read_elements(memoryview(data), count, LIMIT)
    except (MalformedTensor, BodyTooLarge):
        return
    assert len(elements) == count
    assert packed(elements) == data


@given(ELEMENTS, st.data())
def test_elements_that_are_cut_short_or_followed_by_more_are_refused(
    elements: list[bytes], data: st.DataObject
) -> None:
    whole = packed([*elements, b"x"])
    cut = data.draw(st.integers(0, len(whole) - 1))
    for wrong in (whole[:cut], whole + b"\0"):
        with pytest.raises(MalformedTensor):
            read_elements(memoryview(wrong), len(elements) + 1, LIMIT)


def test_an_element_over_the_limit_is_refused_with_the_limit() -> None:
    with pytest.raises(BodyTooLarge) as refused:
        read_elements(memoryview(packed([bytes(LIMIT + 1)])), 1, LIMIT)
    assert (refused.value.limit, refused.value.actual) == (LIMIT, LIMIT + 1)


def test_a_length_of_four_gigabytes_takes_no_memory() -> None:
    with pytest.raises(MalformedTensor):
        read_elements(memoryview(b"\xff\xff\xff\xff" + bytes(9)), 1, LIMIT)


@given(st.binary(max_size=LIMIT))
def test_base64_is_read_with_and_without_a_data_uri(element: bytes) -> None:
    text = base64.b64encode(element).decode()
    prefixes = ("", "data:image/png;base64,", "DATA:image/svg+xml;BASE64,")
    assert read_base64([prefix + text for prefix in prefixes], 3, LIMIT) == [element] * 3


@pytest.mark.parametrize(
    "text",
    ["QUI", "QUI==", "QU I=", "QUI=\n", "QU-_", "Q", "=", "QUI=QUI=", "é", "\ud800", "data:image/png,QUI=", "QUI=,"],
)
def test_row_21_what_is_not_base64_is_refused(text: str) -> None:
    with pytest.raises(BadBase64):
        read_base64([text], 1, LIMIT)


@pytest.mark.parametrize("size", [LIMIT + 1, LIMIT + 2, LIMIT + 3, 10 * LIMIT])
def test_base64_over_the_limit_is_refused(size: int) -> None:
    with pytest.raises(BodyTooLarge):
        read_base64([base64.b64encode(bytes(size)).decode()], 1, LIMIT)
    assert read_base64([base64.b64encode(bytes(LIMIT)).decode()], 1, LIMIT) == [bytes(LIMIT)]


def test_base64_far_over_the_limit_is_not_decoded() -> None:
    with pytest.raises(BodyTooLarge):
        read_base64(["?" * 10 * LIMIT], 1, LIMIT)


@pytest.mark.parametrize("texts", [[], ["", ""], [1], [None], [["QUI="]], [b"QUI="]])
def test_other_data_than_one_string_is_refused(texts: list[object]) -> None:
    with pytest.raises(InvalidInference):
        read_base64(texts, 1, LIMIT)


@given(IMAGES)
def test_floats_keep_every_bit(images: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    data = write_binary(images)
    assert data == images.astype("<f4").tobytes()
    assert read_floats(memoryview(data), SHAPE).tobytes() == data
    for numbers in (images.ravel().tolist(), images.tolist()):
        assert read_numbers(numbers, SHAPE).tobytes() == data


def test_whole_numbers_are_numbers_too() -> None:
    assert read_numbers([0, 1, 0.5, 1, 1, 0] * 2, SHAPE).ravel().tolist()[:3] == [0, 1, 0.5]


@pytest.mark.parametrize("bad", [-0.001, 1.001, float("nan"), float("inf"), 255.0])
def test_floats_outside_of_0_to_1_are_refused(bad: float) -> None:
    images = np.zeros(SHAPE, np.float32)
    images[1, 2, 0, 1] = bad
    with pytest.raises(InvalidInference):
        read_floats(memoryview(images.tobytes()), SHAPE)
    with pytest.raises(InvalidInference):
        read_numbers(images.tolist(), SHAPE)


@pytest.mark.parametrize("size", [0, 4, 47, 49, 52])
def test_bytes_that_contradict_the_shape_are_refused(size: int) -> None:
    with pytest.raises(InvalidInference):
        read_floats(memoryview(bytes(size)), SHAPE)


@pytest.mark.parametrize(
    "data",
    [
        [],
        [0] * 11,
        [0] * 13,
        [True, *[0] * 11],
        [None, *[0] * 11],
        ["0", *[0] * 11],
        [10**400, *[0] * 11],
        [[0] * 6] * 2,
        [[0, 0]] * 6,
        [[[[0, 0]]] * 3] * 3,
        [[[[0, 0]]] * 2 + [[[0]]]] * 2,
        [[[[0, [0]]]] * 3] * 2,
        [[[[[0], [0]]]] * 3] * 2,
        [[[[0, 0]]] * 3, 0],
        [{}] * 12,
    ],
)
def test_numbers_that_contradict_the_shape_or_are_none_are_refused(data: list[Any]) -> None:
    with pytest.raises(InvalidInference):
        read_numbers(data, SHAPE)


def test_other_tensors_are_written_little_endian_and_strings_after_their_length() -> None:
    assert write_binary(np.array([1, 2**64 - 1], np.uint64)) == struct.pack("<QQ", 1, 2**64 - 1)
    assert write_binary(np.array([["é", ""]], object)) == b"\2\0\0\0\xc3\xa9\0\0\0\0"
    assert write_binary(np.arange(4, dtype=np.float32).reshape(2, 2).T) == struct.pack("<4f", 0, 2, 1, 3)
