"""The routes of the contract. Each handler reads as the way of its request, top to bottom."""

from __future__ import annotations

import asyncio
import time
from html import escape

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from service.downloads import Download
from service.errors import (
    ClarifierError,
    NoDetector,
    NotAcceptable,
    NotReady,
    pages,
    problem_of,
)
from service.gateway import gateway_of
from service.images import MAX_WEBP_SIDE, change_original, encode_image, encode_pixels, to_floats
from service.openapi import BINARY, IMAGES_BODY, documented, problem_response, problems
from service.parameters import (
    ClassifyParameters,
    DetectParameters,
    ModelParameters,
    NoParameters,
    PurifyParameters,
    read_accepted,
    read_parameters,
)
from service.questions import (
    Prepared,
    Question,
    answer,
    answer_all,
    ask,
    decode,
    draw_seed,
    in_thread,
    read_upload,
    read_uploads,
)
from service.queue import Completed, Outcome
from service.schemas import (
    BatchResponse,
    ClassifyResponse,
    DetectResponse,
    ModelInfo,
    ModelsResponse,
    Problem,
    Timing,
    Verdict,
)
from service.work import Classified, Detected, Floats, Operation, Pixels, Purified

MODEL_SIZE_TYPES = ("image/png", "image/webp", "application/x-npy")
ORIGINAL_SIZE_TYPES = ("image/png", "image/webp")
"""Not floats: the original's pixels had 8 bits, and a photograph would be hundreds of megabytes of floats."""
HUGE_TYPES = ("image/png",)
"""For originals of more than MAX_WEBP_SIDE."""
DEFAULT_TOP_K = 5


direct = APIRouter(responses=problems(), tags=["images"])
"""Handlers that take the request and return the response, so that `DirectMiddleware` can call them."""
router = APIRouter(responses={"default": problem_response("A problem")}, tags=["service"])


# --- routes that run an engine


@direct.post(
    "/classify",
    responses={200: {"model": ClassifyResponse}},
    openapi_extra=documented(ClassifyParameters),
    summary="A defended answer: what is in the image",
)
async def classify(request: Request) -> Response:
    with ask(request, Operation.CLASSIFY, ClassifyParameters) as question:
        prepared = await decode(question, await read_upload(question, request))
        seed = draw_seed(question)
        completed = await answer(question, request, prepared, seed)
        return _json(_classify_response(question, prepared, completed, seed))


@direct.post(
    "/classify/batch",
    responses={200: {"model": BatchResponse}},
    openapi_extra=documented(ClassifyParameters, IMAGES_BODY),
    summary="Several images, an answer or a problem for each, in their order",
)
async def classify_batch(request: Request) -> Response:
    with ask(request, Operation.CLASSIFY, ClassifyParameters) as question:
        prepared = await _decode_all(question, await read_uploads(question, request))
        sound = [image for image in prepared if isinstance(image, Prepared)]
        seeds = [draw_seed(question) for _ in sound]
        outcomes = await answer_all(question, request, sound, seeds)
        answered = iter(zip(outcomes, seeds, strict=True))
        results = [
            _result(question, image, *next(answered)) if isinstance(image, Prepared) else _problem(question, image)
            for image in prepared
        ]
        return _json(BatchResponse(request_id=question.record.request_id, results=results))


@direct.post(
    "/purify",
    responses={200: {"content": {kind: {"schema": BINARY} for kind in MODEL_SIZE_TYPES}}},
    openapi_extra=documented(PurifyParameters),
    summary="The image without what an attack may have put into it",
)
async def purify(request: Request) -> Response:
    with ask(request, Operation.PURIFY, PurifyParameters) as question:
        media_type = _acceptable(request, MODEL_SIZE_TYPES if not question.keeps_upload else ORIGINAL_SIZE_TYPES)
        data = await read_upload(question, request)
        prepared = await decode(question, data)
        original = data if question.keeps_upload else None
        del data  # may be large
        if original is not None and max(prepared.image.width, prepared.image.height) > MAX_WEBP_SIDE:
            media_type = _acceptable(request, HUGE_TYPES)
        seed = draw_seed(question)
        completed = await answer(question, request, prepared, seed)
        purified = completed.answer
        assert isinstance(purified, Purified)
        limit = question.gateway.settings.max_image_pixels
        started = time.monotonic()
        pixels = prepared.image.pixels
        body = await in_thread(question, _encode, purified.image, pixels, original, media_type, limit)
        question.record.time("encode", 1000 * (time.monotonic() - started))
        headers = {
            "X-Clarifier-Model": question.key.model,
            "X-Clarifier-Defense": question.key.defense,
            "X-Clarifier-Linf": f"{purified.linf:.6f}",
            "X-Clarifier-Seed": str(seed),
            "X-Content-Type-Options": "nosniff",
        }
        settings, budget = question.gateway.settings, question.gateway.uploads
        # Whoever sends at the slowest pace that is allowed may receive at the same.
        timeout_s = settings.body_timeout_s * max(1, len(body) / settings.max_image_bytes)
        return Download(body, budget, timeout_s, headers=headers, media_type=media_type)


