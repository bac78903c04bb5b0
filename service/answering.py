"""What was decoded becomes an answer: by way of the cache, the queue and the engine, while its client is there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fastapi import Request

from models.manifest import Manifest
from service.cache import AnswerCache, answer_keys
from service.departure import WhenGone
from service.errors import ClarifierError, ClientLeft, DeadlineExceeded
from service.parameters import ModelParameters
from service.questions import QUICK_HASH_BYTES, Prepared, Question, in_thread
from service.queue import Completed, Outcome
from service.record import Record
from service.remote.wire import fits
from service.watch.cases import Case
from service.work import Answer, Classified, Pixels, Purified, is_degraded


async def answer(question: Question[ModelParameters], request: Request, prepared: Prepared, seed: int) -> Completed:
    """The engine's answer, through the queue."""
    (outcome,) = await answer_all(question, request, [prepared], [seed])
    if isinstance(outcome, ClarifierError):
        raise outcome
    return outcome


async def answer_all(
    question: Question[ModelParameters], request: Request, images: Sequence[Prepared], seeds: Sequence[int]
) -> list[Outcome]:
    """Answers in order, an image's own error in its place. A client who leaves takes the images out again.

    Uploads that are not kept must be out of memory by now: their bytes are free for others.
    """
    if not question.keeps_upload:
        question.account.release()
    if not images:
        return []
    pixels = [prepared.image.pixels for prepared in images]
    watch = question.gateway.watch
    if watch is not None:
        watch.note_queries(request.scope, pixels)
    cache = question.gateway.cache
    if cache is None:
        outcomes = await _run(question, request, pixels, seeds)
    else:
        outcomes = await _find_or_run(cache, question, request, pixels, seeds)
    metrics, manifest = question.gateway.metrics, question.manifest
    for outcome in outcomes:
        if isinstance(outcome, Completed):
            metrics.count_answer(question.record, outcome.answer, manifest.classes, manifest.aid_threshold)
    if len(outcomes) == 1 and isinstance(outcomes[0], Completed):
        _note_verdict(question.record, outcomes[0].answer, manifest)
    if watch is not None:
        told, key = question.record, question.key
        asked = zip(pixels, seeds, strict=True)
        watch.note_outcomes([Case(key, image, seed, told.request_id, told.key) for image, seed in asked], outcomes)
    return outcomes


def _note_verdict(record: Record, answer: Answer, manifest: Manifest) -> None:
    if isinstance(answer, Classified):
        record.label = manifest.classes[int(answer.probabilities.argmax())]
    if not isinstance(answer, Purified) and answer.aid_score is not None and manifest.aid_threshold is not None:
        record.suspicious = answer.aid_score < manifest.aid_threshold


async def _find_or_run(
    cache: AnswerCache,
    question: Question[ModelParameters],
    request: Request,
    images: Sequence[Pixels],
    seeds: Sequence[int],
) -> list[Outcome]:
    """As `_run`, which is left the images that `cache` has no answer to; it keeps what they are answered."""
    counter = question.gateway.metrics.cache_requests
    if question.draws and not question.seeded:
        counter.labels("skip").inc(len(images))
        return await _run(question, request, images, seeds)
    keys = await _answer_keys(question, images, seeds)
    found = _fitting(question, await cache.find(keys))
    new = [place for place, known in enumerate(found) if known is None]
    counter.labels("miss").inc(len(new))
    counter.labels("hit").inc(len(found) - len(new))
    ran = await _run(question, request, [images[place] for place in new], [seeds[place] for place in new])
    answers = {
        keys[place]: one.answer
        for place, one in zip(new, ran, strict=True)
        if isinstance(one, Completed) and not is_degraded(one.answer)
    }
    if answers:
        await cache.keep(answers)
    rest = iter(ran)
    return [next(rest) if known is None else Completed(known, 0.0, 0.0, 0, {}) for known in found]


def _fitting(question: Question[ModelParameters], found: list[Answer | None]) -> list[Answer | None]:
    """What of `found` can be an answer: others may write where gateways share theirs."""
    sound = [one if one is None or fits(one, question.key, question.manifest) else None for one in found]
    if misfits := sound.count(None) - found.count(None):
        question.gateway.metrics.redis_errors.labels("malformed").inc(misfits)
    return sound


async def _answer_keys(
    question: Question[ModelParameters], images: Sequence[Pixels], seeds: Sequence[int]
) -> list[bytes]:
    seed = seeds[0] if question.draws else None  # the client's: every image has it
    asked = (question.scope, question.bundle.digest, question.key, seed, images)
    if sum(image.nbytes for image in images) <= QUICK_HASH_BYTES:
        return answer_keys(*asked)
    return await in_thread(question, answer_keys, *asked)


async def _run(
    question: Question[ModelParameters], request: Request, images: Sequence[Pixels], seeds: Sequence[int]
) -> list[Outcome]:
    """What the engine makes of `images`, by way of the queue. No image is left in it, and no place kept, at the end.

    Raises DeadlineExceeded and ClientLeft.
    """
    items = question.batcher.admit(question.places, question.key, images, seeds, question.deadline)
    if not items:  # what is cached needs its place no more
        return []
    metrics = question.gateway.metrics
    metrics.accepted.inc(len(items))
    try:
        with WhenGone(request, partial(question.batcher.withdraw, items)):
            outcomes = await question.batcher.wait(items)
    except BaseException:
        metrics.answered.inc(len(items))
        raise
    gone = [outcome for outcome in outcomes if isinstance(outcome, ClientLeft)]
    if gone:
        metrics.count_cancelled([one.where for one in gone], ran=len(outcomes) - len(gone))
        raise gone[0]
    metrics.answered.inc(len(items))
    for item, outcome in zip(items, outcomes, strict=True):
        if isinstance(outcome, Completed):
            metrics.queue_wait.observe(outcome.queue_ms / 1000)
            _time(question.record, outcome)
        elif isinstance(outcome, DeadlineExceeded) and not outcome.was_running:
            metrics.queue_wait.observe(item.deadline - item.enqueued_at)
    return outcomes


def _time(record: Record, completed: Completed) -> None:
    record.time("queue", completed.queue_ms)
    for stage, milliseconds in completed.stage_ms.items():
        record.time(stage, milliseconds)
