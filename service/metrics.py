"""Every Prometheus metric, declared once. Labels come from closed or configured sets only."""

from __future__ import annotations

import platform
from collections import Counter as Count
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from service import __version__
from service.dispatch import Dispatcher
from service.record import Record
from service.work import Classified, Detected, Key, Operation, Purified, is_degraded

M = TypeVar("M", Counter, Histogram)

PREFIX = "clarifier_"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 128)
BYTES = tuple(4**power for power in range(5, 15))
"""1 KiB to 256 MiB."""
DISTANCES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1)
ERROR_KINDS = ("oom", "cuda", "nan", "other", "killed")
"""Of every engine; the last of workers alone."""
SCORES = tuple(tenth / 10 for tenth in range(1, 11))
CACHE_RESULTS = ("hit", "miss", "skip")
REDIS_OPS = (
    "watch", "send", "receive", "jobs", "take", "beat", "gone", "finish", "end",
    "limit", "find", "keep", "similar", "look", "malformed",
)  # fmt: skip
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
        self.request_size = self._histogram("request_size_bytes", "Of bodies, as far as read.", ("route",), BYTES)
        self.batch_size = self._histogram("batch_size", "Images per batch.", (), BATCH_SIZES)
        self.batches = self._counter("batches", "Batches, by why they left.", ("reason",))
        self.queue_depth = self._gauge("queue_depth", "Images that wait here.")
        self.queue_capacity = self._gauge("queue_capacity", "Images that may wait.")
        self.queue_oldest = self._gauge("queue_oldest_seconds", "How long the first of these has waited.")
        self.queue_lag = self._gauge("queue_lag", "Images in Redis that no worker has taken, of all gateways.")
        self.queue_wait = self._histogram("queue_wait_seconds", "Of an image, until it ran or was given up.", ())
        self.rejected = self._counter(
            "rejected", "Requests, and images of batches, refused or given up; by problem code.", ("reason",)
        )
        self.accepted = self._counter("accepted", "Images that were let into the queue.", ())
        self.answered = self._counter("answered", "Images of these that were answered, well or not.", ())
        self.cancelled = self._counter("cancelled", "Images of these whose client left.", ("where",))
        self.cache_requests = self._counter(
            "cache_requests", "Images, by what the answer cache had for them.", ("result",)
        )
        self.mislabeled = self._counter("mislabeled", "Images of another kind than was declared.", ())
        self.aid_score = self._histogram("aid_score", "1 natural, 0 adversarial.", (), SCORES)
        self.compared = self._counter("compared", "Images with both labels.", ("model", "defense"))
        self.purification_linf = self._histogram(
            "purification_linf", "How far a purified image is from what it was.", ("defense",), DISTANCES
        )
        self.suspicious = self._counter("suspicious", "Images below their bundle's AID threshold.", ("model",))
        self.auto_degraded = self._counter(
            "auto_degraded", "Images for which `auto` ran its cheap chain beyond its cap.", ("model",)
        )
        self.flips = self._counter("flips", "Defended label differs from the undefended.", ("model", "defense"))
        self.predictions = self._counter("predictions", "Defended labels.", ("model", "label"))
        self.event_loop_lag = self._histogram("event_loop_lag_seconds", "How late it was, four times a second.", ())
        self.shadowed = self._counter("shadowed", "Images of the sample, by what became of them.", ("outcome",))
        self.near_duplicates = self._counter("near_duplicates", "Images, by whose key sent them.", ("key",))
        self.similarity_skipped = self._counter("similarity_skipped", "Images that were not compared.", ())
        self.similarity_alerts = self._counter(
            "query_similarity_alerts", "Images that are near-duplicates of too many before them.", ()
        )
        self.engine_errors = self._counter("engine_errors", "Failed batches and answers.", ("engine", "kind"))
        self.engine_seconds = self._counter("engine_seconds", "That batches ran.", ("defense",))
        self.engine_images = self._counter("engine_images", "Images of these.", ("defense",))
        self.cost_seconds = self._counter(
            "cost_seconds", "Of plain classifications: what the defense took, and the classifier.", ("defense", "part")
        )
        self.ready = self._gauge("ready", "1 while /readyz says so.")
        self.device_memory = self._gauge("device_memory_bytes", "Allocated on the accelerator; 0 on a CPU.")
        self.redis_up = self._gauge("redis_up", "1 while Redis answers.")
        self.redis_errors = self._counter("redis_errors", "What failed with Redis.", ("op",))
        _begin(self.cache_requests, CACHE_RESULTS)
        _begin(self.redis_errors, REDIS_OPS)
        self.evidence = self._counter("evidence", "Cases of evidence, by what became of them.", ("outcome",))
        self.jobs = self._gauge("jobs", "Jobs that are not done.")
        self.job_images = self._counter("job_images", "Images of jobs that were answered here.", ("outcome",))
        self.model_info = self._gauge("model_info", "1 for each loaded bundle.", ("model", "digest", "device"))
        self.bundle_load = self._gauge("bundle_load_seconds", "That the last load of the repository took.")
        self.bundle_success = self._gauge("bundle_last_load_success", "0 if that left out a bundle, or failed.")
        self.bundle_success.set(1)
        build = self._gauge("build_info", "1: what runs here.", ("version", "python"))
        build.labels(__version__, platform.python_version()).set(1)

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

    def watch_queue(self, queue: Dispatcher) -> None:
        """Read what waits whenever the page is asked for."""
        self.queue_capacity.set(queue.max_queue_size)
        self.queue_depth.set_function(lambda: queue.own_depth)
        self.queue_oldest.set_function(lambda: queue.oldest_s)

    def watch_device(self, memory_bytes: Callable[[], float]) -> None:
        """Read this whenever the page is asked for."""
        self.device_memory.set_function(memory_bytes)

    def watch_readiness(self, why_not_ready: Callable[[], str | None]) -> None:
        """Ask this whenever the page is asked for."""
        self.ready.set_function(lambda: why_not_ready() is None)

    def watch_requests(self, routes: Callable[[], Iterable[str]]) -> None:
        """`routes` gives that of each request in progress, whenever the page is asked for."""
        self.registry.register(_InProgress(routes))

    def note_bundles(self, digests: Mapping[str, str], devices: Mapping[str, Iterable[str]]) -> None:
        """These are served from now on, by `name@version`, each on its devices, and no others."""
        self.model_info.clear()
        for name, digest in digests.items():
            for device in devices[name]:
                self.model_info.labels(name, digest, device).set(1)
            for counter in (self.suspicious, self.auto_degraded):
                counter.labels(name)  # or its first rise would go unseen

    def expect_errors(self, engine: str) -> None:
        """None has happened in this engine."""
        for kind in ERROR_KINDS:
            self.engine_errors.labels(engine, kind)

    def count_batch(self, key: Key, images: int, seconds: float, stage_ms: Mapping[str, float]) -> None:
        """A batch of `key` has run for so long."""
        defense = defense_label(key.defense)
        self.batch_size.observe(images)
        _series(self.engine_seconds, defense).inc(seconds)
        _series(self.engine_images, defense).inc(images)
        if key.operation is Operation.CLASSIFY and key.votes == 1 and not key.explain and "purify" in stage_ms:
            spent = sum(stage_ms.get(stage, 0.0) for stage in ("transform", "purify"))
            _series(self.cost_seconds, defense, "defense").inc(spent / 1000)
            _series(self.cost_seconds, defense, "classifier").inc(stage_ms["classify"] / 1000)

    def count_request(self, record: Record) -> None:
        """A request has been answered, or its client has left."""
        defense = defense_label(record.defense)
        _series(self.requests, record.route, record.model, defense, str(record.status)).inc()
        _series(self.request_duration, record.route).observe(record.elapsed_ms() / 1000)
        if record.received:
            _series(self.request_size, record.route).observe(record.received)
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

    def count_cancelled(self, places: Iterable[str], ran: int) -> None:
        """The client of images that were at these `places`, and of others that `ran` in vain, has left."""
        for where, images in (Count(places) + Count(running=ran)).items():
            self.cancelled.labels(where).inc(images)

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
            if answer.undefended is not None and record.defense != "none":
                self.count_comparison(record.model, record.defense, index, int(answer.undefended.argmax()))
        if not isinstance(answer, Detected) and answer.linf is not None:
            _series(self.purification_linf, defense_label(record.defense)).observe(answer.linf)
        if not isinstance(answer, Purified):
            self.count_score(record.model, answer.aid_score, threshold)

    def count_comparison(self, model: str, defense: str, defended: int, undefended: int) -> None:
        """Both labels of an image are known, by index."""
        labels = model, defense_label(defense)
        _series(self.compared, *labels).inc()
        _series(self.flips, *labels).inc(defended != undefended)

    def count_score(self, model: str, score: float | None, threshold: float | None) -> None:
        """An image has been scored by AID, unless there is nothing that could."""
        if score is not None and threshold is not None:
            self.aid_score.observe(score)
            _series(self.suspicious, model).inc(score < threshold)


class _InProgress(Collector):
    """A gauge of those routes that had a request once."""

    def __init__(self, routes: Callable[[], Iterable[str]]) -> None:
        self._routes = routes
        self._known = set[str]()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One family."""
        counts = Count(self._routes())
        self._known |= counts.keys()
        family = GaugeMetricFamily(PREFIX + "requests_in_progress", "Requests being answered.", labels=["route"])
        for route in sorted(self._known):
            family.add_metric([route], counts[route])
        yield family


def _begin(counter: Counter, labels: Iterable[str]) -> None:
    """Show zeros: a rise from nothing to one goes unseen."""
    for label in labels:
        counter.labels(label)


@cache
def _series(metric: M, *labels: str) -> M:
    """`metric.labels`, looked up once: labels come from closed sets, and every request needs eight of them."""
    return metric.labels(*labels)


def defense_label(defense: str) -> str:
    """A defense alone is a label of its own; chains, of which clients could invent many, share one."""
    return "chain" if "," in defense else defense
