"""Tensors of the Open Inference Protocol: what is between JSON or bytes and what we compute with. Pure functions.

Numbers are little-endian and row-major. A BYTES tensor is binary as its elements one after the other, each after its
length in four bytes; in JSON its elements are strings, and those of images are base64.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import BadBase64, BodyTooLarge, InvalidInference, MalformedTensor
from service.work import Floats

DATATYPES = {"f": "FP32", "u": "UINT64", "O": "BYTES"}
"""By the kind of the numpy array; BYTES are an array of str."""
LENGTH = struct.Struct("<I")
DATA_URI = re.compile(r"data:image/[a-z0-9.+-]{1,64};base64,", re.IGNORECASE)
"""Browsers write this before the base64 of an image."""
NUMBERS = {int, float}
"""Not bool, which Python would take for a number."""


def read_elements(data: memoryview, count: int, max_bytes: int) -> list[bytes]:
    """The `count` elements of a binary BYTES tensor.

    Raises MalformedTensor if their lengths do not add up to the data, BodyTooLarge for one of more than `max_bytes`.
    """
    elements = list[bytes]()
    position = 0
    for _ in range(count):
        start = position + LENGTH.size
        if start > len(data):
            raise MalformedTensor("the data end before the last element")
        (length,) = LENGTH.unpack_from(data, position)
        position = start + length
        if position > len(data):
            raise MalformedTensor("an element is longer than what is left of the data")
        _check_size(length, max_bytes)
        elements.append(bytes(data[start:position]))
    if position != len(data):
        raise MalformedTensor("data are left after the last element")
    return elements


def read_base64(texts: Sequence[object], count: int, max_bytes: int) -> list[bytes]:
    """The `count` elements of an image tensor in JSON. Raises InvalidInference, BadBase64 and BodyTooLarge."""
    if len(texts) != count:
        raise InvalidInference(f"the shape says {count} elements, the data have {len(texts)}")
    return [_from_base64(text, max_bytes) for text in texts]


def _from_base64(text: object, max_bytes: int) -> bytes:
    if not isinstance(text, str):
        raise InvalidInference("an element of a BYTES tensor is not a string")
    prefix = DATA_URI.match(text)
    start = prefix.end() if prefix else 0
    _check_size((len(text) - start) // 4 * 3 - 2, max_bytes)  # before there is memory for it; padding is at most 2
    try:
        element = base64.b64decode(text[start:], validate=True)
    except ValueError:
        raise BadBase64 from None
    _check_size(len(element), max_bytes)
    return element


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise BodyTooLarge(f"an image may have {max_bytes} bytes", limit=max_bytes, actual=size)


def read_floats(data: memoryview, shape: Sequence[int]) -> Floats:
    """A binary FP32 tensor of numbers in [0, 1]: not a copy. Raises InvalidInference."""
    count = int(np.prod(shape))
    if len(data) != 4 * count:
        raise InvalidInference(f"the shape says {4 * count} bytes, the data have {len(data)}")
    return _checked(np.frombuffer(data, "<f4")).reshape(shape)


def read_numbers(data: Sequence[Any], shape: Sequence[int]) -> Floats:
    """An FP32 tensor of numbers in [0, 1] in JSON, flat or nested. Raises InvalidInference."""
    flat = _flat(data, shape)
    count = int(np.prod(shape))
    if len(flat) != count:
        raise InvalidInference(f"the shape says {count} numbers, the data have {len(flat)}")
    if not set(map(type, flat)) <= NUMBERS:
        raise InvalidInference("the data of an FP32 tensor are not all numbers, or not nested as the shape says")
    try:
        numbers = np.array(flat, np.float64)
    except OverflowError:
        raise _outside() from None
    return _checked(numbers).astype(np.float32).reshape(shape)


def _flat(data: Sequence[Any], shape: Sequence[int]) -> Sequence[Any]:
    """The innermost elements of lists in lists of the lengths that `shape` says; flat data as they are."""
    if not (data and isinstance(data[0], list)):
        return data
    for length in shape[1:]:
        if not all(isinstance(part, list) and len(part) == length for part in data):
            raise InvalidInference("the data are not nested as the shape says")
        data = list(chain.from_iterable(data))
    return data


def _checked(numbers: NDArray[Any]) -> NDArray[Any]:
    """`numbers`, if they are all in [0, 1]; NaN is not."""
    if not (numbers.min() >= 0 and numbers.max() <= 1):
        raise _outside()
    return numbers


def _outside() -> InvalidInference:
    return InvalidInference("a number of the images is not in [0, 1]")


def write_binary(tensor: NDArray[Any]) -> bytes:
    """The binary form of a float32, uint64 or str array."""
    if tensor.dtype.kind != "O":
        return tensor.astype(tensor.dtype.newbyteorder("<"), copy=False).tobytes()
    elements = [text.encode() for text in tensor.ravel()]
    return b"".join(LENGTH.pack(len(element)) + element for element in elements)
