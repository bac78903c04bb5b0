"""What gateways and workers write to each other comes back as it was, and nothing else is believed."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import ClarifierError, DeadlineExceeded, InferenceFailed, NotFinite, Overloaded
from service.queue import Completed, Item
from service.wire import HEAD, Malformed, pack_reply, pack_work, unpack_reply, unpack_work
from service.work import Answer, Classified, Detected, Key, Operation, Purified

IMAGE = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
FLOATS = np.linspace(0, 1, 3, dtype=np.float32)
ANSWERS: list[Answer] = [
    Classified(FLOATS),
    Classified(FLOATS, FLOATS[::-1], 0.25, "atop", np.zeros((2, 2, 3), np.float32)),
    Purified(np.ones((2, 2, 3), np.float32), 0.5),
    Detected(0.75),
]


def item(key: Key) -> Item:
    loop = asyncio.new_event_loop()
    try:
        return Item(key, IMAGE, 2**64 - 1, 5.0, 1.0, loop.create_future())
    finally:
        loop.close()


@pytest.mark.parametrize("operation", list(Operation))
def test_work_comes_back_as_it_was(operation: Operation) -> None:
    key = Key(operation, "colors@1", "atop:rt3,aid", 3, explain=True, purified=True)
    work = unpack_work(pack_work("g-1", "g", item(key), 1234.5))
    assert (work.uid, work.gateway, work.key, work.seed, work.left_ms) == ("g-1", "g", key, 2**64 - 1, 1234.5)
    np.testing.assert_array_equal(work.image, IMAGE)
    assert work.image.dtype == np.uint8


def test_floats_come_back_as_floats() -> None:
    one = item(Key(Operation.CLASSIFY, "colors@1", floats=True))
    one.image = (IMAGE / 255).astype(np.float32).transpose(1, 0, 2)  # type: ignore[assignment]  # a view, as they wait
    np.testing.assert_array_equal(unpack_work(pack_work("g-1", "g", one, 1.0)).image, one.image)


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_comes_back_as_it_was(answer: Answer) -> None:
    completed = Completed(answer, 1.5, 2.5, 7, {"purify": 1.0})
    reply = unpack_reply(pack_reply("g-1", completed))
    assert isinstance(reply.outcome, Completed)
    assert reply.uid == "g-1"
    assert type(reply.outcome.answer) is type(answer)
    for field in dataclasses.fields(answer):
        np.testing.assert_equal(getattr(reply.outcome.answer, field.name), getattr(answer, field.name))
    assert (reply.outcome.queue_ms, reply.outcome.inference_ms) == (1.5, 2.5)
    assert (reply.outcome.batch_size, reply.outcome.stage_ms) == (7, {"purify": 1.0})


@pytest.mark.parametrize(
    ("error", "comes_back"),
    [
        (NotFinite(), NotFinite),
        (InferenceFailed(), InferenceFailed),
        (DeadlineExceeded(), DeadlineExceeded),
        (Overloaded(), InferenceFailed),
    ],
)
def test_an_error_comes_back_as_its_class(error: ClarifierError, comes_back: type[ClarifierError]) -> None:
    assert type(unpack_reply(pack_reply("g-1", error)).outcome) is comes_back


def changed(fields: dict[bytes, bytes], **head: Any) -> dict[bytes, bytes]:
    return {**fields, HEAD: json.dumps({**json.loads(fields[HEAD]), **head}).encode()}


WORK = pack_work("g-1", "g", item(Key(Operation.CLASSIFY, "colors@1")), 10.0)
REPLY = pack_reply("g-1", Completed(ANSWERS[0], 1.0, 1.0, 1, {}))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {HEAD: b"[]"},
        {HEAD: b"[" * 100_000},
        {HEAD: b"\xff"},
        {**WORK, b"image": b""},
        changed(WORK, operation="delete"),
        changed(WORK, votes=0),
        changed(WORK, votes=True),
        changed(WORK, floats=True),
        changed(WORK, explain=1),
        changed(WORK, seed=-1),
        changed(WORK, left_ms=None),
        changed(WORK, left_ms="nan"),
        changed(WORK, model=3),
        changed(WORK, arrays={"image": ["u1", -2, -6]}),
        changed(WORK, arrays={"image": ["O", 12]}),
        changed(WORK, arrays={"image": ["u1", 10**30]}),
        changed(WORK, arrays={"other": ["u1", 12]}),
    ],
)
def test_forged_work_is_refused(fields: dict[bytes, bytes]) -> None:
    with pytest.raises(Malformed):
        unpack_work(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        changed(REPLY, error="overloaded"),
        changed(REPLY, error=["nan"]),
        changed(REPLY, kind="other"),
        changed(REPLY, kind="purified"),
        changed(REPLY, queue_ms=float("nan")),
        changed(REPLY, stage_ms=[1]),
        changed(REPLY, uid=None),
    ],
)
def test_forged_replies_are_refused(fields: dict[bytes, bytes]) -> None:
    with pytest.raises(Malformed):
        unpack_reply(fields)


@given(st.dictionaries(st.sampled_from([HEAD, b"image", b"probabilities"]), st.binary(max_size=64)))
def test_bytes_at_random_are_refused(fields: dict[bytes, bytes]) -> None:
    with pytest.raises(Malformed):
        unpack_work(fields)
    with pytest.raises(Malformed):
        unpack_reply(fields)
