"""What Prometheus reads: the names of the contract, and labels from closed sets."""

from __future__ import annotations

import platform
import re
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from service.entropy import Entropy
from service.metrics import Metrics, defense_label
from service.record import new_record
from service.work import Classified, Detected, Purified
from tests.service.conftest import Running, until
from tests.service.fakes import POISON_VALUE, green, marked, png

GOOD = png(green())
README = Path(__file__).parents[2] / "service" / "README.md"
CONTRACT = {
    "requests_total", "request_duration_seconds", "stage_duration_seconds", "batch_size", "queue_depth",
    "rejected_total", "aid_score", "suspicious_total", "flips_total", "predictions_total",
    "engine_errors_total", "device_memory_bytes", "model_info", "mislabeled_total", "redis_up",
    "redis_errors_total", "cache_requests_total", "accepted_total", "answered_total", "cancelled_total",
    "bundle_load_seconds", "bundle_last_load_success", "auto_degraded_total", "query_similarity_alerts_total",
    "event_loop_lag_seconds", "jobs", "job_images_total", "requests_in_progress", "request_size_bytes",
    "batches_total", "queue_capacity", "queue_oldest_seconds", "queue_lag", "queue_wait_seconds", "ready",
    "build_info", "purification_linf", "compared_total", "engine_seconds_total", "engine_images_total",
    "cost_seconds_total", "shadowed_total", "evidence_total", "near_duplicates_total", "similarity_skipped_total",
}  # fmt: skip


def families(page: str) -> set[str]:
    """Names after `# TYPE clarifier_`."""
    return {name for name in re.findall(r"^# TYPE clarifier_(\S+)", page, re.M) if not name.endswith("_created")}


def test_the_names_are_those_of_the_contract(service: Running) -> None:
    assert families(service.client.get("/metrics").text) == CONTRACT


def test_the_documentation_lists_the_same_names() -> None:
    documented = set(re.findall(r"^\| `clarifier_(\w+?)(?:\{[^}]*\})?`", README.read_text(), re.M))
    assert documented == CONTRACT


def test_a_good_answer_is_counted_with_its_stages(start: Callable[..., Running]) -> None:
    server = start()
    assert server.client.post("/classify?defense=aid", content=GOOD).status_code == 200
    assert server.client.post("/purify?defense=aid", content=GOOD).status_code == 200
    labels = {"route": "/classify", "model": "colors@1", "defense": "aid", "status": "200"}
    until(lambda: server.metric("clarifier_stage_duration_seconds_count", stage="encode") == 1)
    assert server.metric("clarifier_requests_total", **labels) == 1
    assert server.metric("clarifier_request_duration_seconds_count", route="/classify") == 1
    counts = {
        stage: server.metric("clarifier_stage_duration_seconds_count", stage=stage)
        for stage in ("decode", "queue", "classify", "purify", "encode")
    }
    assert counts == {"decode": 2, "queue": 2, "classify": 1, "purify": 2, "encode": 1}
    assert server.metric("clarifier_request_size_bytes_sum", route="/purify") == len(GOOD)
    assert server.metric("clarifier_purification_linf_count", defense="aid") == 2
    assert server.metric("clarifier_queue_wait_seconds_count") == 2
    assert server.metric("clarifier_batches_total", reason="delay") == 2
    assert server.metric("clarifier_engine_images_total", defense="aid") == 2
    assert server.metric("clarifier_engine_seconds_total", defense="aid") > 0
    parts = [
        server.metric("clarifier_cost_seconds_total", defense="aid", part=part) for part in ("defense", "classifier")
    ]
    assert all(0 < seconds < 1 for seconds in parts)  # of the classification alone: the other was not classified
    assert server.metric("clarifier_batch_size_count") == 2
    assert server.metric("clarifier_batch_size_sum") == 2
    assert server.metric("clarifier_model_info", model="colors@1", digest="d" * 64, device="cpu") == 1


def test_every_answer_is_counted_also_those_of_the_framework(start: Callable[..., Running]) -> None:
    server = start()
    server.client.get("/some/odd/path")
    server.client.get("/another")
    server.client.get("/classify")
    server.client.post("/classify", content=b"no image")
    until(lambda: server.metric("clarifier_rejected_total", reason="unsupported_format") == 1)
    counted = {
        (sample.labels["route"], sample.labels["status"]): sample.value
        for metric in server.gateway.metrics.requests.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    }
    assert counted == {("other", "404"): 2, ("/classify", "405"): 1, ("/classify", "415"): 1}


def test_nothing_that_a_client_sends_creates_a_series(start: Callable[..., Running]) -> None:
    server = start()
    server.client.post("/classify?model=canary", content=GOOD)
    server.client.post("/classify?defense=canary", content=GOOD)
    server.client.get("/canary")
    server.client.get("/models/canary")
    server.client.request("CANARY", "/classify", headers={"x-request-id": "canary"})
    assert "canary" not in server.client.get("/metrics").text.lower()
    for chain in ("atop,aid", "aid,atop", "atop:rt1,zeropur"):
        assert server.client.post(f"/classify?defense={chain}", content=GOOD).status_code == 200
    labels = {"route": "/classify", "model": "colors@1", "defense": "chain", "status": "200"}
    until(lambda: server.metric("clarifier_requests_total", **labels) == 3)


