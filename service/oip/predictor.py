"""The predictor behind a transformer: another server of the Open Inference Protocol, over HTTP."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Annotated, Any, TypeVar

import httpx2
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json

from service.errors import (
    BodyTooLarge,
    ClarifierError,
    DeadlineExceeded,
    InvalidInference,
    NotReady,
    Overloaded,
    PredictorFailed,
    UnknownModel,
)
from service.oip.messages import Inference, Output
from service.oip.steps import JSON_LENGTH, MEDIA_TYPES
from service.uploads import Account
from service.work import Floats

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
"""Of a model or a version: a client's word goes into the address that is asked, and may be nothing but a name."""
MAX_MODELS = 64
"""Whose inputs are remembered."""
REMEMBERED_S = 60.0
"""How long: a predictor may be given other models."""
MAX_METADATA_BYTES = 1 << 20
MAX_ANSWER_BYTES = 64 << 20
MAX_REASON = 200
"""Characters of a predictor's own words that are passed on."""
CONNECT_S = 2.0
POOL = httpx2.Limits(max_connections=256, max_keepalive_connections=32, keepalive_expiry=30.0)
BINARY = "binary_tensor_data"
"""The extension of servers that take tensors behind the JSON."""


class _Tensor(BaseModel):
    """In a predictor's metadata; what else it says is its own affair."""

    model_config = ConfigDict(frozen=True)

    name: str
    datatype: str
    shape: list[int]


class _Server(BaseModel):
    extensions: list[str] = []


class _Model(BaseModel):
    versions: list[str] | None = None
    inputs: Annotated[list[_Tensor], Field(min_length=1, max_length=64)]
    outputs: Annotated[list[_Tensor], Field(max_length=64)]


M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class ImageInput:
    """How a model of the predictor takes images; -1 in the place of a size takes any."""

    name: str
    datatype: str
    """FP32 for numbers in [0, 1], or UINT8."""
    channels_last: bool
    batch: int
    height: int
    width: int

    def tensor(self, images: Floats) -> NDArray[Any]:
        """`images`, (n, H, W, 3) in [0, 1], as the model takes them. Raises PredictorFailed if it does not."""
        ours, theirs = images.shape[:3], (self.batch, self.height, self.width)
        if any(their not in (-1, our) for our, their in zip(ours, theirs, strict=True)):
            raise PredictorFailed(
                f"its model takes images as {theirs}, and gets {ours}: their number, height and width"
            )
        array = images if self.channels_last else images.transpose(0, 3, 1, 2)
        if self.datatype == "UINT8":
            return np.ascontiguousarray((array * 255).round().astype(np.uint8))
        return np.ascontiguousarray(array, "<f4")


@dataclass(frozen=True, slots=True)
class Described:
    """A model of the predictor."""

    image: ImageInput
    binary: bool
    """Whether its server takes tensors behind the JSON."""
    versions: Sequence[str] | None
    outputs: Mapping[str, tuple[str, list[int]]]


@dataclass(frozen=True, slots=True)
class Message:
    """What a predictor is sent."""

    body: bytes
    json_length: int | None
    """None where the body is JSON and nothing else."""

    @property
    def headers(self) -> dict[str, str]:
        """Those that say what the body is."""
        if self.json_length is None:
            return {"Content-Type": "application/json"}
        return {"Content-Type": "application/octet-stream", JSON_LENGTH: str(self.json_length)}


@dataclass(frozen=True, slots=True)
class Reply:
    """What a predictor answers, to be passed on as it came."""

    body: bytes
    json_length: str | None
    """None where the body is JSON and nothing else."""


