"""The result of a job, sent as it is read from Redis: never whole in memory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.archives import Archive
from service.errors import ClientLeft, InferenceFailed, NotReady, UnknownJob
from service.jobs.board import Board
from service.jobs.records import Spec, read_line, read_picture
from service.problems import problem_of
from service.record import record_of
from service.remote.wire import Malformed
from service.schemas import Problem, PurifiedImage, PurifyBatchResponse
from service.work import Operation

logger = logging.getLogger(__name__)

LINES, ARCHIVE = "application/jsonl", "application/zip"
READ = 64
"""Answers that are read together."""
TRIES, RETRY_S = 20, 0.5
"""For a Redis that cannot be reached in the middle of an answer."""


def media_type_of(spec: Spec) -> str:
    """Of the result."""
    return LINES if spec.operation is Operation.CLASSIFY else ARCHIVE


def result_of(board: Board, spec: Spec) -> AsyncIterator[bytes]:
    """A line of JSON for each image in their order; or a zip as of /purify/batch."""
    return _lines(board, spec) if spec.operation is Operation.CLASSIFY else _archive(board, spec)


async def _lines(board: Board, spec: Spec) -> AsyncIterator[bytes]:
    async for _, answers in _answers(board, spec):
        yield b"".join([_line(board, spec, packed) + b"\n" for packed in answers])


def _line(board: Board, spec: Spec, packed: bytes) -> bytes:
    try:
        return read_line(packed)
    except Malformed:
        return to_json(_unreadable(board, spec))


async def _archive(board: Board, spec: Spec) -> AsyncIterator[bytes]:
    archive, results = Archive(), list[PurifiedImage | Problem]()
    async for numbers, answers in _answers(board, spec):
        for number, packed in zip(numbers, answers, strict=True):
            try:
                entry, picture = read_picture(packed)
            except Malformed:
                entry, picture = _unreadable(board, spec), b""
            if isinstance(entry, Problem):
                archive.add(f"{number}.json", entry.model_dump_json(exclude_none=True).encode())
            else:
                entry["file"] = f"{number}.png"
                archive.add(entry["file"], picture)
            results.append(entry)
        yield archive.take()
    listed = PurifyBatchResponse(
        request_id=spec.request_id, model=spec.model, digest=spec.digest, defense=spec.defense, results=results
    )
    archive.add("results.json", to_json(listed, exclude_none=True))
    yield archive.finish()


async def _answers(board: Board, spec: Spec) -> AsyncIterator[tuple[range, list[bytes]]]:
    """The packed answers in the order of the images, some at a time. Raises UnknownJob if they are gone."""
    for start in range(0, spec.images, READ):
        numbers = range(start, min(start + READ, spec.images))
        answers = await _read(board, spec.id, numbers)
        present = [packed for packed in answers if packed is not None]
        if len(present) < len(answers):
            raise UnknownJob
        yield numbers, present


async def _read(board: Board, job: str, numbers: Sequence[int]) -> list[bytes | None]:
    for _ in range(TRIES):
        with suppress(NotReady):
            return await board.results(job, numbers)
        await asyncio.sleep(RETRY_S)
    raise NotReady("Redis cannot be reached")


def _unreadable(board: Board, spec: Spec) -> Problem:
    board.note_malformed()
    return problem_of(InferenceFailed("the answer was lost"), spec.request_id)


class Streamed(Response):
    """A body that is made while it is sent, at the pace of its client: each piece within `timeout_s`.

    One that cannot be finished is broken off, which HTTP clients see.
    """

    def __init__(self, first: bytes, rest: AsyncIterator[bytes], timeout_s: float, media_type: str) -> None:
        super().__init__(media_type=media_type, headers={"X-Content-Type-Options": "nosniff"})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await self._send(send, self._first)
            async for piece in self._rest:
                await self._send(send, piece)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            record_of(scope).code = ClientLeft.code
        except (NotReady, UnknownJob) as error:
            logger.error("a result is broken off: %s", error.detail)
            record_of(scope).code = error.code

    async def _send(self, send: Send, piece: bytes) -> None:
        async with asyncio.timeout(self._timeout_s):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
