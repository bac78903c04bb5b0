"""The routes of the contract. Each handler reads as the way of its request, top to bottom."""

from __future__ import annotations

import time
from html import escape

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from service.answering import answer
from service.answers import SCORE_DIGITS, classify_response
from service.batch_answers import Answered, answer_each, check_pixels, problem_in_place, zip_of
from service.downloads import Download, sending_time_s
from service.errors import ClarifierError, NoDetector, NotAcceptable, NotReady
from service.gateway import gateway_of
from service.images import BYTES_PER_PURIFIED_SAMPLE, MAX_WEBP_SIDE, encode_purified
from service.openapi import BINARY, IMAGES_BODY, PURIFIED_HEADERS, documented, problem_response, problems
from service.parameters import (
    ClassifyParameters,
    DetectParameters,
    ModelParameters,
    NoParameters,
    PurifyParameters,
    read_accepted,
    read_parameters,
)
from service.problems import pages
from service.questions import (
    Prepared,
    Question,
    ask,
    decode,
    decode_all,
    draw_seed,
    in_thread,
    read_upload,
    read_uploads,
)
from service.queue import Completed
from service.schemas import (
    BatchResponse,
    ClassifyResponse,
    DetectResponse,
    ModelInfo,
    ModelsResponse,
    Problem,
    Timing,
)
from service.work import Classified, Detected, Operation, Purified

MODEL_SIZE_TYPES = ("image/png", "image/webp", "application/x-npy")
ORIGINAL_SIZE_TYPES = ("image/png", "image/webp")
"""Not floats: the original's pixels had 8 bits, and a photograph would be hundreds of megabytes of floats."""
HUGE_TYPES = ("image/png",)
"""For originals of more than MAX_WEBP_SIDE."""
ARCHIVE_TYPES = ("application/zip",)
IN_THE_ARCHIVE = (
    "A zip of `0.png`, `1.png`, ... in the order of the images; `INDEX.json`, a problem, in the place of one that "
    "failed; and `results.json`, the PurifyBatchResponse: `request_id`, `model`, `digest`, `defense`, and `results` "
    "with `status`, `file`, `linf`, `seed` and `degraded` of each image, or its problem"
)


direct = APIRouter(responses=problems(), tags=["images"])
"""Handlers that take the request and return the response, so that `DirectMiddleware` can call them."""
catalog = APIRouter(responses={"default": problem_response("A problem")}, tags=["service"])
"""What needs a key, where there are keys, though no engine runs."""
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
        images = await decode_all(question, await read_uploads(question, request))
        results = [_result(question, answered) for answered in await answer_each(question, request, images)]
        return _json(BatchResponse(request_id=question.record.request_id, results=results))


@direct.post(
    "/purify",
    response_class=Response,
    responses={200: {"content": {kind: {"schema": BINARY} for kind in MODEL_SIZE_TYPES}, "headers": PURIFIED_HEADERS}},
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
        limit, memory = question.gateway.settings.max_image_pixels, question.gateway.memory
        started = time.monotonic()
        pixels = prepared.image.pixels
        body = await in_thread(question, encode_purified, purified.image, pixels, original, media_type, limit, memory)
        question.record.time("encode", 1000 * (time.monotonic() - started))
        headers = {
            "X-Clarifier-Model": question.key.model,
            "X-Clarifier-Defense": question.key.defense,
            "X-Clarifier-Linf": f"{purified.linf:.6f}",
            "X-Clarifier-Seed": str(seed),
        }
        if purified.degraded:
            headers["X-Clarifier-Degraded"] = "true"
        return _download(question, body, headers, media_type)


@direct.post(
    "/purify/batch",
    response_class=Response,
    responses={200: {"content": {kind: {"schema": BINARY} for kind in ARCHIVE_TYPES}, "description": IN_THE_ARCHIVE}},
    openapi_extra=documented(PurifyParameters, IMAGES_BODY),
    summary="Several images, purified, in one zip",
)
async def purify_batch(request: Request) -> Response:
    with ask(request, Operation.PURIFY, PurifyParameters) as question, question.gateway.uploads.account() as account:
        media_type = _acceptable(request, ARCHIVE_TYPES)
        uploads = await read_uploads(question, request)
        images = await decode_all(question, uploads)
        check_pixels(question, images)
        originals = [upload if question.keeps_upload and isinstance(upload, bytes) else None for upload in uploads]
        del uploads  # may be large
        inputs = [image.image.pixels for image in images if isinstance(image, Prepared)]
        account.add(BYTES_PER_PURIFIED_SAMPLE * sum(pixels.size for pixels in inputs))
        answers = await answer_each(question, request, images)
        body = await zip_of(question, request, account, answers, originals)
        headers = {"X-Clarifier-Model": question.key.model, "X-Clarifier-Defense": question.key.defense}
        return _download(question, body, headers, media_type)


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
                aid_score=round(detected.aid_score, SCORE_DIGITS),
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
    return classify_response(
        classified,
        question.manifest,
        key=question.key,
        digest=question.bundle.digest,
        request_id=question.record.request_id,
        top_k=question.parameters.top_k,
        seed=seed,
        timing_ms=_timing(question, prepared, completed),
    )


def _timing(question: Question[ModelParameters], prepared: Prepared, completed: Completed) -> Timing:
    return Timing(
        decode=round(prepared.decode_ms, 3),
        queue=round(completed.queue_ms, 3),
        inference=round(completed.inference_ms, 3),
        total=round(question.record.elapsed_ms(), 3),
    )


def _result(question: Question[ClassifyParameters], answered: Answered | ClarifierError) -> ClassifyResponse | Problem:
    if isinstance(answered, ClarifierError):
        return problem_in_place(question, answered)
    return _classify_response(question, answered.prepared, answered.completed, answered.seed)


def _acceptable(request: Request, offered: tuple[str, ...]) -> str:
    """The type of `offered` that the client prefers. Raises NotAcceptable."""
    media_type = read_accepted(request, offered)
    if media_type is None:
        raise NotAcceptable(f"the answer to this request can be {', '.join(offered)}")
    return media_type


def _download(question: Question[PurifyParameters], body: bytes, headers: dict[str, str], media_type: str) -> Download:
    settings, budget = question.gateway.settings, question.gateway.uploads
    timeout_s = sending_time_s(settings, len(body))
    headers["X-Content-Type-Options"] = "nosniff"
    return Download(body, budget, timeout_s, headers=headers, media_type=media_type)


# --- what is served


@catalog.get("/models", summary="What is loaded, with settings and robustness reports")
async def models(request: Request) -> ModelsResponse:
    read_parameters(NoParameters, request)
    gateway = gateway_of(request)
    return ModelsResponse(
        default_model=gateway.settings.default_model,
        models=gateway.catalog.describe_all(),
        refused=list(gateway.catalog.refused),
    )


@catalog.get("/models/{name}", summary="The versions of one model, oldest first; or one, as name@version")
async def model(request: Request, name: str) -> list[ModelInfo]:
    read_parameters(NoParameters, request)
    gateway = gateway_of(request)
    if gateway.batcher is None:  # a model that will be there is not unknown
        raise NotReady(gateway.why_not_ready() or "")
    return gateway.catalog.describe(name)


# --- what is open to everybody


@router.get("/", include_in_schema=False)
async def start_page() -> Response:
    return RedirectResponse("/docs")


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
