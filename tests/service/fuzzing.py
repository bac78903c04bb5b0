"""What Schemathesis sends where a schema can only say "bytes": images, sound and damaged, and tensors around them.

Loaded by Schemathesis itself, see `test_fuzzing.py`.
"""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import numpy as np
import schemathesis
from hypothesis import strategies as st
from schemathesis import Case, CheckContext, HookContext, Response
from schemathesis.generation.value import GeneratedValue

from tests.service.fakes import encoded
from tests.service.manifests import SIDE

FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "BMP": "image/bmp"}
SIZES = [(SIDE, SIDE), (1, 1), (5, 37), (64, 48)]
"""Height and width."""
DEFENSES = ["none", "atop", "atop:rt1,aid", "zeropur:coarse"]
IMAGE_CODES = {"unsupported_format", "undecodable", "animated", "extreme_aspect", "too_many_pixels", "body_too_large"}
"""Refusals that only a bad image deserves."""
INFER = "/v2/models/{name}/infer"


def _picture(kind: str, size: tuple[int, int]) -> bytes:
    return encoded(np.random.default_rng(size[1]).integers(0, 256, (*size, 3), np.uint8), kind)


SOUND = {kind: [_picture(kind, size) for size in SIZES] for kind in FORMATS}
ALL_SOUND = {image for images in SOUND.values() for image in images}
sound_images = st.sampled_from(sorted(ALL_SOUND))


@st.composite
def _damaged(draw: st.DrawFn, images: st.SearchStrategy[bytes]) -> bytes:
    """An image that lost its end, or had some of its bytes replaced."""
    image = draw(images)
    start = draw(st.integers(0, len(image) - 1))
    patch = draw(st.binary(max_size=8))
    return image[: start or 1] if draw(st.booleans()) else image[:start] + patch + image[start + len(patch) :]


images = st.one_of(sound_images, _damaged(sound_images), st.binary(min_size=1, max_size=64))

for kind, media_type in FORMATS.items():
    sound = st.sampled_from(SOUND[kind])
    schemathesis.openapi.media_type(media_type, st.one_of(sound, _damaged(sound)))


# --- the Open Inference Protocol


@st.composite
def _inferences(draw: st.DrawFn) -> dict[str, Any]:
    """A request in JSON whose lengths agree."""
    some = draw(st.lists(images, min_size=1, max_size=3))
    data = [base64.b64encode(image).decode() for image in some]
    return _about(draw, {"name": "image", "datatype": "BYTES", "shape": [len(some)], "data": data})


@st.composite
def _floats(draw: st.DrawFn) -> dict[str, Any]:
    numbers = st.lists(st.floats(-0.1, 1.1) | st.floats(0, 1), min_size=3 * SIDE**2, max_size=3 * SIDE**2)
    return _about(draw, {"name": "images", "datatype": "FP32", "shape": [1, 3, SIDE, SIDE], "data": draw(numbers)})


def _about(draw: st.DrawFn, tensor: dict[str, Any]) -> dict[str, Any]:
    """A request with `tensor`, and some of what can be said beside it."""
    names = st.sampled_from(["probabilities", "label", "purified", "aid_score", "seed"])
    said = {
        "id": st.text(max_size=8),
        "parameters": st.fixed_dictionaries({}, optional={"defense": st.sampled_from(DEFENSES), "votes": st.just(2)}),
        "outputs": st.lists(
            names.map(lambda name: {"name": name}), min_size=1, unique_by=lambda output: output["name"]
        ),
    }
    return {"inputs": [tensor], **draw(st.fixed_dictionaries({}, optional=said))}


def binary(request: dict[str, Any]) -> bytes:
    """A line of JSON, and the images of `request` behind it."""
    (tensor,) = request["inputs"]
    if tensor["datatype"] == "FP32":
        behind = np.array(tensor["data"], "<f4").tobytes()
    else:
        files = [base64.b64decode(one) for one in tensor["data"]]
        behind = b"".join(struct.pack("<I", len(file)) + file for file in files)
    described = {name: value for name, value in tensor.items() if name != "data"}
    described["parameters"] = {"binary_data_size": len(behind)}
    return json.dumps({**request, "inputs": [described]}).encode() + b"\n" + behind


# --- hooks


@schemathesis.hook
def before_generate_body(context: HookContext, strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Bodies that a schema cannot describe, in the place of those that are meant to be good."""
    return strategy.flatmap(lambda body: st.just(body) if isinstance(body, GeneratedValue) else _better(context, body))


def _better(context: HookContext, body: Any) -> st.SearchStrategy[Any]:
    path = context.operation.path if context.operation else ""
    if path == INFER:
        requests = st.one_of(_inferences(), _floats())
        return requests if isinstance(body, dict) else requests.map(binary)
    if path.endswith("/batch"):
        return st.fixed_dictionaries({"images": st.lists(images, min_size=1, max_size=4)})
    return st.just(body) if isinstance(body, dict) else st.one_of(st.just(body), images)


@schemathesis.hook
def map_query(context: HookContext, query: dict[str, Any] | None) -> dict[str, Any] | None:
    """Names that a bundle has, in the place of those that no bundle has."""
    if query and isinstance(name := query.get("defense"), str) and len(name) <= 1024:
        return {**query, "defense": DEFENSES[len(name) % len(DEFENSES)]}
    return query


@schemathesis.hook
def before_call(context: HookContext, case: Case[Any], kwargs: dict[str, Any]) -> None:
    """A message of JSON and tensors says where its JSON ends."""
    if case.path == INFER and isinstance(case.body, bytes) and b"\n" in case.body:
        case.headers["Inference-Header-Content-Length"] = str(case.body.index(b"\n") + 1)


@schemathesis.check
def sound_images_are_not_refused(ctx: CheckContext, response: Response, case: Case[Any]) -> None:
    """An image that a decoder can read is never what a request fails for."""
    body = getattr(case.body, "body", case.body)
    image = body.get("image") if isinstance(body, dict) else body
    if response.status_code >= 400 and isinstance(image, bytes) and image in ALL_SOUND and case.path != INFER:
        assert response.json()["code"] not in IMAGE_CODES, response.text
