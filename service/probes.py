"""What machines ask: is it alive, is it ready, how does it do."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from service.gateway import gateway_of
from service.openapi import problem_response
from service.schemas import HealthResponse

GET_AND_HEAD = ["GET", "HEAD"]
"""Of one route, that `Allow` lists both; the route for OpenAPI, which wants one operation each, comes after it."""
HEALTH: dict[int | str, dict[str, Any]] = {
    200: {"model": HealthResponse},
    503: {"model": HealthResponse, "description": "Not now, and why"},
}
TEXT: dict[str, Any] = {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Every metric"}

probes = APIRouter(responses={"default": problem_response("A problem")}, tags=["service"])


@probes.get("/livez", summary="The process can go on", responses=HEALTH)
@probes.api_route("/livez", methods=GET_AND_HEAD, include_in_schema=False)
@probes.api_route("/ping", methods=GET_AND_HEAD, include_in_schema=False)
async def livez(request: Request) -> Response:
    return health("live", gateway_of(request).why_not_live())


@probes.get("/readyz", summary="Requests would be answered now", responses=HEALTH)
@probes.api_route("/readyz", methods=GET_AND_HEAD, include_in_schema=False)
@probes.api_route("/healthz", methods=GET_AND_HEAD, include_in_schema=False)
@probes.api_route("/health", methods=GET_AND_HEAD, include_in_schema=False)
async def readyz(request: Request) -> Response:
    return health("ready", gateway_of(request).why_not_ready())


def health(good: str, reason: str | None) -> Response:
    """What a probe answers: 200, or 503 with the reason."""
    answer = HealthResponse(status=good if reason is None else f"not {good}", reason=reason)
    status = 200 if reason is None else 503
    return Response(answer.model_dump_json(exclude_none=True), status, media_type="application/json")


@probes.get("/metrics", summary="Prometheus", responses={200: TEXT}, response_class=Response)
@probes.api_route("/metrics", methods=GET_AND_HEAD, include_in_schema=False)
async def metrics(request: Request) -> Response:
    page = gateway_of(request).metrics.page()
    return Response(page, media_type="text/plain; version=1.0.0; charset=utf-8")