@direct.post(
    "/detect",
    responses={200: {"model": DetectResponse}},
    openapi_extra=documented(DetectParameters),
    summary="How natural the image looks to the AID discriminator",
)
async def detect(request: Request) -> Response:
    with ask(request, Operation.DETECT, DetectParameters) as question:
        threshold = question.manifest.aid_threshold
        if threshold is None:
            raise NoDetector
        prepared = await decode(question, await read_upload(question, request))
        completed = await answer(question, request, prepared, 0)
        detected = completed.answer
        assert isinstance(detected, Detected)
        return _json(
            DetectResponse(
                request_id=question.record.request_id,
                model=question.key.model,
                digest=question.bundle.digest,
                aid_score=detected.aid_score,
                suspicious=detected.aid_score < threshold,
                threshold=threshold,
                timing_ms=_timing(question, prepared, completed),
            )
        )


# --- answers


def _json(answer: ClassifyResponse | BatchResponse | DetectResponse) -> Response:
    return Response(to_json(answer), media_type="application/json")


def _classify_response(
    question: Question[ClassifyParameters], prepared: Prepared, completed: Completed, seed: int
) -> ClassifyResponse:
    classified = completed.answer
    assert isinstance(classified, Classified)
    classes = question.manifest.classes
    threshold = question.manifest.aid_threshold
    score = classified.aid_score
    top = _top(classified.probabilities, classes, question.parameters.top_k or DEFAULT_TOP_K)
    first = top[0]
    undefended = classified.undefended
    return ClassifyResponse(
        request_id=question.record.request_id,
        model=question.key.model,
        digest=question.bundle.digest,
        defense=question.key.defense,
        ran=classified.ran or question.key.defense,
        seed=seed,
        label=first["label"],
        index=first["index"],
        probability=first["probability"],
        top=top,
        undefended=None if undefended is None else _top(undefended, classes, 1)[0],
        aid_score=score,
        suspicious=None if score is None or threshold is None else score < threshold,
        timing_ms=_timing(question, prepared, completed),
    )


def _top(probabilities: Floats, classes: tuple[str, ...], count: int) -> list[Verdict]:
    """The `count` likeliest classes; of equals the first."""
    order = np.argsort(-probabilities, kind="stable")[:count].tolist()
    return [Verdict(label=classes[i], index=i, probability=float(probabilities[i])) for i in order]


def _timing(question: Question[ModelParameters], prepared: Prepared, completed: Completed) -> Timing:
    return Timing(
        decode=round(prepared.decode_ms, 3),
        queue=round(completed.queue_ms, 3),
        inference=round(completed.inference_ms, 3),
        total=round(question.record.elapsed_ms(), 3),
    )


async def _decode_all(
    question: Question[ClassifyParameters], uploads: list[bytes | ClarifierError]
) -> list[Prepared | ClarifierError]:
    return await asyncio.gather(*(_decode_or_error(question, upload) for upload in uploads))


async def _decode_or_error(
    question: Question[ClassifyParameters], data: bytes | ClarifierError
) -> Prepared | ClarifierError:
    if isinstance(data, ClarifierError):
        return data
    try:
        return await decode(question, data, alone=False)
    except ClarifierError as error:  # its frames would keep the upload until the whole batch is answered
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)


def _result(
    question: Question[ClassifyParameters], prepared: Prepared, outcome: Outcome, seed: int
) -> ClassifyResponse | Problem:
    if isinstance(outcome, ClarifierError):
        return _problem(question, outcome)
    return _classify_response(question, prepared, outcome, seed)


def _problem(question: Question[ClassifyParameters], error: ClarifierError) -> Problem:
    """One image of a batch failed: counted as if it had been a request of its own."""
    question.gateway.metrics.count_refusal(error.code, error.status)
    return problem_of(error, question.record.request_id)


def _acceptable(request: Request, offered: tuple[str, ...]) -> str:
    """The type of `offered` that the client prefers. Raises NotAcceptable."""
    media_type = read_accepted(request, offered)
    if media_type is None:
        raise NotAcceptable(f"this purified image can be {', '.join(offered)}")
    return media_type


def _encode(image: Floats, model_input: Pixels, original: bytes | None, media_type: str, limit: int) -> bytes:
    """The purified image at the model's size, or what purification changed put onto the original."""
    if original is None:
        return encode_image(image, media_type)
    return encode_pixels(change_original(original, image - to_floats(model_input), limit), media_type)


# --- what is served


@router.get("/", include_in_schema=False)
async def start_page() -> Response:
    return RedirectResponse("/docs")


@router.get("/models", summary="What is loaded, with settings and robustness reports")
async def models(request: Request) -> ModelsResponse:
    read_parameters(NoParameters, request)
    gateway = gateway_of(request)
    catalog = gateway.catalog
    return ModelsResponse(
        default_model=gateway.settings.default_model,
        models=catalog.describe_all(),
        refused=list(catalog.refused),
    )


@router.get("/models/{name}", summary="The versions of one model, oldest first; or one, as name@version")
async def model(request: Request, name: str) -> list[ModelInfo]:
    read_parameters(NoParameters, request)
    gateway = gateway_of(request)
    if gateway.batcher is None:  # a model that will be there is not unknown
        raise NotReady(gateway.why_not_ready() or "")
    return gateway.catalog.describe(name)


@router.get("/problems/{slug}", summary="What a problem type means", response_class=HTMLResponse)
async def problem(slug: str) -> HTMLResponse:
    slug = slug.replace("_", "-")  # as in `code`
    page = pages().get(slug)
    if page is None:
        raise HTTPException(404)
    status, title, paragraph = page
    return HTMLResponse(
        f"<!doctype html><title>{slug}</title><h1>{status}: {escape(title)}</h1><p>{escape(paragraph)}</p>"
    )