class Predictor:
    """The server at `url`. The operator has chosen the address; what comes from it is bounded in size and time all the
    same, and redirections are not followed.

    Every method raises PredictorFailed, DeadlineExceeded, and what the predictor says of the request: UnknownModel,
    InvalidInference, BodyTooLarge, Overloaded, NotReady. Deadlines are readings of the monotonic clock.
    """

    def __init__(self, url: str) -> None:
        self._client = httpx2.AsyncClient(
            base_url=url,
            headers={"Accept-Encoding": "identity"},
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),  # none is kept: clients have nothing in common
            timeout=httpx2.Timeout(None, connect=CONNECT_S),
            transport=httpx2.AsyncHTTPTransport(limits=POOL, trust_env=False, retries=1),  # of connecting, no more
            trust_env=False,
        )
        self._known = OrderedDict[str, tuple[float, Described]]()

    async def close(self) -> None:
        await self._client.aclose()

    async def check_ready(self, path: str, deadline: float) -> None:
        """Raises NotReady, or another of its errors, unless the model at `path` answers now."""
        async with self._answered("GET", f"{path}/ready", deadline) as response:
            await _read_body(response, MAX_METADATA_BYTES)

    async def describe(self, path: str, deadline: float) -> Described:
        """The model at `path`, as it was at most a minute ago."""
        until, known = self._known.get(path, (0.0, None))
        if known is not None and time.monotonic() < until:
            return known
        server = await self._metadata(_Server, "/v2", deadline)
        model = await self._metadata(_Model, path, deadline)
        outputs = {tensor.name: (tensor.datatype, tensor.shape) for tensor in model.outputs}
        found = Described(_image_input(model.inputs), BINARY in server.extensions, model.versions, outputs)
        self._known[path] = (time.monotonic() + REMEMBERED_S, found)
        self._known.move_to_end(path)
        if len(self._known) > MAX_MODELS:
            self._known.popitem(last=False)
        return found

    async def infer(
        self, path: str, message: Message, headers: Mapping[str, str], account: Account, deadline: float
    ) -> Reply:
        """The answer to `message`, whose bytes are held on `account`.

        An inference changes nothing, so that it is sent a second time if the connection broke before its answer: a
        server that restarts closes connections which were about to be used.
        """
        try:
            try:
                return await self._infer(path, message, headers, account, deadline)
            except PredictorFailed as error:
                if not isinstance(error.__cause__, httpx2.HTTPError):
                    raise
                return await self._infer(path, message, headers, account, deadline)
        except (InvalidInference, UnknownModel):
            self._known.pop(path, None)  # it may have been given another model
            raise

    async def _infer(
        self, path: str, message: Message, headers: Mapping[str, str], account: Account, deadline: float
    ) -> Reply:
        sent = {"content": message.body, "headers": {**headers, **message.headers}}
        async with self._answered("POST", f"{path}/infer", deadline, **sent) as response:
            return _reply(response, await _read_body(response, MAX_ANSWER_BYTES, account))

    async def _metadata(self, kind: type[M], path: str, deadline: float) -> M:
        async with self._answered("GET", path, deadline) as response:
            body = await _read_body(response, MAX_METADATA_BYTES)
        try:
            return kind.model_validate_json(body)
        except ValidationError:
            raise PredictorFailed("its metadata are not those of the Open Inference Protocol") from None

    @asynccontextmanager
    async def _answered(self, method: str, path: str, deadline: float, **sent: Any) -> AsyncIterator[httpx2.Response]:
        """A good response, whose body is read inside."""
        try:
            async with (
                asyncio.timeout(max(0.0, deadline - time.monotonic())),
                self._client.stream(method, path, **sent) as response,
            ):
                if response.status_code != 200:
                    raise _refusal(response, await _read_body(response, MAX_METADATA_BYTES))
                yield response
        except TimeoutError:
            raise DeadlineExceeded("the predictor has not answered in time") from None
        except (httpx2.ConnectError, httpx2.ConnectTimeout):
            raise PredictorFailed("it cannot be reached") from None
        except httpx2.HTTPError as error:
            raise PredictorFailed("the connection to it broke") from error


