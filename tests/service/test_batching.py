"""Everybody is answered: a real engine thread with a fake engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from service.batching import Batcher
from service.errors import (
    ClarifierError,
    ClientLeft,
    DeadlineExceeded,
    Draining,
    InferenceFailed,
    NotFinite,
    NotReady,
    Overloaded,
)
from service.metrics import Metrics
from service.pace import LAST_BATCHES
from service.queue import Completed, Item
from service.work import Answer, Detected, EngineFault, Key, Operation, Pixels, Ran

KEYS = [Key(Operation.DETECT, f"model@{version}") for version in (1, 2, 3)]
A = KEYS[0]


class FakeEngine:
    """Answers an image with its own first sample. Values name misbehaviors; `gate` holds the engine."""

    RAISES, NAN, SHORT, FATAL, OOM = 201, 202, 203, 204, 205

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.second_gate = threading.Event()
        self.second_gate.set()
        self.hold_after = 0
        self.batches: list[list[int]] = []

    def run(self, key: Key, images: Sequence[Pixels], seeds: Sequence[int]) -> Ran:
        values = [int(image[0, 0, 0]) for image in images]
        self.batches.append(values)
        self.entered.set()
        assert self.gate.wait(20)
        assert len(self.batches) <= self.hold_after or self.second_gate.wait(20)
        if self.RAISES in values:
            raise RuntimeError("raised on purpose")
        if self.OOM in values:
            raise EngineFault("oom")
        if self.FATAL in values:
            raise SystemExit
        answers: list[Answer | ClarifierError] = [
            NotFinite() if value == self.NAN else Detected(float(value)) for value in values
        ]
        return Ran(answers[1:] if self.SHORT in values else answers, {"classify": 3.0})


@asynccontextmanager
async def started(engine: FakeEngine, **settings: Any) -> AsyncIterator[Batcher]:
    options: dict[str, Any] = {
        "max_batch_size": 4,
        "max_queue_delay_ms": 1,
        "max_queue_size": 16,
        "max_queue_wait_ms": 0,
    }
    batcher = Batcher(engine.run, engine_name="fake", metrics=Metrics(), **(options | settings))
    batcher.start()
    try:
        yield batcher
    finally:
        engine.gate.set()
        await batcher.stop(20)


def image(value: int) -> Pixels:
    return np.full((1, 1, 3), value, np.uint8)


async def submit(batcher: Batcher, value: int, *, key: Key = A, seconds: float = 20) -> Completed:
    return await answer(batcher, admit(batcher, [value], key=key, seconds=seconds))


async def answer(batcher: Batcher, one: Sequence[Item]) -> Completed:
    (outcome,) = await batcher.wait(one)
    if isinstance(outcome, ClarifierError):
        raise outcome
    return outcome


def admit(batcher: Batcher, values: Sequence[int], *, key: Key = A, seconds: float = 20) -> list[Item]:
    """Reserve and take a place for each value."""
    with batcher.places() as places:
        batcher.reserve(places, len(values))
        images = [image(value) for value in values]
        return batcher.admit(places, key, images, [0] * len(values), time.monotonic() + seconds)


async def outcome(awaitable: Awaitable[Completed]) -> float | type[ClarifierError]:
    """The score, or the class of the error."""
    try:
        completed = await awaitable
    except ClarifierError as error:
        return type(error)
    assert isinstance(completed.answer, Detected)
    return completed.answer.aid_score


async def outcomes(batcher: Batcher, values: Sequence[int]) -> list[float | type[ClarifierError]]:
    return await asyncio.gather(*(outcome(submit(batcher, value)) for value in values))


async def hold(engine: FakeEngine, batcher: Batcher) -> asyncio.Task[float | type[ClarifierError]]:
    """Keep the engine busy with one item (value 0) until its gate opens."""
    engine.gate.clear()
    engine.entered.clear()
    task = asyncio.create_task(outcome(submit(batcher, 0)))
    await eventually(engine.entered.is_set)
    return task


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


def test_everybody_gets_their_own_answer_and_its_costs() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with started(engine) as batcher:
            assert await outcomes(batcher, range(1, 13)) == list(range(1, 13))
            assert all(len(batch) <= 4 for batch in engine.batches)
            completed = await submit(batcher, 5)
            assert completed.batch_size == 1
            assert completed.stage_ms == {"classify": 3.0}
            assert completed.queue_ms >= 0
            assert completed.inference_ms >= 0

    asyncio.run(scenario())


def test_who_would_wait_in_vain_is_refused_at_once() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with started(engine, max_batch_size=1) as batcher:
            held = await hold(engine, batcher)
            waiting = [admit(batcher, [value]) for value in (1, 2, 3)]
            batcher.check_in_time(A, time.monotonic() + 1e-3)  # nothing is known of the pace yet
            await asyncio.sleep(0.5)
            engine.gate.set()
            await held
            for one in waiting:
                await answer(batcher, one)
            batcher.check_in_time(A, time.monotonic() + 1e-3)  # nobody waits
            held = await hold(engine, batcher)
            for _ in range(LAST_BATCHES):
                batcher._pace.note(A, 1, 0.5)
            waiting = [admit(batcher, [value]) for value in range(1, 9)]
            await eventually(lambda: batcher._queue.depth == 8)
            with pytest.raises(Overloaded) as refused:
                batcher.check_in_time(A, time.monotonic() + 4 * 0.5)
            assert refused.value.retry_after_s > 0
            batcher.check_in_time(A, time.monotonic() + 1000)
            batcher.check_in_time(A, time.monotonic() - 1)  # that is 504
            engine.gate.set()
            assert await held == 0

    asyncio.run(scenario())


def test_who_would_wait_longer_than_anybody_should_is_refused_but_not_from_the_next_batch() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with started(engine, max_batch_size=2, max_queue_wait_ms=5000) as batcher:
            held = await hold(engine, batcher)
            for images in (1, 2):
                batcher._pace.note(A, images, 100.0 * images)
            waiting = admit(batcher, [1])
            batcher.check_in_time(A, time.monotonic() + 10_000)  # 100 s, but it is in the next batch
            waiting += admit(batcher, [1])
            with pytest.raises(Overloaded) as refused:
                batcher.check_in_time(A, time.monotonic() + 10_000)
            assert 270 < refused.value.retry_after_s <= 295, "what runs, and a batch, but for 5 s"
            for images in [1, 2] * LAST_BATCHES:
                batcher._pace.note(A, images, 0.5 * images)
            waiting += admit(batcher, [1] * 6)
            batcher.check_in_time(A, time.monotonic() + 10_000)  # four batches of 1 s, and its own does not count
            waiting += admit(batcher, [1] * 4)
            with pytest.raises(Overloaded):
                batcher.check_in_time(A, time.monotonic() + 10_000)
            engine.gate.set()
            await asyncio.gather(held, batcher.wait(waiting))

    asyncio.run(scenario())


def test_what_one_turn_of_the_event_loop_admits_is_one_batch() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with started(engine, max_queue_delay_ms=0) as batcher:
            asked = [admit(batcher, [value]) for value in (1, 2, 3)]
            assert batcher.depth == 3
            batcher.withdraw(asked.pop(1))
            assert batcher.depth == 2
            assert [(await answer(batcher, one)).batch_size for one in asked] == [2, 2]
        assert engine.batches == [[1, 3]]

    asyncio.run(scenario())


def test_what_was_admitted_in_the_turn_of_the_end_is_answered() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with started(engine) as batcher:
            last = admit(batcher, [1])
            batcher.finish()
            assert (await answer(batcher, last)).batch_size == 1

    asyncio.run(scenario())


def test_waiting_items_are_batched_while_the_engine_is_busy() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with started(engine) as batcher:
            held = await hold(engine, batcher)
            others = asyncio.create_task(outcomes(batcher, [1, 2, 3, 4, 5]))
            await eventually(lambda: batcher.depth == 5)
            engine.gate.set()
            assert await others == [1, 2, 3, 4, 5]
            assert await held == 0
            assert engine.batches == [[0], [1, 2, 3, 4], [5]]
            assert batcher.depth == 0

    asyncio.run(scenario())


def test_row_48_ten_times_the_capacity_is_429_for_the_excess_and_an_answer_for_the_rest() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with started(engine, max_queue_size=16) as batcher:
            held = await hold(engine, batcher)
            others = [asyncio.create_task(outcome(submit(batcher, 1 + i % 100))) for i in range(160)]
            await eventually(lambda: sum(task.done() for task in others) == 144)
            assert [await task for task in others if task.done()] == [Overloaded] * 144
            assert batcher.depth == 16
            with pytest.raises(Overloaded):
                batcher.check_open()
            engine.gate.set()
            answers = [await task for task in others]
            assert [a for a in answers if a is not Overloaded] == [1 + i % 100 for i in range(16)]
            assert await held == 0
            assert await outcome(submit(batcher, 7)) == 7  # recovered

    asyncio.run(scenario())


def test_a_clients_batch_is_admitted_as_a_whole_or_not_at_all() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with started(engine, max_queue_size=4) as batcher:
            held = await hold(engine, batcher)
            with pytest.raises(Overloaded):
                admit(batcher, [1] * 5)
            assert batcher.depth == 0
            engine.gate.set()
            await held

    asyncio.run(scenario())


def test_row_50_an_item_whose_deadline_passes_is_504_and_never_reaches_the_engine() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with started(engine) as batcher:
            held = await hold(engine, batcher)
            assert await outcome(submit(batcher, 1, seconds=0.03)) is DeadlineExceeded
            assert batcher.depth == 0
            with pytest.raises(DeadlineExceeded):
                admit(batcher, [1], seconds=-1)
            engine.gate.set()
            assert await held == 0
            assert await outcome(submit(batcher, 2)) == 2
            assert engine.batches == [[0], [2]]

    asyncio.run(scenario())


def test_an_item_that_runs_when_its_deadline_passes_is_504() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        engine.gate.clear()
        async with started(engine) as batcher:
            assert await outcome(submit(batcher, 1, seconds=0.05)) is DeadlineExceeded
            assert engine.batches == [[1]]

    asyncio.run(scenario())


def test_at_the_deadline_of_several_those_that_were_answered_keep_their_answers() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with started(engine, max_batch_size=2) as batcher:
            engine.hold_after = 1
            engine.second_gate.clear()
            items = admit(batcher, [1, 2, 3, 4, 5], seconds=0.2)
            found = await batcher.wait(items)
            assert [type(each) for each in found] == [Completed] * 2 + [DeadlineExceeded] * 3
            assert batcher.depth == 0
            engine.second_gate.set()

    asyncio.run(scenario())


def test_a_caller_that_is_cancelled_takes_all_of_its_items_out() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with started(engine) as batcher:
            held = await hold(engine, batcher)
            leaving = asyncio.create_task(batcher.wait(admit(batcher, [1, 2, 3])))
            await asyncio.sleep(0)  # it waits
            assert batcher.depth == 3
            leaving.cancel()
            await eventually(leaving.done)
            assert leaving.cancelled()
            assert batcher.depth == 0
            engine.gate.set()
            assert await held == 0
            assert engine.batches == [[0]]

    asyncio.run(scenario())


def test_row_11_a_client_that_leaves_costs_nothing_and_harms_nobody() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with started(engine) as batcher:
            held = await hold(engine, batcher)
            leaving = admit(batcher, [1])
            cancelled = asyncio.create_task(outcome(submit(batcher, 2)))
            staying = asyncio.create_task(outcome(submit(batcher, 3)))
            await eventually(lambda: batcher.depth == 3)
            batcher.withdraw(leaving)
            cancelled.cancel()
            assert await outcome(answer(batcher, leaving)) is ClientLeft
            await eventually(lambda: batcher.depth == 1)
            engine.gate.set()
            assert (await held, await staying) == (0, 3)
            assert engine.batches == [[0], [3]]

    asyncio.run(scenario())


def test_row_52_one_poisoned_item_fails_alone() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with started(engine) as batcher:
            held = await hold(engine, batcher)
            others = asyncio.create_task(outcomes(batcher, [1, engine.RAISES, 2, 3]))
            await eventually(lambda: batcher.depth == 4)
            engine.gate.set()
            assert await others == [1, InferenceFailed, 2, 3]
            assert await held == 0
            assert batcher._metrics.engine_errors.labels("fake", "other")._value.get() == 2

    asyncio.run(scenario())


def test_each_retry_is_answered_as_it_ends_and_shows_that_the_engine_is_alive() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with started(engine) as batcher:
            held = await hold(engine, batcher)
            others = [asyncio.create_task(outcome(submit(batcher, value))) for value in (1, engine.RAISES, 2)]
            await eventually(lambda: batcher.depth == 3)
            engine.hold_after = 3  # held, the batch, the first retry
            engine.second_gate.clear()
            engine.gate.set()
            assert await others[0] == 1
            await held
            await eventually(lambda: len(engine.batches) == 4)
            assert not others[1].done()
            assert batcher.silence_s < 20
            engine.second_gate.set()
            assert [await other for other in others] == [1, InferenceFailed, 2]

    asyncio.run(scenario())


def test_row_46_an_answer_that_is_not_finite_fails_alone_without_a_second_run() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with started(engine) as batcher:
            held = await hold(engine, batcher)
            others = asyncio.create_task(outcomes(batcher, [1, engine.NAN, 2]))
            await eventually(lambda: batcher.depth == 3)
            engine.gate.set()
            assert await others == [1, NotFinite, 2]
            assert engine.batches[1:] == [[1, engine.NAN, 2]]
            await held
            assert batcher._metrics.engine_errors.labels("fake", "nan")._value.get() == 1

    asyncio.run(scenario())


def test_a_batch_of_the_wrong_length_gives_nobody_anothers_answer() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with started(engine) as batcher:
            held = await hold(engine, batcher)
            others = asyncio.create_task(outcomes(batcher, [1, engine.SHORT, 2]))
            await eventually(lambda: batcher.depth == 3)
            engine.gate.set()
            assert await others == [1, InferenceFailed, 2]
            await held

    asyncio.run(scenario())


def test_an_engine_fault_is_counted_by_its_kind() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with started(engine) as batcher:
            assert await outcome(submit(batcher, engine.OOM)) is InferenceFailed
            assert batcher._metrics.engine_errors.labels("fake", "oom")._value.get() == 1

    asyncio.run(scenario())


def test_row_53_an_exception_inside_the_loop_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with started(engine) as batcher:
            broken = threading.Event()

            def break_once(_: object) -> None:
                if not broken.is_set():
                    broken.set()
                    raise RuntimeError("injected")

            monkeypatch.setattr(batcher._metrics.batch_size, "observe", break_once)
            assert await outcome(submit(batcher, 1)) is InferenceFailed  # answered, not left waiting
            assert broken.is_set()
            assert await outcome(submit(batcher, 2)) == 2
            assert batcher.silence_s < 20

    asyncio.run(scenario())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # SystemExit ends it
def test_row_53_a_loop_that_ends_answers_everybody_and_takes_readiness_with_it() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with started(engine, max_batch_size=1) as batcher:
            held = await hold(engine, batcher)
            fatal = asyncio.create_task(outcome(submit(batcher, engine.FATAL)))
            behind = asyncio.create_task(outcome(submit(batcher, 1)))
            await eventually(lambda: batcher.depth == 2)
            engine.gate.set()
            assert (await held, await fatal, await behind) == (0, InferenceFailed, NotReady)
            await eventually(lambda: batcher.silence_s == float("inf"))
            with pytest.raises(NotReady):
                batcher.check_open()

    asyncio.run(scenario())


def test_a_drain_hurries_and_the_engine_ends_when_nobody_else_will_come() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with started(engine, max_queue_delay_ms=60_000) as batcher:
            waiting = asyncio.create_task(outcome(submit(batcher, 1)))
            await eventually(lambda: batcher.depth == 1)
            batcher.drain()
            assert await waiting == 1
            assert await outcome(submit(batcher, 2)) == 2  # it was let in before the drain
            assert batcher.alive
            batcher.finish()
            with pytest.raises(Draining):
                admit(batcher, [3])
            await eventually(lambda: not batcher.alive)

    asyncio.run(scenario())


def test_what_is_left_when_the_drain_time_is_over_is_answered_503() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with started(engine) as batcher:
            running = await hold(engine, batcher)
            waiting = asyncio.create_task(outcome(submit(batcher, 1)))
            await eventually(lambda: batcher.depth == 1)
            await batcher.stop(0.01)
            assert (await running, await waiting) == (Draining, Draining)

    asyncio.run(scenario())


def test_the_engine_beats_while_idle_and_shows_when_it_is_stuck() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with started(engine) as batcher:
            await asyncio.sleep(1.2)
            assert batcher.silence_s < 1.1  # it would be 1.2 without a beat
            held = await hold(engine, batcher)
            assert batcher.busy
            before = batcher.silence_s
            await asyncio.sleep(0.05)
            assert batcher.silence_s > before
            engine.gate.set()
            await held

    asyncio.run(scenario())


def test_thousands_of_random_clients_get_their_own_answers() -> None:
    async def client(batcher: Batcher, number: int) -> None:
        value = number % 200
        task = asyncio.create_task(outcome(submit(batcher, value, key=KEYS[number % 3])))
        if number % 7 == 0:
            await asyncio.sleep(number % 5 / 1000)
            task.cancel()
            return
        assert await task in (value, Overloaded)

    async def scenario() -> None:
        engine = FakeEngine()
        async with started(engine, max_queue_size=200, max_batch_size=8) as batcher:
            for wave in range(10):
                await asyncio.gather(*(client(batcher, 300 * wave + i) for i in range(300)))
            await eventually(lambda: batcher.depth == 0)
            assert await outcome(submit(batcher, 9)) == 9

    asyncio.run(scenario())