def test_a_failure_of_the_engine_is_counted_by_kind(start: Callable[..., Running]) -> None:
    server = start()
    assert server.client.post("/classify", content=png(marked(POISON_VALUE))).status_code == 500
    assert server.metric("clarifier_engine_errors_total", engine="torch", kind="other") == 1


def classified(*probabilities: float, undefended: tuple[float, ...] = (), score: float | None = None) -> Classified:
    bare = np.array(undefended, np.float32) if undefended else None
    return Classified(np.array(probabilities, np.float32), bare, score)


def test_answers_feed_the_attack_watch() -> None:
    metrics = Metrics()
    record = new_record("", Entropy())
    record.model, record.defense = "m@1", "atop"
    classes = ("cat", "dog")
    metrics.count_answer(record, classified(0.9, 0.1, undefended=(0.2, 0.8), score=0.3), classes, 0.5)
    metrics.count_answer(record, classified(0.9, 0.1, undefended=(0.7, 0.3), score=0.8), classes, 0.5)
    metrics.count_answer(record, classified(0.1, 0.9), classes, None)
    metrics.count_answer(record, Detected(0.1), classes, 0.5)
    value = metrics.registry.get_sample_value
    assert value("clarifier_predictions_total", {"model": "m@1", "label": "cat"}) == 2
    assert value("clarifier_predictions_total", {"model": "m@1", "label": "dog"}) == 1
    assert value("clarifier_flips_total", {"model": "m@1", "defense": "atop"}) == 1
    assert value("clarifier_compared_total", {"model": "m@1", "defense": "atop"}) == 2
    assert value("clarifier_suspicious_total", {"model": "m@1"}) == 2
    assert value("clarifier_aid_score_count") == 3


def test_row_47_what_was_degraded_is_counted_whatever_was_asked() -> None:
    metrics = Metrics()
    record = new_record("", Entropy())
    record.model = "m@1"
    answer = classified(0.9, 0.1)
    purified = Purified(np.zeros((2, 2, 3), np.float32), 0.0)
    for one in (answer, replace(answer, degraded=True), purified, replace(purified, degraded=True), Detected(0.1)):
        metrics.count_answer(record, one, ("cat", "dog"), None)
    assert metrics.registry.get_sample_value("clarifier_auto_degraded_total", {"model": "m@1"}) == 2


def test_a_model_of_many_classes_does_not_make_many_series() -> None:
    metrics = Metrics()
    record = new_record("", Entropy())
    record.model = "m@1"
    metrics.count_answer(record, classified(0.1, 0.9), tuple(f"class {i}" for i in range(1000)), None)
    assert metrics.registry.get_sample_value("clarifier_predictions_total", {"model": "m@1", "label": "other"}) == 1


@pytest.mark.parametrize(("defense", "label"), [("atop", "atop"), ("atop:rt1", "atop:rt1"), ("a,b", "chain")])
def test_chains_share_a_label(defense: str, label: str) -> None:
    assert defense_label(defense) == label


def test_what_waits_and_since_when_is_on_the_page(start: Callable[..., Running]) -> None:
    server = start(max_batch_size=1, max_queue_size=5)
    assert server.metric("clarifier_queue_oldest_seconds") == 0
    server.bundle.gate.clear()
    with ThreadPoolExecutor(3) as clients:
        answers = [clients.submit(server.client.post, "/classify", content=GOOD) for _ in range(3)]
        until(lambda: server.metric("clarifier_queue_depth") == 2)
        until(lambda: server.metric("clarifier_queue_oldest_seconds") > 0.1)
        assert server.metric("clarifier_queue_capacity") == 5
        assert server.metric("clarifier_requests_in_progress", route="/classify") == 3
        server.bundle.gate.set()
        assert {answer.result().status_code for answer in answers} == {200}
    until(lambda: server.metric("clarifier_requests_in_progress", route="/classify") == 0)
    assert server.metric("clarifier_queue_oldest_seconds") == 0
    assert server.metric("clarifier_batches_total", reason="size") == 3
    assert server.metric("clarifier_queue_wait_seconds_sum") > 0.2


def test_an_image_that_waited_in_vain_has_waited_until_its_deadline(start: Callable[..., Running]) -> None:
    server = start()
    server.bundle.gate.clear()
    for waited in (0, 1):  # the first runs until its deadline, and the second waits behind it
        response = server.client.post("/classify", content=GOOD, headers={"x-request-timeout-ms": "150"})
        assert response.status_code == 504
        assert server.metric("clarifier_queue_wait_seconds_count") == waited
    assert 0.05 < server.metric("clarifier_queue_wait_seconds_sum") <= 0.15


def test_ready_is_what_the_probe_says(start: Callable[..., Running]) -> None:
    server = start()
    assert server.metric("clarifier_ready") == 1
    server.gateway.draining = True
    assert server.client.get("/readyz").status_code == 503
    assert server.metric("clarifier_ready") == 0


def test_the_version_is_that_of_the_package(service: Running) -> None:
    declared = tomllib.loads((README.parents[1] / "pyproject.toml").read_text())["project"]["version"]
    running = {"version": declared, "python": platform.python_version()}
    assert service.metric("clarifier_build_info", **running) == 1
