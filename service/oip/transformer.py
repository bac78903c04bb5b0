"""The routes of a transformer: a predictor's models of the Open Inference Protocol, with images that are purified here.

Clients send what they would send to a bundle, image files or numbers at its input size. The bundle of DEFAULT_MODEL
purifies; the predictor gets the images in the datatype and layout of its own input, and its answer is passed on.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from service.answering import answer_all
from service.downloads import Download, sending_time_s
from service.errors import ClarifierError, NotReady
from service.gateway import Gateway, gateway_of
from service.oip.messages import Images, Inference, inputs_of, read_passage
from service.oip.predictor import Described, Message, Predictor, Reply, model_path, write_message
from service.oip.steps import (
    FLOAT_BYTES,
    JSON_FLOAT_BYTES,
    JSON_LENGTH,
    SAYS,
    described,
    health,
    json_response,
    prepare,
    read_body,
    sound,
)
from service.openapi import BINARY, documented_inference
from service.parameters import ModelParameters, NoParameters, PurifyParameters, read_parameters
from service.questions import Question, ask_with, draw_seed, in_thread, refine
from service.repository import DescribedBundle
from service.tracing import asking
from service.work import Floats, Operation, Purified

ANSWER = {"type": "object", "required": ["outputs"]}
PROBE_S = 2.0
"""For a question about a model: probes do not wait longer."""

transformer = APIRouter(responses=SAYS, tags=["open inference protocol"])
"""Models, which need a key where there are keys."""


@transformer.get("/v2/models/{name}/ready", summary="Whether the service and the predictor's model are ready")
@transformer.get("/v2/models/{name}/versions/{version}/ready", include_in_schema=False)
async def model_ready(request: Request, name: str) -> Response:
    read_parameters(NoParameters, request)
    reason = gateway_of(request).why_not_ready()
    if reason is None:
        path, predictor, deadline = _path(request), _predictor(request), time.monotonic() + PROBE_S
        try:
            await predictor.check_ready(path, deadline)
            await predictor.describe(path, deadline)
        except ClarifierError as error:
            reason = f"{error.title}: {error.detail}"
    return health("ready", reason, name=name)


@transformer.get("/v2/models/{name}", summary="Inputs, which are ours, and outputs, which are the predictor's")
@transformer.get("/v2/models/{name}/versions/{version}", include_in_schema=False)
async def model(request: Request, name: str) -> Response:
    read_parameters(NoParameters, request)
    gateway = gateway_of(request)
    bundle = _purifier(gateway)
    found = await _predictor(request).describe(_path(request), time.monotonic() + PROBE_S)
    answer: dict[str, Any] = {
        "name": name,
        "platform": "clarifier_transformer",
        "inputs": described(inputs_of(bundle.manifest)),
        "outputs": described(dict(found.outputs)),
    }
    return json_response(answer if found.versions is None else answer | {"versions": found.versions})


@transformer.post(
    "/v2/models/{name}/infer",
    responses={
        200: {"content": {"application/json": {"schema": ANSWER}, "application/octet-stream": {"schema": BINARY}}}
    },
    openapi_extra=documented_inference(),
    summary="The predictor's answers for one or more images that were purified",
)
@transformer.post("/v2/models/{name}/versions/{version}/infer", include_in_schema=False)
async def infer(request: Request, name: str) -> Response:
    read_parameters(NoParameters, request)
    path, predictor = _path(request), _predictor(request)
    with ask_with(request, Operation.PURIFY, ModelParameters()) as asked:
        model = await predictor.describe(path, asked.deadline)  # first: it is known, or there is no need to go on
        inference, images = await read_body(asked, request, partial(read_passage, model=name))
        question = _question(asked, inference, images)
        prepared = await prepare(question, request, images)
        del images  # may be large
        seeds = [draw_seed(question) for _ in prepared]
        with question.gateway.uploads.account() as account:
            account.add(_message_bytes(question, model, len(prepared)))
            answers = [one.answer for one in sound(await answer_all(question, request, prepared, seeds))]
            purified = np.stack([answer.image for answer in answers if isinstance(answer, Purified)])
            message = await _write(question, inference, model, purified)
            started = time.monotonic()
            reply = await predictor.infer(path, message, _headers(question), account, question.deadline)
            question.record.time("predict", 1000 * (time.monotonic() - started))
    degraded = any(isinstance(answer, Purified) and answer.degraded for answer in answers)
    return _response(question, reply, seeds, degraded)


# --- what is asked


def _predictor(request: Request) -> Predictor:
    predictor = gateway_of(request).predictor
    assert predictor is not None
    return predictor


def _path(request: Request) -> str:
    """Of the model at the predictor, as the address has it. Raises UnknownModel."""
    return model_path(request.path_params["name"], request.path_params.get("version"))


def _purifier(gateway: Gateway) -> DescribedBundle:
    """The bundle that purifies. Raises NotReady."""
    if (reason := gateway.why_not_ready()) is not None:
        raise NotReady(reason)
    return gateway.catalog.find(gateway.settings.default_model)[1]


def _question(asked: Question[ModelParameters], inference: Inference, images: Images) -> Question[PurifyParameters]:
    """The question with what its body says."""
    said = inference.parameters
    deadline = asked.deadline
    if said.timeout:
        deadline = min(deadline, asked.record.started + said.timeout / 1e6)
    parameters = PurifyParameters(defense=said.defense, seed=said.seed)
    return refine(asked, parameters, deadline, floats=isinstance(images, np.ndarray))


def _message_bytes(question: Question[PurifyParameters], model: Described, count: int) -> int:
    """What the purified images take in memory, and the message that has them."""
    height, width = question.manifest.input_size
    written = FLOAT_BYTES if model.binary else FLOAT_BYTES + JSON_FLOAT_BYTES
    return (FLOAT_BYTES + written) * count * 3 * height * width


async def _write(
    question: Question[PurifyParameters], inference: Inference, model: Described, purified: Floats
) -> Message:
    started = time.monotonic()
    message = await in_thread(question, write_message, inference, model, purified)
    question.record.time("encode", 1000 * (time.monotonic() - started))
    return message


def _headers(question: Question[PurifyParameters]) -> dict[str, str]:
    """By which the predictor's logs and spans are found."""
    named = {"X-Request-Id": question.record.request_id}
    return named | ({"traceparent": asking.get()} if asking.get() else {})


# --- the answer


def _response(question: Question[PurifyParameters], reply: Reply, seeds: list[int], degraded: bool) -> Response:
    headers = {
        "X-Clarifier-Model": question.key.model,
        "X-Clarifier-Defense": question.key.defense,
        "X-Clarifier-Seed": ", ".join(map(str, seeds)),
    }
    if degraded:
        headers["X-Clarifier-Degraded"] = "true"
    if reply.json_length is not None:
        headers[JSON_LENGTH] = reply.json_length
    media_type = "application/json" if reply.json_length is None else "application/octet-stream"
    gateway = question.gateway
    timeout_s = sending_time_s(gateway.settings, len(reply.body))
    return Download(reply.body, gateway.uploads, timeout_s, headers=headers, media_type=media_type)
