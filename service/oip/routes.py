"""The Open Inference Protocol, version 2: KServe's REST and Triton's HTTP, so that their clients work unchanged.

An inference goes the way of /classify/batch: the same decoder, limits, queue and engine. But it is answered as a whole:
one image that cannot be answered fails them all, since the protocol has no place for it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray

from service.answering import answer_all
from service.answers import SCORE_DIGITS, top
from service.downloads import Download, sending_time_s
from service.errors import InvalidInference, NotReady
from service.gateway import gateway_of
from service.oip.messages import Images, Inference, Output, inputs_of, outputs_of, read_inference, write_response
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
from service.parameters import ClassifyParameters, ModelParameters, NoParameters, read_parameters
from service.probes import GET_AND_HEAD
from service.questions import Question, ask_with, draw_seed, in_thread, refine
from service.queue import Completed, Outcome
from service.repository import DescribedBundle
from service.work import Classified, Operation

EXTENSIONS = ("binary_tensor_data", "classification", "parameters", "schedule_policy")
"""Of Triton's; each has its tests."""
ANSWER = {
    "type": "object",
    "required": ["model_name", "model_version", "outputs"],
    "properties": {
        "outputs": {"type": "array", "items": {"type": "object", "required": ["name", "datatype", "shape"]}}
    },
}

oip = APIRouter(responses=SAYS, tags=["open inference protocol"])
"""Models, which need a key where there are keys."""
oip_server = APIRouter(responses=SAYS, tags=["open inference protocol"])
"""For everybody."""


@oip_server.get("/v2", summary="What speaks here")
async def server(request: Request) -> Response:
    read_parameters(NoParameters, request)
    return json_response({"name": "clarifier", "version": request.app.version, "extensions": EXTENSIONS})


@oip_server.get("/v2/health/live", summary="As /livez")
@oip_server.api_route("/v2/health/live", methods=GET_AND_HEAD, include_in_schema=False)
async def live(request: Request) -> Response:
    return health("live", gateway_of(request).why_not_live())


@oip_server.get("/v2/health/ready", summary="As /readyz")
@oip_server.api_route("/v2/health/ready", methods=GET_AND_HEAD, include_in_schema=False)
async def ready(request: Request) -> Response:
    return health("ready", gateway_of(request).why_not_ready())


@oip.get("/v2/models/{name}/ready", summary="Whether a model is loaded, and the service ready")
@oip.get("/v2/models/{name}/versions/{version}/ready", include_in_schema=False)
async def model_ready(request: Request, name: str) -> Response:
    read_parameters(NoParameters, request)
    return health("ready", gateway_of(request).why_not_ready(), name=_bundle(request).manifest.name)


@oip.get("/v2/models/{name}", summary="Inputs and outputs of a model")
@oip.get("/v2/models/{name}/versions/{version}", include_in_schema=False)
async def model(request: Request, name: str) -> Response:
    read_parameters(NoParameters, request)
    gateway = gateway_of(request)
    manifest = _bundle(request).manifest
    return json_response(
        {
            "name": manifest.name,
            "versions": [info.version for info in gateway.catalog.describe(manifest.name)],
            "platform": f"clarifier_{gateway.settings.engine}",
            "inputs": described(inputs_of(manifest)),
            "outputs": described(outputs_of(manifest)),
        }
    )


@oip.post(
    "/v2/models/{name}/infer",
    responses={
        200: {"content": {"application/json": {"schema": ANSWER}, "application/octet-stream": {"schema": BINARY}}}
    },
    openapi_extra=documented_inference(),
    summary="Defended answers for one or more images",
)
@oip.post("/v2/models/{name}/versions/{version}/infer", include_in_schema=False)
async def infer(request: Request, name: str) -> Response:
    read_parameters(NoParameters, request)
    with ask_with(request, Operation.CLASSIFY, ModelParameters.model_construct(model=_wanted(request))) as asked:
        inference, images = await read_body(asked, request, read_inference)
        question = _question(asked, inference, images)
        prepared = await prepare(question, request, images)
        del images  # may be large
        seeds = [draw_seed(question) for _ in prepared]
        with question.gateway.uploads.account() as answers:
            answers.add(_purified_bytes(question, inference, len(prepared)))
            outcomes = await answer_all(question, request, prepared, seeds)
            body, json_length = await _write(question, inference, outcomes, seeds)
    headers = {} if json_length is None else {JSON_LENGTH: str(json_length)}
    media_type = "application/json" if json_length is None else "application/octet-stream"
    if not question.key.purified:
        return Response(body, headers=headers, media_type=media_type)
    timeout_s = sending_time_s(question.gateway.settings, len(body))
    return Download(body, question.gateway.uploads, timeout_s, headers=headers, media_type=media_type)


