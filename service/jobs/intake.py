"""An upload becomes a job: images are decoded as they come and go into Redis in chunks, few at a time in memory.

The job is there once all of it is; until then nobody can find it, and what is there of it expires or is taken out.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from fastapi import Request

from service.errors import (
    BodyTooLarge,
    ClarifierError,
    MalformedMultipart,
    MalformedZip,
    NotReady,
    TooManyImages,
    UnsupportedMedia,
    WrongField,
)
from service.jobs.board import Board
from service.jobs.body import MIN_BYTES_PER_S, Body
from service.jobs.forms import form_images
from service.jobs.records import CHUNK, Found, Input, Spec, pack_entry, pack_inputs
from service.jobs.store import Answered
from service.jobs.zips import ZIP_TYPES, zip_images
from service.parameters import ClassifyParameters, DefenseParameters
from service.problems import problem_of
from service.questions import Prepared, Question, decode_all, draw_seed, in_thread
from service.settings import Settings
from service.uploads import Upload, content_type_of

R = TypeVar("R")
Asked = Question[DefenseParameters]
Uploaded = Upload | ClarifierError


@dataclass(slots=True)
class Progress:
    """What has been kept of an upload."""

    id: str
    starts: list[int] = field(default_factory=list)
    images: int = 0
    failed: int = 0
    kept_bytes: int = 0
    sent: Any = field(default_factory=hashlib.sha256)
    """A hash of what was asked for and of each image: the same for the same job."""


async def take_job(question: Asked, request: Request, board: Board, job: str, idempotency: str | None) -> Found:
    """The job that `request` asks for, or the one that its idempotency key has made of the same before.

    Raises what its body deserves, KeyReused, Overloaded, RateLimited, NotReady; then nothing is left of it.
    """
    progress = Progress(job)
    progress.sent.update(repr((question.key, question.parameters.model_dump())).encode())
    try:
        async for group in _groups(_uploads(question, request), question):
            await _keep(question, request, board, progress, group)
        if not progress.images:
            raise WrongField("there is no image in it")
        access = question.gateway.access
        if access is not None:
            await access.count_images(request.scope, progress.images)
        spec = _spec(question, progress)
        made = await board.make(spec, progress.failed, idempotency, progress.sent.hexdigest())
    except BaseException:
        with suppress(NotReady):  # then it expires
            await board.forget(job)
        raise
    if made != job:
        await board.forget(job)
    return await board.find(made, spec.owner)


async def _uploads(question: Asked, request: Request) -> AsyncIterator[Uploaded]:
    settings = question.gateway.settings
    kind, boundary = content_type_of(request)
    if kind not in (*ZIP_TYPES, "multipart/form-data"):
        raise UnsupportedMedia("send multipart/form-data with the images in fields named images, or application/zip")
    malformed = MalformedZip if boundary is None else MalformedMultipart
    body = Body(request, settings.max_job_bytes, settings.body_timeout_s, malformed)
    if boundary is None:

        async def run(function: Callable[[], R]) -> R:
            return await in_thread(question, function)

        images = zip_images(body, settings.max_job_images, settings.max_image_bytes, run)
    else:
        images = form_images(body, boundary, settings.max_image_bytes)
    count = 0
    async for upload in images:
        count += 1
        if count > settings.max_job_images:
            limit = settings.max_job_images
            raise TooManyImages(f"a job may hold {limit} images", limit=limit)
        yield upload
    question.record.bytes = body.size


async def _groups(uploads: AsyncIterator[Uploaded], question: Asked) -> AsyncIterator[list[Uploaded]]:
    """A chunk at a time: fewer where their uploads have MAX_IMAGE_BYTES before. They count as uploads while here."""
    group, size = list[Uploaded](), 0
    async for upload in uploads:
        group.append(upload)
        if isinstance(upload, Upload):
            question.account.add(len(upload.data))
            size += len(upload.data)
        if len(group) == CHUNK or size >= question.gateway.settings.max_image_bytes:
            yield group
            question.account.release()
            group, size = [], 0
    if group:
        yield group


async def _keep(question: Asked, request: Request, board: Board, progress: Progress, group: list[Uploaded]) -> None:
    """Decode a group and keep it; an image that fails has its answer already."""
    await in_thread(question, _add_to_hash, progress.sent, group)
    data = [upload.data if isinstance(upload, Upload) else upload for upload in group]
    images = list(enumerate(await decode_all(question, data), progress.images))
    inputs = [
        Input(number, image.image.pixels, draw_seed(question), image.decode_ms)
        for number, image in images
        if isinstance(image, Prepared)
    ]
    if question.gateway.watch is not None:
        question.gateway.watch.note_queries(request.scope, [each.pixels for each in inputs])
    failed = [
        Answered(number, _problem(question, error), failed=True)
        for number, error in images
        if isinstance(error, ClarifierError)
    ]
    settings = question.gateway.settings
    progress.kept_bytes += sum(each.pixels.nbytes for each in inputs)
    if progress.kept_bytes > settings.max_job_bytes:
        limit = settings.max_job_bytes
        raise BodyTooLarge(f"the images of a job may have {limit} bytes at the model's size", limit=limit)
    await board.put(progress.id, progress.images, pack_inputs(inputs), failed, _unfinished_s(settings))
    progress.starts.append(progress.images)
    progress.images += len(group)
    progress.failed += len(failed)


def _unfinished_s(settings: Settings) -> float:
    """How long a part of an upload waits for the next: as long as that may take at the slowest pace, twice."""
    return 2 * (settings.body_timeout_s + 2 * settings.max_image_bytes / MIN_BYTES_PER_S)


def _problem(question: Asked, error: ClarifierError) -> bytes:
    """As one image of a batch: counted as if it had been a request of its own."""
    question.gateway.metrics.count_refusal(error.code, error.status)
    question.gateway.metrics.job_images.labels("failed").inc()
    return pack_entry(problem_of(error, question.record.request_id))


def _add_to_hash(sent: Any, group: list[Uploaded]) -> None:
    for upload in group:
        if isinstance(upload, ClarifierError):
            sent.update(f"{upload.code}\n".encode())
        else:
            sent.update(f"{len(upload.data)}\n".encode())
            sent.update(upload.data)


def _spec(question: Asked, progress: Progress) -> Spec:
    key, parameters = question.key, question.parameters
    return Spec(
        id=progress.id,
        owner=question.record.key,
        request_id=question.record.request_id,
        operation=key.operation,
        model=key.model,
        digest=question.bundle.digest,
        defense=key.defense,
        votes=key.votes,
        explain=key.explain,
        top_k=parameters.top_k if isinstance(parameters, ClassifyParameters) else None,
        input_size=question.manifest.input_size,
        images=progress.images,
        starts=tuple(progress.starts),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
