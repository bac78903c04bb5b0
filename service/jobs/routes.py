"""The routes of jobs: made, looked at, fetched, cancelled."""

from __future__ import annotations

import re
import secrets
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from service.access import require
from service.errors import JobUnfinished, NoJobs, NotAcceptable, NotReady, UnknownJob
from service.gateway import gateway_of
from service.keys import Right
from service.openapi import BINARY, documented, problems
from service.parameters import JobParameters, NoParameters, invalid, read_accepted, read_parameters
from service.questions import ask_with
from service.record import record_of
from service.schemas import JobResponse
from service.work import Operation

if TYPE_CHECKING:  # memory mode does not load redis
    from service.jobs.board import Board
    from service.jobs.records import Found

JOB_ID = re.compile(r"[0-9a-f]{32}")
IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
POLL_S = 2
"""When to ask again for the result of a job that is not done."""
FOREVER = float("inf")
UPLOAD = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["images"],
                "properties": {"images": {"type": "array", "items": BINARY}},
            }
        },
        "application/zip": {"schema": BINARY},
    },
}
IDEMPOTENT = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Of your choice: the same key with the same images and parameters is the same job.",
    "schema": {"type": "string", "pattern": "^[\\x21-\\x7e]{1,255}$"},
}
LOCATION = {"Location": {"description": "Of the job.", "schema": {"type": "string"}}}
RESULT = (
    "Of `classify` a line of JSON for each image, in their order: as the results of `/classify/batch`. Of `purify` a "
    "zip as of `/purify/batch`"
)

jobs = APIRouter(responses=problems(), tags=["jobs"])


def _documented_upload() -> dict[str, object]:
    described = documented(JobParameters, UPLOAD)
    return {**described, "parameters": [*described["parameters"], IDEMPOTENT]}


@jobs.post(
    "/jobs",
    status_code=202,
    response_model=JobResponse,
    responses={202: {"headers": LOCATION, "description": "The job is kept and will be worked on"}},
    openapi_extra=_documented_upload(),
    summary="Thousands of images, answered later (needs `CLARIFIER_QUEUE=redis`)",
)
async def make_job(request: Request, response: Response) -> JobResponse:
    from service.jobs.intake import take_job

    board = _board(request)
    require(request.scope, Right.JOBS)
    parameters = read_parameters(JobParameters, request)
    idempotency = _idempotency_key(request)
    with ask_with(request, Operation(parameters.operation), parameters.asked()) as question:
        await board.check_room()
        patient = replace(question, deadline=FOREVER)  # an upload may take longer than an answer
        found = await take_job(patient, request, board, secrets.token_hex(16), idempotency)
    response.headers["Location"] = f"/jobs/{found.spec.id}"
    return _described(found)


@jobs.get("/jobs/{id}", summary="How far a job is")
async def job(request: Request, id: str) -> JobResponse:
    read_parameters(NoParameters, request)
    return _described(await _find(request, id))


@jobs.get(
    "/jobs/{id}/result",
    response_class=Response,
    responses={
        200: {
            "description": RESULT,
            "content": {"application/jsonl": {"schema": {"type": "string"}}, "application/zip": {"schema": BINARY}},
        }
    },
    summary="The answers to a job that is done",
)
async def result(request: Request, id: str) -> Response:
    from service.jobs.results import Streamed, media_type_of, result_of

    read_parameters(NoParameters, request)
    found = await _find(request, id)
    media_type = media_type_of(found.spec)
    if read_accepted(request, (media_type,)) is None:
        raise NotAcceptable(f"the result of this job is {media_type}")
    if not found.is_done:
        detail = f"{found.done} of {found.spec.images} images are done"
        raise JobUnfinished(detail, limit=found.spec.images, actual=found.done, retry_after_s=POLL_S)
    pieces = result_of(_board(request), found.spec)
    return Streamed(await anext(pieces), pieces, gateway_of(request).settings.body_timeout_s, media_type)


@jobs.delete("/jobs/{id}", status_code=204, response_class=Response, summary="Cancel a job, and forget its result")
async def forget_job(request: Request, id: str) -> Response:
    read_parameters(NoParameters, request)
    await _find(request, id)
    await _board(request).forget(id)
    return Response(status_code=204)


def _board(request: Request) -> Board:
    gateway = gateway_of(request)
    if gateway.jobs is not None:
        return gateway.jobs
    if gateway.settings.queue == "memory":
        raise NoJobs("jobs need CLARIFIER_QUEUE=redis")
    raise NotReady(gateway.why_not_ready() or "")


async def _find(request: Request, id: str) -> Found:
    board = _board(request)
    if not JOB_ID.fullmatch(id):
        raise UnknownJob
    found = await board.find(id, record_of(request.scope).key)
    record = record_of(request.scope)
    record.model, record.defense, record.digest = found.spec.model, found.spec.defense, found.spec.digest
    return found


def _idempotency_key(request: Request) -> str | None:
    """Raises InvalidParameter."""
    keys = request.headers.getlist("idempotency-key")
    if not keys:
        return None
    if len(keys) > 1 or not IDEMPOTENCY_KEY.fullmatch(keys[0]):
        raise invalid(("header", "Idempotency-Key", "is not one text of 1 to 255 visible ASCII characters"))
    return keys[0]


def _described(found: Found) -> JobResponse:
    spec = found.spec
    expires = datetime.now(UTC) + timedelta(seconds=found.left_s)
    return JobResponse(
        id=spec.id,
        state="done" if found.is_done else "running" if found.running else "waiting",
        operation="purify" if spec.operation is Operation.PURIFY else "classify",
        model=spec.model,
        digest=spec.digest,
        defense=spec.defense,
        images=spec.images,
        done=found.done,
        failed=found.failed,
        created=spec.created,
        expires=expires.isoformat(timespec="seconds"),
    )
