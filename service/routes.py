"""The routes of the contract. Each handler reads as the way of its request, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from service.answers import SCORE_DIGITS, classify_response
from service.archives import Archive
from service.downloads import Download
from service.errors import (
    ClarifierError,
    ClientLeft,
    NoDetector,
    NotAcceptable,
    NotReady,
    TooManyPixels,
    pages,
    problem_of,
)
from service.gateway import gateway_of
from service.images import (
    BYTES_PER_PURIFIED_SAMPLE,
    MAX_WEBP_SIDE,
    change_original,
    encode_image,
    encode_pixels,
    to_floats,
)
from service.openapi import BINARY, IMAGES_BODY, PURIFIED_HEADERS, documented, problem_response, problems
from service.parameters import (
    ClassifyParameters,
    DefenseParameters,
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
    PurifiedImage,
    PurifyBatchResponse,
    Timing,
)
from service.uploads import BATCH_BODY_IMAGES, Account
from service.work import Classified, Detected, Floats, Operation, Pixels, Purified

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
        results = [_result(question, answered) for answered in await _answer_each(question, request, images)]
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
        _check_pixels(question, images)
        originals = [upload if question.keeps_upload and isinstance(upload, bytes) else None for upload in uploads]
        del uploads  # may be large
        inputs = [image.image.pixels for image in images if isinstance(image, Prepared)]
        account.add(BYTES_PER_PURIFIED_SAMPLE * sum(pixels.size for pixels in inputs))
        answers = await _answer_each(question, request, images)
        body = await _archive(question, request, account, answers, originals)
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


@dataclass(frozen=True, slots=True)
class Answered:
    """An image of a batch, the engine's answer, and the seed that it was asked with."""

    prepared: Prepared
    completed: Completed
    seed: int


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


async def _answer_each(
    question: Question[DefenseParameters], request: Request, images: Sequence[Prepared | ClarifierError]
) -> list[Answered | ClarifierError]:
    """The engine's answers in the order of the images, an image's own error in its place."""
    sound = [image for image in images if isinstance(image, Prepared)]
    seeds = [draw_seed(question) for _ in sound]
    outcomes = await answer_all(question, request, sound, seeds)
    answers = iter(
        outcome if isinstance(outcome, ClarifierError) else Answered(image, outcome, seed)
        for image, outcome, seed in zip(sound, outcomes, seeds, strict=True)
    )
    return [next(answers) if isinstance(image, Prepared) else image for image in images]


def _result(question: Question[ClassifyParameters], answered: Answered | ClarifierError) -> ClassifyResponse | Problem:
    if isinstance(answered, ClarifierError):
        return _problem(question, answered)
    return _classify_response(question, answered.prepared, answered.completed, answered.seed)


def _problem(question: Question[DefenseParameters], error: ClarifierError) -> Problem:
    """One image of a batch failed: counted as if it had been a request of its own."""
    question.gateway.metrics.count_refusal(error.code, error.status)
    return problem_of(error, question.record.request_id)


def _acceptable(request: Request, offered: tuple[str, ...]) -> str:
    """The type of `offered` that the client prefers. Raises NotAcceptable."""
    media_type = read_accepted(request, offered)
    if media_type is None:
        raise NotAcceptable(f"the answer to this request can be {', '.join(offered)}")
    return media_type


def _encode(image: Floats, model_input: Pixels, original: bytes | None, media_type: str, limit: int) -> bytes:
    """The purified image at the model's size, or what purification changed put onto the original."""
    if original is None:
        return encode_image(image, media_type)
    return encode_pixels(change_original(original, image - to_floats(model_input), limit), media_type)


def _download(question: Question[PurifyParameters], body: bytes, headers: dict[str, str], media_type: str) -> Download:
    settings, budget = question.gateway.settings, question.gateway.uploads
    # Whoever sends at the slowest pace that is allowed may receive at the same.
    timeout_s = settings.body_timeout_s * max(1, len(body) / settings.max_image_bytes)
    headers["X-Content-Type-Options"] = "nosniff"
    return Download(body, budget, timeout_s, headers=headers, media_type=media_type)


def _check_pixels(question: Question[PurifyParameters], images: Sequence[Prepared | ClarifierError]) -> None:
    """Raise TooManyPixels for a batch whose answer at its own size would not fit, however little else is under way."""
    limit = BATCH_BODY_IMAGES * question.gateway.settings.max_image_pixels
    pixels = sum(image.image.width * image.image.height for image in images if isinstance(image, Prepared))
    if question.keeps_upload and pixels > limit:
        raise TooManyPixels(f"with size=original a batch may have {limit} pixels", limit=limit, actual=pixels)


async def _archive(
    question: Question[PurifyParameters],
    request: Request,
    account: Account,
    answers: Sequence[Answered | ClarifierError],
    originals: Sequence[bytes | None],
) -> bytes:
    """A zip of each purified image, or of the problem in its place, and of `results.json`, which lists them all.

    One image after the other, so that a batch has one decoder thread at a time. Raises Overloaded (the budget of
    `account`) and ClientLeft.
    """
    archive = Archive()
    results = list[PurifiedImage | Problem]()
    for number, (answered, original) in enumerate(zip(answers, originals, strict=True)):
        if await request.is_disconnected():
            raise ClientLeft
        before = archive.size
        results.append(await _add_to(archive, number, question, answered, original))
        account.add(archive.size - before)
    response = PurifyBatchResponse(
        request_id=question.record.request_id,
        model=question.key.model,
        digest=question.bundle.digest,
        defense=question.key.defense,
        results=results,
    )
    archive.add("results.json", to_json(response, exclude_none=True))
    return archive.finish()


async def _add_to(
    archive: Archive,
    number: int,
    question: Question[PurifyParameters],
    answered: Answered | ClarifierError,
    original: bytes | None,
) -> PurifiedImage | Problem:
    """Put the image of this `number`, or its problem, into `archive`; what `results.json` says of it."""
    added: PurifiedImage | ClarifierError
    if isinstance(answered, ClarifierError):
        added = answered
    else:
        added = await _add_picture(archive, f"{number}.png", question, answered, original)
    if not isinstance(added, ClarifierError):
        return added
    problem = _problem(question, added)
    archive.add(f"{number}.json", problem.model_dump_json(exclude_none=True).encode())
    return problem


async def _add_picture(
    archive: Archive, name: str, question: Question[PurifyParameters], answered: Answered, original: bytes | None
) -> PurifiedImage | ClarifierError:
    purified = answered.completed.answer
    assert isinstance(purified, Purified)
    pixels, limit = answered.prepared.image.pixels, question.gateway.settings.max_image_pixels

    def add() -> None:
        archive.add(name, _encode(purified.image, pixels, original, "image/png", limit))

    started = time.monotonic()
    try:
        await in_thread(question, add)
    except ClarifierError as error:
        return error
    question.record.time("encode", 1000 * (time.monotonic() - started))
    return PurifiedImage(
        status=200, file=name, linf=round(purified.linf, 6), seed=answered.seed, degraded=purified.degraded
    )


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
