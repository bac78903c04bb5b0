"""Who goes next, with a clock of our own."""

from __future__ import annotations

import asyncio

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.queue import BatchQueue, Item
from service.work import Key, Operation, Pixels

KEYS = [Key(Operation.DETECT, f"model@{version}") for version in (1, 2, 3)]
A, B, _ = KEYS
IMAGE: Pixels = np.zeros((1, 1, 3), np.uint8)


def item(key: Key = A, *, at: float = 0.0) -> Item:
    return Item(key, IMAGE, 0, 1e9, at, asyncio.Future(loop=LOOP))


LOOP = asyncio.new_event_loop()
LOOP.close()  # futures need one; nothing ever runs on it


def test_a_batch_leaves_when_it_is_full() -> None:
    queue = BatchQueue(max_batch_size=2, max_delay_s=10)
    items = [item(at=t) for t in (0, 1, 2)]
    queue.add(items[:1])
    assert queue.take(5) == []
    queue.add(items[1:])
    assert queue.take(5) == items[:2]
    assert queue.depth == 1


def test_a_batch_leaves_when_its_oldest_item_has_waited_long_enough() -> None:
    queue = BatchQueue(max_batch_size=8, max_delay_s=10)
    items = [item(at=1), item(at=4)]
    queue.add(items)
    assert queue.wait_s(4) == 7
    assert queue.take(10.9) == []
    assert queue.take(11) == items
    assert queue.wait_s(11) is None


def test_different_keys_never_share_a_batch() -> None:
    queue = BatchQueue(max_batch_size=8, max_delay_s=1)
    items = [item(A, at=0), item(B, at=0.1), item(A, at=0.2)]
    queue.add(items)
    assert queue.take(5) == [items[0], items[2]]
    assert queue.take(5) == [items[1]]


def test_a_full_group_may_overtake_a_waiting_one_but_not_a_due_one() -> None:
    def queued() -> tuple[BatchQueue, Item, list[Item]]:
        one, two = item(A, at=0), [item(B, at=1), item(B, at=2)]
        made = BatchQueue(max_batch_size=2, max_delay_s=10)
        made.add([one, *two])
        return made, one, two

    early, _, full = queued()
    assert early.take(3) == full
    late, oldest, _ = queued()
    assert late.take(10) == [oldest]


def test_a_batch_is_limited_by_its_work() -> None:
    queue = BatchQueue(max_batch_size=32, max_delay_s=10)
    for votes, expected in ((1, 32), (5, 6), (32, 1), (64, 1)):
        key = Key(Operation.CLASSIFY, "model@1", "atop", votes)
        queue.add([item(key) for _ in range(40)])
        assert len(queue.take(0)) == expected  # full: it leaves before the delay is over
        queue.clear()


def test_a_draining_queue_does_not_wait_for_company() -> None:
    queue = BatchQueue(max_batch_size=8, max_delay_s=10)
    items = [item()]
    queue.add(items)
    assert queue.take(0, at_once=True) == items


class QueueMachine(RuleBasedStateMachine):
    """Any order of arrivals, departures and batches: nobody is lost, doubled, mixed, starved or overtaken."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.size, self.delay = 3, 5.0
        self.queue = BatchQueue(self.size, self.delay)
        self.waiting: list[Item] = []

    @rule(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=4))
    def arrive(self, keys: list[Key]) -> None:
        items = [item(key, at=self.now) for key in keys]
        self.queue.add(items)
        self.waiting += items

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.waiting))
        self.queue.discard(gone)
        self.queue.discard(gone)  # twice is harmless
        self.waiting.remove(gone)

    @rule(seconds=st.floats(0, 3))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(at_once=st.booleans())
    def take(self, at_once: bool) -> None:
        batch = self.queue.take(self.now, at_once=at_once)
        oldest = min(self.waiting, key=lambda one: one.enqueued_at, default=None)
        groups = {key: [one for one in self.waiting if one.key == key] for key in KEYS}
        if oldest is None:
            assert not batch
            return
        due = at_once or self.now >= oldest.enqueued_at + self.delay
        if not batch:
            assert not due
            assert all(len(group) < self.size for group in groups.values())
            return
        group = groups[batch[0].key]
        assert batch == group[: self.size]  # one key, first come first served
        assert len(batch) == self.size or due
        if due:
            assert batch[0].enqueued_at == oldest.enqueued_at
        self.waiting = [one for one in self.waiting if one not in batch]

    @invariant()
    def depth_is_how_many_wait(self) -> None:
        assert self.queue.depth == len(self.waiting)

    def teardown(self) -> None:
        left = self.queue.clear()
        assert sorted(map(id, left)) == sorted(map(id, self.waiting))
        assert self.queue.depth == 0


QueueMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestQueue = QueueMachine.TestCase
