"""Every Prometheus metric, declared once. Labels come from closed or configured sets only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import generate_latest

from service.record import Record
from service.work import Classified, Detected, Purified, is_degraded

M = TypeVar("M", Counter, Histogram)

PREFIX = "clarifier_"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 128)
SCORES = tuple(tenth / 10 for tenth in range(1, 11))
MAX_LABELLED_CLASSES = 100
"""Models with more classes count their predictions under `other`."""


class Metrics:
    """The metrics of one application, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = self._counter(
            "requests", "Answers, by middleware too.", ("route", "model", "defense", "status")
        )
        self.request_duration = self._histogram("request_duration_seconds", "From first to last byte.", ("route",))
        self.stage_duration = self._histogram("stage_duration_seconds", "Of one request in one stage.", ("stage",))
        self.batch_size = self._histogram("batch_size", "Images per batch.", (), BATCH_SIZES)
        self.queue_depth = self._gauge("queue_depth", "Images that wait.")
        self.rejected = self._counter(
            "rejected", "Requests, and images of batches, refused or given up; by problem code.", ("reason",)
        )
        self.accepted = self._counter("accepted", "Images that were let into the queue.", ())
        self.answered = self._counter("answered", "Images of these that were answered, well or not.", ())
        self.cancelled = self._counter("cancelled", "Images of these whose client left.", ())
        self.cache_requests = self._counter(
            "cache_requests", "Images, by what the answer cache had for them.", ("result",)
        )
        self.mislabeled = self._counter("mislabeled", "Images of another kind than was declared.", ())
        self.aid_score = self._histogram("aid_score", "1 natural, 0 adversarial.", (), SCORES)
        self.suspicious = self._counter("suspicious", "Images below their bundle's AID threshold.", ("model",))
        self.auto_degraded = self._counter(
            "auto_degraded", "Images for which `auto` ran its cheap chain beyond its cap.", ("model",)
        )
        self.flips = self._counter("flips", "Defended label differs from the undefended.", ("model", "defense"))
        self.predictions = self._counter("predictions", "Defended labels.", ("model", "label"))
        self.event_loop_lag = self._histogram("event_loop_lag_seconds", "How late it was, four times a second.", ())
        self.similarity_alerts = self._counter(
            "query_similarity_alerts", "Images that are near-duplicates of too many before them.", ()
        )
        self.engine_errors = self._counter("engine_errors", "Failed batches and answers.", ("engine", "kind"))
        self.device_memory = self._gauge("device_memory_bytes", "Allocated on the accelerator; 0 on a CPU.")
        self.redis_up = self._gauge("redis_up", "1 while Redis answers.")
        self.redis_errors = self._counter("redis_errors", "What failed with Redis.", ("op",))
        self.jobs = self._gauge("jobs", "Jobs that are not done.")
        self.job_images = self._counter("job_images", "Images of jobs that were answered here.", ("outcome",))
        self.model_info = self._gauge("model_info", "1 for each loaded bundle.", ("model", "digest", "device"))
        self.bundle_load = self._gauge("bundle_load_seconds", "That the last load of the repository took.")
        self.bundle_success = self._gauge("bundle_last_load_success", "0 if that left out a bundle, or failed.")
        self.bundle_success.set(1)

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, labels: tuple[str, ...], buckets: tuple[float, ...] = SECONDS
    ) -> Histogram:
        return Histogram(PREFIX + name, text, labels, buckets=buckets, registry=self.registry)

    def page(self) -> bytes:
        """What /metrics answers."""
        return generate_latest(self.registry)

    def watch(self, queue_depth: Callable[[], float], device_memory: Callable[[], float]) -> None:
        """Read these two whenever the page is asked for."""
        self.queue_depth.set_function(queue_depth)
        self.device_memory.set_function(device_memory)

    def note_bundles(self, digests: Mapping[str, str], device: str) -> None:
        """These are served from now on, by `name@version`, and no others."""
        self.model_info.clear()
        for name, digest in digests.items():
            self.model_info.labels(name, digest, device).set(1)

    def count_request(self, record: Record) -> None:
        """A request has been answered, or its client has left."""
        defense = defense_label(record.defense)
        _series(self.requests, record.route, record.model, defense, str(record.status)).inc()
        _series(self.request_duration, record.route).observe(record.elapsed_ms() / 1000)
        for stage, milliseconds in record.timing_ms.items():
            _series(self.stage_duration, stage).observe(milliseconds / 1000)
        if record.mislabeled:
            self.mislabeled.inc()
        if record.code:
            self.count_refusal(record.code, record.status)

    def count_refusal(self, code: str, status: int) -> None:
        """A request, or one image of a batch, was refused or given up; failures of ours (500) are counted apart."""
        if status != 500:
            self.rejected.labels(code).inc()

    def count_answer(
        self,
        record: Record,
        answer: Classified | Purified | Detected,
        classes: tuple[str, ...],
        threshold: float | None,
    ) -> None:
        """What an answer says about the image: the attack watch."""
        if is_degraded(answer):
            self.auto_degraded.labels(record.model).inc()
        if isinstance(answer, Classified):
            index = int(answer.probabilities.argmax())
            label = classes[index] if len(classes) <= MAX_LABELLED_CLASSES else "other"
            _series(self.predictions, record.model, label).inc()
            if answer.undefended is not None and index != int(answer.undefended.argmax()):
                self.flips.labels(record.model, defense_label(record.defense)).inc()
        if not isinstance(answer, Purified) and answer.aid_score is not None and threshold is not None:
            self.aid_score.observe(answer.aid_score)
            if answer.aid_score < threshold:
                self.suspicious.labels(record.model).inc()


@cache
def _series(metric: M, *labels: str) -> M:
    """`metric.labels`, looked up once: labels come from closed sets, and every request needs eight of them."""
    return metric.labels(*labels)


def defense_label(defense: str) -> str:
    """A defense alone is a label of its own; chains, of which clients could invent many, share one."""
    return "chain" if "," in defense else defense
