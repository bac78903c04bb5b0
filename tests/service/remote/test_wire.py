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
from service.remote.wire import (
    HEAD,
    Malformed,
    fits,
    pack_answer,
    pack_reply,
    pack_work,
    unpack_answer,
    unpack_reply,
    unpack_work,
)
from service.work import Answer, Classified, Detected, Key, Operation, Purified
from tests.service.manifests import SIDE, fake_manifest

IMAGE = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
FLOATS = np.linspace(0, 1, 3, dtype=np.float32)
ANSWERS: list[Answer] = [
    Classified(FLOATS),
    Classified(FLOATS, FLOATS[::-1], 0.25, "atop", np.zeros((2, 2, 3), np.float32)),
    Classified(FLOATS, ran="none", degraded=True),
    Purified(np.ones((2, 2, 3), np.float32), 0.5),
    Purified(np.ones((2, 2, 3), np.float32), 0.5, degraded=True),
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
        changed(REPLY, degraded=None),
        changed(REPLY, degraded=1),
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


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_in_one_piece_comes_back_as_it_was(answer: Answer) -> None:
    found = unpack_answer("question", pack_answer("question", answer))
    assert type(found) is type(answer)
    for field in dataclasses.fields(answer):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(answer, field.name))
    with pytest.raises(Malformed):
        unpack_answer("another question", pack_answer("question", answer))


TABLES = (
    st.lists(st.tuples(st.sampled_from(["head", "image", "probabilities"]), st.integers())) | st.integers() | st.text()
)


@given(
    st.binary(max_size=200)
    | st.builds(lambda table, rest: json.dumps(table).encode() + b"\n" + rest, TABLES, st.binary())
)
def test_row_72_bytes_that_are_no_answer_are_malformed(packed: bytes) -> None:
    with pytest.raises(Malformed):
        unpack_answer("question", packed)


@given(st.data())
def test_row_72_an_answer_that_was_changed_is_malformed_or_an_answer(data: st.DataObject) -> None:
    packed = bytearray(pack_answer("question", ANSWERS[1]))
    place = data.draw(st.integers(0, len(packed) - 1))
    packed[place] ^= data.draw(st.integers(1, 255))
    packed = packed[: data.draw(st.integers(0, len(packed)))]
    try:
        answer = unpack_answer("question", bytes(packed))
    except Malformed:
        return
    assert fits(answer, Key(Operation.CLASSIFY, "colors@1"), fake_manifest()) in (True, False)


PICTURE = np.full((SIDE, SIDE, 3), 0.5, np.float32)
CLASSIFY = Key(Operation.CLASSIFY, "colors@1")
EXPLAIN = Key(Operation.CLASSIFY, "colors@1", explain=True, purified=True)
AUTO, PURIFY_AUTO = (Key(operation, "colors@1", "auto") for operation in (Operation.CLASSIFY, Operation.PURIFY))


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        (CLASSIFY, Classified(FLOATS)),
        (CLASSIFY, Classified(FLOATS + np.float32(1e-6), ran="atop:rt1,aid")),
        (EXPLAIN, Classified(FLOATS, FLOATS, 0.0, "none", PICTURE)),
        (EXPLAIN, Classified(FLOATS, FLOATS, None, None, PICTURE)),  # of a bundle without AID
        (Key(Operation.PURIFY, "colors@1"), Purified(PICTURE, 1.0)),
        (Key(Operation.DETECT, "colors@1"), Detected(1.0)),
        (AUTO, Classified(FLOATS, ran="zeropur")),
        (AUTO, Classified(FLOATS, ran="none", degraded=True)),
        (PURIFY_AUTO, Purified(PICTURE, 1.0, degraded=True)),
    ],
)
def test_an_answer_fits_its_own_question_and_no_other(key: Key, answer: Answer) -> None:
    manifest = fake_manifest(auto=True)
    assert fits(answer, key, manifest)
    others = [Key(operation, "colors@1", key.defense) for operation in Operation if operation is not key.operation]
    assert not any(fits(answer, other, manifest) for other in others)


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        (CLASSIFY, Classified(FLOATS[:2])),
        (CLASSIFY, Classified(FLOATS[:, None])),
        (CLASSIFY, Classified(np.array([0.5, np.nan, 0.5], np.float32))),
        (CLASSIFY, Classified(np.array([0.5, np.inf, 0.5], np.float32))),
        (CLASSIFY, Classified(FLOATS - 1)),
        (CLASSIFY, Classified(np.ones(3, np.uint8))),
        (CLASSIFY, Classified(FLOATS, FLOATS)),
        (CLASSIFY, Classified(FLOATS, aid_score=1.5)),
        (CLASSIFY, Classified(FLOATS, ran="strong")),
        (CLASSIFY, Classified(FLOATS, purified=PICTURE)),
        (EXPLAIN, Classified(FLOATS, None, 0.5, None, PICTURE)),
        (EXPLAIN, Classified(FLOATS, FLOATS[:2], 0.5, None, PICTURE)),
        (EXPLAIN, Classified(FLOATS, FLOATS, 0.5, None, PICTURE[1:])),
        (EXPLAIN, Classified(FLOATS, FLOATS)),
        (Key(Operation.PURIFY, "colors@1"), Purified(PICTURE * 3, 0.5)),
        (Key(Operation.PURIFY, "colors@1"), Purified(PICTURE[1:], 0.5)),
        (Key(Operation.PURIFY, "colors@1"), Purified(PICTURE, -1.0)),
        (Key(Operation.DETECT, "colors@1"), Detected(2.0)),
        (CLASSIFY, Classified(FLOATS, ran="none", degraded=True)),
        (AUTO, Classified(FLOATS, ran="zeropur", degraded=True)),
        (AUTO, Classified(FLOATS, degraded=True)),
        (Key(Operation.PURIFY, "colors@1", "zeropur"), Purified(PICTURE, 0.5, degraded=True)),
    ],
)
def test_row_72_an_answer_of_another_shape_kind_or_range_does_not_fit(key: Key, answer: Answer) -> None:
    assert not fits(answer, key, fake_manifest(auto=True))
