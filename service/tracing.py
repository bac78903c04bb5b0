"""Traces, where the standard `OTEL_*` variables name a collector and the extra `tracing` is installed; else nothing.

A request is a span, a child of what its header `traceparent` names, with a span for each of its stages. A batch is a
trace of its own with links to the requests whose images it held: it belongs to none of them alone. Spans are written
down when a request has been answered, with the times that were taken for metrics anyway.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from importlib.util import find_spec
from typing import TYPE_CHECKING

from service import __version__
from service.record import Record
from service.settings import SettingsError, traces_are_wanted
from service.work import Key

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, SpanContext, Tracer

TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")
"""W3C Trace Context."""
NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter")
"""Packages of the extra."""
ENGINE_STAGES = ("transform", "purify", "classify")
"""In the order in which they run."""

asking: ContextVar[str] = ContextVar("traceparent", default="")
"""The `traceparent` of the request that runs here; empty where none does, or nobody traces."""


class Tracing:
    """Where spans go."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer: Tracer = provider.get_tracer("clarifier", __version__)

    def begin(self, record: Record, header: str) -> None:
        """A request has come, whose `traceparent` is `header`."""
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract({"traceparent": header}) if header else None
        span = self._tracer.start_span("request", context=parent, kind=SpanKind.SERVER)
        carrier = dict[str, str]()
        TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
        record.span = span
        record.trace_id = f"{span.get_span_context().trace_id:032x}"
        asking.set(carrier["traceparent"])

    def end(self, record: Record) -> None:
        """It has been answered; its stages were timed on the way."""
        from opentelemetry.trace import Span, Status, StatusCode

        span = record.span
        if not isinstance(span, Span):
            return
        span.update_name(record.route)
        said: dict[str, str | int] = {
            "http.route": record.route,
            "http.response.status_code": record.status,
            "clarifier.request_id": record.request_id,
            "clarifier.model": record.model,
            "clarifier.defense": record.defense,
            "clarifier.code": record.code,
        }
        span.set_attributes({name: value for name, value in said.items() if value != ""})
        if record.status >= 500:
            span.set_status(Status(StatusCode.ERROR, record.code))
        for name, start, seconds in _laid_out(record):
            self._write(span, name, start, seconds)
        span.end(_epoch_ns(record.started + record.elapsed_ms() / 1000))

    def note_batch(self, key: Key, requests: Iterable[str], started: float, stage_ms: Mapping[str, float]) -> None:
        """A batch of `key` has run since `started`, for requests with these `traceparent`s, empty where unknown."""
        from opentelemetry.context import Context
        from opentelemetry.trace import Link

        asked = [context for context in map(_context_of, dict.fromkeys(requests)) if context is not None]
        if not any(context.trace_flags.sampled for context in asked):
            return
        span = self._tracer.start_span(
            "batch",
            context=Context(),
            links=[Link(context) for context in asked],
            start_time=_epoch_ns(started),
            attributes={
                "clarifier.model": key.model,
                "clarifier.defense": key.defense,
                "clarifier.requests": len(asked),
            },
        )
        start = started
        for name in ENGINE_STAGES:
            if name in stage_ms:
                self._write(span, name, start, stage_ms[name] / 1000)
                start += stage_ms[name] / 1000
        span.end()

    def close(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown()

    def _write(self, parent: Span, name: str, start: float, seconds: float) -> None:
        from opentelemetry.trace import set_span_in_context

        child = self._tracer.start_span(name, context=set_span_in_context(parent), start_time=_epoch_ns(start))
        child.end(_epoch_ns(start + seconds))


def create_tracing(role: str) -> Tracing | None:
    """None unless a collector is named. Raises SettingsError if one is, and the extra is not installed.

    `role` is `gateway` or `worker`: the service's name is `clarifier-` and that, unless OTEL_SERVICE_NAME says another.
    """
    if not traces_are_wanted():
        return None
    check_tracing()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = Resource({"service.name": f"clarifier-{role}", "service.version": __version__})
    provider = TracerProvider(resource=named.merge(OTELResourceDetector().detect()))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


def check_tracing() -> None:
    """Raises SettingsError if traces are asked for and cannot be made."""
    if traces_are_wanted() and (find_spec("opentelemetry") is None or not all(map(find_spec, NEEDED))):
        raise SettingsError("OTEL_EXPORTER_OTLP_ENDPOINT names a collector, which needs the extra `tracing`")


def trace_id_of(header: str) -> str:
    """The trace that a `traceparent` names; empty if it is none."""
    found = TRACEPARENT.fullmatch(header)
    return "" if found is None else found[1]


def _context_of(traceparent: str) -> SpanContext | None:
    from opentelemetry.trace import SpanContext, TraceFlags

    found = TRACEPARENT.fullmatch(traceparent)
    if found is None:
        return None
    trace, span, flags = (int(part, 16) for part in found.groups())
    return SpanContext(trace, span, is_remote=True, trace_flags=TraceFlags(flags))


def _laid_out(record: Record) -> list[tuple[str, float, float]]:
    """Name, start and seconds of each stage: the engine's end when the answer came, and the wait ends before them."""
    laid = list[tuple[str, float, float]]()
    for stage in ("decode", "encode", "predict"):
        if stage in record.timing_ms:
            seconds = record.timing_ms[stage] / 1000
            laid.append((stage, record.timed_at[stage] - seconds, seconds))
    end = record.timed_at.get("queue")
    if end is not None:
        for stage in reversed(("queue", *ENGINE_STAGES)):
            if stage in record.timing_ms:
                seconds = record.timing_ms[stage] / 1000
                end -= seconds
                laid.append((stage, end, seconds))
    return sorted(laid, key=lambda each: each[1])


def _epoch_ns(monotonic: float) -> int:
    """A reading of the monotonic clock, in seconds, as OpenTelemetry wants times."""
    return int(1e9 * (time.time() - time.monotonic() + monotonic))