def model_path(name: str, version: str | None) -> str:
    """The part of the address that names a model. Raises UnknownModel for what cannot be a name."""
    if not all(NAME.fullmatch(part) for part in (name, version or "0")):
        raise UnknownModel
    return f"/v2/models/{name}" if version is None else f"/v2/models/{name}/versions/{version}"


def write_message(inference: Inference, model: Described, images: Floats) -> Message:
    """`images`, (n, H, W, 3) in [0, 1], and what else the predictor is asked. Raises PredictorFailed if its model takes
    no such images.
    """
    tensor = model.image.tensor(images)
    described: dict[str, Any] = {
        "name": model.image.name,
        "datatype": model.image.datatype,
        "shape": tensor.shape,
    }
    parameters: dict[str, Any] = {}
    if model.binary and inference.parameters.binary_data_output:
        parameters["binary_data_output"] = True
    data = tensor.tobytes() if model.binary else b""
    described |= {"parameters": {"binary_data_size": len(data)}} if model.binary else {"data": tensor.ravel().tolist()}
    asked: dict[str, Any] = {"inputs": [described]}
    if inference.id is not None:
        asked["id"] = inference.id
    if parameters:
        asked["parameters"] = parameters
    if inference.outputs:
        asked["outputs"] = [_asked_output(output, model.binary) for output in inference.outputs]
    text = to_json(asked)
    return Message(text + data, len(text) if model.binary else None)


def _asked_output(output: Output, binary: bool) -> dict[str, Any]:
    hidden = None if binary else {"parameters": {"binary_data"}}
    return output.model_dump(exclude_none=True, exclude=hidden)


def _image_input(inputs: Sequence[_Tensor]) -> ImageInput:
    """The first of `inputs` that takes batches of color images. Raises PredictorFailed if there is none."""
    for tensor in inputs:
        if tensor.datatype not in ("FP32", "UINT8") or len(tensor.shape) != 4:
            continue
        batch, *sides = tensor.shape
        if 3 in (sides[0], sides[2]):
            last = sides[0] != 3
            height, width = sides[:2] if last else sides[1:]
            return ImageInput(tensor.name, tensor.datatype, last, batch, height, width)
    raise PredictorFailed("its model has no input of FP32 or UINT8 for batches of images with three channels")


async def _read_body(response: httpx2.Response, limit: int, account: Account | None = None) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_bytes():
        if len(body) + len(chunk) > limit:
            raise PredictorFailed(f"its answer has more than {limit} bytes")
        if account is not None:
            account.add(len(chunk))
        body += chunk
    return bytes(body)


def _reply(response: httpx2.Response, body: bytes) -> Reply:
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    length = response.headers.get(JSON_LENGTH)
    if kind not in MEDIA_TYPES or (length is not None and not (length.isdecimal() and int(length) <= len(body))):
        raise PredictorFailed("its answer is not one of the Open Inference Protocol")
    return Reply(body, length)


def _refusal(response: httpx2.Response, body: bytes) -> ClarifierError:
    """What a bad status means to our client."""
    reason = _reason(body)
    said = "the predictor gives no reason" if reason is None else f"the predictor says: {reason}"
    status = response.status_code
    if status in (429, 503):
        wait = response.headers.get("retry-after", "")
        busy = Overloaded if status == 429 else NotReady
        return busy(said, retry_after_s=float(wait) if re.fullmatch(r"[0-9]{1,4}", wait) else 0.0)
    refusals: dict[int, type[ClarifierError]] = {
        400: InvalidInference,
        404: UnknownModel,
        413: BodyTooLarge,
        422: InvalidInference,
        504: DeadlineExceeded,
    }
    if status in refusals:
        return refusals[status](said)
    return PredictorFailed(f"it answered with status {status}")


def _reason(body: bytes) -> str | None:
    """The `error` of an answer, in printable ASCII."""
    try:
        error = json.loads(body).get("error")
    except (ValueError, AttributeError, RecursionError):
        return None
    return re.sub(r"[^ -~]", "?", error[:MAX_REASON]) if isinstance(error, str) and error else None
