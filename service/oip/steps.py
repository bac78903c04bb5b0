"""Steps of an inference that do not depend on who classifies, and the protocol's small answers."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any, Protocol, TypeVar, cast

import numpy as np
from fastapi import Request, Response
from pydantic_core import to_json

from models.manifest import Manifest
from service.errors import ClarifierError
from service.images import Decoded
from service.oip.messages import Images, Inference
from service.parameters import DefenseParameters, ModelParameters
from service.questions import Prepared, Question, check_rights, decode, decode_all, in_thread
from service.uploads import QUICK_FORM_BYTES, batch_body_bytes, read_message
from service.work import Floats, Pixels

JSON_LENGTH = "Inference-Header-Content-Length"
MEDIA_TYPES = ("", "application/json", "application/octet-stream")
"""Clients send none, or the one for JSON and the other for JSON with binary tensors behind it."""
FLOAT_BYTES = 4
JSON_FLOAT_BYTES = 64
"""Of a number on its way into JSON: an object, its place in a list, and its digits."""
ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
SAYS: dict[int | str, dict[str, Any]] = {
    "default": {"description": "An error", "content": {"application/json": {"schema": ERROR}}}
}
"""What OpenAPI says about every route of the protocol."""

T = TypeVar("T")


class Reader(Protocol):
    """`read_inference`, or what has its place."""

    def __call__(
        self, body: bytes, json_lengths: Sequence[str], manifest: Manifest, max_images: int, max_bytes: int, /
    ) -> tuple[Inference, Images]: ...


async def read_body(asked: Question[ModelParameters], request: Request, read: Reader) -> tuple[Inference, Images]:
    """What the body asks, and its images; a small body is read at once, others in a thread."""
    settings = asked.gateway.settings
    limits = (settings.max_batch_size, settings.max_image_bytes)
    times = (settings.body_timeout_s, asked.deadline)
    body = await read_message(request, asked.account, MEDIA_TYPES, batch_body_bytes(*limits), *times)
    lengths = request.headers.getlist(JSON_LENGTH)
    if len(body) <= QUICK_FORM_BYTES:
        inference, images = read(body, lengths, asked.manifest, *limits)
    else:
        inference, images = await in_thread(asked, read, body, lengths, asked.manifest, *limits)
    if isinstance(images, np.ndarray):  # which JSON may have spent fewer bytes on than memory does
        asked.account.add(max(0, images.nbytes - len(body)))
    return inference, images


async def prepare(question: Question[DefenseParameters], request: Request, images: Images) -> list[Prepared]:
    """The images, let in, and as the queue takes them. Raises what is wrong with the first that is wrong."""
    check_rights(request, question.key, question.catalog)
    if question.gateway.access is not None:
        await question.gateway.access.count_images(request.scope, len(images))
    question.batcher.reserve(question.places, len(images))
    if isinstance(images, np.ndarray):
        question.record.bytes = images.nbytes
        return [_as_they_are(image) for image in images]
    question.record.bytes = sum(map(len, images))
    if len(images) == 1:
        return [await decode(question, images[0])]
    return sound(await decode_all(question, images))


def _as_they_are(image: Floats) -> Prepared:
    """An image (3, H, W) of numbers, which needs no decoder: (H, W, 3), not a copy."""
    pixels = image.transpose(1, 2, 0)
    # The queue only carries its images; the key says to the engine what they are.
    return Prepared(Decoded(cast(Pixels, pixels), "", pixels.shape[1], pixels.shape[0]), 0.0)


def sound(outcomes: Sequence[T | ClarifierError]) -> list[T]:
    """All of `outcomes`. Raises the first error among them; of several images it names the one."""
    for number, outcome in enumerate(outcomes):
        if isinstance(outcome, ClarifierError):
            error = copy(outcome)  # which other requests may have got too
            error.detail = outcome.detail if len(outcomes) == 1 else f"image {number}: {outcome.detail}"
            raise error
    return [outcome for outcome in outcomes if not isinstance(outcome, ClarifierError)]


def health(good: str, reason: str | None, **named: str) -> Response:
    """Whether something is `good`, or the reason why it is not."""
    if reason is None:
        return json_response({**named, good: True})
    return json_response({**named, good: False, "error": f"not {good}: {reason}"}, 503)


def described(tensors: dict[str, tuple[str, list[int]]]) -> list[dict[str, Any]]:
    """Tensors as a model's metadata have them."""
    return [{"name": name, "datatype": datatype, "shape": shape} for name, (datatype, shape) in tensors.items()]


def json_response(answer: dict[str, Any], status: int = 200) -> Response:
    return Response(to_json(answer), status, media_type="application/json")
