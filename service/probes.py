"""What machines ask: is it alive, is it ready, how does it do."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.gateway import gateway_of
from service.openapi import problem_response
from service.schemas import HealthResponse

probes = APIRouter(responses={"default": problem_response("A problem")}, tags=["service"])


@probes.get("/livez", summary="The process can go on")
@probes.head("/livez", include_in_schema=False)
@probes.api_route("/ping", methods=["GET", "HEAD"], include_in_schema=False)
async def livez(request: Request) -> Response:
    return health("live", gateway_of(request).why_not_live())


@probes.get("/readyz", summary="Requests would be answered now")
@probes.head("/readyz", include_in_schema=False)
@probes.api_route("/healthz", methods=["GET", "HEAD"], include_in_schema=False)
@probes.api_route("/health", methods=["GET", "HEAD"], include_in_schema=False)
async def readyz(request: Request) -> Response:
    return health("ready", gateway_of(request).why_not_ready())


def health(good: str, reason: str | None) -> Response:
    """What a probe answers: 200, or 503 with the reason."""
    answer = HealthResponse(status=good if reason is None else f"not {good}", reason=reason)
    status = 200 if reason is None else 503
    return Response(answer.model_dump_json(exclude_none=True), status, media_type="application/json")


@probes.get("/metrics", summary="Prometheus")
@probes.head("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    page = gateway_of(request).metrics.page()
    return Response(page, media_type="text/plain; version=1.0.0; charset=utf-8")
