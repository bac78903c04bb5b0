"""The answers of a batch: each image's own, or its problem, in its place; and the zip of those that were purified."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import Request
from pydantic_core import to_json

from service.answering import answer_all
from service.archives import Archive
from service.errors import ClarifierError, ClientLeft, TooManyPixels
from service.images import encode_purified
from service.parameters import DefenseParameters, PurifyParameters
from service.problems import problem_of
from service.questions import Prepared, Question, draw_seed, in_thread
from service.queue import Completed
from service.schemas import Problem, PurifiedImage, PurifyBatchResponse
from service.uploads import BATCH_BODY_IMAGES, Account
from service.work import Purified


@dataclass(frozen=True, slots=True)
class Answered:
    """An image of a batch, the engine's answer, and the seed that it was asked with."""

    prepared: Prepared
    completed: Completed
    seed: int


async def answer_each(
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


def problem_in_place(question: Question[DefenseParameters], error: ClarifierError) -> Problem:
    """What stands in the place of an image that failed: counted as if it had been a request of its own."""
    question.gateway.metrics.count_refusal(error.code, error.status)
    return problem_of(error, question.record.request_id)


def check_pixels(question: Question[PurifyParameters], images: Sequence[Prepared | ClarifierError]) -> None:
    """Raise TooManyPixels for a batch whose answer at its own size would not fit, however little else is under way."""
    limit = BATCH_BODY_IMAGES * question.gateway.settings.max_image_pixels
    pixels = sum(image.image.width * image.image.height for image in images if isinstance(image, Prepared))
    if question.keeps_upload and pixels > limit:
        raise TooManyPixels(f"with size=original a batch may have {limit} pixels", limit=limit, actual=pixels)


async def zip_of(
    question: Question[PurifyParameters],
    request: Request,
    account: Account,
    answers: Sequence[Answered | ClarifierError],
    originals: Sequence[bytes | None],
) -> bytes:
    """A zip of each purified image, or of the problem in its place, and of `results.json`, which lists them all.

    One image after the other, so that a batch has one decoder thread at a time. Raises Overloaded and
    ShortOfMemory (the budget of `account`), and ClientLeft.
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
    problem = problem_in_place(question, added)
    archive.add(f"{number}.json", problem.model_dump_json(exclude_none=True).encode())
    return problem


async def _add_picture(
    archive: Archive, name: str, question: Question[PurifyParameters], answered: Answered, original: bytes | None
) -> PurifiedImage | ClarifierError:
    purified = answered.completed.answer
    assert isinstance(purified, Purified)
    pixels, limit = answered.prepared.image.pixels, question.gateway.settings.max_image_pixels
    memory = question.gateway.memory

    def add() -> None:
        archive.add(name, encode_purified(purified.image, pixels, original, "image/png", limit, memory))

    started = time.monotonic()
    try:
        await in_thread(question, add)
    except ClarifierError as error:
        return error
    question.record.time("encode", 1000 * (time.monotonic() - started))
    return PurifiedImage(
        status=200, file=name, linf=round(purified.linf, 6), seed=answered.seed, degraded=purified.degraded
    )
