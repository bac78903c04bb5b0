"""Spans as a collector gets them: a request's own, its stages below it, and the batch that it shared."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from service import tracing
from service.settings import SettingsError
from service.tracing import check_tracing, create_tracing, trace_id_of
from tests.service.conftest import Running, until
from tests.service.fakes import POISON_VALUE, green, marked, png
from tests.service.farm import Farm, classify, ready

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


class Collector:
    """What has arrived: spans, and the service that sent each."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    named = {each.key: each.value.string_value for each in resource.resource.attributes}
                    for scope in resource.scope_spans:
                        collector.spans += [(named["service.name"], span) for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def named(self, name: str) -> list[Any]:
        return [span for _, span in self.spans if span.name == name]


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """One that the environment names."""
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server.server_port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    try:
        yield collector
    finally:
        collector.server.shutdown()
        collector.server.server_close()
        thread.join()


def attributes(span: Any) -> dict[str, Any]:
    return {each.key: each.value.string_value or each.value.int_value for each in span.attributes}


def test_a_request_is_a_span_with_its_stages_below_it(collector: Collector, start: Callable[..., Running]) -> None:
    server = start()
    response = server.client.post(
        "/purify?defense=atop", content=png(green()), headers={"traceparent": TRACEPARENT, "x-request-id": "mine"}
    )
    assert response.status_code == 200
    until(lambda: collector.named("/purify") and collector.named("batch"))
    (request,) = collector.named("/purify")
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    said = attributes(request)
    assert (said["http.response.status_code"], said["clarifier.request_id"]) == (200, "mine")
    assert (said["clarifier.model"], said["clarifier.defense"]) == ("colors@1", "atop")
    children = [span for _, span in collector.spans if span.parent_span_id == request.span_id]
    children.sort(key=lambda span: span.start_time_unix_nano)
    assert [span.name for span in children] == ["decode", "queue", "purify", "encode"]
    assert all(span.trace_id == request.trace_id for span in children)
    slack = 5_000_000  # two clocks are read one after the other
    assert children[0].start_time_unix_nano > request.start_time_unix_nano - slack
    assert children[-1].end_time_unix_nano < request.end_time_unix_nano + slack


def test_a_batch_has_links_to_all_whose_images_it_held(collector: Collector, start: Callable[..., Running]) -> None:
    server = start(max_queue_delay_ms=300, max_batch_size=2)
    with ThreadPoolExecutor(2) as clients:
        answers = [clients.submit(server.client.post, "/classify", content=png(green())) for _ in range(2)]
        assert {answer.result().status_code for answer in answers} == {200}
    until(lambda: len(collector.named("/classify")) == 2 and collector.named("batch"))
    (batch,) = collector.named("batch")
    links = {(link.trace_id, link.span_id) for link in batch.links}
    assert links == {(span.trace_id, span.span_id) for span in collector.named("/classify")}
    assert not batch.parent_span_id
    assert {span.name for _, span in collector.spans if span.parent_span_id == batch.span_id} == {"purify", "classify"}
    assert attributes(batch)["clarifier.requests"] == 2


def test_failures_and_refusals_are_spans_too_and_probes_are_not(
    collector: Collector, start: Callable[..., Running]
) -> None:
    server = start()
    server.client.get("/readyz")
    server.client.get("/nowhere")
    server.client.post("/classify", content=b"no image")
    server.client.post("/classify", content=png(marked(POISON_VALUE)))
    until(lambda: len(collector.named("/classify")) == 2)
    codes = [attributes(span)["clarifier.code"] for span in collector.named("/classify")]
    assert codes == ["unsupported_format", "inference_failed"]
    assert [span.status.code for span in collector.named("/classify")] == [0, 2]
    until(lambda: collector.named("other"))
    assert not collector.named("/readyz")


def test_what_its_parent_does_not_sample_is_not_sent(collector: Collector, start: Callable[..., Running]) -> None:
    server = start()
    server.client.post("/classify", content=png(green()), headers={"traceparent": TRACEPARENT[:-1] + "0"})
    server.client.post("/classify", content=png(green()))
    until(lambda: collector.named("/classify"))
    assert len(collector.named("/classify")) == len(collector.named("batch")) == 1


def test_the_log_line_has_the_trace(
    start: Callable[..., Running], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    caplog.set_level("INFO", "service.requests")
    server = start()
    assert server.gateway.tracing is None
    for header in (TRACEPARENT, "00-none-of-it", ""):
        server.client.post("/classify", content=png(green()), headers={"traceparent": header})
    until(lambda: len([record for record in caplog.records if record.name == "service.requests"]) == 3)
    lines = [record.__dict__["fields"] for record in caplog.records if record.name == "service.requests"]
    assert [line.get("trace_id") for line in lines] == [TRACE, None, None]


def test_a_workers_batch_has_links_to_the_gateways_requests(collector: Collector, farm: Farm) -> None:
    server = farm.gateway()
    farm.worker()
    ready(server)
    assert classify(server, traceparent=TRACEPARENT).status_code == 200
    until(lambda: collector.named("/classify") and collector.named("batch"), 30)
    ((service, batch),) = [pair for pair in collector.spans if pair[1].name == "batch"]
    (request,) = collector.named("/classify")
    assert service == "clarifier-worker"
    assert [(link.trace_id.hex(), link.span_id) for link in batch.links] == [(TRACE, request.span_id)]


def test_a_collector_without_the_extra_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:1/v1/traces")
    check_tracing()
    monkeypatch.setattr(tracing, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="extra `tracing`"):
        check_tracing()
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    check_tracing()
    assert create_tracing("gateway") is None


@pytest.mark.parametrize(
    "header",
    ["", "junk", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01", TRACEPARENT.upper(), f"01-{TRACE}"],
)
def test_what_is_no_traceparent_names_no_trace(header: str) -> None:
    assert trace_id_of(header) == ""
    assert trace_id_of(TRACEPARENT) == TRACE
