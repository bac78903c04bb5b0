"""A sample of the traffic runs again, undefended, and nobody waits for it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tests.service.conftest import Running, until
from tests.service.fakes import POISON_VALUE, dark, green, marked, png


def shadowed(server: Running, outcome: str = "done") -> float:
    return server.metric("clarifier_shadowed_total", outcome=outcome)


def test_answers_are_compared_and_scored_afterwards(start: Callable[..., Running]) -> None:
    server = start(shadow_rate=1.0)
    for _ in range(3):
        assert server.client.post("/classify?defense=atop", content=png(green())).status_code == 200
    assert server.client.post("/classify?defense=aid", content=png(dark())).status_code == 200
    assert server.client.post("/purify?defense=aid", content=png(dark())).status_code == 200
    until(lambda: shadowed(server) == 5)
    assert server.metric("clarifier_aid_score_count") == 5
    assert server.metric("clarifier_suspicious_total", model="colors@1") == 5  # whose scores are below the threshold
    assert server.metric("clarifier_compared_total", model="colors@1", defense="atop") == 3
    assert server.metric("clarifier_compared_total", model="colors@1", defense="aid") == 1
    assert server.metric("clarifier_flips_total", model="colors@1", defense="atop") == 0
    assert server.metric("clarifier_accepted_total") == 5  # what clients have asked, and no more


def test_a_label_that_the_defense_has_changed_is_a_flip(start: Callable[..., Running]) -> None:
    server = start(shadow_rate=1.0)
    image = np.full_like(green(), 100)  # every color alike: noise decides

    def label(query: str) -> str:
        return str(server.client.post(f"/classify?{query}", content=png(image)).json()["label"])

    bare, noisy = label("defense=none"), [label(f"defense=atop&seed={seed}") for seed in range(20)]
    until(lambda: shadowed(server) == 21)
    flips = sum(one != bare for one in noisy)
    assert 0 < flips < 20
    assert server.metric("clarifier_flips_total", model="colors@1", defense="atop") == flips
    assert server.metric("clarifier_compared_total", model="colors@1", defense="none") == 0


def test_what_was_explained_is_not_run_again(start: Callable[..., Running]) -> None:
    server = start(shadow_rate=1.0)
    server.client.post("/classify?explain=true", content=png(green()))
    server.client.post("/detect", content=png(green()))
    server.client.post("/classify", content=png(green()))
    until(lambda: shadowed(server) == 1)
    assert server.metric("clarifier_aid_score_count") == 3


def test_the_rate_is_a_share(start: Callable[..., Running]) -> None:
    server = start(shadow_rate=0.25)
    with ThreadPoolExecutor(8) as clients:
        list(clients.map(lambda _: server.client.post("/classify", content=png(green())), range(400)))
    until(lambda: server.metric("clarifier_answered_total") == 400)
    until(lambda: shadowed(server) >= 50)
    assert 50 <= shadowed(server) + shadowed(server, "skipped") <= 150  # six deviations


def test_without_a_rate_nothing_is_run_again(start: Callable[..., Running]) -> None:
    server = start()
    server.client.post("/classify", content=png(green()))
    assert server.gateway.watch is None
    assert server.bundle.batches[-2:] == [1, 1]


def test_a_queue_that_is_half_full_is_for_those_who_wait(start: Callable[..., Running]) -> None:
    server = start(shadow_rate=1.0, max_queue_size=4, max_batch_size=1)
    assert server.client.post("/classify?defense=none", content=png(green())).status_code == 200
    server.bundle.gate.clear()
    with ThreadPoolExecutor(4) as clients:
        answers = [clients.submit(server.client.post, "/classify", content=png(green())) for _ in range(4)]
        until(lambda: server.metric("clarifier_queue_depth") >= 3)
        until(lambda: shadowed(server, "skipped") == 1)
        server.bundle.gate.set()
        assert {answer.result().status_code for answer in answers} == {200}


def test_what_fails_there_fails_nobody(start: Callable[..., Running]) -> None:
    server = start(shadow_rate=1.0)
    server.bundle.misbehaves = False
    assert server.client.post("/classify?defense=aid", content=png(marked(POISON_VALUE))).status_code == 200
    server.bundle.misbehaves = True
    until(lambda: shadowed(server, "failed") == 1)
    assert server.still_answers()


def test_whoever_waits_for_those_inside_need_not_wait_for_ever(start: Callable[..., Running]) -> None:
    server = start(shadow_rate=1.0)
    assert server.client.post("/classify", content=png(green())).status_code == 200
    server.bundle.entered.clear()
    server.bundle.gate.clear()
    until(server.bundle.entered.is_set)
    inside = set(server.gateway._in_flight)
    assert len(inside) == 1
    server.bundle.gate.set()
    until(lambda: all(task.done() for task in inside))