# --- what is asked


def _wanted(request: Request) -> str:
    """`name` or `name@version`, as the address has it."""
    path = request.path_params
    return f"{path['name']}@{path['version']}" if "version" in path else str(path["name"])


def _bundle(request: Request) -> DescribedBundle:
    """The bundle that the address names. Raises NotReady and UnknownModel."""
    gateway = gateway_of(request)
    if gateway.batcher is None:  # a model that will be there is not unknown
        raise NotReady(gateway.why_not_ready() or "")
    return gateway.catalog.find(_wanted(request))[1]


def _question(asked: Question[ModelParameters], inference: Inference, images: Images) -> Question[ClassifyParameters]:
    """The question with what its body says."""
    said = inference.parameters
    explain, purified = inference.wants("aid_score"), inference.wants("purified")
    parameters = ClassifyParameters(defense=said.defense, seed=said.seed, votes=said.votes, explain=explain)
    deadline = asked.deadline
    if said.timeout:
        deadline = min(deadline, asked.record.started + said.timeout / 1e6)
    question = refine(asked, parameters, deadline, purified=purified, floats=isinstance(images, np.ndarray))
    if purified and question.key.votes > 1:
        raise InvalidInference("purified is one draw of a random defense: there is none for several votes")
    return question


def _purified_bytes(question: Question[ClassifyParameters], inference: Inference, count: int) -> int:
    """What the purified images of an answer take in memory."""
    height, width = question.manifest.input_size
    sizes = [
        FLOAT_BYTES if inference.is_binary(output) else FLOAT_BYTES + JSON_FLOAT_BYTES
        for output in inference.outputs
        if output.name == "purified"
    ]
    return sum(sizes) * count * 3 * height * width


# --- answers


async def _write(
    question: Question[ClassifyParameters], inference: Inference, outcomes: Sequence[Outcome], seeds: Sequence[int]
) -> tuple[bytes, int | None]:
    """The body, and the length of its JSON if there is more; purified images are written in a thread."""
    completed = sound(outcomes)
    if not question.key.purified:
        return _body(question, inference, completed, seeds)
    started = time.monotonic()
    written = await in_thread(question, _body, question, inference, completed, seeds)
    question.record.time("encode", 1000 * (time.monotonic() - started))
    return written


def _body(
    question: Question[ClassifyParameters], inference: Inference, completed: Sequence[Completed], seeds: Sequence[int]
) -> tuple[bytes, int | None]:
    manifest = question.manifest
    answers = [one.answer for one in completed if isinstance(one.answer, Classified)]
    parameters: dict[str, object] = {"defense": question.key.defense, "digest": question.bundle.digest}
    if any(answer.degraded for answer in answers):
        parameters["degraded"] = True
    head = {"model_name": manifest.name, "model_version": manifest.version, "parameters": parameters}
    tensors = [_tensor(output, answers, seeds, manifest.classes) for output in inference.outputs]
    return write_response(head, inference, tensors)


def _tensor(
    output: Output, answers: Sequence[Classified], seeds: Sequence[int], classes: tuple[str, ...]
) -> NDArray[Any]:
    match output.name:
        case "probabilities" if output.classification is not None:
            return _strings([_ranking(answer, classes, output.classification) for answer in answers])
        case "probabilities":
            return np.stack([answer.probabilities for answer in answers])
        case "label":
            return _strings([top(answer.probabilities, classes, 1)[0]["label"] for answer in answers])
        case "purified":
            pictures = [answer.purified for answer in answers if answer.purified is not None]
            return np.stack(pictures).transpose(0, 3, 1, 2)
        case "aid_score":
            return np.array([answer.aid_score for answer in answers], np.float32).round(SCORE_DIGITS)
        case "seed":
            return np.array(seeds, np.uint64)
    raise AssertionError(output.name)


def _ranking(answer: Classified, classes: tuple[str, ...], count: int) -> list[str]:
    """The `count` likeliest classes as Triton writes them: `0.930000:3:cat`."""
    verdicts = top(answer.probabilities, classes, count)
    return [f"{verdict['probability']:f}:{verdict['index']}:{verdict['label']}" for verdict in verdicts]


def _strings(texts: Sequence[Any]) -> NDArray[Any]:
    return np.array(texts, object)
