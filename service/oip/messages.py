"""Messages of the Open Inference Protocol: the body of a request to what it asks, answers to the body of a response.

A body is JSON, or JSON and behind it the binary tensors in the order in which the JSON names them. What is not known
is refused, never ignored: a member, an input, an output, a parameter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json

from models.manifest import Manifest
from service.errors import BodyTooLarge, InvalidInference, MalformedJson, MalformedTensor, TooManyImages
from service.oip.tensors import DATATYPES, read_base64, read_elements, read_floats, read_numbers, write_binary
from service.parameters import InferParameters, printable, validated
from service.work import Floats

ENCODED, PIXELS = "image", "images"
"""The inputs, of which a request has one: image files, or images as numbers at the model's input size."""
DEFAULT_OUTPUTS = ("probabilities", "label")
"""Where the request names none: the others cost time or are large."""
MAX_ID = 1024
MAX_PARAMETERS = 64
MAX_PROBLEMS = 8
"""That one error lists; of more, which only a flood has, it does not even make a list."""
SPARE_VALUES = 4096
"""Values that JSON may have besides the numbers of images."""

Images = list[bytes] | Floats
"""Of a request: files, or numbers in [0, 1], (n, 3, H, W)."""


class Member(BaseModel):
    """Of a request's JSON: types are not converted, and an unknown member is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class InputParameters(Member):
    """Of one input."""

    binary_data_size: Annotated[int | None, Field(ge=0)] = None
    content_type: Literal["base64"] | None = None
    """Of BYTES in JSON, which are base64 also where nobody says so."""


class Input(Member):
    """A tensor that is sent, in `data` or behind the JSON."""

    name: str
    shape: list[int]
    datatype: str
    parameters: InputParameters | None = None
    data: list[Any] | None = None

    @property
    def binary_data_size(self) -> int | None:
        """None where the data are in the JSON."""
        return None if self.parameters is None else self.parameters.binary_data_size


class OutputParameters(Member):
    """Of one output."""

    binary_data: bool | None = None
    classification: Annotated[int | None, Field(ge=1)] = None


class Output(Member):
    """A tensor that is asked for."""

    name: str
    parameters: OutputParameters | None = None

    @property
    def binary_data(self) -> bool | None:
        """Whether to send it behind the JSON; None leaves it to the request."""
        return None if self.parameters is None else self.parameters.binary_data

    @property
    def classification(self) -> int | None:
        """How many classes to list instead of the probabilities of all."""
        return None if self.parameters is None else self.parameters.classification


class InferRequest(Member):
    """The JSON of a request. KServe's client repeats the model's name in it."""

    id: Annotated[str | None, Field(max_length=MAX_ID)] = None
    model_name: str | None = None
    parameters: Annotated[dict[str, Any] | None, Field(max_length=MAX_PARAMETERS)] = None
    inputs: list[Input]
    outputs: list[Output] | None = None


@dataclass(frozen=True, slots=True)
class Inference:
    """What a request asks. Its images are apart, to be out of memory sooner."""

    id: str | None
    parameters: InferParameters
    outputs: Sequence[Output]

    def wants(self, name: str) -> bool:
        """Whether `name` is among the outputs that are asked for."""
        return any(output.name == name for output in self.outputs)

    def is_binary(self, output: Output) -> bool:
        """Whether `output` is to be sent behind the JSON."""
        return self.parameters.binary_data_output if output.binary_data is None else output.binary_data


def inputs_of(manifest: Manifest) -> dict[str, tuple[str, list[int]]]:
    """Datatype and shape of each input of a model; -1 is the number of images."""
    return {ENCODED: ("BYTES", [-1]), PIXELS: ("FP32", [-1, 3, *manifest.input_size])}


def outputs_of(manifest: Manifest) -> dict[str, tuple[str, list[int]]]:
    """Datatype and shape of each output of a model."""
    scores: dict[str, tuple[str, list[int]]] = {"aid_score": ("FP32", [-1])}
    return {
        "probabilities": ("FP32", [-1, len(manifest.classes)]),
        "label": ("BYTES", [-1]),
        "purified": ("FP32", [-1, 3, *manifest.input_size]),
        **(scores if manifest.aid_threshold is not None else {}),
        "seed": ("UINT64", [-1]),
    }


def read_inference(
    body: bytes, json_lengths: Sequence[str], manifest: Manifest, max_images: int, max_bytes: int
) -> tuple[Inference, Images]:
    """What `body` asks of the model of `manifest`, and its images: files, or numbers (n, 3, H, W).

    `json_lengths` are the values of the header Inference-Header-Content-Length; there is one if tensors are binary.
    Raises MalformedJson, MalformedTensor, BadBase64, InvalidInference, InvalidParameter, TooManyImages, BodyTooLarge.
    """
    request, binary = _read_request(body, json_lengths, manifest, max_images)
    _check_name(request, manifest.name, f"{manifest.name}@{manifest.version}")
    parameters = validated(InferParameters, request.parameters or {}, "parameters")
    outputs = request.outputs or [Output(name=name) for name in DEFAULT_OUTPUTS]
    _check_outputs(outputs, manifest)
    return Inference(request.id, parameters, outputs), _read_images(request, binary, manifest, max_images, max_bytes)


def read_passage(
    body: bytes, json_lengths: Sequence[str], manifest: Manifest, max_images: int, max_bytes: int, *, model: str
) -> tuple[Inference, Images]:
    """As `read_inference`, where `model` is a predictor's: its outputs are not known here, and none stands for all.

    The images are still what the model of `manifest`, which purifies them, takes.
    """
    request, binary = _read_request(body, json_lengths, manifest, max_images)
    _check_name(request, model)
    parameters = validated(InferParameters, request.parameters or {}, "parameters")
    if parameters.votes > 1:
        raise InvalidInference("votes are averaged probabilities, and a predictor's answer is not ours to average")
    inference = Inference(request.id, parameters, request.outputs or ())
    return inference, _read_images(request, binary, manifest, max_images, max_bytes)


def _read_request(
    body: bytes, json_lengths: Sequence[str], manifest: Manifest, max_images: int
) -> tuple[InferRequest, memoryview]:
    """The JSON of `body`, and what is behind it."""
    message, binary = _split(body, json_lengths)
    samples = 3 * manifest.input_size[0] * manifest.input_size[1]
    return _request(read_json(message, 2 * max_images * samples + SPARE_VALUES)), binary


def _check_name(request: InferRequest, *names: str) -> None:
    if request.model_name not in (None, *names):
        raise InvalidInference("the model_name is not that of the address")


def _split(body: bytes, json_lengths: Sequence[str]) -> tuple[memoryview, memoryview]:
    whole = memoryview(body)
    if not json_lengths:
        return whole, whole[:0]
    text = json_lengths[0]
    if len(json_lengths) > 1 or not (text.isascii() and text.isdecimal() and len(text) < 19 and int(text) <= len(body)):
        raise MalformedTensor("Inference-Header-Content-Length is not a number of bytes of the body")
    return whole[: int(text)], whole[int(text) :]


def read_json(message: memoryview, max_values: int) -> object:
    """The one value of a JSON text, which may hold lists, objects and commas up to `max_values` together.

    Raises MalformedJson for whatever two readers could understand differently, and BodyTooLarge: a few bytes of JSON
    become objects of many.
    """
    try:
        text = str(message, "utf-8")
        values = sum(text.count(mark) for mark in "[{,")
        if values > max_values:
            raise BodyTooLarge(f"the JSON may have {max_values} values", limit=max_values, actual=values)
        value = json.loads(text, object_pairs_hook=_object, parse_float=_finite, parse_constant=_not_a_number)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # fails for half of a surrogate pair
    except json.JSONDecodeError as error:
        raise MalformedJson(f"it is not JSON at character {error.pos}") from None
    except UnicodeError:
        raise MalformedJson("it is not UTF-8, or has half of a surrogate pair") from None
    except ValueError:
        raise MalformedJson("a number has too many digits") from None
    except RecursionError:
        raise MalformedJson("it is nested too deeply") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise MalformedJson("an object names a member twice")
    return members


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise MalformedJson("a number is beyond the range of a double")
    return number


def _not_a_number(_: str) -> NoReturn:
    raise MalformedJson("NaN and Infinity are not JSON")


def _request(value: object) -> InferRequest:
    try:
        return InferRequest.model_validate(value)
    except ValidationError as error:
        if error.error_count() > MAX_PROBLEMS:
            raise InvalidInference(f"more than {MAX_PROBLEMS} members are wrong") from None
        found = error.errors(include_url=False, include_input=False, include_context=False)
        raise InvalidInference("; ".join(_sentence(problem) for problem in found)) from None


def _sentence(problem: Any) -> str:
    place = "/".join(printable(str(step)) for step in problem["loc"])
    message = "is not a member that we know" if problem["type"] == "extra_forbidden" else problem["msg"]
    return f"{place}: {message}" if place else message


def _check_outputs(outputs: Sequence[Output], manifest: Manifest) -> None:
    known = outputs_of(manifest)
    for output in outputs:
        if output.name not in known:
            raise InvalidInference(f"{printable(output.name)} is not an output; known: {', '.join(known)}")
        if output.classification is None:
            continue
        if output.name != "probabilities":
            raise InvalidInference(f"{output.name} has no classification")
        if output.classification > len(manifest.classes):
            raise InvalidInference(f"the model has {len(manifest.classes)} classes")
    if len({output.name for output in outputs}) < len(outputs):
        raise InvalidInference("an output is asked for twice")


def _only_input(inputs: Sequence[Input], manifest: Manifest) -> Input:
    known = inputs_of(manifest)
    for tensor in inputs:
        if tensor.name not in known:
            raise InvalidInference(f"{printable(tensor.name)} is not an input; known: {', '.join(known)}")
    if len(inputs) != 1:
        raise InvalidInference(f"a request has one input, {' or '.join(known)}")
    return inputs[0]


def _check_shape(tensor: Input, manifest: Manifest, max_images: int) -> None:
    datatype, shape = inputs_of(manifest)[tensor.name]
    if tensor.datatype != datatype:
        raise InvalidInference(f"the datatype of {tensor.name} is {datatype}")
    if len(tensor.shape) != len(shape) or tensor.shape[1:] != shape[1:] or tensor.shape[0] < 1:
        raise InvalidInference(f"the shape of {tensor.name} is {shape}, where -1 is the number of images, at least 1")
    if tensor.shape[0] > max_images:
        raise TooManyImages(f"a request may hold {max_images} images", limit=max_images, actual=tensor.shape[0])


def _read_images(
    request: InferRequest, binary: memoryview, manifest: Manifest, max_images: int, max_bytes: int
) -> Images:
    tensor = _only_input(request.inputs, manifest)
    _check_shape(tensor, manifest, max_images)
    return _images(tensor, binary, max_bytes)


def _images(tensor: Input, binary: memoryview, max_bytes: int) -> Images:
    size = tensor.binary_data_size
    if (size is None) == (tensor.data is None):
        raise InvalidInference(f"{tensor.name} has either data or a binary_data_size")
    if len(binary) != (size or 0):
        raise MalformedTensor(f"{size or 0} bytes are announced behind the JSON, and there are {len(binary)}")
    if tensor.data is None:
        is_encoded = tensor.name == ENCODED
        return read_elements(binary, tensor.shape[0], max_bytes) if is_encoded else read_floats(binary, tensor.shape)
    if tensor.name == ENCODED:
        return read_base64(tensor.data, tensor.shape[0], max_bytes)
    return read_numbers(tensor.data, tensor.shape)


def write_response(
    head: dict[str, Any], inference: Inference, tensors: Sequence[NDArray[Any]]
) -> tuple[bytes, int | None]:
    """`head` and the tensors of `inference.outputs`: a body, and the length of its JSON if there is more than that."""
    outputs = list[dict[str, Any]]()
    behind = list[bytes]()
    for output, tensor in zip(inference.outputs, tensors, strict=True):
        described = {"name": output.name, "datatype": DATATYPES[tensor.dtype.kind], "shape": tensor.shape}
        if inference.is_binary(output):
            behind.append(write_binary(tensor))
            outputs.append(described | {"parameters": {"binary_data_size": len(behind[-1])}})
        else:
            outputs.append(described | {"data": tensor.ravel().tolist()})
    named = head if inference.id is None else head | {"id": inference.id}
    message = to_json(named | {"outputs": outputs})
    return b"".join([message, *behind]), len(message) if behind else None
