"""What is kept of a job: its description, its prepared images, its answers. Each is checked when it is read.

A chunk of images, and an answer, is a line of JSON with bytes after it: pixels, or a PNG.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import to_json

from service.remote.wire import Malformed
from service.schemas import ClassifyResponse, Problem, PurifiedImage
from service.work import Key, Operation, Pixels

PNG = b"\x89PNG\r\n\x1a\n"
CHUNK = 32
"""At most so many images are kept together."""
MAX_SEED = 2**64
CLASSIFIED: TypeAdapter[ClassifyResponse | Problem] = TypeAdapter(ClassifyResponse | Problem)
PURIFIED: TypeAdapter[PurifiedImage | Problem] = TypeAdapter(PurifiedImage | Problem)

Entry = ClassifyResponse | PurifiedImage | Problem
"""What is said of one image: as in the answer of a batch."""


class Spec(BaseModel):
    """What a job asks for, fixed when it is made."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    id: str
    owner: str
    """The name of the key that made it; empty where nobody has one."""
    request_id: str
    operation: Operation
    model: str
    """`name@version`."""
    digest: str
    defense: str
    votes: Annotated[int, Field(ge=1)]
    explain: bool
    top_k: int | None
    input_size: tuple[int, int]
    """Height and width in pixels."""
    images: Annotated[int, Field(ge=1, lt=2**31)]
    starts: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...]
    """The number of the first image of each chunk."""
    created: str

    @property
    def key(self) -> Key:
        """What its images must agree on to run in one batch."""
        return Key(self.operation, self.model, self.defense, self.votes, self.explain, digest=self.digest)

    @property
    def chunks(self) -> list[range]:
        """The numbers of the images of each chunk."""
        ends = [*self.starts[1:], self.images]
        return [range(start, end) for start, end in zip(self.starts, ends, strict=True)]


@dataclass(frozen=True, slots=True)
class Input:
    """One image of a job at the model's input size."""

    number: int
    pixels: Pixels
    seed: int
    decode_ms: float


@dataclass(frozen=True, slots=True)
class Found:
    """A job and how far it is."""

    spec: Spec
    done: int
    """Images that have their answer, the failed ones among them."""
    failed: int
    running: bool
    """Whether a gateway works on it."""
    left_s: float
    """Until it is forgotten."""

    @property
    def is_done(self) -> bool:
        """Whether every image has its answer."""
        return self.done >= self.spec.images


def read_spec(text: bytes) -> Spec:
    """Raises Malformed."""
    try:
        spec = Spec.model_validate_json(text)
    except ValidationError as error:
        raise Malformed(str(error)) from None
    if spec.starts[:1] != (0,) or any(not 1 <= len(numbers) <= CHUNK for numbers in spec.chunks):
        raise Malformed("its chunks do not hold its images")
    return spec


def pack_inputs(inputs: Sequence[Input]) -> bytes:
    """A chunk, which may be empty: images that could not be read are not in it."""
    head = json.dumps([[each.number, each.seed, round(each.decode_ms, 3)] for each in inputs]).encode()
    return b"\n".join([head, b"".join(each.pixels.tobytes() for each in inputs)])


def unpack_inputs(data: bytes, numbers: range, input_size: tuple[int, int]) -> dict[int, Input]:
    """The images of a chunk by their numbers, which are some of `numbers`. Raises Malformed."""
    head, _, samples = data.partition(b"\n")
    height, width = input_size
    try:
        listed = json.loads(head)
        pixels = np.frombuffer(samples, np.uint8).reshape(len(listed), height, width, 3)
        found = [_input(number, seed, ms, image) for (number, seed, ms), image in zip(listed, pixels, strict=True)]
    except (IndexError, RecursionError, TypeError, ValueError) as error:
        raise Malformed(str(error)) from None
    inputs = {each.number: each for each in found}
    if len(inputs) != len(found) or not all(number in numbers for number in inputs):
        raise Malformed("a chunk holds other images than its own")
    return inputs


def _input(number: object, seed: object, decode_ms: object, pixels: Pixels) -> Input:
    if type(number) is not int or type(seed) is not int or not 0 <= seed < MAX_SEED:
        raise ValueError("a number is none")
    if type(decode_ms) not in (int, float) or not math.isfinite(decode_ms):  # type: ignore[arg-type]
        raise ValueError("a time is none")
    return Input(number, pixels, seed, float(decode_ms))  # type: ignore[arg-type]


def pack_entry(entry: Entry, picture: bytes = b"") -> bytes:
    """An answer and, of a purified image, its PNG."""
    return to_json(entry) + b"\n" + picture


def read_line(data: bytes) -> bytes:
    """What is said of a classified image, as it was written. Raises Malformed."""
    line, _, rest = data.partition(b"\n")
    try:
        CLASSIFIED.validate_json(line)
    except ValidationError as error:
        raise Malformed(str(error)) from None
    if rest:
        raise Malformed("something follows an answer")
    return line


def read_picture(data: bytes) -> tuple[PurifiedImage | Problem, bytes]:
    """What is said of a purified image, and its PNG, empty if it failed. Raises Malformed."""
    line, _, picture = data.partition(b"\n")
    try:
        entry = PURIFIED.validate_json(line)
    except ValidationError as error:
        raise Malformed(str(error)) from None
    if picture.startswith(PNG) == isinstance(entry, Problem):
        raise Malformed("a picture is none")
    return entry, picture
